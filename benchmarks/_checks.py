"""Checks before timing: results against `reference`, on small ragged cases and on some groups of the timed shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _common import DEVICE, FP8, RECIPES, TRITON, attempt, failures, poison, relative_error

from grouped_gemm import Recipe, grouped_mm, reference
from grouped_gemm.backends.base import OffsetPlan


def check_small() -> None:
    """Forward, dgrad, wgrad and bias on ragged groups with rows past the last one, against `reference` in fp64."""
    cases = [(4000, 704, 2880, True), (4000, 2880, 704, False), (300, 100, 50, True), (300, 16, 200, False)]
    for recipe in Recipe:
        for num_rows, k, n, k_contiguous in cases:
            name = f"{recipe.value} M={num_rows} K={k} N={n} {'k' if k_contiguous else 'n'} contiguous"
            attempt(name, lambda: check_case(name, recipe, num_rows, k, n, k_contiguous))  # noqa: B023
    for recipe in RECIPES[1:]:
        attempt(f"quantizers {recipe.value}", lambda: check_quantizers(recipe))  # noqa: B023


def check_case(name: str, recipe: Recipe, num_rows: int, k: int, n: int, k_contiguous: bool) -> None:
    ends = [0, num_rows // 3, num_rows // 3, num_rows // 2 + 7, num_rows - 61]
    offs = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    a = torch.randn(num_rows, k, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(5, n, k, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    b = b if k_contiguous else b.contiguous()
    dy = torch.randn(num_rows, n, device=DEVICE, dtype=torch.bfloat16)
    a[ends[-1] :], dy[ends[-1] :] = float("nan"), float("nan")
    a.requires_grad_(), b.requires_grad_()

    def passes(backend: str) -> tuple[torch.Tensor, ...]:
        poison(num_rows, n, torch.bfloat16)
        y = grouped_mm(a, b, offs, recipe=recipe, kernel_preference=backend)
        poison(num_rows, k, torch.bfloat16)
        return (y, *torch.autograd.grad(y, (a, b), dy))

    errors = [relative_error(x, truth) for x, truth in zip(passes("triton"), passes("emulated"))]
    y = grouped_mm(a, b, offs, recipe=recipe, kernel_preference="triton")
    past = bool((y[ends[-1] :] == 0).all())
    empty = bool((torch.autograd.grad(y, b, dy)[0][2] == 0).all())
    good = past and empty and all(error < 5e-3 for error in errors)
    print(f"{'ok  ' if good else 'BAD '} {name}: " + " ".join(f"{error:.1e}" for error in errors), flush=True)
    if not good:
        failures.append(f"{name}: errors {errors}, zero past the end {past}, zero where empty {empty}")


def check_quantizers(recipe: Recipe) -> None:
    """The quantizers give the bits of `reference` on the CPU."""
    ends = [130, 130, 263, 700]
    x = torch.randn(777, 1000, dtype=torch.bfloat16) * torch.randn(777, 1).exp().bfloat16()
    x[5, 7], x[300, 9], x[400] = float("nan"), float("inf"), 0
    plan = OffsetPlan(torch.tensor(ends, dtype=torch.int32, device=DEVICE), 777)
    rows, columns = TRITON.quantize_activations(x.to(DEVICE), plan, recipe, rows=True, columns=True)
    same = []
    data, scale = reference.quantize(x[:700], reference.row_blocks(recipe), recipe, FP8)
    found = rows.scale[:, None]
    if recipe.block is not None:  # the scales of a group begin at a multiple of four
        found = torch.cat([rows.scale[:, :130], rows.scale[:, 132:265], rows.scale[:, 268:705]], 1).t()
    same += [is_same(rows.data[:700], data), is_same(found[:700], scale)]
    data, scale = reference.quantize_columns(x, ends, recipe, FP8)
    same += [is_same(columns.scale, scale)]
    by_token = columns.data.transpose(1, 2).flatten(0, 1)
    block = 0
    for group in reference.group_slices(ends):
        length = group.stop - group.start
        same += [is_same(by_token[block * 128 : block * 128 + length], data[group])]
        block += -(-length // 128)
    w = torch.randn(3, 300, 200, dtype=torch.bfloat16)
    for b in (w, w.transpose(1, 2)):
        for operand in TRITON.quantize_weights(b.to(DEVICE), recipe, forward=True, dgrad=True):
            data, scale = reference.quantize(b, reference.weight_blocks(recipe, operand.axis), recipe, FP8)
            scale = scale if recipe.block else scale.squeeze(operand.axis)
            same += [is_same(operand.data, data), is_same(operand.scale, scale)]
    print(f"{'ok  ' if all(same) else 'BAD '} quantizers {recipe.value}, bit for bit: {same}", flush=True)
    if not all(same):
        failures.append(f"quantizers {recipe.value} differ from reference: {same}")


def is_same(x: torch.Tensor, truth: torch.Tensor) -> bool:
    return torch.equal(x.cpu().float().nan_to_num(1e38), truth.float().nan_to_num(1e38))


def sampled_error(
    recipe: Recipe, pass_: str, function: Callable[[], torch.Tensor], a: Any, w: Any, dy: Any, offs: Any
) -> float:
    """The error of three groups, relative to quantized operands, with NaN in the memory of the output."""
    (num_rows, k), n = a.shape, w.shape[1]
    poison(*((w.shape[0], n, k) if pass_ == "wgrad" else (num_rows, n if pass_ == "forward" else k)), torch.bfloat16)
    out = function()
    groups = reference.group_slices(reference.group_ends(offs.cpu(), num_rows))
    worst = 0.0
    for e in (0, len(groups) // 2, len(groups) - 1):
        rows = groups[e]
        if pass_ == "wgrad":
            blocks = reference.column_blocks(recipe)
            left, right = (rounded(x[rows], blocks, recipe) for x in (dy, a))
            found, truth = out[e].t(), left.t() @ right
        else:
            x, b, axis = (a, w[e].t(), 1) if pass_ == "forward" else (dy, w[e], 2)
            # dgrad multiplies by the transpose of b, whose first axis is N
            sides = reference.weight_blocks(recipe, axis)[1:]
            sides = sides if axis == 1 else sides[::-1]
            left, right = rounded(x[rows], reference.row_blocks(recipe), recipe), rounded(b, sides, recipe)
            found, truth = out[rows], left @ right
        if rows.start < rows.stop:
            worst = max(worst, relative_error(found, truth))
        elif pass_ == "wgrad" and not bool((found == 0).all()):
            raise AssertionError("an empty group's wgrad is not zero")
    return worst


def rounded(x: torch.Tensor, blocks: Any, recipe: Recipe) -> torch.Tensor:
    """``x`` quantized and dequantized, in fp32."""
    if not recipe.is_scaled or x.shape[0] == 0:
        return x.float()
    return reference.dequantize(*reference.quantize(x, blocks, recipe, FP8), blocks)
