"""Timing of calls that are compared, on a simulated GPU: a queue of kernels and a host that fills it."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from types import SimpleNamespace

import pytest

from grouped_gemm.autotune import timing


class SimulatedGPU:
    """A simulated GPU that stands for ``torch`` and ``timeit``. Its clocks are in microseconds."""

    def __init__(self):
        self.host = self.idle_from = 0.0
        self.captured = None  # the launches of the graph that is being captured
        self.cuda = SimpleNamespace(CUDAGraph=self.new_graph, graph=self.capture, synchronize=self.wait)

    def launch(self, device_us):
        if self.captured is not None:
            self.captured.append(device_us)
        else:
            self.idle_from = max(self.idle_from, self.host) + device_us

    def wait(self):
        self.host = max(self.host, self.idle_from)

    def new_graph(self):
        launches = []
        return SimpleNamespace(launches=launches, replay=lambda: list(map(self.launch, launches)))

    @contextlib.contextmanager
    def capture(self, graph):
        self.captured = graph.launches
        yield
        self.captured = None

    def timeit(self, run, number):
        begin = self.host
        run()
        return (self.host - begin) / 1e6

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
    monkeypatch.setattr(timing, "timeit", gpu)
    return gpu


def test_eager_time_is_that_of_the_slower_of_host_and_device(gpu):
    calls = {"host": gpu.call(host_us=200, device_us=10), "device": gpu.call(host_us=5, device_us=50)}
    assert timing.eager_microseconds(calls) == pytest.approx({"host": 200 + 10 / 10, "device": 50 + 5 / 10})


def test_a_sync_counts_for_the_call_that_makes_it(gpu):
    calls = {"waits": gpu.call(host_us=5, device_us=100, waits=True), "does not": gpu.call(host_us=5, device_us=10)}
    assert timing.eager_microseconds(calls) == pytest.approx({"waits": 105, "does not": 10 + 5 / 10})


def test_a_captured_call_takes_no_time_of_the_host(gpu):
    calls = {"slow host": gpu.call(host_us=200, device_us=10), "slow device": gpu.call(host_us=5, device_us=50)}
    assert timing.captured_microseconds(calls) == pytest.approx({"slow host": 10, "slow device": 50})


def test_a_disturbed_round_does_not_count(gpu):
    turns = []

    def disturbed():
        turns.append(gpu.host)
        gpu.call(host_us=5, device_us=1000 if len(turns) % 50 == 0 else 40)()

    times = timing.eager_microseconds({"disturbed": disturbed, "other": gpu.call(5, 40)})
    assert times["disturbed"] == pytest.approx(40, rel=0.02)


@pytest.mark.parametrize("device_us, rounds", ((10, 30), (100_000, 7)))
def test_long_calls_are_timed_in_fewer_rounds(gpu, device_us, rounds):
    turns = []

    def call():
        turns.append(gpu.host)
        gpu.launch(device_us)

    timing.eager_microseconds({"call": call})
    assert len(turns) == 10 * (1 + rounds)  # the first round is not timed


def test_calls_are_interleaved_in_every_order(gpu):
    turns = []

    def named(name):
        return lambda: turns.append(name)

    timing.eager_microseconds({name: named(name) for name in "abc"})
    followed = {pair for pair in pairwise(turns) if pair[0] != pair[1]}
    assert len(followed) == 6 and len({turns.count(name) for name in "abc"}) == 1
