"""Contests: the parts of a call, measured on each backend that could run it. `cost_model` says what follows from them.

The cases that come with this package were measured so. With GROUPED_GEMM_AUTOTUNE=1, `warmup` measures those of a model
on the user's own GPU, keeps them in a file, and AUTO believes them before all others. No call measures anything.

M, E, K, N: rows, groups, in and out features. D: K or N.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grouped_gemm.autotune.timing import captured_microseconds, device_microseconds, host_microseconds
from grouped_gemm.backends import Candidate
from grouped_gemm.backends.base import ALL_PASSES, OffsetPlan, _GroupedMMBackend
from grouped_gemm.core.call_spec import CallSpec, Pass, RowClass
from grouped_gemm.core.machine import Machine
from grouped_gemm.core.preference import BackendKind, cache_directory
from grouped_gemm.core.store import DAMAGE, locked, read, replace
from grouped_gemm.kernels.gemm import tile_search
from grouped_gemm.selection import cost_model
from grouped_gemm.selection.cost_model import Case, Table, Times
from grouped_gemm.selection.rules import able

SCHEMA = 1  # of the file; another number is another file
Timer = Callable[[dict[BackendKind, Callable[[], Any]]], dict[BackendKind, float]]


def tables(machine: Machine, tunes: bool) -> tuple[Table, ...]:
    """The measurements that decisions on ``machine`` rest on, those that count most first.

    Args:
        machine: where.
        tunes: whether those of this GPU's own file are among them.
    """
    own = (known(machine),) if tunes and machine.is_gpu else ()
    shipped = cost_model.shipped(machine.vendor)
    return own if shipped is None else (*own, shipped)


# -- measuring


def measure(
    spec: CallSpec,
    num_rows: int,
    device: torch.device,
    contestants: Sequence[Candidate],
    on_device: Timer | None = None,
    on_host: Timer = host_microseconds,
) -> tuple[Case, dict[BackendKind, str]]:
    """Times the parts of a call on random operands, for each of ``contestants`` that is able to run a pass.

    Takes about half a second for each, and as much memory as a training step; waits for the device.

    Args:
        spec: what kind of call; its passes say which parts.
        num_rows: M.
        device: where.
        contestants: the backends on that device.
        on_device: microseconds of functions that are compared; None: `timing.device_microseconds`, or for few rows
            `timing.captured_microseconds`, since between events their launches would take as long as the host does.
        on_host: likewise what the host takes.

    Returns:
        The case, and why those that failed did.
    """
    in_graphs = spec.rows is not RowClass.LARGE
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device).normal_(generator=generator).to(spec.dtype)

    a_MK, g_MN = normal(num_rows, spec.k), normal(num_rows, spec.n)
    by_n = normal(spec.num_groups, spec.n, spec.k) * spec.k**-0.5
    b_EKN = by_n.transpose(1, 2) if spec.b_contiguous == "k" else by_n.transpose(1, 2).contiguous()
    del by_n
    offs = uneven_ends(num_rows, spec.num_groups, spec.group_alignment, device)
    backends = {contestant.backend.kind: contestant.backend for contestant in contestants}
    failures: dict[BackendKind, str] = {}
    runs: dict[BackendKind, dict[str, Callable[[], Any]]] = {}
    for kind, passes in able(spec, contestants).items():
        with _noting(failures, kind):
            runs[kind] = _parts(backends[kind], spec, passes, a_MK, g_MN, b_EKN, offs)
            for run in runs[kind].values():
                run()  # compiles
    times: dict[BackendKind, dict[str, float]] = {kind: {} for kind in runs if kind not in failures}
    hosts: dict[BackendKind, dict[str, float]] = {kind: {} for kind in times}
    for part in cost_model.PARTS:
        calls = {kind: runs[kind][part] for kind in times if part in runs[kind] and kind not in failures}
        waiting = {kind: calls.pop(kind) for kind in tuple(calls) if not in_graphs or _waits(backends[kind], part)}
        for timer, compared, found in (
            (on_device or captured_microseconds, calls, times),
            (on_device or device_microseconds, waiting, times),
            (on_host, calls | waiting, hosts),
        ):
            for kind, microseconds in _timed(compared, timer, failures).items():
                found[kind][part] = microseconds
    for by_kind in (times, hosts):
        by_kind.update((kind, {}) for kind in failures)  # which no call is then expected to end on
        if not spec.recipe.is_scaled:  # nothing is quantized: what was timed is a function that returns its argument
            for parts in by_kind.values():
                parts.update((part, 0.0) for part in parts if part[:2] in ("a_", "g_", "b_"))
    sizes = spec.num_groups, spec.k, spec.n, num_rows
    return Case(*cost_model.facts_of(spec), *sizes, times, hosts), failures


def _waits(backend: _GroupedMMBackend, part: str) -> bool:
    """Whether a part may wait for the device, which no graph captures."""
    passes = backend.host_sync_passes
    return bool(backend.host_syncs) and (passes == ALL_PASSES or part in [pass_.value for pass_ in passes])


@contextlib.contextmanager
def _noting(failures: dict[BackendKind, str], kind: BackendKind) -> Iterator[None]:
    """What is raised, by a compiler or a launch, is why ``kind`` is out of this contest."""
    try:
        yield
    except Exception as error:
        failures[kind] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _timed(
    calls: dict[BackendKind, Callable[[], Any]], timer: Timer, failures: dict[BackendKind, str]
) -> dict[BackendKind, float]:
    """By turns; where that fails, each alone, which tells whose fault it is."""
    try:
        return timer(calls) if calls else {}
    except Exception:
        times: dict[BackendKind, float] = {}
        for kind, call in calls.items():
            with _noting(failures, kind):
                times |= timer({kind: call})
        return times


def uneven_ends(num_rows: int, num_groups: int, alignment: int, device: torch.device) -> Tensor:
    """End rows (E,) int32 of groups of half to one and a half of the average, in multiples of ``alignment``."""
    parts = [(e + 1) / num_groups for e in range(num_groups)]
    ends = [round(num_rows * (part + part * part) / 2) // alignment * alignment for part in parts]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def _parts(
    backend: _GroupedMMBackend,
    spec: CallSpec,
    passes: Sequence[Pass],
    a_MK: Tensor,
    g_MN: Tensor,
    b_EKN: Tensor,
    offs: Tensor,
) -> dict[str, Callable[[], Any]]:
    """Each of `cost_model.PARTS` that has to do with ``passes``, as a function without arguments."""
    forward, dgrad, wgrad = (p in passes for p in Pass)
    recipe, num_rows, dtype = spec.recipe, len(a_MK), spec.dtype
    plan: OffsetPlan = backend.plan(offs, num_rows, spec.group_alignment)

    def activations(x: Tensor) -> Callable[[bool, bool], Any]:
        return lambda rows, columns: backend.quantize_activations(x, plan, recipe, rows=rows, columns=columns)

    def weights(one: bool, two: bool) -> Any:
        return backend.quantize_weights(b_EKN, recipe, forward=one, dgrad=two)

    parts: dict[str, Callable[[], Any]] = {"plan": lambda: backend.plan(offs, num_rows, spec.group_alignment)}
    for names, wanted, quantize in (
        (("a_rows", "a_columns", "a_both"), (forward, wgrad), activations(a_MK)),
        (("g_rows", "g_columns", "g_both"), (dgrad, wgrad), activations(g_MN)),
        (("b_forward", "b_dgrad", "b_both"), (forward, dgrad), weights),
    ):
        for name, which in zip(names, ((True, False), (False, True), (True, True))):
            if wanted[0] >= which[0] and wanted[1] >= which[1]:
                parts[name] = functools.partial(quantize, *which)
    a_rows, a_columns = activations(a_MK)(forward, wgrad)
    g_rows, g_columns = activations(g_MN)(dgrad, wgrad)
    b_forward, b_dgrad = weights(forward, dgrad)
    if forward:
        parts["forward"] = lambda: backend.grouped_mm(a_rows, b_forward, plan, spec.out_dtype)
    if dgrad:
        parts["dgrad"] = lambda: backend.grouped_mm(g_rows, b_dgrad, plan, dtype)
    if wgrad:
        parts["wgrad"] = lambda: backend.wgrad(a_columns, g_columns, plan, dtype, contiguous=spec.b_contiguous)
    return parts


# -- the file


def path() -> Path:
    """The file, in `preference.cache_directory`."""
    return cache_directory() / f"contests-{SCHEMA}.json"


_known: dict[Machine, Table] = {}
_lock = threading.Lock()


def known(machine: Machine) -> Table:
    """What was measured on this GPU with these versions, here or in an earlier process: the file, read once.

    A file that is damaged or cannot be read is ignored with a warning.
    """
    if machine not in _known:
        _known[machine] = _read(machine)
    return _known[machine]


def _read(machine: Machine) -> Table:
    entries = []
    try:
        entries = _entries()
    except OSError as error:
        warnings.warn(
            f"contests-{SCHEMA}.json: expected a file that can be read; found {error}. Shipped measurements are used. "
            "Set GROUPED_GEMM_CACHE_DIR to a directory that can be read and written.",
            stacklevel=3,
        )
    except DAMAGE as error:
        warnings.warn(
            f"{path()}: expected measurements of backends; found {type(error).__name__}: {error}. The file is ignored. "
            "Delete it; grouped_gemm.warmup then measures again.",
            stacklevel=3,
        )
    here = [entry for entry in entries if entry["setting"] == _setting(machine)]
    day = max((entry["date"] for entry in here), default="")
    return Table(machine.name, machine.arch, day, "as now", tuple(map(_case, here)), is_exact=True)


def store(machine: Machine, cases: Sequence[Case]) -> None:
    """Uses ``cases`` from now on, in this process, and adds them to the file, as `tile_search.store` does with tiles.

    Where another process was faster to measure the same, what it has stored is used: all then decide alike.
    """
    today = date.today().isoformat()
    new = [{"setting": _setting(machine), "date": today, **_entry(case)} for case in cases]
    try:
        file = path()
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock")):
            try:
                entries = _entries()
            except DAMAGE:  # `known` has warned of it
                entries = []
            others = [entry for entry in entries if any(_is_same(entry, other) for other in new)]
            added = [entry for entry in new if not any(_is_same(entry, other) for other in others)]
            replace(file, json.dumps({"schema": SCHEMA, "cases": entries + added}, indent=1))
            cases = [*map(_case, others), *map(_case, added)]
    except OSError as error:
        warnings.warn(
            f"contests-{SCHEMA}.json: expected a directory to keep it in; found {error}. This process uses them, "
            "later ones have to measure again. Set GROUPED_GEMM_CACHE_DIR to a directory that can be written.",
            stacklevel=2,
        )
    table = known(machine)
    with _lock:
        before = [case for case in table.cases if not any(_facts(case) == _facts(other) for other in cases)]
        _known[machine] = dataclasses.replace(table, date=today, cases=(*before, *cases))


def read_again(machine: Machine) -> None:
    """Looks at the file again: another process may have measured what is asked for."""
    with _lock:
        _known.pop(machine, None)


def _setting(machine: Machine) -> dict[str, str]:
    """What a measurement holds for: the GPU, and all that runs on it."""
    versions = {package: version for package, version in machine.versions if package in ("torch", "deep_gemm")}
    return {"gpu": machine.name, **tile_search.versions(), **versions}


_FACTS = ("recipe", "rows", "whole_blocks", "num_groups", "k", "n")


def _facts(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in _FACTS}


def _entry(case: Case) -> dict[str, Any]:
    clocks = {
        clock: {kind.value: dict(times) for kind, times in by_kind.items()}
        for clock, by_kind in (("times", case.times), ("hosts", case.hosts))
    }
    return {**_facts(case), "num_rows": case.num_rows, **clocks}


def _is_same(entry: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(entry[name] == other[name] for name in ("setting", *_FACTS))


def _case(entry: dict[str, Any]) -> Case:
    def clock(name: str) -> dict[BackendKind, Times]:
        return {
            BackendKind(kind): {part: float(parts[part]) for part in cost_model.PARTS if part in parts}
            for kind, parts in entry[name].items()
        }

    facts = {name: entry[name] for name in (*_FACTS, "num_rows")}
    return Case(**facts, times=clock("times"), hosts=clock("hosts"))


def _entries() -> list[dict[str, Any]]:
    """The entries of the file, those of other machines too; none where there is no file.

    Raises:
        One of DAMAGE: the file cannot be read, or holds something else.
    """
    entries = read(path(), SCHEMA, "cases")
    for entry in entries:
        case = _case(entry)
        sizes = case.num_groups, case.k, case.n, case.num_rows
        names = [entry[name] for name in ("recipe", "rows", "date")]
        times = [us for clock in (case.times, case.hosts) for parts in clock.values() for us in parts.values()]
        if not (
            isinstance(entry["setting"], dict)
            and isinstance(case.whole_blocks, bool)
            and all(type(size) is int and 1 <= size < 2**63 for size in sizes)
            and all(isinstance(name, str) for name in names)
            and all(0 <= us < math.inf for us in times)
        ):
            raise TypeError(f"a case that is none: {entry!r}")
    return entries
