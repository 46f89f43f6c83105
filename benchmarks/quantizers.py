"""The quantizers, beside a copy of as many bytes, torch.compile of the same math, and torchao where it has one.

    python -m grouped_gemm bench quantizers
    python -m grouped_gemm bench quantizers --shapes seed qwen3_gateup --recipes fp8_rowwise --json run.json
    python -m grouped_gemm bench quantizers --device cpu                       # the emulated backend, tiny shapes

A share is the time of a copy over the time of a quantizer, where the copy reads and writes as many bytes in all as the
quantizer must: each input read once, each output written once. Scales, which add at most 3%, are not counted. Calls
include what they allocate and launch. Times are medians of single calls with a cold L2; a quantizer, its copy and its
peers take turns. Groups are ragged. Weights lie with K or with N contiguous in memory.

Peers do no more than they must: torch.compile quantizes groups of equal size, which it can see as one tensor, and
writes each layout that the quantizer writes, transposed where GEMMs need it. The last lines say which goals the run has
reached, and the geometric means over the shapes of a MoE's backward, which have many small groups.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from _calls import cold_samples, free
from _common import ends_of, failures, reason_of
from _report import SHAPES, Goal, sizes
from torch import Tensor

from grouped_gemm import Recipe, reference
from grouped_gemm.backends import get_backend
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind

RECIPES = (Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)
# M, E, N, K. What is quantized in the backward of a MoE layer: x and dy, with many small groups.
SWEEP = {f"backward_{e}x{k}": (16640, e, 2048, k) for e in (64, 128) for k in (2048, 5120)}
ALL = {name: SHAPES[name] for name in ("seed", "qwen3_gateup")} | SWEEP
TINY = {"tiny": (256, 4, 64, 128)}
ACTIVATIONS = {"rows": (True, False), "columns": (False, True), "both": (True, True)}
WEIGHTS = {"weights, K contiguous": 1, "weights, N contiguous": 2}
# The least share of a copy. Rowwise, scales of columns need the whole group and weights are quantized along both axes,
# so the input is read twice: without help from L2, both layouts cannot exceed 0.67.
GOALS = {
    (Recipe.FP8_ROWWISE, "rows"): 0.9,
    (Recipe.FP8_ROWWISE, "both"): 0.6,
    (Recipe.FP8_BLOCKWISE, "rows"): 0.9,
    (Recipe.FP8_BLOCKWISE, "columns"): 0.85,
    (Recipe.FP8_BLOCKWISE, "both"): 0.85,
} | {(recipe, what): goal for recipe, goal in zip(RECIPES, (0.6, 0.85)) for what in WEIGHTS}
Call = Callable[[], Any]
Row = dict[str, Any]


def measure(shape: str, recipe: Recipe, device: str, rounds: int, peers: bool) -> list[Row]:
    """The times of all quantizers of a recipe on one shape, in microseconds."""
    num_rows, num_groups, n, k = (ALL | TINY)[shape]
    backend = get_backend(BackendKind.TRITON if device == "cuda" else BackendKind.EMULATED)
    x = torch.randn(num_rows, k, device=device, dtype=torch.bfloat16)
    w = torch.randn(num_groups, n, k, device=device, dtype=torch.bfloat16)
    offs = ends_of(num_rows, num_groups, "ragged", device)
    blocks = backend.needs_blocks(recipe, True)
    plan = backend.plan(offs, num_rows, blocks=blocks)  # made once for all operands of a layer, so it is not timed
    cases: dict[str, tuple[Tensor, Call]] = {}
    for what, (rows, columns) in ACTIVATIONS.items():
        cases[what] = (
            x,
            lambda rows=rows, columns=columns: backend.quantize_activations(
                x, plan, recipe, rows=rows, columns=columns
            ),
        )
    for what, axis in WEIGHTS.items():
        b = w.transpose(1, 2) if axis == 1 else w.transpose(1, 2).contiguous()
        cases[what] = b, lambda b=b: backend.quantize_weights(b, recipe, forward=True, dgrad=True)
    found = []
    for what, (source, call) in cases.items():
        layouts = 1 if what in ("rows", "columns") else 2
        nbytes = (2 + layouts) * source.numel()
        calls = {"": call, "copy": copy_of(nbytes, device)}
        if peers:
            calls |= compiled_peers(what, source, num_groups, recipe) | torchao_peers(what, source, offs, recipe)
        samples, errors = cold_samples(calls, rounds)
        for peer, error in errors.items():
            print(f"FAILED {shape} {recipe.value} {what} {peer}: {error}", flush=True)
            failures.extend([] if peer.startswith("torch") else [f"{shape} {recipe.value} {what} {peer}: {error}"])
        us = {name: statistics.median(times) for name, times in samples.items()}
        row = {"shape": shape, "recipe": recipe.value, "quantizer": what, "bytes": nbytes}
        found.append(row | {"us": us.pop("", None), "copy_us": us.pop("copy", None), "peers": us})
        print(describe(found[-1]), flush=True)
        torch._dynamo.reset()
    return found


def copy_of(nbytes: int, device: str) -> Call:
    """A copy that reads and writes ``nbytes`` in all."""
    source = torch.zeros(nbytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compiled_peers(what: str, source: Tensor, num_groups: int, recipe: Recipe) -> dict[str, Call]:
    """torch.compile of the same formulas."""
    fp8 = machine_of(source.device).fp8_dtype

    def transposed(x: Tensor) -> Tensor:
        return x.transpose(-1, -2).contiguous()

    def by_rows(x: Tensor) -> Any:
        return reference.quantize(x, reference.row_blocks(recipe), recipe, fp8)

    def by_columns(x: Tensor) -> Any:  # of groups of equal size
        data, scale = reference.quantize(
            x.view(num_groups, -1, x.shape[1]), (1, *reference.column_blocks(recipe)), recipe, fp8
        )
        return transposed(data), scale

    def both(x: Tensor) -> Any:
        return by_rows(x), by_columns(x)

    def weights(w: Tensor) -> Any:
        forward, dgrad = (reference.quantize(w, reference.weight_blocks(recipe, axis), recipe, fp8) for axis in (1, 2))
        straight, other = (forward, dgrad) if w.stride(1) == 1 else (dgrad, forward)
        return straight, transposed(other[0]), other[1]

    functions = {"rows": by_rows, "columns": by_columns, "both": both}
    compiled = torch.compile(functions.get(what, weights), dynamic=False)
    return {"torch.compile": lambda: compiled(source)}


def torchao_peers(what: str, source: Tensor, offs: Tensor, recipe: Recipe) -> dict[str, Call]:
    """torchao's kernels, which write other layouts. Weights: those that it has for this memory order."""
    if not source.is_cuda:
        return {}
    try:
        if recipe is Recipe.FP8_ROWWISE:
            from torchao.prototype.moe_training.kernels import (
                triton_fp8_colwise_3d_scale_and_cast,
                triton_fp8_per_group_colwise_scales,
                triton_fp8_rowwise_2d_scale_and_cast,
                triton_fp8_rowwise_3d_transpose_rhs,
            )

            kernels: dict[str, list[Call]] = {
                "rows": [lambda: triton_fp8_rowwise_2d_scale_and_cast(source)],
                "columns": [lambda: triton_fp8_per_group_colwise_scales(source, offs)],
                "weights, K contiguous": [
                    lambda: triton_fp8_colwise_3d_scale_and_cast(source),
                    lambda: triton_fp8_rowwise_3d_transpose_rhs(source),
                ],
            }
        elif recipe is Recipe.FP8_BLOCKWISE:
            from torchao.prototype.blockwise_fp8_training.grouped_kernels import (
                triton_fp8_blockwise_weight_quant_grouped_rhs,
                triton_fp8_blockwise_weight_quant_grouped_transposed_rhs,
            )
            from torchao.prototype.blockwise_fp8_training.kernels import (
                triton_fp8_blockwise_act_quant_lhs,
                triton_fp8_blockwise_act_quant_transposed_lhs,
            )

            kernels = {
                "rows": [lambda: triton_fp8_blockwise_act_quant_lhs(source)],
                "columns": [lambda: triton_fp8_blockwise_act_quant_transposed_lhs(source)],
                "weights, K contiguous": [
                    lambda: triton_fp8_blockwise_weight_quant_grouped_transposed_rhs(source),
                    lambda: triton_fp8_blockwise_weight_quant_grouped_rhs(source),
                ],
            }
        else:
            from torchao.prototype.mx_formats.kernels import triton_to_mxfp8_dim0, triton_to_mxfp8_dim1

            kernels = {
                "rows": [lambda: triton_to_mxfp8_dim0(source)],
                "columns": [lambda: triton_to_mxfp8_dim1(source)],
            }
    except ImportError as error:
        if not torchao_missing:
            print(f"left out  torchao: {reason_of(error)}", flush=True)
        torchao_missing.append(recipe)
        return {}
    kernels["both"] = kernels["rows"] + kernels["columns"]
    return {"torchao": lambda: [kernel() for kernel in kernels[what]]} if what in kernels else {}


