"""`warmup`: compiles what a model's calls need before its first step, and tunes it under GROUPED_GEMM_AUTOTUNE=1.

It makes small but real calls, so that it reaches exactly the code that the model's calls reach. One size per row class
is enough for this package's kernels, because they are specialized on E, K, N, strides and dtypes, but not on M.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grouped_gemm.autograd import GroupedMM, run_forward
from grouped_gemm.autotune import profile
from grouped_gemm.autotune.measure import measure, operands, uneven_ends
from grouped_gemm.backends import candidates, get_backend
from grouped_gemm.core.call_spec import CallSpec, Pass, RowClass
from grouped_gemm.core.preference import AUTOTUNE, KernelPreference, Preference, check_bool
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.functional import explain, grouped_mm
from grouped_gemm.kernels.gemm import tile_search
from grouped_gemm.selection import checks, dtensor
from grouped_gemm.selection.cost_model import Call
from grouped_gemm.selection.explanation import Explanation, timed
from grouped_gemm.selection.route import Route, forget, route_on
from grouped_gemm.selection.rules import Decision, able_plans

# Rows per group: the fewest of each row class, and a typical number for timing. `_typical_rows` has that of LARGE.
_MIN_ROWS = {RowClass.DECODE: 1, RowClass.SMALL: 17, RowClass.LARGE: 257}
_TYPICAL_ROWS = {RowClass.DECODE: 2, RowClass.SMALL: 128}


@dataclass(frozen=True)
class WarmedUp:
    """The warmup of one row class.

    Attributes:
        decision: which backend runs each pass; with the times of the plans, if any were measured.
        num_rows: M of the calls.
        calls: the number of calls of `grouped_mm`, with and without gradients; 0 if nothing has to be compiled.
        failed: the plans that failed while they were measured, and why.
        searches: tile searches, one for each use of a kernel that had no result of an earlier search.
    """

    decision: Decision
    num_rows: int
    calls: int
    failed: tuple[tuple[str, str], ...]
    searches: tuple[tile_search.Search, ...]

    def to_dict(self) -> dict[str, Any]:
        """The `Explanation` of the calls as data, and what was done, ready for JSON."""
        done = {"calls": self.calls, "failed": dict(self.failed), "searches": list(map(str, self.searches))}
        return Explanation(self.decision, self.num_rows).to_dict() | done

    def __str__(self) -> str:
        done = f"M = {self.num_rows}, calls: {self.calls}" if self.calls else "nothing to compile"
        chosen = ", ".join(f"{pass_.value} {backend.value}" for pass_, backend in self.decision.chosen)
        lines = [f"{self.decision.spec.rows.value:12}{done:24}{chosen}"]
        if self.decision.expected is not None:
            lines.append(f"  measured  {'; '.join(timed(*plan) for plan in self.decision.expected.plans)}")
        lines += [f"  failed    {plan}: {reason}" for plan, reason in self.failed]
        lines += [f"  tile      {search}" for search in self.searches]
        return "\n".join(f"  {line}" for line in lines)


@dataclass(frozen=True)
class Warmup:
    """What `warmup` did. ``print`` it, or use `to_dict`.

    Attributes:
        classes: the row classes, the one with the most rows first.
        seconds: how long all of it took.
    """

    classes: tuple[WarmedUp, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The same as plain strings, numbers, lists and dicts, ready for JSON."""
        return {"classes": [warmed.to_dict() for warmed in self.classes], "seconds": self.seconds}

    @property
    def total(self) -> str:
        """The last line of the text: how long all of it took."""
        return f"  {'total':12}{self.seconds:.1f} s"

    def __str__(self) -> str:
        call = [str(warmed.decision.spec) for warmed in self.classes[:1]]
        return "\n".join([*call, *map(str, self.classes), self.total])


