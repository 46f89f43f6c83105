"""The figures of one run as text, and whether they reach the goals. It reads the JSON of grouped_mm.py, without a GPU.

A run is a dict: device, versions, seconds, ceilings (TFLOP/s of one large matmul, by name), failures, rows. A row is a
GEMM (shape, kind, recipe, pass, flops, error, ms, peers: ms by name) or a host time (host, us). A figure that failed is
None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, NamedTuple

Row = dict[str, Any]
# name: (M tokens, E experts, N out features, K in features); "seed" is the shape of the first measurements
SHAPES = {
    "seed": (32768, 8, 2048, 7168),
    "dsv3_gateup": (32768, 32, 4096, 7168),
    "dsv3_down": (32768, 32, 7168, 2048),
    "qwen3_gateup": (131072, 128, 1536, 2048),
    "qwen3_down": (131072, 128, 2048, 768),
}
UNTUNED = {  # that no profile has and no tile was chosen for
    "mixtral_gateup": (16384, 8, 28672, 4096),
    "mixtral_down": (16384, 8, 4096, 14336),
    "scout_gateup": (16384, 16, 16384, 5120),
    "olmoe_gateup": (65536, 64, 2048, 2048),
    "glm_down": (32768, 40, 5120, 1536),
    "phi_gateup": (24576, 16, 12800, 4096),
    "few_rows": (16384, 128, 1536, 2048),  # 128 for each expert
}
ALL_SHAPES = SHAPES | UNTUNED
KINDS = ("balanced", "ragged", "zipf")  # how rows are shared among groups, see `_common.ends_of`
PASSES = ("forward", "dgrad", "wgrad")
CEILINGS = {"none": "bf16", "fp8_rowwise": "fp8", "fp8_blockwise": "fp8"}  # the matmul that a recipe is compared with


_KEYS = {"device", "versions", "seconds", "ceilings", "failures", "rows"}


def check_form(run: Any, keys: Set[str] = _KEYS) -> dict[str, Any]:
    """``run``, after a check of its keys.

    Raises:
        ValueError: a key is missing.
    """
    missing = sorted(keys - run.keys()) if isinstance(run, dict) else sorted(keys)
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    return run


def name(row: Row) -> str:
    """The name of a row: "seed ragged none forward"."""
    if "host" in row:
        return f"host time of {row['host']}"
    return f"{row['shape']} {row['kind']} {row['recipe']} {row['pass']}"


def sizes(shape: str, shapes: Mapping[str, tuple[int, ...]] = ALL_SHAPES) -> str:
    """``32768x8x2048x7168``, M x E x N x K; empty for a name that is not among ``shapes``."""
    return "x".join(map(str, shapes.get(shape, ())))


def legend(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]] = ALL_SHAPES) -> str:
    """What the names of shapes stand for."""
    return "shapes, M x E x N x K: " + ", ".join(
        f"{name} {sizes(name, shapes)}".rstrip() for name in dict.fromkeys(names)
    )


def rate(row: Row, ms: float | None) -> float | None:
    """TFLOP/s of a GEMM that takes ``ms`` milliseconds."""
    return row["flops"] / ms / 1e9 if ms else None


def ratio(row: Row, peer: str) -> float | None:
    """How many times as fast as the peer; None if one of them failed."""
    return row["peers"][peer] / row["ms"] if row["ms"] and row["peers"].get(peer) else None


def share(row: Row, ceilings: dict[str, float | None], ms: float | None) -> float | None:
    """The share of the ceiling, a matmul in the same run; None if one of them failed."""
    ceiling = ceilings.get(CEILINGS[row["recipe"]])
    found = rate(row, ms)
    return found / ceiling if found and ceiling else None


def describe(row: Row, ceilings: dict[str, float | None]) -> str:
    """One line: our rate, each peer's rate, and the ratio."""
    if "host" in row:
        return f"{name(row):40s}{_number(row['us'], '8.1f')} us"
    mine = f"{_number(rate(row, row['ms']), '7.0f')} TFLOP/s"
    mine += f"{_number(share(row, ceilings, row['ms']), '6.2f')} of a matmul"
    text = f"{name(row):54s}{mine}"
    for peer, ms in row.get("peers", {}).items():
        text += f"  {peer}{_number(rate(row, ms), '6.0f')}, {_number(ratio(row, peer), '.2f')}x"
    return text + (f"  error {_number(row['error'], '.0e')}" if "error" in row else "")


