"""Times of calls that are compared: interleaved, since a GPU that heats up or slows down does so for all of them."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Calls = Mapping[T, Callable[[], Any]]
_CACHE_BYTES = 256 * 2**20  # more than any L2 holds
_ROUNDS = (7, 40)  # of all calls
# Enough for any part of a call. A call whose host takes longer before its first long kernel counts what is over.
_MOST_AHEAD_US = 500.0
_CYCLES_PER_US = 2000  # of a fast GPU's clock
_DEVICE_BOUND_US = 2000  # a call that takes the device longer does not wait for the host
# Shuffles rounds: what comes after a call that heats the device is slower, and must not always be the same one.
_order = random.Random(0)


def device_microseconds(calls: Calls[T], budget_ms: float = 40) -> dict[T, float]:
    """What the device takes for a call with a cold L2: medians between events, in rounds whose order is shuffled.

    Before each call the device is kept busy for about as long as the host takes, lest it waits between the events.

    Args:
        calls: what is compared; each has run before, so that nothing is compiled.
        budget_ms: about how long to measure, if that is enough for seven rounds.
    """
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")
    names = list(calls)
    ahead_us = _MOST_AHEAD_US

    def timed(name: T) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        torch.cuda._sleep(int(ahead_us * _CYCLES_PER_US))
        start.record()
        calls[name]()
        end.record()
        return start, end

    def milliseconds(pair: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        return pair[0].elapsed_time(pair[1])

    for name in names:
        timed(name)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    first = [timed(name) for name in names]
    ahead_us = min(1e6 * (time.perf_counter() - begin), _MOST_AHEAD_US)  # of all: enough for each
    torch.cuda.synchronize()
    round_ms = sum(map(milliseconds, first)) + (0.15 + ahead_us / 1e3) * len(calls)
    rounds = max(_ROUNDS[0], min(_ROUNDS[1], int(budget_ms / round_ms)))
    pairs: dict[T, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in _order.sample(names, len(names)):
            pairs[name].append(timed(name))
    torch.cuda.synchronize()
    return {name: 1e3 * statistics.median(map(milliseconds, found)) for name, found in pairs.items()}


def eager_microseconds(calls: Calls[T], budget_ms: float = 100) -> dict[T, float]:
    """What eager calls take in a row: on the device, where the fastest takes it milliseconds; else by the wall clock,
    since the host may take longer than the device.
    """
    times = device_microseconds(calls, budget_ms)
    return times if min(times.values()) >= _DEVICE_BOUND_US else wall_microseconds(calls)


def wall_microseconds(calls: Calls[T]) -> dict[T, float]:
    """What one of ten calls in a row takes in all, whether host or device is slower: the median of 30 turns."""
    turns, in_a_row = 30, 10
    times: dict[T, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with _no_garbage_collection():
        for _ in range(turns):
            for name in _order.sample(names, len(names)):
                call = calls[name]
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(in_a_row):
                    call()
                torch.cuda.synchronize()
                times[name].append(1e6 * (time.perf_counter() - begin) / in_a_row)
    return {name: statistics.median(found) for name, found in times.items()}


def captured_microseconds(calls: Calls[T], budget_ms: float = 20) -> dict[T, float]:
    """What the device takes for a call that is replayed as a part of a CUDA graph: of four, one with a cold L2."""
    in_a_graph = 4
    graphs = {name: _capture(call, in_a_graph) for name, call in calls.items()}
    times = device_microseconds({name: graph.replay for name, graph in graphs.items()}, budget_ms)
    return {name: us / in_a_graph for name, us in times.items()}


def _capture(call: Callable[[], Any], count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # some parts launch nothing
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
    return graph


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection would be taken for the time of the call that it happens to fall into."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
