"""`warmup`: compiles, and where GROUPED_GEMM_AUTOTUNE=1 tunes, what a model's calls need, ahead of its first step.

It makes real calls, small ones, so that it reaches the very code that the model's calls reach. One size for each row
class is enough for this package's kernels: they are specialized on E, K, N, strides and dtypes, and not on M. DeepGEMM
chooses its tile by M as well, so a call with another M may still compile there.

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

# Rows of a group: the fewest of each class; and for times, what is usual. The latter of LARGE depend on E.
_FEWEST = {RowClass.DECODE: 1, RowClass.SMALL: 17, RowClass.LARGE: 257}
_USUAL = {RowClass.DECODE: 2, RowClass.SMALL: 128}


@dataclass(frozen=True)
class WarmedUp:
    """One row class.

    Attributes:
        decision: who runs each pass.
        num_rows: M of the calls.
        calls: how many `grouped_mm` were made, with and without gradients; 0 where nothing has to be compiled.
        seconds: what they took.
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
        decision: what AUTO takes from now on; `Decision.expected` has the times.
        failed: plans that failed, and why.
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
    """What `warmup` did. ``print`` it, or take `to_dict`.

    Attributes:
        classes: the row classes, in the order that was asked for.
        profiled: measurements of kinds of calls that several plans can run and of which nothing was known.
        searches: searches of tiles, one for each use of a kernel of which nothing was known.
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
        """How many calls were made, beside those of the searches."""
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
            lines.append(f"  {'tiles':12}nothing to search: known from earlier, or no kernel has tiles")
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

    The exception is DeepGEMM, which chooses its tile by M as well: a new M may still compile there.

    Call it once for each kind of expert weights, with the arguments that the model's calls have, under the same
    `prefer` and autocast. It makes a few small calls for each row class, on random rows, and waits for the device.
    Weights and their ``grad`` stay as they are. Where GROUPED_GEMM_AUTOTUNE=1, it first times the plans that AUTO
    could take, and then searches a tile for each kernel, unless the files of earlier runs know (docs/env.md). That
    takes minutes, and as much memory as a training step of up to 65536 rows, or 512 for each group, does with random
    weights beside yours.

    Args:
        b: (E, K, N), as `grouped_mm` takes it: only shape, strides, dtype and device matter; or weights from
            `quantize_weights`.
        recipe: as in `grouped_mm`.
        rows: the row classes that calls will have, or their names, or one of them: on average, at most 16 rows of a
            group ("decode"), at most 256 ("small"), more ("large").
        training: whether there will be gradients, too: of ``a``, ``b`` and ``bias``, or of ``a`` only where ``b`` was
            quantized beforehand with ``dgrad=True``.
        bias: (E, N), where calls have one.
        out_dtype: as in `grouped_mm`.
        group_alignment: as in `grouped_mm`.
        kernel_preference: as in `grouped_mm`.

    Returns:
        A `Warmup`: print it, or take its ``to_dict()``.

    Raises:
        TypeError, ValueError, NoBackendError: as `grouped_mm`; ValueError also where ``rows`` names no row class.
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
    with torch.inference_mode(False), _current(b.device):
        profiled = [
            found
            for row_class in (row_classes if tunes else ())
            for found in _profile(b, bias, row_class, training, options)
        ]
        classes = tuple(_warm_up(b, bias, row_class, training, options) for row_class in row_classes)
        searches: list[tile_search.Search] = []
        if tunes:
            # The most rows first: wgrad has one tile for all classes.
            for warmed in sorted(classes, key=lambda warmed: -warmed.num_rows):
                searches += _tune(b, bias, warmed.decision)
    return Warmup(classes, tuple(profiled), tuple(searches), time.perf_counter() - begin, tunes)


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """On ``device``, whose stream is the one that is timed and waited for, and not while it is captured."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("warmup: expected a call before CUDA graph capture; found one under way")
        yield


def _row_class(value: RowClass | str) -> RowClass:
    try:
        return RowClass(value.lower() if isinstance(value, str) else value)
    except ValueError:
        checks.fail("rows", f"row classes, of {', '.join(c.value for c in RowClass)}", repr(value))


def _groups(b: Tensor | QuantizedWeights, rows: int, alignment: int) -> tuple[Tensor, Tensor]:
    """Memory of (E * ``rows``, K) activations, and the ends of uneven groups: half of ``rows`` to one and a half."""
    num_groups, k, _ = b.shape
    a = torch.empty(num_groups * rows, k, dtype=b.dtype, device=b.device)
    return a, uneven_ends(len(a), num_groups, alignment, b.device)


def _fill(*tensors: Tensor) -> None:
    """Normal values; the caller's random numbers stay what they are."""
    for tensor in tensors:
        tensor.normal_(generator=torch.Generator(tensor.device).manual_seed(0))


def _warm_up(
    b: Tensor | QuantizedWeights, bias: Tensor | None, rows: RowClass, training: bool, options: dict[str, Any]
) -> WarmedUp:
    """The calls of one row class: without gradients, as in evaluation and under activation checkpointing, and with."""
    begin = time.perf_counter()
    a, offs = _groups(b, _FEWEST[rows], options["group_alignment"])
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
    """Measures the plans that AUTO could take for one row class, if there are several and nothing is known of them.

    Quantized weights have a backend already; and a guaranteed alignment may leave no rows in the class.
    """
    if isinstance(b, QuantizedWeights):
        return
    a = torch.empty(b.shape[0] * _FEWEST[rows], b.shape[1], dtype=b.dtype, device=b.device).requires_grad_(training)
    offs = torch.zeros(b.shape[0], dtype=torch.int32, device=b.device)
    with torch.set_grad_enabled(training):
        eager = explain(a, b.detach().requires_grad_(training), offs, bias=bias, **options).decision
    machine = eager.spec.machine
    if eager.preference is not KernelPreference.AUTO or not machine.is_gpu or eager.spec.dtype != torch.bfloat16:
        return
    # A profile does not tell calls with a bias, another out_dtype or no leave to sync apart: measure every plan.
    spec = eager.spec._replace(out_dtype=eager.spec.dtype, has_bias=False, host_sync=True)
    here, num_rows = candidates(b.device), b.shape[0] * _usual(spec)
    has_rows = uneven_ends(num_rows, b.shape[0], spec.group_alignment, torch.device("cpu"))[-1] > 0
    profile.forget()
    if len(able_plans(spec, here)) < 2 or not has_rows or Call.of(spec) in profile.known(machine).times:
        return
    times, failed = measure(spec, num_rows, b.device, here)
    profile.store(machine, times)
    forget()
    decision = decide(eager.spec, KernelPreference.AUTO, here, profiles=profile.profiles(machine, True))
    yield Profiled(decision, tuple(failed.items()))


def _usual(spec: CallSpec) -> int:
    """Rows of a group in what is timed."""
    return _USUAL.get(spec.rows, max(512, min(4096, 65536 // spec.num_groups)))


def _tune(b: Tensor | QuantizedWeights, bias: Tensor | None, decision: Decision) -> list[tile_search.Search]:
    """Searches tiles for the passes of one row class, each pass alone, with what it quantizes."""
    spec = decision.spec
    a, offs = _groups(b, _usual(spec), spec.group_alignment)
    if offs[-1] == 0:  # the guaranteed alignment leaves no rows in this class
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