def warmup(
    b: Tensor | QuantizedWeights,
    *,
    recipe: Recipe | str | None = None,
    rows: Iterable[RowClass | str] | RowClass | str = tuple(RowClass),
    training: bool = True,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    group_alignment: int = 1,
    kernel_preference: Preference = KernelPreference.AUTO,
    progress: Callable[[WarmedUp], object] = lambda done: None,
) -> Warmup:
    """Compiles what `grouped_mm` with these weights needs, so that no step of a model waits for a compiler.

    The exception is DeepGEMM, which also chooses its tile by M: a new M may still compile there.

    Call it once for each kind of expert weights, with the arguments of the model's calls, under the same `prefer` and
    autocast. It makes a few small calls with random rows for each row class, and synchronizes the host. It does not
    change the weights or their ``grad``. With GROUPED_GEMM_AUTOTUNE=1, it also times the plans that AUTO could choose,
    and searches a tile for each kernel, unless the file of earlier runs has the results (docs/env.md). That takes
    minutes. It needs as much memory as a training step of up to 65536 rows, or 512 rows per group if that is more, with
    random weights beside yours.

    Args:
        b: (E, K, N), as in `grouped_mm`; only shape, strides, dtype and device matter. Or weights from
            `quantize_weights`.
        recipe: as in `grouped_mm`.
        rows: one or several row classes of the model's calls, or their names. By the average number of rows per group:
            at most 16 ("decode"), at most 256 ("small"), more ("large").
        training: whether calls will have gradients: of ``a``, ``b`` and ``bias``; or of ``a`` only, if ``b`` was
            quantized beforehand with ``dgrad=True``.
        bias: (E, N), if the calls have one.
        out_dtype: as in `grouped_mm`.
        group_alignment: as in `grouped_mm`.
        kernel_preference: as in `grouped_mm`.
        progress: called with each row class when it is done, for example ``print``.

    Returns:
        A `Warmup`: print it, or use its ``to_dict()``.

    Raises:
        TypeError, ValueError, NoBackendError: as in `grouped_mm`. ValueError also if ``rows`` names no row class.
        RuntimeError: a CUDA graph is being captured.
    """
    b, bias = dtensor.local(b=b, bias=bias)
    if not isinstance(b, QuantizedWeights):
        checks.check_tensor("b", b, (3,), checks.DTYPES)
    checks.check_options(out_dtype, group_alignment)
    check_bool("training", training)
    row_classes = set(map(_row_class, (rows,) if isinstance(rows, (str, RowClass)) else rows))
    options = {
        "recipe": recipe,
        "out_dtype": out_dtype,
        "group_alignment": group_alignment,
        "kernel_preference": kernel_preference,
    }
    begin = time.perf_counter()
    is_cuda = b.device.type == "cuda"
    # Timing and synchronization act on the current device.
    with torch.inference_mode(False), torch.cuda.device(b.device) if is_cuda else nullcontext():
        if is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("warmup: expected a call outside of CUDA graph capture; found a capture in progress")
        # Most rows first: wgrad has one tile for all row classes, which is searched once.
        most_first = sorted(row_classes, key=_MIN_ROWS.__getitem__, reverse=True)
        classes = []
        for row_class in most_first:
            classes.append(_warm_up(b, bias, row_class, training, options))
            progress(classes[-1])
    return Warmup(tuple(classes), time.perf_counter() - begin)


def _row_class(value: RowClass | str) -> RowClass:
    try:
        return RowClass(value.lower() if isinstance(value, str) else value)
    except ValueError:
        checks.fail("rows", f"row classes out of {', '.join(c.value for c in RowClass)}", repr(value))


