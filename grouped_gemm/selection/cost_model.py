"""What a pass costs on each backend, as measured: what AUTO compares.

A measured case takes a training call apart: the plan, the quantizers (each layout alone, and both from one read) and
the three products. From these parts follows what any choice of backends for its passes would take, also where two of
them quantize one operand. A call like no case gets the times of the nearest one, scaled by the work.

An eager call takes what the device takes for its parts, or what the host does, whichever is more: few rows wait for
the host. A CUDA graph is replayed without it.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from grouped_gemm.core.call_spec import CallSpec, Pass
from grouped_gemm.core.preference import BackendKind

# Microseconds of each part. a: (M, K); g: dY, (M, N); b: the weights. rows, columns: the layouts of forward or dgrad,
# and of wgrad. both: two layouts from one read. A backend that does not run a pass lacks its parts.
PARTS = (
    "plan",
    *("a_rows", "a_columns", "a_both"),
    *("g_rows", "g_columns", "g_both"),
    *("b_forward", "b_dgrad", "b_both"),
    *(p.value for p in Pass),
)
Times = Mapping[str, float]
_LAUNCH_US = 3.0  # what the shortest kernels of the table take
_SIZES = {"num_groups": "E", "k": "K", "n": "N", "num_rows": "M"}  # columns of a table
_SHIPPED = {"nvidia": "measured_h200.csv"}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        recipe: name of the recipe, without "_pow2", which takes the same time.
        rows: value of the row class.
        whole_blocks: whether groups were multiples of 128 rows, and that was promised.
        num_groups: E.
        k: K.
        n: N.
        num_rows: M.
        times: microseconds that the device takes for the parts, of each backend; none of one that failed.
        hosts: likewise the host, until a part is launched.
    """

    recipe: str
    rows: str
    whole_blocks: bool
    num_groups: int
    k: int
    n: int
    num_rows: int
    times: Mapping[BackendKind, Times] = field(hash=False)
    hosts: Mapping[BackendKind, Times] = field(hash=False, default_factory=dict)

    def covers(self, spec: CallSpec) -> bool:
        """Whether each pass of ``spec`` was measured, on one backend at least."""
        return all(any(p.value in times for times in self.times.values()) for p in spec.passes)

    def distance(self, spec: CallSpec) -> float:
        """How far its sizes are from those of ``spec``: the sum of the logarithms of the ratios."""
        pairs = (self.num_groups, spec.num_groups), (self.k, spec.k), (self.n, spec.n)
        return sum(abs(math.log(max(x, 1) / max(y, 1))) for x, y in pairs)


@dataclass(frozen=True)
class Table:
    """Cases that were measured on one GPU.

    Attributes:
        gpu: its name.
        arch: its architecture.
        date: when, as "2026-11-21".
        versions: of what, for people.
        cases: the measurements.
        is_exact: whether a case speaks for its own sizes only.
    """

    gpu: str
    arch: str
    date: str
    versions: str
    cases: tuple[Case, ...]
    is_exact: bool = False


@dataclass(frozen=True)
class Estimate:
    """What the parts of a call are expected to take.

    Attributes:
        source: where this was measured, as a phrase.
        num_rows: M of the calls that it speaks of; a spec knows M as a class only.
        times: microseconds that the device takes for the parts, of each backend that was measured.
        hosts: likewise the host.
        is_exact: whether this very kind of call was measured, on this very GPU.
    """

    source: str
    num_rows: int
    times: Mapping[BackendKind, Times]
    hosts: Mapping[BackendKind, Times] = field(default_factory=dict)
    is_exact: bool = False

    def total(self, chosen: Mapping[Pass, BackendKind]) -> float:
        """Microseconds of a call whose passes run on ``chosen``; infinite where that was not measured."""
        parts = list(_parts(chosen))
        on_device = sum(self.times.get(kind, {}).get(part, math.inf) for kind, part in parts)
        on_host = sum(self.hosts.get(kind, {}).get(part, 0.0) for kind, part in parts)
        return max(on_device, on_host)

    def of_pass(self, kind: BackendKind, pass_: Pass, chosen: Mapping[Pass, BackendKind]) -> float:
        """Microseconds that ``pass_`` on ``kind`` adds to those passes of ``chosen`` that come before it there."""
        passes = list(chosen)
        before = {p: chosen[p] for p in passes[: passes.index(pass_)]}
        total = self.total({**before, pass_: kind})
        return total - (self.total(before) if before and math.isfinite(total) else 0)


def _parts(chosen: Mapping[Pass, BackendKind]) -> Iterator[tuple[BackendKind, str]]:
    """The parts of a call whose passes run on ``chosen``, and who runs them."""
    forward, dgrad, wgrad = map(chosen.get, Pass)
    for kind in dict.fromkeys(chosen.values()):
        yield kind, "plan"
    for first, second, names in (
        (forward, wgrad, ("a_rows", "a_columns", "a_both")),
        (dgrad, wgrad, ("g_rows", "g_columns", "g_both")),
        (forward, dgrad, ("b_forward", "b_dgrad", "b_both")),
    ):
        if first is not None and first is second:
            yield first, names[2]
        else:
            yield from ((kind, name) for kind, name in zip((first, second), names) if kind is not None)
    for pass_, kind in chosen.items():
        yield kind, pass_.value


