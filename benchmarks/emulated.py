"""Emulated on the CPU against a loop of torch.matmul over the same operands, dequantized beforehand.

Both get quantized or dequantized operands and write bfloat16. The backend dequantizes and multiplies, the loop only
multiplies, in fp32. The goal is a ratio of at most 2. Times are medians of interleaved repeats, so that a busy machine
slows both.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grouped_gemm import BackendKind, Pass, Quantized, Recipe, reference
from grouped_gemm.backends import get_backend

GOAL = 2.0
OUT_DTYPE = torch.bfloat16
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    m: int
    e: int
    k: int
    n: int
    ragged: bool = False

    def __str__(self) -> str:
        return f"{self.m}x{self.e}x{self.k}x{self.n}{' ragged' if self.ragged else ''}"

    def offs(self) -> Tensor:
        """End rows of equal groups, or of ragged ones, sized as 1, 1/2, 1/3, ... with an empty one in the middle."""
        shares = torch.ones(self.e)
        if self.ragged:
            shares = 1 / torch.arange(1, self.e + 1)
            shares[self.e // 2] = 0
        return (shares.cumsum(0) / shares.sum() * self.m).round().to(torch.int32)


SHAPES = (Shape(2048, 8, 1024, 1024), Shape(1024, 32, 512, 512), Shape(2000, 16, 704, 512, ragged=True))


@dataclass(frozen=True)
class Result:
    shape: str
    recipe: str
    pass_: Pass
    emulated_ms: float
    loop_ms: float

    @property
    def ratio(self) -> float:
        return self.emulated_ms / self.loop_ms

    def to_dict(self) -> dict[str, str | float]:
        times = {"emulated_ms": self.emulated_ms, "loop_ms": self.loop_ms, "ratio": self.ratio}
        return {"shape": self.shape, "recipe": self.recipe, "pass": self.pass_.value, **times}


def runs(shape: Shape, recipe: Recipe) -> dict[Pass, tuple[Run, Run]]:
    """For each pass, the backend's run and the loop."""
    torch.manual_seed(0)
    a_MK = torch.randn(shape.m, shape.k, dtype=OUT_DTYPE)
    dy_MN = torch.randn(shape.m, shape.n, dtype=OUT_DTYPE)
    b_EKN = torch.randn(shape.e, shape.n, shape.k, dtype=OUT_DTYPE).transpose(1, 2)
    offs = shape.offs()
    groups = reference.group_slices(offs.tolist())

    backend = get_backend(BackendKind.EMULATED)
    plan = backend.plan(offs, shape.m)
    a_rows, a_columns = backend.quantize_activations(a_MK, plan, recipe, rows=True, columns=True)
    dy_rows, dy_columns = backend.quantize_activations(dy_MN, plan, recipe, rows=True, columns=True)
    b_forward, b_dgrad = backend.quantize_weights(b_EKN, recipe, forward=True, dgrad=True)

    def multiply(lhs: Quantized | None, rhs: Quantized | None) -> tuple[Run, Run]:
        assert lhs is not None and rhs is not None, "they were asked for"
        left = reference.dequantize(lhs.data, lhs.scale, reference.row_blocks(recipe))
        right = reference.dequantize(rhs.data, rhs.scale, reference.weight_blocks(recipe, rhs.axis))
        right = right if rhs.axis == 1 else right.transpose(1, 2)

        def loop() -> Tensor:
            out = torch.empty(shape.m, right.shape[2], dtype=OUT_DTYPE)
            for e, rows in enumerate(groups):
                out[rows] = torch.matmul(left[rows], right[e])
            return out

        return lambda: backend.grouped_mm(lhs, rhs, plan, OUT_DTYPE), loop

    def contract(lhs: Quantized | None, rhs: Quantized | None) -> tuple[Run, Run]:
        assert lhs is not None and rhs is not None, "they were asked for"
        left, right = dequantize_columns(lhs, groups), dequantize_columns(rhs, groups)

        def loop() -> Tensor:
            out = torch.empty(shape.e, shape.k, shape.n, dtype=OUT_DTYPE)
            for e, rows in enumerate(groups):
                out[e] = torch.matmul(left[rows].t(), right[rows])
            return out

        return lambda: backend.wgrad(lhs, rhs, plan, OUT_DTYPE, contiguous="n"), loop

    return {
        Pass.FORWARD: multiply(a_rows, b_forward),
        Pass.DGRAD: multiply(dy_rows, b_dgrad),
        Pass.WGRAD: contract(a_columns, dy_columns),
    }


def dequantize_columns(operand: Quantized, groups: list[slice]) -> Tensor:
    """The fp32 values of an operand of wgrad."""
    out = operand.data.float()
    blocks = reference.column_blocks(operand.recipe)
    scales = reference.column_scale_slices([rows.stop for rows in groups], operand.recipe)
    for rows, scale_rows in zip(groups, scales):
        if operand.scale is not None and rows.start < rows.stop:
            out[rows] = reference.dequantize(operand.data[rows], operand.scale[scale_rows], blocks)
    return out


def medians(functions: tuple[Run, ...], repeats: int) -> list[float]:
    """The median milliseconds of each function; their runs are interleaved."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times):
            start = time.perf_counter()
            function()
            taken.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


def measure(shape: Shape, recipe: Recipe, repeats: int) -> list[Result]:
    results = []
    for pass_, (emulated, loop) in runs(shape, recipe).items():
        torch.testing.assert_close(emulated(), loop())  # the same results; this run also warms up
        results.append(Result(str(shape), recipe.value, pass_, *medians((emulated, loop), repeats)))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grouped_gemm bench emulated", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="runs of which the median is taken")
    parser.add_argument("--threads", type=int, help="threads of torch; 1 is steadiest where others use the machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args()

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.repeats} repeats; shapes MxExKxN")
    print(f"{'shape':24}{'recipe':20}{'pass':10}{'emulated':>12}{'loop':>12}{'ratio':>8}")
    results = []
    for shape in SHAPES:
        for recipe in Recipe:
            for r in measure(shape, recipe, args.repeats):
                results.append(r)
                times = f"{r.emulated_ms:9.2f} ms{r.loop_ms:9.2f} ms{r.ratio:8.2f}"
                print(f"{r.shape:24}{r.recipe:20}{r.pass_.value:10}{times}{'  over' if r.ratio > GOAL else ''}")
    print(f"{sum(r.ratio > GOAL for r in results)} of {len(results)} over the goal of {GOAL}")
    if args.json is not None:
        args.json.write_text(json.dumps([r.to_dict() for r in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
