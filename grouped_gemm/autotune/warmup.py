"""`warmup`: compiles what a model's calls need before its first step, and tunes it under GROUPED_GEMM_AUTOTUNE=1.

It makes small but real calls, so that it reaches exactly the code that the model's calls reach. One size per row class
is enough for this package's kernels, because they are specialized on E, K, N, strides and dtypes, but not on M.
DeepGEMM also chooses its tile by M, so a call with another M may still compile there.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grouped_gemm.autograd import GroupedMM, run_forward
from grouped_gemm.autotune import profile
from grouped_gemm.autotune.measure import measure, uneven_ends
from grouped_gemm.backends import candidates, get_backend
from grouped_gemm.core.call_spec import CallSpec, Pass, RowClass
from grouped_gemm.core.dense import dense_weights
from grouped_gemm.core.preference import AUTOTUNE, KernelPreference, Preference, check_bool
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.functional import explain, grouped_mm
from grouped_gemm.kernels.gemm import tile_search
from grouped_gemm.selection import checks, dtensor
from grouped_gemm.selection.cost_model import Call
from grouped_gemm.selection.explanation import Explanation
from grouped_gemm.selection.route import forget, route_on
from grouped_gemm.selection.rules import Decision, able_plans, decide

# Rows per group: the fewest of each row class, and a typical number for timing. `_typical_rows` has that of LARGE.
_MIN_ROWS = {RowClass.DECODE: 1, RowClass.SMALL: 17, RowClass.LARGE: 257}
_TYPICAL_ROWS = {RowClass.DECODE: 2, RowClass.SMALL: 128}


@dataclass(frozen=True)
class WarmedUp:
    """The warmup of one row class.

    Attributes:
        decision: which backend runs each pass.
        num_rows: M of the calls.
        calls: the number of calls of `grouped_mm`, with and without gradients; 0 if nothing has to be compiled.
        seconds: how long they took.
    """

    decision: Decision
    num_rows: int
    calls: int
    seconds: float

    def __str__(self) -> str:
        done = f"M = {self.num_rows}: {_count(self.calls, 'call')} in {self.seconds:.1f} s"
        done = done if self.calls else "nothing to compile"
        return f"  {self.decision.spec.rows.value:12}{done:36}{self.decision.summary}"


@dataclass(frozen=True)
class Profiled:
    """One measurement of the plans that can run a kind of call.

    Attributes:
        decision: what AUTO chooses from now on; `Decision.expected` has the times.
        failed: the plans that failed, and why.
    """

    decision: Decision
    failed: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        expected = self.decision.expected
        times = [f"{plan} {us:.0f} us" for plan, us in (expected.plans if expected else ()) if us < math.inf]
        failed = [f"{plan} failed: {reason}" for plan, reason in self.failed]
        return f"{self.decision.spec.rows.value}: {self.decision.summary} ({'; '.join([*times, *failed])})"


@dataclass(frozen=True)
class Warmup:
    """What `warmup` did. ``print`` it, or use `to_dict`.

    Attributes:
        classes: the row classes, in the order of the argument.
        profiled: measurements, one for each kind of call that several plans can run and that had no measurement.
        searches: tile searches, one for each use of a kernel that had no result of an earlier search.
        seconds: how long all of it took.
        tunes: whether GROUPED_GEMM_AUTOTUNE is on.
    """

    classes: tuple[WarmedUp, ...]
    profiled: tuple[Profiled, ...]
    searches: tuple[tile_search.Search, ...]
    seconds: float
    tunes: bool

    @property
    def calls(self) -> int:
        """The number of calls, without those of measurements and searches."""
        return sum(warmed.calls for warmed in self.classes)

    @property
    def tuned(self) -> tuple[tile_search.Search, ...]:
        """The searches that found a better tile than the shipped one."""
        return tuple(search for search in self.searches if search.tile != search.shipped)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain strings, numbers, lists and dicts, ready for JSON."""
        return {
            "call": str(self.classes[0].decision.spec) if self.classes else "",
            "classes": [
                {"M": warmed.num_rows, "calls": warmed.calls, "seconds": warmed.seconds, **_chosen(warmed.decision)}
                for warmed in self.classes
            ],
            "profiled": [{**_chosen(found.decision), "failed": dict(found.failed)} for found in self.profiled],
            "searches": [
                {
                    "use": str(search.site),
                    "shipped": search.shipped._asdict(),
                    "tile": search.tile._asdict(),
                    "speedup": search.speedup,
                    "tried": search.tried,
                    "different": search.different,
                    "failed": [{"tile": tile._asdict(), "reason": reason} for tile, reason in search.failed],
                }
                for search in self.searches
            ],
            "seconds": self.seconds,
            "tunes": self.tunes,
        }

    def __str__(self) -> str:
        lines = [str(self.classes[0].decision.spec)] if self.classes else []
        lines += map(str, self.classes)
        lines += [f"  {'plans':12}{profiled}" for profiled in self.profiled]
        lines += [f"  {'tiles':12}{search}" for search in self.searches]
        if self.tunes and not self.searches:
            lines.append(f"  {'tiles':12}nothing to search: known from an earlier run, or no kernel has tiles")
        counts = [_count(self.calls, "call")]
        if self.searches:
            counts.append(
                f"{len(self.tuned)} of {_count(len(self.searches), 'search', 'searches')} found a better tile"
            )
        lines.append(f"  {'total':12}{', '.join(counts)}, {self.seconds:.1f} s")
        return "\n".join(lines)