def facts_of(spec: CallSpec) -> tuple[str, str, bool]:
    """Recipe, row class and whole blocks of the cases that speak of ``spec``, at any sizes."""
    return spec.recipe.value.removesuffix("_pow2"), spec.rows.value, spec.group_alignment % 128 == 0


def estimate(spec: CallSpec, tables: Iterable[Table]) -> Estimate | None:
    """What the first of ``tables`` that knows cases of this recipe and row class lets expect; None: none does."""
    if spec.dtype is not torch.bfloat16:
        return None
    recipe, rows, whole_blocks = facts_of(spec)
    for table in tables:
        alike = [case for case in table.cases if (case.recipe, case.rows) == (recipe, rows)]
        exactly = [case for case in alike if case.whole_blocks == whole_blocks]
        alike = exactly if table.is_exact else exactly or alike
        if table.is_exact:
            alike = [case for case in alike if case.distance(spec) == 0 and case.covers(spec)]
        if alike:
            return _scaled(min(alike, key=lambda case: case.distance(spec)), spec, table)
    return None


def _scaled(case: Case, spec: CallSpec, table: Table) -> Estimate:
    """The times of ``case`` for the sizes of ``spec``, at as many rows for each group; the host's stay the same."""
    groups, k, n = (y / max(x, 1) for x, y in zip((case.num_groups, case.k, case.n), _sizes(spec)))
    work = {"plan": 1.0, "a": groups * k, "g": groups * n}
    times: dict[BackendKind, dict[str, float]] = {}
    for kind, parts in case.times.items():
        times[kind] = {}
        for part, microseconds in parts.items():
            scaled = microseconds * work.get(part.partition("_")[0], groups * k * n)
            times[kind][part] = max(scaled, min(microseconds, _LAUNCH_US))
    hosts = {kind: dict(parts) for kind, parts in case.hosts.items() if not spec.captured}
    if spec.weights is not None:  # they were quantized beforehand
        for parts in (*filter(None, times.values()), *hosts.values()):
            parts |= dict.fromkeys(("b_forward", "b_dgrad", "b_both"), 0.0)
    where = table.gpu if table.gpu == spec.machine.name else f"{table.gpu}, the nearest that is known"
    sizes = "" if case.distance(spec) == 0 else f" at E={case.num_groups}, K={case.k}, N={case.n}"
    num_rows = max(1, round(case.num_rows / max(case.num_groups, 1) * spec.num_groups))
    return Estimate(f"measured on {where}, {table.date}{sizes}", num_rows, times, hosts, table.is_exact)


def _sizes(spec: CallSpec) -> tuple[int, int, int]:
    return spec.num_groups, spec.k, spec.n


@functools.cache
def shipped(vendor: str) -> Table | None:
    """The measurements that come with this package for the GPUs of ``vendor``; None: there are none."""
    if vendor not in _SHIPPED:
        return None
    return parse((Path(__file__).parent / _SHIPPED[vendor]).read_text(encoding="utf-8"))


def parse(text: str) -> Table:
    """The table that `render` wrote.

    Raises:
        ValueError, KeyError: it is none.
    """
    lines = text.splitlines()
    head = dict(line.removeprefix("# ").split(": ", 1) for line in lines if line.startswith("# "))
    cases: dict[str, Case] = {}
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        num_groups, k, n, num_rows = (int(row[column]) for column in _SIZES.values())
        case = Case(row["recipe"], row["rows"], row["blocks"] == "whole", num_groups, k, n, num_rows, {})
        key = str(case)
        times = {part: float(row[part]) for part in PARTS if row[part]}
        same, kind = cases.get(key, case), BackendKind(row["backend"])
        if row["clock"] == "device":
            cases[key] = replace(same, times={**same.times, kind: times})
        else:
            cases[key] = replace(same, hosts={**same.hosts, kind: times})
    return Table(head["gpu"], head["arch"], head["date"], head["versions"], tuple(cases.values()))


def render(table: Table) -> str:
    """``table`` as comma-separated values: a line for each case and backend."""
    lines = [f"# {name}: {getattr(table, name)}" for name in ("gpu", "arch", "date", "versions")]
    lines.append("# unit: microseconds, of parts of a call that grouped_gemm/selection/cost_model.py names")
    lines.append(",".join(("recipe", "rows", "blocks", *_SIZES.values(), "backend", "clock", *PARTS)))
    for case in table.cases:
        blocks = "whole" if case.whole_blocks else "any"
        facts = [case.recipe, case.rows, blocks, *(str(getattr(case, name)) for name in _SIZES)]
        for clock, by_kind in (("device", case.times), ("host", case.hosts)):
            for kind, times in by_kind.items():
                values = [f"{times[part]:.1f}" if part in times else "" for part in PARTS]
                lines.append(",".join([*facts, kind.value, clock, *values]))
    return "\n".join(lines) + "\n"
