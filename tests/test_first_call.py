"""A new kind of call compiles its kernels at the same time, before it launches any, and only where that is safe."""

from __future__ import annotations

import json
import sys
import threading
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grouped_gemm import BackendKind, backends, cache_weights, grouped_mm
from grouped_gemm import __main__ as cli
from grouped_gemm.backends import emulated, triton
from grouped_gemm.backends.base import Health
from grouped_gemm.core import replay
from grouped_gemm.selection import route

pytest.importorskip("triton")
from triton.runtime._async_compile import active_mode

from grouped_gemm.kernels import common
from grouped_gemm.kernels.common import launch as launching

X = torch.zeros(8)


class Kernel:
    """A fake of Triton's function, which compiles as that one does."""

    def __init__(self, name: str, compile_it: Any = lambda: None) -> None:
        self.name, self.compile_it = name, compile_it
        self.arg_names = ["x", "BLOCK"]
        self.cache: dict[str, Any] = {}
        self.launches: list[Any] = []
        self.loaded_in: list[threading.Thread] = []

    def compiled(self) -> Any:
        self.compile_it()
        kernel = self

        class Compiled:
            function, packed_metadata = "function", "metadata"

            def __getitem__(self, grid: Any) -> Any:
                return lambda *args: kernel.launches.append(args)

            @cached_property
            def run(self) -> Any:
                kernel.loaded_in.append(threading.current_thread())
                return lambda *args: kernel.launches.append(args[9:])

        return Compiled()

    def warmup(self, *args: Any, grid: Any, **constants: Any) -> None:
        mode = active_mode.get()
        assert mode is not None
        finish = partial(self.cache.__setitem__, "key")
        finish(mode.submit(self.name, self.compiled, finish))

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            if self.cache.get("key") is None:
                self.cache["key"] = self.compiled()
            self.launches.append(args)
            return self.cache["key"]

        return launch


@pytest.fixture
def here(monkeypatch):
    """Devices that are not there."""
    monkeypatch.setattr(launching, "_launchers", {})
    monkeypatch.setattr(launching, "_THREADS", 3)
    streams = SimpleNamespace(get_current_stream=lambda device: 0)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=streams))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    devices: list[int] = []

    class Device:
        def __init__(self, index: int) -> None:
            devices.append(index)

        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Device)
    return devices


def launch(*kernels: Kernel) -> None:
    for kernel in kernels:
        launching.launch(kernel, (1,), X, constants={"BLOCK": 64})


def test_kernels_compile_at_the_same_time_and_none_is_launched(here):
    meet = threading.Barrier(3, timeout=60)
    kernels = [Kernel(str(i), meet.wait) for i in range(3)]
    before = threading.active_count()
    launching.compile_together(lambda: launch(*kernels, *kernels))
    assert not meet.broken and threading.active_count() == before and here == [3, 3, 3]
    assert all(kernel.cache and not kernel.launches for kernel in kernels)
    (loaded_in,) = kernels[0].loaded_in
    assert loaded_in is not threading.current_thread() and not loaded_in.is_alive()


def test_an_error_is_that_of_the_launch_that_needs_the_kernel(here):
    errors = [MemoryError("again"), MemoryError("first")]

    def fail() -> None:
        if errors:
            raise errors.pop()

    broken, good = Kernel("broken", fail), Kernel("good")
    launching.compile_together(lambda: launch(broken, good))
    launch(good)
    with pytest.raises(MemoryError, match="again"):
        launch(broken)
    launch(broken)  # the error is not kept
    assert len(good.launches) == len(broken.launches) == len(good.loaded_in) == 1


def test_another_thread_may_launch_what_is_still_being_compiled(here, monkeypatch):
    begun, launched = threading.Event(), threading.Event()
    kernel = Kernel("a", lambda: launched.wait(60))

    first = launching.Launcher._compile_and_launch

    def before_it_is_compiled(*args: Any) -> Any:
        future = first(*args)
        launched.set()
        return future

    def compile_it() -> None:
        launching.compile_together(lambda: (launch(kernel), begun.set()))

    monkeypatch.setattr(launching.Launcher, "_compile_and_launch", before_it_is_compiled)
    compiling = threading.Thread(target=compile_it)
    compiling.start()
    assert begun.wait(60)
    launch(kernel)
    compiling.join()
    monkeypatch.setattr(launching, "_is_watched", lambda: True)
    launch(kernel)  # by the compiled kernel, which is not a future any more
    assert len(kernel.launches) == 2


@pytest.mark.parametrize("error", (KeyboardInterrupt, torch.OutOfMemoryError))
def test_what_interrupts_it_leaves_nothing_on(here, error):
    def fail() -> None:
        raise error

    kernel = Kernel("a")
    with pytest.raises(error):
        launching.compile_together(lambda: (launch(kernel), fail()))
    assert active_mode.get() is None and not replay.rehearses()
    launch(kernel)
    assert len(kernel.launches) == 1


def test_a_rehearsal_neither_replays_nor_counts_as_a_call(monkeypatch):
    monkeypatch.setattr(replay, "_is_on_gpu", lambda x: True)
    monkeypatch.setattr(replay, "_programs", {})
    ran: list[bool] = []
    call = replay.replayed("a call", lambda x: ran.append(replay.rehearses()))
    for _ in range(3):
        with replay.rehearsal():
            call(X)
    assert ran == [True] * 3 and not replay._programs and not replay.rehearses()