def _chosen(decision: Decision) -> dict[str, Any]:
    explanation = Explanation(decision).to_dict()
    return {"rows": decision.spec.rows.value, "chosen": explanation["chosen"], "expected": explanation["expected"]}


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


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
    row_classes = dict.fromkeys(map(_row_class, (rows,) if isinstance(rows, (str, RowClass)) else rows))
    options = {
        "recipe": recipe,
        "out_dtype": out_dtype,
        "group_alignment": group_alignment,
        "kernel_preference": kernel_preference,
    }
    tunes = AUTOTUNE.is_on()
    begin = time.perf_counter()
    with torch.inference_mode(False), _on_device(b.device):
        profiled = [
            found
            for row_class in (row_classes if tunes else ())
            for found in _profile(b, bias, row_class, training, options)
        ]
        classes = tuple(_warm_up(b, bias, row_class, training, options) for row_class in row_classes)
        searches: list[tile_search.Search] = []
        if tunes:
            # Most rows first: wgrad has one tile for all row classes.
            for warmed in sorted(classes, key=lambda warmed: -warmed.num_rows):
                searches += _tune(b, bias, warmed.decision)
    return Warmup(classes, tuple(profiled), tuple(searches), time.perf_counter() - begin, tunes)


@contextmanager
def _on_device(device: torch.device) -> Iterator[None]:
    """Makes ``device`` current, since timing and synchronization act on the current one. Raises during a capture."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("warmup: expected a call outside of CUDA graph capture; found a capture in progress")
        yield


def _row_class(value: RowClass | str) -> RowClass:
    try:
        return RowClass(value.lower() if isinstance(value, str) else value)
    except ValueError:
        checks.fail("rows", f"row classes out of {', '.join(c.value for c in RowClass)}", repr(value))


def _groups(b: Tensor | QuantizedWeights, rows: int, alignment: int) -> tuple[Tensor, Tensor]:
    """Uninitialized (E * ``rows``, K) activations, and the ends of uneven groups: 0.5 to 1.5 times ``rows``."""
    num_groups, k, _ = b.shape
    a = torch.empty(num_groups * rows, k, dtype=b.dtype, device=b.device)
    return a, uneven_ends(len(a), num_groups, alignment, b.device)


def _fill(*tensors: Tensor) -> None:
    """Fills with normal values, without advancing the caller's random number generator."""
    for tensor in tensors:
        tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(0))


def _warm_up(
    b: Tensor | QuantizedWeights, bias: Tensor | None, rows: RowClass, training: bool, options: dict[str, Any]
) -> WarmedUp:
    """The calls of one row class: without gradients, as in evaluation and activation checkpointing, and with them."""
    begin = time.perf_counter()
    a, offs = _groups(b, _MIN_ROWS[rows], options["group_alignment"])
    b = b if isinstance(b, QuantizedWeights) else b.detach().requires_grad_(training)
    bias = bias.detach().requires_grad_(training) if isinstance(bias, Tensor) else bias
    a.requires_grad_(training and (isinstance(b, Tensor) or b.dgrad is not None))
    with torch.set_grad_enabled(training):
        decision = explain(a, b, offs, bias=bias, **options).decision
    decision.check()
    calls = 0
    if any(get_backend(kind).compiles for kind in decision.backends):
        with torch.no_grad():
            _fill(a)
            grouped_mm(a, b, offs, bias=bias, **options)
        calls = 1
        leaves = [x for x in (a, b, bias) if isinstance(x, Tensor) and x.requires_grad]
        if leaves:
            with torch.enable_grad():
                y = grouped_mm(a, b, offs, bias=bias, **options)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
            calls = 2
        if a.is_cuda:
            torch.cuda.synchronize(a.device)
    return WarmedUp(decision, len(a), calls, time.perf_counter() - begin)


