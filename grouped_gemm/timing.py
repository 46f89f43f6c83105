"""Times of calls that are compared: taken by turns, since a GPU that heats up or slows down does so for all of them."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_CACHE_BYTES = 256 * 2**20  # more than any L2 holds
_ROUNDS = (7, 40)  # of all calls
_UNBOUND_US = 2000.0  # what takes the device longer does not wait for the host


def eager_microseconds(calls: Mapping[T, Callable[[], Any]], budget_ms: float = 40) -> dict[T, float]:
    """Of one call among many: what the device takes with a cold L2, or the host, whichever takes longer.

    Args:
        calls: what is compared; each has run before, so that nothing is compiled.
        budget_ms: about how long to measure, if that is enough for seven rounds.
    """
    on_device = _on_device(calls, budget_ms)
    hosts: dict[T, list[float]] = {name: [] for name in calls}
    for turn in range(3):
        for name in _order(calls, turn):
            if on_device[name] < _UNBOUND_US:
                hosts[name].append(_on_host(calls[name], on_device[name]))
    return {name: max(us, statistics.median(hosts[name]) if hosts[name] else 0.0) for name, us in on_device.items()}


def captured_microseconds(calls: Mapping[T, Callable[[], Any]], budget_ms: float = 20) -> dict[T, float]:
    """Of one call that is replayed as a part of a CUDA graph."""
    in_a_graph = 4
    graphs = {name: _capture(call, in_a_graph) for name, call in calls.items()}
    times = _on_device({name: graph.replay for name, graph in graphs.items()}, budget_ms)
    return {name: us / in_a_graph for name, us in times.items()}


def _capture(call: Callable[[], Any], count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # some parts launch nothing
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
    return graph


def _on_device(calls: Mapping[T, Callable[[], Any]], budget_ms: float) -> dict[T, float]:
    """Medians between events, in rounds whose order rotates."""
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")

    def timed(call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
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


def _on_host(call: Callable[[], Any], on_device: float) -> float:
    """Microseconds until the call returns, in a queue that does not fill."""
    count = max(3, min(20, int(2e3 / max(on_device, 1))))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return 1e6 * spent / count


def _order(calls: Mapping[T, Any], turn: int) -> list[T]:
    names = list(calls)
    first = turn % len(names)
    return names[first:] + names[:first]