def _warm_up(
    b: Tensor | QuantizedWeights, bias: Tensor | None, rows: RowClass, training: bool, options: dict[str, Any]
) -> WarmedUp:
    """Tunes one row class and makes its calls: without gradients, as in evaluation and checkpointing, and with them."""
    num_groups, k, _ = b.shape
    a = torch.empty(num_groups * _MIN_ROWS[rows], k, dtype=b.dtype, device=b.device)
    offs = uneven_ends(len(a), num_groups, options["group_alignment"], b.device)
    b = b if isinstance(b, QuantizedWeights) else b.detach().requires_grad_(training)
    bias = bias.detach().requires_grad_(training) if isinstance(bias, Tensor) else bias
    a.requires_grad_(training and (isinstance(b, Tensor) or b.dgrad is not None))
    decision = explain(a, b, offs, bias=bias, **options).decision
    decision.check()
    failed: dict[str, str] = {}
    searches: list[tile_search.Search] = []
    timed_rows = num_groups * _typical_rows(decision.spec)
    if AUTOTUNE.is_on() and timed_rows >= decision.spec.group_alignment:  # else all groups of this class are empty
        failed = _profile(decision, timed_rows, b.device)
        decision = explain(a, b, offs, bias=bias, **options).decision
        searches = _tune(decision, timed_rows, b)
    calls = 0
    if any(get_backend(kind).compiles for kind in decision.backends):
        with torch.no_grad():
            a.normal_(generator=torch.Generator(a.device).manual_seed(0))  # leaves the caller's generator alone
            grouped_mm(a, b, offs, bias=bias, **options)
        leaves = [x for x in (a, b, bias) if isinstance(x, Tensor) and x.requires_grad]
        if leaves:
            y = grouped_mm(a, b, offs, bias=bias, **options)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        calls = 1 + bool(leaves)
        if a.is_cuda:
            torch.cuda.synchronize()
    return WarmedUp(decision, len(a), calls, tuple(failed.items()), tuple(searches))


def _typical_rows(spec: CallSpec) -> int:
    """Rows per group of the calls that are timed. For LARGE they depend on E."""
    return _TYPICAL_ROWS.get(spec.rows, max(512, min(4096, 65536 // spec.num_groups)))


def _profile(decision: Decision, num_rows: int, device: torch.device) -> dict[str, str]:
    """Measures the plans that AUTO could choose, if there are several and no measurement exists.

    Returns:
        The errors by plan that failed.
    """
    spec, here = decision.spec, candidates(device)
    if decision.preference is not KernelPreference.AUTO or not spec.machine.is_gpu or spec.dtype != torch.bfloat16:
        return {}
    # A profile does not distinguish calls by bias, out_dtype or host_sync. So measure every plan, without restrictions.
    spec = spec._replace(out_dtype=spec.dtype, has_bias=False, host_sync=True)
    profile.forget()  # another process may have measured the same
    if len(able_plans(spec, here)) < 2 or Call.of(spec) in profile.known(spec.machine).times:
        return {}
    times, failed = measure(spec, num_rows, device, here)
    profile.store(spec.machine, times)
    forget()
    return failed


def _tune(decision: Decision, num_rows: int, b: Tensor | QuantizedWeights) -> list[tile_search.Search]:
    """Searches tiles for each pass. The weights are random, unless they are quantized."""
    a, weights, dy, offs = operands(decision.spec, num_rows, b.device)
    b = b if isinstance(b, QuantizedWeights) else weights
    searches: list[tile_search.Search] = []
    for pass_, kind in decision.chosen:
        if get_backend(kind).compiles:
            plan = {p: backend for p, backend in decision.chosen if p in (Pass.FORWARD, pass_)}
            searches += tile_search.search(_alone(pass_, a, b, dy, offs, route_on(decision.spec, plan)))
    return searches


def _alone(
    pass_: Pass, a: Tensor, b: Tensor | QuantizedWeights, dy: Tensor, offs: Tensor, route: Route
) -> Callable[[], Tensor]:
    """One pass, with its quantizers."""
    if pass_ is Pass.FORWARD:
        return lambda: run_forward(a, b, None, offs, route)[0]
    if pass_ is Pass.DGRAD:
        leaf = a.detach().requires_grad_()
        y = GroupedMM.apply(leaf, b, None, offs, route, None, None)
    else:
        assert isinstance(b, Tensor), "quantized weights have no gradient"
        leaf = b.detach().requires_grad_()
        y = GroupedMM.apply(a, leaf, None, offs, route, None, None)
    return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]