torchao_missing: list[Recipe] = []


def share(row: Row) -> float | None:
    """The time of the copy over that of the quantizer; None if one of them failed."""
    return row["copy_us"] / row["us"] if row["us"] and row["copy_us"] else None


def name(row: Row) -> str:
    return f"{row['shape']} {row['recipe']} {row['quantizer']}"


def describe(row: Row) -> str:
    """One line: microseconds, GB/s, the share, and how many times as fast as each peer."""
    us, found = row["us"] or math.nan, share(row) or math.nan
    peers = "".join(f"  {peer} {theirs:.0f} us, {theirs / us:.2f}x" for peer, theirs in row["peers"].items())
    return f"{name(row):52}{us:8.0f} us{row['bytes'] / us / 1e3:7.0f} GB/s{found:6.2f} of a copy{peers}"


def goals(rows: Iterable[Row]) -> list[Goal]:
    """The goals, each with its cases among ``rows``, without the sweep, where launches take as long as kernels."""
    rows = [row for row in rows if row["shape"] not in SWEEP]
    found = []
    for (recipe, what), limit in GOALS.items():
        mine = [row for row in rows if (row["recipe"], row["quantizer"]) == (recipe.value, what)]
        found.append(Goal(f"{recipe.value} {what}", limit, [(name(row), share(row)) for row in mine]))
    return found


