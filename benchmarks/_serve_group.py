"""Calls that serve.py compares: each is checked before it is timed, and all are timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from _calls import figures
from _common import failures, leave_out, reason_of
from _report import Row
from _serve_layers import RECIPE, is_ours
from _serve_report import describe, name
from torch import Tensor

ERROR = {False: 1e-2, True: 0.1}  # relative, without and with FP8, which rounds each operand by 2.6%, rms
results: list[Row] = []
Run = Callable[[], Any]
Timer = Callable[[Mapping["Call", Run]], tuple[dict["Call", list[float]], dict["Call", str]]]


class Call(NamedTuple):
    """A call in a group of calls that are compared."""

    dtype: str
    name: str
    mode: str


def limit_of(call: Call, layers: int = 1) -> float:
    """The greatest relative error of a result. Those of layers add up."""
    return layers * ERROR[call.dtype == "fp8" or call.name == RECIPE]


class WrongResult(Exception):
    """A result that is not timed."""


def record(row: Row) -> None:
    results.append(row)
    print(describe(row), flush=True)


def checked(error: float, limit: float) -> float:
    """``error``, if it is below the limit.

    Raises:
        WrongResult: it is not, or it is NaN.
    """
    if not error < limit:
        raise WrongResult(f"relative error {error:.1e}, expected below {limit}")
    return error


def poisoned(replay: Run, output: Tensor) -> Run:
    """A replay that fills its output with NaN before."""

    def run() -> Tensor:
        output.fill_(float("nan"))
        return replay()

    return run


def measure_group(
    rows: Mapping[Call, Row],
    prepare: Callable[[Call], Run],
    error_of: Callable[[Call, Any], float],
    timer: Timer,
    peak_of: Callable[[Call, Run], float | None],
) -> None:
    """Fills and records the row of each call that gives a right result.

    A call of ours that fails or gives a wrong result is a failure of the run; its row has no time. A peer is left out.

    Args:
        rows: what is known before, by call.
        prepare: captures or compiles a call.
        error_of: the relative error of a result. It raises `WrongResult` if that is too large.
        timer: `interleaved_samples` or `cold_samples`, with their options.
        peak_of: MiB of a call, or None.
    """
    runs: dict[Call, Run] = {}
    for call, row in rows.items():
        row |= {"us": None, "error": None, "peak": None, "speedup": {}}
        try:
            run = prepare(call)
            row["error"] = error_of(call, run())
            runs[call] = run
        except Exception as error:
            _refuse(call, row, error, reason_of(error))
    samples, failed = timer(runs)
    for call, reason in failed.items():
        _refuse(call, rows[call], None, reason)
    medians = {call: statistics.median(times) for call, times in samples.items()}
    for call, times in samples.items():
        row = rows[call]
        row["us"] = figures(times)
        peers = {other: median for other, median in medians.items() if not is_ours(other.name)}
        if is_ours(call.name):
            row["speedup"] = {f"{other.dtype} {other.name}": peers[other] / medians[call] for other in peers}
        try:
            row["peak"] = peak_of(call, runs[call])
        except Exception as error:
            (failures.append if is_ours(call.name) else print)(f"{name(row)}, peak: {reason_of(error)}")
        record(row)


def _refuse(call: Call, row: Row, error: Exception | None, reason: str) -> None:
    if is_ours(call.name):
        failures.append(f"{name(row)}: {reason}")
        print(f"FAILED {failures[-1]}", flush=True)
        record(row)
    else:
        leave_out(f"{call.dtype} {call.name}" if isinstance(error, ImportError) else name(row), reason)
