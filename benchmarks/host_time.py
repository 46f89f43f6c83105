"""Host time of an eager call: microseconds of Python between the caller and the kernels, on a CPU.

The Triton backend runs with ops that compute nothing, which leaves checks, selection, wrappers and autograd. The time
of the ops alone, for torch's dispatcher and allocations, is measured separately and subtracted. Times are the best of
several repeats, since other work on the machine only ever adds to them.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import argparse
import json
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grouped_gemm import BackendKind, Recipe, autograd, backends, functional, grouped_mm, quantize_weights
from grouped_gemm.backends import triton
from grouped_gemm.backends.base import _GroupedMMBackend
from grouped_gemm.core.library import ops
from grouped_gemm.kernels.quantize import layouts
from grouped_gemm.selection import rules

M, E, K, N = 64, 4, 32, 48
Run = Callable[[], Any]


class TritonWithoutGPU(triton.Backend):
    """The Triton backend, on a machine without a GPU."""

    requirements: Any = ()
    health = _GroupedMMBackend.health


def quantized_activations(
    x: Tensor, offs: Tensor, recipe: str, rows: bool, columns: bool, *blocks: Any
) -> tuple[Tensor, ...]:
    return once(layouts.activations, x.shape, offs.shape[0], Recipe(recipe), rows=rows, columns=columns)


def quantized_weights(b: Tensor, recipe: str, forward: bool, dgrad: bool) -> tuple[Tensor, ...]:
    return once(layouts.weights, b.shape, Recipe(recipe), forward=forward, dgrad=dgrad)


def once(allocate: Callable[..., tuple[Tensor, ...]], shape: torch.Size, *args: Any, **flags: bool) -> Any:
    """What ``allocate`` returns for a tensor of ``shape``, allocated at the first call."""
    key = (allocate, shape, *args, *flags.values())
    if key not in _allocated:
        _allocated[key] = allocate(torch.empty(shape, dtype=torch.bfloat16), *args, **flags)
    return _allocated[key]


_allocated: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}


def gemm(lhs: Tensor, lhs_scale: Tensor | None, rhs: Tensor, *rest: Any) -> Tensor:
    return lhs.new_empty(lhs.shape[0], rhs.shape[2], dtype=rest[-1])


def wgrad(lhs: Tensor, lhs_scale: Tensor | None, rhs: Tensor, rhs_scale: Any, offs: Tensor, *rest: Any) -> Tensor:
    return lhs.new_empty(offs.shape[0], lhs.shape[1], rhs.shape[1], dtype=rest[-1])


# GEMMs return a new tensor at each call, since autograd attaches its history to the output.
EMPTY_OPS: dict[str, Any] = {
    "triton_grouped_mm": gemm,
    "triton_wgrad": wgrad,
    "triton_quantize_activations": quantized_activations,
    "triton_quantize_weights": quantized_weights,
    "triton_token_blocks": lambda offs, num_rows: offs,
}


def best_of_ops(run: Run, repeats: int) -> float:
    """Microseconds of the ops that ``run`` calls, alone."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    def recorder(op: Any) -> Any:
        def record(*args: Any) -> Any:
            calls.append((op, args))
            return op(*args)

        return record

    with mock.patch.multiple(ops, **{name: recorder(op) for name, op in EMPTY_OPS.items()}):
        run()

    def replay() -> None:
        for op, args in calls:
            op(*args)

    with torch.no_grad():
        return best(replay, repeats)


def best(run: Run, repeats: int, number: int = 50) -> float:
    """Microseconds of the fastest of ``repeats`` loops, per run."""
    run()
    return min(timeit.repeat(run, number=number, repeat=repeats)) / number * 1e6


class BareFunction(torch.autograd.Function):
    """A function without work: the time of autograd alone for two operands."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.saved_tensors, None)


def measure_forward(recipe: Recipe, repeats: int, prequantized: bool = False) -> dict[str, float]:
    """A call without gradients, and its parts."""
    a, b, offs = operands()
    weights = quantize_weights(b, recipe) if prequantized else b

    def call() -> Tensor:
        return grouped_mm(a, weights, offs, recipe=recipe)

    with mock.patch.object(functional, "run_forward", wraps=autograd.run_forward) as spied:
        call()
    passed = spied.call_args.args
    whole, run = best(call, repeats), best(lambda: autograd.run_forward(*passed), repeats)
    ops = best_of_ops(call, repeats)
    return {
        "checks and selection": whole - run,
        "backend's wrappers": run - ops,
        "before the ops": whole - ops,
        "ops": ops,
    }


def measure_training(recipe: Recipe, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Forward of a call with gradients of both operands, and its backward."""
    a, b, offs = operands()
    a.requires_grad_()
    b.requires_grad_()

    def forward() -> Tensor:
        return grouped_mm(a, b, offs, recipe=recipe)

    y = forward()
    dy = torch.randn_like(y)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (a, b), dy, retain_graph=True)

    bare_y = y.detach()
    z = BareFunction.apply(a, b, bare_y.clone())
    found = []
    for run, bare in (
        (forward, lambda: BareFunction.apply(a, b, bare_y.detach())),
        (backward, lambda: torch.autograd.grad(z, (a, b), dy, retain_graph=True)),
    ):
        whole, ops, floor = best(run, repeats), best_of_ops(run, repeats), best(bare, repeats)
        found.append({"around the ops": whole - ops, "of which autograd": floor, "ops": ops})
    return found[0], found[1]


def operands() -> tuple[Tensor, Tensor, Tensor]:
    a = torch.randn(M, K, dtype=torch.bfloat16)
    b = torch.randn(E, N, K, dtype=torch.bfloat16).transpose(1, 2).detach()
    return a, b, torch.tensor([16, 16, 40, 64], dtype=torch.int32)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grouped_gemm bench host_time", description=__doc__)
    parser.add_argument("--repeats", type=int, default=300, help="loops of which the fastest counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args()

    torch.set_num_threads(1)
    with (
        mock.patch.multiple(ops, **EMPTY_OPS),
        mock.patch.dict(backends._instances, {BackendKind.TRITON: TritonWithoutGPU()}),
        mock.patch.dict(rules.FIRST, {"": (BackendKind.TRITON,)}),
    ):
        results = {}
        for recipe in (Recipe.NONE, Recipe.FP8_BLOCKWISE):
            results[f"{recipe.value}, forward alone"] = measure_forward(recipe, args.repeats)
            forward, backward = measure_training(recipe, args.repeats)
            results[f"{recipe.value}, training, forward"] = forward
            results[f"{recipe.value}, training, backward"] = backward
        name = f"{Recipe.FP8_BLOCKWISE.value}, forward alone, quantized weights"
        results[name] = measure_forward(Recipe.FP8_BLOCKWISE, args.repeats, prequantized=True)

    print(f"torch {torch.__version__}, best of {args.repeats}, microseconds")
    for name, parts in results.items():
        print(f"{name:50}" + ", ".join(f"{part} {time:.1f}" for part, time in parts.items()))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
