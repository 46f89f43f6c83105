"""Host time of an eager call, in microseconds: the first one with its shapes, and a replayed one (`core/replay.py`).

On a GPU, calls are so small that the host is what takes the time. `torch._grouped_mm` in bf16 is timed as well, eager
and compiled, and the goals are printed: 1.3 of torch's time in bf16, forward and step, and 2.5 of torch's bf16 step in
FP8.

On a CPU, the Triton backend runs with launches that do nothing. That leaves Python, autograd and allocations.

A "first" call is one whose program has been forgotten; compiled kernels and decisions are kept. A step is forward and
backward. Times are the best of several loops, since other work on the machine only ever adds to them.

M, E, K, N: rows, groups, in and out features. T, k, H, I: tokens, experts per token, hidden and inner features.
"""

from __future__ import annotations

import argparse
import functools
import json
import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grouped_gemm import BackendKind, Recipe, backends, grouped_mm, quantize_weights
from grouped_gemm.backends import triton
from grouped_gemm.backends.base import _GroupedMMBackend
from grouped_gemm.core import machine, replay
from grouped_gemm.kernels.common import launch
from grouped_gemm.kernels.gemm import k_grouped_hopper
from grouped_gemm.moe import experts_forward
from grouped_gemm.selection import route, rules

M, E, K, N = 256, 4, 256, 512
T, TOP_K, H, I = 64, 2, 256, 512  # noqa: E741
RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE)
GOALS = {"none forward": 1.3, "none step": 1.3, "fp8_rowwise step": 2.5, "fp8_blockwise step": 2.5}  # of torch's time
Run = Callable[[], Any]


class TritonWithoutGPU(triton.Backend):
    """The Triton backend, on a machine without a GPU."""

    requirements: Any = ()
    health = _GroupedMMBackend.health


def _launch_nothing(launcher: launch.Launcher, grid: tuple[int, ...], *args: Any) -> None:
    """A launch, which is recorded as on a GPU."""
    if (recording := replay.current()) is not None:
        run: Any = SimpleNamespace(
            launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0, profile_scratch_size=0
        )
        whole = SimpleNamespace(metadata=SimpleNamespace(tensordesc_meta=[{}] * 9))
        compiled = launch._Compiled(whole, run, 0, "metadata", lambda device: 0)
        recording.add(launch.Prepared.of(compiled, 0, grid, (*args, *launcher._values), recording.place))