@pytest.mark.parametrize("reason", ("none", "cpu", "capture", "traced"))
def test_it_starts_only_in_eager_calls_on_a_gpu(monkeypatch, reason):
    compiled: list[Any] = []
    monkeypatch.setattr(launching, "compile_together", compiled.append)
    monkeypatch.setattr(launching, "on_device", lambda x: launching._HERE)
    monkeypatch.setattr(triton, "is_capturing", lambda x: reason == "capture")
    monkeypatch.setattr(triton, "is_intercepted", lambda: reason == "traced")
    x: Any = SimpleNamespace(is_cuda=reason != "cpu")
    triton.Backend().compile_together(lambda: None, x)
    assert len(compiled) == (reason == "none")


@pytest.mark.parametrize("broken", ("import", "run"))
def test_no_error_of_it_reaches_the_caller(monkeypatch, broken):
    def fail(run: Any) -> None:
        raise torch.OutOfMemoryError

    if broken == "import":
        monkeypatch.delattr(common, "launch")
        monkeypatch.setitem(sys.modules, launching.__name__, None)
    monkeypatch.setattr(launching, "compile_together", fail)
    monkeypatch.setattr(launching, "on_device", lambda x: launching._HERE)
    monkeypatch.setattr(triton, "is_capturing", lambda x: False)
    x: Any = SimpleNamespace(is_cuda=True)
    triton.Backend().compile_together(lambda: None, x)


class Watched(emulated.Backend):
    """Writes down in which order it is asked to compile, checked and run."""

    def __init__(self, runs: bool) -> None:
        self.runs, self.events = runs, []

    def compile_together(self, run: Any, x: torch.Tensor) -> None:
        self.events.append("compile")
        if self.runs:
            run()

    def health(self, device: torch.device) -> Health:
        self.events.append("health")
        return Health()


@pytest.fixture
def watch(monkeypatch):
    def start(runs: bool = False) -> Watched:
        backend = Watched(runs)
        monkeypatch.setitem(backends._instances, BackendKind.EMULATED, backend)
        backends.candidates.cache_clear()
        route.reset_caches()
        return backend

    yield start
    monkeypatch.undo()
    backends.candidates.cache_clear()
    route.reset_caches()


def operands(num_rows: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a = torch.randn(num_rows, 32).bfloat16().requires_grad_()
    w = torch.randn(2, 16, 32).bfloat16().requires_grad_()
    return a, w, torch.tensor([3, num_rows], dtype=torch.int32)


def test_each_kind_of_call_compiles_once_and_before_the_health_check(watch):
    backend = watch()
    for num_rows in (8, 8, 9):
        a, w, offs = operands(num_rows)
        grouped_mm(a, w.transpose(1, 2), offs)
    assert backend.events == ["compile", "health"]
    with torch.no_grad():
        grouped_mm(a, w.transpose(1, 2), offs)
    assert backend.events == ["compile", "health", "compile"]


def test_code_that_is_traced_compiles_nothing(watch):
    backend = watch()
    a, w, offs = operands()
    torch.compile(grouped_mm, backend="eager", fullgraph=True)(a, w.transpose(1, 2), offs)
    assert backend.events == ["health"]


@pytest.mark.parametrize("recipe", ("none", "fp8_rowwise", "fp8_blockwise"))
def test_what_is_compiled_changes_no_result_and_caches_no_weights(watch, recipe):
    results = []
    for runs in (False, True):
        backend = watch(runs)
        a, w, offs = operands()
        bias = torch.randn(2, 16, requires_grad=True)
        w.main_grad = torch.ones(w.shape)  # type: ignore[attr-defined]
        with cache_weights():
            y = grouped_mm(a, w.transpose(1, 2), offs, recipe=recipe, bias=bias.bfloat16(), accumulate_main_grad=True)
        y.sum().backward()
        results.append((y.detach(), a.grad, bias.grad, w.main_grad))
        assert backend.events == ["compile", "health"]
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("trains", (False, True))
def test_memory_for_a_sum_of_gradients_is_taken_only_where_there_are_gradients(watch, monkeypatch, trains):
    watch(runs=True)
    a, w, offs = operands()
    w.main_grad = torch.zeros(w.shape)  # type: ignore[attr-defined]
    like, sizes = torch.empty_like, []
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: sizes.append(x.shape) or like(x, **options))
    with torch.set_grad_enabled(trains):
        grouped_mm(a, w.transpose(1, 2), offs, accumulate_main_grad=True)
    assert sizes == [(2, 32, 16)] * trains


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the benchmark would run on it")
def test_a_first_step_needs_few_kernels(tmp_path, capsys):
    """Compiled ahead for an H100: two of the health check, and five of the step."""
    command = ["bench", "first_call", "--recipes", "fp8_blockwise", "--modes", "together"]
    cli.main([*command, "--json", str(tmp_path / "run.json")])
    (row,) = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert row["kernels"] == 7 and row["forward"] > 0 and row["backward"] > 0
    assert "fp8_blockwise" in capsys.readouterr().out
