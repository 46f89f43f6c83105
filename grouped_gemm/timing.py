"""Times of calls that are compared: taken by turns, since a GPU that heats up or slows down does so for all of them."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Calls = Mapping[T, Callable[[], Any]]
_CACHE_BYTES = 256 * 2**20  # more than any L2 holds
_ROUNDS = (7, 40)  # of all calls
_TURNS = 7


def device_microseconds(calls: Calls[T], budget_ms: float = 40) -> dict[T, float]:
    """What the device takes for a call with a cold L2: medians between events, in rounds whose order rotates.

    Args:
        calls: what is compared; each has run before, so that nothing is compiled.
        budget_ms: about how long to measure, if that is enough for seven rounds.
    """
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")

    def timed(call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()  # the host launches the call meanwhile
        start.record()
        call()
        end.record()
        return start, end

    def milliseconds(pair: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        return pair[0].elapsed_time(pair[1])

    first = [timed(call) for _ in range(2) for call in calls.values()]
    torch.cuda.synchronize()
    flush_ms = 0.15
    round_ms = sum(map(milliseconds, first[len(calls) :])) + flush_ms * len(calls)
    rounds = max(_ROUNDS[0], min(_ROUNDS[1], int(budget_ms / round_ms)))
    pairs: dict[T, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in _order(calls, turn):
            pairs[name].append(timed(calls[name]))
    torch.cuda.synchronize()
    return {name: 1e3 * statistics.median(map(milliseconds, found)) for name, found in pairs.items()}


def host_microseconds(calls: Calls[T]) -> dict[T, float]:
    """What the host takes until a call returns, in a queue that does not fill: the least, as others only add to it."""
    return _on_host(calls, 5, waits=False)


def wall_microseconds(calls: Calls[T]) -> dict[T, float]:
    """What one call among many takes in all, whether host or device is slower: the least of several turns."""
    return _on_host(calls, 10, waits=True)


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


def _on_host(calls: Calls[T], count: int, waits: bool) -> dict[T, float]:
    times: dict[T, list[float]] = {name: [] for name in calls}
    for turn in range(_TURNS):
        for name in _order(calls, turn):
            call = calls[name]
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(count):
                call()
            if waits:
                torch.cuda.synchronize()
            times[name].append(1e6 * (time.perf_counter() - begin) / count)
    torch.cuda.synchronize()
    return {name: min(found) for name, found in times.items()}


def _order(calls: Calls[T], turn: int) -> list[T]:
    names = list(calls)
    first = turn % len(names)
    return names[first:] + names[:first]
