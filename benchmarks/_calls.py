"""What benchmarks of layers and models share: calls as CUDA graphs and with a cold L2; memory; quantiles."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from _common import reason_of, synchronize

T = TypeVar("T")
MIB = 2**20
_FLUSHED = 256 * MIB  # bytes, several times the L2 of any GPU


def figures(samples: list[float]) -> dict[str, float]:
    """Mean, median, p10 and p90."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return {
        "mean": statistics.fmean(samples),
        "median": statistics.median(samples),
        "p10": tenths[0],
        "p90": tenths[-1],
    }


def cold_samples(calls: Mapping[T, Callable[[], Any]], rounds: int) -> tuple[dict[T, list[float]], dict[T, str]]:
    """Times of single calls that find nothing in L2, in microseconds, and the errors of those that fail.

    CUDA events around each call, and nothing is subtracted. Before it, one buffer is written and another is read, each
    several times as large as L2: the written lines are out of L2 too, so no call has to write back those of another.
    Each round takes one sample of each call, in shuffled order. Without a GPU, the time of the host.
    """
    order = random.Random(0)
    samples: dict[T, list[float]] = {name: [] for name in calls}
    errors: dict[T, str] = {}
    has_gpu = torch.cuda.is_available()
    shape = _FLUSHED // 4 if has_gpu else 1
    device = "cuda" if has_gpu else "cpu"
    written, read = (torch.randint(2**31 - 1, (shape,), dtype=torch.int32, device=device) for _ in range(2))

    def sample(call: Callable[[], Any]) -> float:
        if not has_gpu:
            begin = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - begin)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        written.bitwise_not_()
        read.sum()
        first.record()
        call()
        last.record()
        last.synchronize()
        return 1e3 * first.elapsed_time(last)

    for name in calls:  # the first call may compile
        try:
            sample(calls[name])
        except Exception as error:
            errors[name] = reason_of(error)
    remaining = [name for name in calls if name not in errors]
    for _ in range(rounds):
        for name in order.sample(remaining, len(remaining)):
            samples[name].append(sample(calls[name]))
    return {name: samples[name] for name in remaining}, errors


def copy_rate(device: str) -> float:
    """Bytes per microsecond of a copy of random values, those that it reads and those that it writes."""
    nbytes = 2**30 if device == "cuda" else 2**20
    source = torch.randint(2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    samples, _ = cold_samples({"copy": lambda: target.copy_(source)}, rounds=20)
    synchronize()
    return 2 * nbytes / statistics.median(samples["copy"])


def captured(run: Callable[[], Any]) -> tuple[Callable[[], Any], float]:
    """Replays of a CUDA graph of ``run``, which return what it returned, and the peak of its memory in MiB.

    Raises:
        RuntimeError: ``run`` has a host sync. This is found before the capture, since torch's random numbers and its
            allocator may not work after a capture that failed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
        before_debugging = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before_debugging)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.cuda.graph(graph):
        outputs = run()
    most = (torch.cuda.max_memory_allocated() - before) / MIB

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay, most


def peak(run: Callable[[], Any]) -> float:
    """MiB that a call needs at most beyond what is allocated before it."""
    before = allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def allocated() -> int:
    """Bytes on the GPU, after a collection of garbage."""
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def free() -> None:
    """Returns memory to the GPU, so that the next size finds it in one piece."""
    gc.collect()
    torch.cuda.empty_cache()