def means(rows: Iterable[Row]) -> list[str]:
    """Geometric means over the sweep: of the shares, and of the speed over each peer."""
    lines = []
    rows = [row for row in rows if row["shape"] in SWEEP]
    for recipe, what in dict.fromkeys((row["recipe"], row["quantizer"]) for row in rows):
        mine = [row for row in rows if (row["recipe"], row["quantizer"]) == (recipe, what)]
        shares = [found for row in mine if (found := share(row))]
        if not shares:
            continue
        text = f"  {f'{recipe} {what}':38}{statistics.geometric_mean(shares):5.2f} of a copy"
        for peer in dict.fromkeys(peer for row in mine for peer in row["peers"]):
            ratios = [row["peers"][peer] / row["us"] for row in mine if row["us"] and peer in row["peers"]]
            text += f", {statistics.geometric_mean(ratios):.2f}x {peer} ({len(ratios)} of {len(mine)})"
        lines.append(text)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grouped_gemm bench quantizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="*", choices=[*ALL, *TINY], help="default: all; on a CPU tiny")
    values = [recipe.value for recipe in RECIPES]
    parser.add_argument("--recipes", nargs="*", choices=values, default=values)
    parser.add_argument("--rounds", type=int, default=30, help="calls of which the median is taken")
    parser.add_argument("--no-peers", action="store_true", help="leave out torch.compile, which compiles, and torchao")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the run to this file")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    shapes = args.shapes or list(ALL if on_gpu else TINY)
    machine = machine_of(args.device)
    versions = {package: str(machine.version(package)) for package in ("torch", "triton")}
    print(machine.name, versions, flush=True)
    print("M x E x N x K: " + ", ".join(f"{shape} {sizes(shape, ALL | TINY)}" for shape in shapes), flush=True)
    torch.manual_seed(0)
    rows: list[Row] = []
    for shape in shapes:
        for recipe in map(Recipe, args.recipes):
            try:
                rows += measure(shape, recipe, args.device, args.rounds, not args.no_peers)
            except Exception as error:
                failures.append(f"{shape} {recipe.value}: {reason_of(error)}")
                print(f"FAILED {failures[-1]}", flush=True)
            if on_gpu:
                free()
    print("\ngoals, in this run: shares of a copy")
    for goal in goals(rows):
        print(goal)
    print("\n".join(["\ngeometric means of the sweep", *means(rows), f"\n{len(failures)} failures", *failures]))
    if args.json:
        run = {"device": machine.name, "versions": versions, "rows": rows, "failures": failures}
        args.json.write_text(json.dumps(run, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
