"""Timing of calls that are compared, on a simulated GPU: a queue of kernels and a host that fills it."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest

from grouped_gemm.autotune import timing


class SimulatedGPU:
    """A simulated GPU that stands for ``torch`` and ``time``. Its clocks are in microseconds."""

    int8 = None

    def __init__(self):
        self.host = self.idle_from = 0.0
        self.cuda = SimpleNamespace(Event=self.event, synchronize=self.wait, _sleep=self.sleep)

    def launch(self, device_us):
        self.idle_from = max(self.idle_from, self.host) + device_us

    def wait(self):
        self.host = max(self.host, self.idle_from)

    def sleep(self, cycles):
        self.launch(cycles / 2000)

    def event(self, enable_timing):
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(self.idle_from, self.host))
        event.elapsed_time = lambda end: (end.at - event.at) / 1e3
        return event

    def empty(self, size, dtype, device):
        return SimpleNamespace(zero_=lambda: self.launch(60))

    def perf_counter(self):
        return self.host / 1e6

    def call(self, host_us, device_us, waits=False):
        def run():
            self.host += host_us
            self.launch(device_us)
            if waits:
                self.wait()

        return run


@pytest.fixture
def gpu(monkeypatch):
    gpu = SimulatedGPU()
    monkeypatch.setattr(timing, "torch", gpu)
    monkeypatch.setattr(timing, "time", gpu)
    return gpu


def test_a_slow_host_is_not_taken_for_a_slow_device(gpu):
    calls = {"slow host": gpu.call(host_us=200, device_us=10), "slow device": gpu.call(host_us=5, device_us=50)}
    assert timing.device_microseconds(calls) == pytest.approx({"slow host": 10, "slow device": 50})


def test_a_sync_counts_for_the_call_that_makes_it(gpu):
    calls = {"waits": gpu.call(host_us=5, device_us=100, waits=True), "does not": gpu.call(host_us=5, device_us=10)}
    assert timing.device_microseconds(calls) == pytest.approx({"waits": 100, "does not": 10})


def test_wall_time_is_that_of_the_slower_of_host_and_device(gpu):
    calls = {"host": gpu.call(host_us=200, device_us=10), "device": gpu.call(host_us=5, device_us=50)}
    assert timing.wall_microseconds(calls) == pytest.approx({"host": 200 + 10 / 10, "device": 50 + 5 / 10})


def test_eager_time_is_that_of_the_slower_of_host_and_device(gpu):
    long = {"long": gpu.call(host_us=200, device_us=3000), "longer": gpu.call(host_us=4000, device_us=3500)}
    assert timing.eager_microseconds(long) == pytest.approx({"long": 3000, "longer": 3500})
    short = {"host": gpu.call(host_us=200, device_us=10), "device": gpu.call(host_us=5, device_us=50)}
    assert timing.eager_microseconds(short) == pytest.approx({"host": 200 + 10 / 10, "device": 50 + 5 / 10})


@pytest.mark.parametrize("timer", (timing.device_microseconds, timing.wall_microseconds))
def test_a_disturbed_run_does_not_count(gpu, timer):
    turns = []

    def disturbed():
        turns.append(gpu.host)
        gpu.call(host_us=5, device_us=1000 if len(turns) % 50 == 0 else 40)()

    assert timer({"disturbed": disturbed, "other": gpu.call(5, 40)})["disturbed"] == pytest.approx(40, rel=0.02)


def test_calls_are_interleaved_in_every_order(gpu):
    turns = []

    def named(name):
        return lambda: turns.append(name)

    timing.wall_microseconds({name: named(name) for name in "abc"})
    followed = {pair for pair in pairwise(turns) if pair[0] != pair[1]}
    assert len(followed) == 6 and all(turns.count(name) == 300 for name in "abc")
