"""Timing of calls that are compared. They are interleaved, so that a GPU that heats up slows all of them down alike."""

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
_ROUNDS = (7, 40)  # the fewest and the most rounds; each round times all calls
# The longest that the device is kept busy before a call, enough for any part of a call. If the host takes longer before
# the first long kernel, the excess counts as time of the call.
_MAX_DELAY_US = 500.0
_CYCLES_PER_US = 2000  # the clock of a fast GPU
_DEVICE_BOUND_US = 2000  # a call that takes longer than this on the device is bound by the device
# Shuffles the order in each round: a call runs slower after one that heats the device, and that must not always be the
# same call.
_order = random.Random(0)


def device_microseconds(calls: Calls[T], budget_ms: float = 40) -> dict[T, float]:
    """Device time of each call with a cold L2: the median time between two events, over rounds in shuffled order.

    Before each call, the device is kept busy for about as long as the host needs, so that it does not wait for the host
    between the events.

    Args:
        calls: the calls to compare. Each has run before, so nothing compiles.
        budget_ms: about how long to measure, provided that this is enough for seven rounds.
    """
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device="cuda")
    names = list(calls)
    delay_us = _MAX_DELAY_US

    def timed(name: T) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        torch.cuda._sleep(int(delay_us * _CYCLES_PER_US))
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
    delay_us = min(1e6 * (time.perf_counter() - begin), _MAX_DELAY_US)  # of all calls: enough for each
    torch.cuda.synchronize()
    round_ms = sum(map(milliseconds, first)) + (0.15 + delay_us / 1e3) * len(calls)
    rounds = max(_ROUNDS[0], min(_ROUNDS[1], int(budget_ms / round_ms)))
    pairs: dict[T, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in _order.sample(names, len(names)):
            pairs[name].append(timed(name))
    torch.cuda.synchronize()
    return {name: 1e3 * statistics.median(map(milliseconds, found)) for name, found in pairs.items()}


def eager_microseconds(calls: Calls[T], budget_ms: float = 100) -> dict[T, float]:
    """Time of each eager call in a series of calls.

    It is device time if even the fastest call takes at least 2 ms on the device. Otherwise it is wall time, since the
    host may take longer than the device.
    """
    times = device_microseconds(calls, budget_ms)
    return times if min(times.values()) >= _DEVICE_BOUND_US else wall_microseconds(calls)


def wall_microseconds(calls: Calls[T]) -> dict[T, float]:
    """Wall time of each call, which host or device may bound.

    It is the mean of ten calls in a row, and the median of 30 rounds.
    """
    rounds, in_a_row = 30, 10
    times: dict[T, list[float]] = {name: [] for name in calls}
    names = list(calls)
    with _no_garbage_collection():
        for _ in range(rounds):
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
    """Device time of each call in a replayed CUDA graph of four equal calls, the first of them with a cold L2."""
    in_a_graph = 4
    graphs = {name: _capture(call, in_a_graph) for name, call in calls.items()}
    times = device_microseconds({name: graph.replay for name, graph in graphs.items()}, budget_ms)
    return {name: us / in_a_graph for name, us in times.items()}


def _capture(call: Callable[[], Any], count: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # some calls launch nothing
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
    return graph


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turns off garbage collection, which would count as time of the call that it interrupts."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
