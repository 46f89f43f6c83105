"""Timing of calls that are compared. They are interleaved, so that a GPU that heats up slows all of them down alike.

All times are wall times of ten calls in a row, which host or device may bound: those of a model's step.
"""

from __future__ import annotations

import random
import statistics
import timeit
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Run = Callable[[], Any]
_IN_A_ROW = 10  # enough that the first launch and the host sync at the end hardly count
_ROUNDS = (7, 30)  # the fewest and the most rounds; each round times all calls
_BUDGET_S = 0.5  # a round beyond the fewest starts only if all rounds so far took less
# Shuffles the order in each round: a call runs slower after one that heats the device, and that must not always be the
# same call.
_order = random.Random(0)


def eager_microseconds(calls: Mapping[T, Run]) -> dict[T, float]:
    """Time of each eager call."""
    return _microseconds({name: _in_a_row(call) for name, call in calls.items()})


def captured_microseconds(calls: Mapping[T, Run]) -> dict[T, float]:
    """Time of each call in a CUDA graph of ten equal calls that is replayed. Each call has run before."""
    graphs = {name: torch.cuda.CUDAGraph() for name in calls}
    for name, call in calls.items():
        with torch.cuda.graph(graphs[name]):
            _in_a_row(call)()
    return _microseconds({name: graph.replay for name, graph in graphs.items()})


def _in_a_row(call: Run) -> Run:
    def run() -> None:
        for _ in range(_IN_A_ROW):
            call()

    return run


def _microseconds(runs: Mapping[T, Run]) -> dict[T, float]:
    """Microseconds of one call by name: a run makes ten of them. The median of rounds in shuffled order."""

    def seconds(run: Run) -> float:
        def finished() -> None:
            run()
            torch.cuda.synchronize()

        # timeit turns off garbage collection, which would count as time of the call that it interrupts.
        return timeit.timeit(finished, number=1)

    for run in runs.values():  # compiles, and fills caches
        seconds(run)
    times: dict[T, list[float]] = {name: [] for name in runs}
    for done in range(_ROUNDS[1]):
        if done >= _ROUNDS[0] and sum(map(sum, times.values())) >= _BUDGET_S:
            break
        for name in _order.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name]))
    return {name: 1e6 * statistics.median(found) / _IN_A_ROW for name, found in times.items()}
