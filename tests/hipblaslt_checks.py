"""Checks of hipBLASLt's quantizers, bit for bit against their torch twins. They run interpreted and on a GPU."""

from __future__ import annotations

import torch
from kernel_checks import activations, assert_same

from grouped_gemm import Recipe, reference, testing
from grouped_gemm.backends.hipblaslt import backend as hipblaslt
from grouped_gemm.backends.hipblaslt import layouts as layouts
from grouped_gemm.backends.hipblaslt import quantize as hipblaslt_quantize

# ends of groups, M, what group sizes are multiples of: ragged; ends out of order and range; all empty; multiples
# of 16, with a tail; whole blocks, without and with a tail
GROUPS = (
    ((0, 37, 37, 38, 130), 135, 1),
    ((-5, 100, 40, 999), 133, 1),
    ((0, 0), 20, 1),
    ((16, 16, 160), 165, 16),
    ((128, 64, 384), 384, 128),
    ((0, 128, 128), 140, 128),
)


def check_activations(
    ends: tuple[int, ...], num_rows: int, multiple: int, recipe: Recipe, device: torch.device | str = "cpu"
) -> None:
    """Each layout alone, and both from one read. Rows past the last group are NaN; their columns are not compared."""
    torch.manual_seed(0)
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    inside = reference.group_ends(offs, num_rows)
    x = activations(num_rows, 256 + 16, torch.bfloat16, device)
    x[inside[-1] :] = torch.nan
    x = x[:, 16:]
    needed = 128 if recipe is Recipe.MXFP8 else 16
    for rows, columns in ((True, False), (True, True), (False, True)):
        if columns and multiple % needed:
            continue
        what = f"{recipe.value}, ends {ends}, {rows=}, {columns=}"
        with testing.poisoned_memory():
            found, twin = (layouts.activations(x, len(ends), recipe, rows=rows, columns=columns) for _ in range(2))
        hipblaslt_quantize.quantize_activations(x, offs, recipe, found)
        hipblaslt._fill_activations(x, inside, recipe, twin)
        if rows:
            for mine, other, name in ((found[0], twin[0], "data"), (found[1], twin[1], "scales")):
                assert_same(mine[: inside[-1]], other[: inside[-1]], f"{name} by rows: {what}")
        if columns:
            assert_same(found[2][:, : inside[-1]], twin[2][:, : inside[-1]], f"data by columns: {what}")
            for e, group in enumerate(reference.group_slices(inside)):
                if group.start < group.stop:
                    mine, other = (
                        out[3][e] if recipe.block is None else hipblaslt._scales_of(out[3], group)
                        for out in (found, twin)
                    )
                    assert_same(mine[:256], other[:256], f"scales by columns of group {e}: {what}")


def check_weights(recipe: Recipe, contiguous: str, device: torch.device | str = "cpu") -> None:
    """Each layout alone, and both from one read. MX scales of padding lines are not compared."""
    torch.manual_seed(0)
    k, n = (128, 256) if recipe is Recipe.MXFP8 else (48, 144)
    sizes: tuple[tuple[int, int, bool, bool], ...] = ((k, n, True, True), (k, n, True, False), (k, n, False, True))
    if recipe is Recipe.MXFP8:  # only the contraction is a multiple of 128
        sizes += ((k, 144, True, False), (48, n, False, True))
    for k, n, forward, dgrad in sizes:
        what = f"{recipe.value}, K = {k}, N = {n}, {forward=}, {dgrad=}"
        b = torch.randn(2, n, k, device=device).mul_(5).bfloat16().transpose(1, 2)
        b = b if contiguous == "k" else b.contiguous()
        with testing.poisoned_memory():
            found, twin = (layouts.weights(b, recipe, forward=forward, dgrad=dgrad) for _ in range(2))
        hipblaslt_quantize.quantize_weights(b, recipe, found)
        hipblaslt._fill_weights(b, recipe, twin)
        lines = None if recipe.block is None else (n, k)
        for i, name in enumerate(("data for forward", "data for dgrad", "scales for forward", "scales for dgrad")):
            mine, other = found[i], twin[i]
            if mine.dim() == 3 and i >= 2 and lines is not None:
                mine, other = mine[:, : lines[i - 2]], other[:, : lines[i - 2]]
            if mine.dim() == 3:
                assert_same(mine, other, f"{name}: {what}")