def _profile(
    b: Tensor | QuantizedWeights, bias: Tensor | None, rows: RowClass, training: bool, options: dict[str, Any]
) -> Iterator[Profiled]:
    """Measures the plans that AUTO could choose for one row class, if there are several and no measurement exists.

    Quantized weights already have a backend. A guaranteed alignment may leave no rows in the row class.
    """
    if isinstance(b, QuantizedWeights):
        return
    a = torch.empty(b.shape[0] * _MIN_ROWS[rows], b.shape[1], dtype=b.dtype, device=b.device).requires_grad_(training)
    offs = torch.zeros(b.shape[0], dtype=torch.int32, device=b.device)
    with torch.set_grad_enabled(training):
        eager = explain(a, b.detach().requires_grad_(training), offs, bias=bias, **options).decision
    machine = eager.spec.machine
    if eager.preference is not KernelPreference.AUTO or not machine.is_gpu or eager.spec.dtype != torch.bfloat16:
        return
    # A profile does not distinguish calls by bias, out_dtype or host_sync. So measure every plan, without restrictions.
    spec = eager.spec._replace(out_dtype=eager.spec.dtype, has_bias=False, host_sync=True)
    here, num_rows = candidates(b.device), b.shape[0] * _typical_rows(spec)
    has_rows = uneven_ends(num_rows, b.shape[0], spec.group_alignment, torch.device("cpu"))[-1] > 0
    profile.forget()
    if len(able_plans(spec, here)) < 2 or not has_rows or Call.of(spec) in profile.known(machine).times:
        return
    times, failed = measure(spec, num_rows, b.device, here)
    profile.store(machine, times)
    forget()
    decision = decide(eager.spec, KernelPreference.AUTO, here, profiles=profile.profiles(machine, True))
    yield Profiled(decision, tuple(failed.items()))


def _typical_rows(spec: CallSpec) -> int:
    """Rows per group of the calls that are timed. For LARGE they depend on E."""
    return _TYPICAL_ROWS.get(spec.rows, max(512, min(4096, 65536 // spec.num_groups)))


def _tune(b: Tensor | QuantizedWeights, bias: Tensor | None, decision: Decision) -> list[tile_search.Search]:
    """Searches tiles for the passes of one row class. Each pass runs alone, with its quantizers."""
    spec = decision.spec
    a, offs = _groups(b, _typical_rows(spec), spec.group_alignment)
    if offs[-1] == 0:  # the guaranteed alignment leaves no rows in this row class
        return []
    weights = dense_weights(torch.empty_like(b.detach()))[0].to(spec.dtype) if isinstance(b, Tensor) else b
    a, dy = a.to(spec.dtype), torch.empty(len(a), spec.n, dtype=spec.out_dtype, device=a.device)
    _fill(a, dy, *([weights] if isinstance(weights, Tensor) else []))
    backends = {pass_: kind for pass_, kind in decision.chosen if get_backend(kind).compiles}
    runs: list[Callable[[], Tensor]] = []
    if Pass.FORWARD in backends:
        alone = route_on(spec, {Pass.FORWARD: backends[Pass.FORWARD]})
        runs.append(torch.no_grad()(lambda: run_forward(a, weights, bias, offs, alone)[0]))
    for pass_, operand in ((Pass.DGRAD, a), (Pass.WGRAD, weights)):
        if pass_ in backends and isinstance(operand, Tensor):
            route = route_on(spec, {p: kind for p, kind in decision.chosen if p in (Pass.FORWARD, pass_)})
            leaf = operand.detach().requires_grad_()
            x, w = (leaf, weights) if pass_ is Pass.DGRAD else (a, leaf)
            y = GroupedMM.apply(x, w, None, offs, route)
            runs.append(lambda y=y, leaf=leaf: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0])  # type: ignore[misc]
    return [search for run in runs for search in tile_search.search(run)]