@contextmanager
def launches_that_do_nothing() -> Iterator[None]:
    """The Triton backend on a CPU, which replays, with the kernels of Hopper."""
    hopper = machine.Machine("nvidia", "sm_90", "CPU", machine.machine_of("cpu").versions)
    with ExitStack() as stack:
        for target, name, value in (
            (machine, "_probe", lambda *device: hopper),
            (launch.Launcher, "__call__", _launch_nothing),
            (launch, "_function_in_c", lambda run: lambda *args: None),
            (launch, "_encode", lambda *args: 0),
            (replay, "_is_on_gpu", lambda x: True),
            (replay, "_new_empty", lambda *form: torch.empty_strided(*form[:2], dtype=form[2])),
            (replay, "_current_device", lambda: -1),  # that of tensors on a CPU
            (k_grouped_hopper, "num_processors", lambda device: 132),
            (launch, "_thread", SimpleNamespace(has_context=True)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.dict(backends._instances, {BackendKind.TRITON: TritonWithoutGPU()}))
        stack.enter_context(mock.patch.dict(rules.FIRST, {"": (BackendKind.TRITON,)}))
        for forget in (backends.candidates.cache_clear, route.reset_caches):  # what was decided with the real backend
            forget()
            stack.callback(forget)
        yield


def best(run: Run, repeats: int, is_cuda: bool, number: int = 30) -> float:
    """Microseconds of the fastest of ``repeats`` loops, per run."""
    run()
    wait = torch.cuda.synchronize if is_cuda else lambda: None
    times = []
    for _ in range(repeats):
        wait()  # so that no launch has to
        times.append(timeit.timeit(run, number=number))
    wait()
    return min(times) / number * 1e6


def step(forward: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> Run:
    """Forward and backward."""
    dy = torch.randn_like(forward(*leaves))
    return lambda: torch.autograd.grad(forward(*leaves), leaves, dy)


def without_gradients(forward: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> Run:
    def run() -> Tensor:
        with torch.no_grad():
            return forward(*leaves)

    return run


class Nothing(torch.autograd.Function):
    """Allocates what a call on the same operands returns: the least that autograd takes for a function in Python."""

    @staticmethod
    def forward(ctx: Any, a_MK: Tensor, w_ENK: Tensor) -> Tensor:
        ctx.save_for_backward(a_MK, w_ENK)
        return a_MK.new_empty(a_MK.shape[0], w_ENK.shape[1])

    @staticmethod
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor, Tensor]:
        a_MK, w_ENK = ctx.saved_tensors
        return torch.empty_like(a_MK), torch.empty_like(w_ENK)


def calls(device: torch.device) -> dict[str, Run]:
    """What is timed, by name."""

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).bfloat16().requires_grad_()

    a, w = leaf(M, K), leaf(E, N, K)
    offs = torch.tensor([16, 16, 160, M], dtype=torch.int32, device=device)
    found: dict[str, Run] = {}
    for recipe in RECIPES:

        def multiply(a: Tensor, w: Tensor, recipe: Recipe = recipe) -> Tensor:
            return grouped_mm(a, w.transpose(1, 2), offs, recipe=recipe)

        found[f"{recipe.value} forward"] = without_gradients(multiply, (a, w))
        found[f"{recipe.value} step"] = step(multiply, (a, w))
    quantized = quantize_weights(w.detach().transpose(1, 2), Recipe.FP8_BLOCKWISE)
    found["fp8_blockwise forward, quantized weights"] = lambda: grouped_mm(a.detach(), quantized, offs)
    found["a function that does nothing, step"] = step(Nothing.apply, (a, w))
    gate_up, down, x = leaf(E, 2 * I, H), leaf(E, H, I), leaf(T, H)
    ids, weights = torch.rand(T, E, device=device).topk(TOP_K).indices, torch.rand(T, TOP_K, device=device)

    def layer(x: Tensor, gate_up: Tensor, down: Tensor, recipe: Recipe | None = None) -> Tensor:
        return experts_forward(x, ids[: len(x)], weights[: len(x)], gate_up, down, recipe=recipe)

    quantizing = functools.partial(layer, recipe=Recipe.FP8_BLOCKWISE)
    found["experts_forward"] = without_gradients(layer, (x, gate_up, down))
    found["experts_forward, one token"] = without_gradients(layer, (x[:1].detach(), gate_up, down))
    found["experts_forward step"] = step(layer, (x, gate_up, down))
    found["experts_forward fp8_blockwise"] = without_gradients(quantizing, (x, gate_up, down))
    found["experts_forward fp8_blockwise step"] = step(quantizing, (x, gate_up, down))
    if device.type != "cuda":
        return found

    def of_torch(a: Tensor, w: Tensor) -> Tensor:
        return torch._grouped_mm(a, w.transpose(1, 2), offs=offs)

    found |= {"torch forward": without_gradients(of_torch, (a, w)), "torch step": step(of_torch, (a, w))}
    for name, function in {"none": lambda a, w: grouped_mm(a, w.transpose(1, 2), offs), "torch": of_torch}.items():
        compiled = torch.compile(function, fullgraph=True)
        found[f"{name} forward, compiled"] = without_gradients(compiled, (a, w))
        found[f"{name} step, compiled"] = step(compiled, (a, w))
    return found


def measure(device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds by call, of the first one and of a replayed one, and how many programs that runs."""
    is_cuda, results = device.type == "cuda", {}
    for name, run in calls(device).items():
        with mock.patch.object(replay, "_is_on_gpu", lambda x: False):  # as the first one runs
            first = best(run, repeats, is_cuda)
        for _ in range(3):
            run()
        results[name] = {"first": first, "replayed": best(run, repeats, is_cuda), "programs": programs_of(run)}
    return results


def programs_of(run: Run) -> int:
    """How many programs a replayed call runs."""
    ran, play = [], replay.Program.run

    def counted(program: replay.Program, *args: Any) -> Any:
        ran.append(program)
        return play(program, *args)

    with mock.patch.object(replay.Program, "run", counted):
        run()
    return len(ran)


def report(results: dict[str, dict[str, float]]) -> None:
    for name, us in results.items():
        of_torch = results.get(f"torch {name.partition(' ')[2]}", {}).get("replayed")
        goal = f", goal {GOALS[name]}" if name in GOALS else ""
        ratio = f"{us['replayed'] / of_torch:6.2f} of torch's in bf16{goal}" if of_torch else ""
        print(
            f"{name:42} first {us['first']:7.1f}  replayed {us['replayed']:7.1f} us, {us['programs']} programs {ratio}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grouped_gemm bench host_time", description=__doc__)
    parser.add_argument("--repeats", type=int, default=50, help="loops of which the fastest counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        where, results = torch.cuda.get_device_name(), measure(device, args.repeats)
    else:
        torch.set_num_threads(1)
        with launches_that_do_nothing():
            where, results = "launches that do nothing", measure(device, args.repeats)
    print(f"torch {torch.__version__}, {where}, best of {args.repeats}, microseconds")
    report(results)
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