def _number(value: float | None, form: str) -> str:
    return format(float("nan") if value is None else value, form)


class Goal(NamedTuple):
    """A bound for every case: at least ``limit``, or at most if ``at_most``. ``unit`` is that of limit and values."""

    what: str
    limit: float
    cases: list[tuple[str, float | None]]  # None: it failed, which misses the goal
    at_most: bool = False
    unit: str = "x"

    @property
    def reached(self) -> int:
        """How many cases reach the goal."""
        return sum(self._reaches(value) for _, value in self.cases)

    @property
    def worst(self) -> tuple[str, float | None]:
        """The case that is farthest from the goal; one that failed is the farthest."""
        sign = -1 if self.at_most else 1
        return min(self.cases, key=lambda case: float("-inf") if case[1] is None else sign * case[1])

    def _reaches(self, value: float | None) -> bool:
        return value is not None and (value <= self.limit if self.at_most else value >= self.limit)

    def __str__(self) -> str:
        limit, worst = (".2f", ".2f") if self.unit == "x" else (".0f", ".1f")
        what = f"{self.what} {'<=' if self.at_most else '>='} {self.limit:{limit}}{self.unit}"
        if not self.cases:
            return f"  not measured  {what}"
        case, value = self.worst
        verdict = "reached" if self.reached == len(self.cases) else "NOT reached"
        found = "failed" if value is None else f"{value:{worst}}{self.unit}"
        return f"  {verdict:14}{what:52} {self.reached} of {len(self.cases)}, worst {found}: {case}"


def goals(rows: Iterable[Row]) -> list[Goal]:
    """The goals, each with its cases among ``rows``."""
    rows = list(rows)

    def against(recipe: str, pass_: str, peer: str, limit: float) -> Goal:
        mine = [r for r in rows if (r.get("recipe"), r.get("pass")) == (recipe, pass_) and peer in r["peers"]]
        # where the peer itself failed there is nothing to compare with; the failure is counted
        cases = [(name(r), ratio(r, peer)) for r in mine if r["peers"][peer] is not None]
        return Goal(f"{'bf16' if recipe == 'none' else recipe} {pass_} against {peer}", limit, cases)

    found = [against(recipe, pass_, "torch", 1.0) for recipe in ("none", "fp8_rowwise") for pass_ in PASSES]
    found += [
        against("fp8_blockwise", "forward", "deep_gemm", 1.0),
        against("fp8_blockwise", "dgrad", "deep_gemm", 1.0),
        against("fp8_blockwise", "wgrad", "deep_gemm", 1.15),
        Goal(
            "host time of an eager call in bf16",
            25.0,
            [(name(r), r["us"]) for r in rows if r.get("host") == "grouped_mm none"],
            at_most=True,
            unit=" us",
        ),
    ]
    return found


def print_run(run: dict[str, Any], write: Callable[[str], Any] = print) -> None:
    """Every row, the goals, the failures."""
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    ceilings = ", ".join(f"{what} {_number(value, '.0f')} TFLOP/s" for what, value in run["ceilings"].items())
    write(f"{run['device']}, {versions}; one large matmul: {ceilings}")
    write("x: how many times as fast as the peer")
    write(legend(row["shape"] for row in run["rows"] if "shape" in row))
    for row in run["rows"]:
        write(describe(row, run["ceilings"]))
    write("\ngoals, in this run")
    for goal in goals(run["rows"]):
        write(str(goal))
    write(f"\n{len(run['failures'])} failures, {run['seconds']:.0f} s")
    for failure in run["failures"]:
        write(f"  {failure}")
