"""The tensors that torch's grouped GEMMs read: shapes, strides and dtypes. Imports no Triton. See docs/layouts.md.

In wgrad torch requires contiguous tokens, a multiple of 16 in each group rowwise and of 32 in MX, and no empty group,
because CUTLASS's GEMM fails over zero tokens. So groups are padded to multiples of 32, an empty one to 32 tokens of
zeros. The number of tokens depends on ``offs``, which the host does not know; `num_tokens` is enough for any ``offs``.

MX scales are swizzled, as Blackwell's tensor cores read them: in atoms of 128 lines by 4 scales, 512 bytes, in which
line i has the four bytes at 16 (i mod 32) + 4 (i // 32). Atoms along the contraction are adjacent. Each group of
activations has its own atoms. Scales of no values are 1.

M, E, D: rows, groups, features. T: tokens, the rows of padded groups. B: atoms of M rows or T tokens, at most.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.quantize import layouts
from grouped_gemm.kernels.quantize.layouts import MX_SCALES, Operands

ALIGNMENT = 16  # bytes, so as many fp8 values
TOKENS = 32  # groups are padded to a multiple of this many tokens
ATOM = 128  # lines, and values of each line


def num_tokens(num_rows: int, num_groups: int) -> int:
    """T: the most tokens that groups of ``num_rows`` rows in all can have."""
    return (num_rows // TOKENS + num_groups) * TOKENS


def num_blocks(num_rows: int, num_groups: int) -> int:
    """B: the most blocks of 128 that the rows, or the tokens, of groups can fill."""
    return num_rows // ATOM + num_groups


def plan(offs: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The end of each group in rows, in order and within [0, M], and in tokens; both (E,) int32."""
    ends = torch.empty_like(offs, memory_format=torch.contiguous_format)
    return ends, torch.empty_like(ends)


def token_blocks(ends: Tensor, num_rows: int) -> Tensor:
    """(B, 4) int32: of each block of tokens its group, its first row, rows from there to the end of its group, and its
    first token."""
    return ends.new_empty(num_blocks(num_rows, ends.shape[0]), 4)


def activations(x_MD: Tensor, num_groups: int, recipe: Recipe, *, rows: bool, columns: bool) -> Operands:
    """Data and scales for forward and dgrad, then for wgrad. What is not wanted has shape (0,).

    Returns:
        Data (M, D) fp8, contiguous D, a multiple of 16, in MX of 32; scales (M,), swizzled (128 B, ceil(D/128) 4).
        Data (D, T) fp8, contiguous T; scales (E, D), contiguous, swizzled (ceil(D/128) 128, 4 B).
    """
    num_rows, features = x_MD.shape
    fp8 = machine_of(x_MD.device).fp8_dtype
    row_shape: tuple[int, ...] = (num_rows,)
    column_shape: tuple[int, ...] = (num_groups, features)
    if recipe is Recipe.MXFP8:
        blocks, feature_blocks = num_blocks(num_rows, num_groups), -(-features // ATOM)
        row_shape, column_shape = (
            (blocks * ATOM, feature_blocks * MX_SCALES),
            (feature_blocks * ATOM, blocks * MX_SCALES),
        )
    row_data, row_scale, column_data, column_scale = (x_MD.new_empty(0) for _ in range(4))
    if rows:
        row_data = x_MD.new_empty(num_rows, features, dtype=fp8)
        row_scale = x_MD.new_empty(row_shape, dtype=recipe.scale_dtype)
    if columns:
        column_data = x_MD.new_empty(features, num_tokens(num_rows, num_groups), dtype=fp8)
        column_scale = x_MD.new_empty(column_shape, dtype=recipe.scale_dtype)
    return row_data, row_scale, column_data, column_scale


def weights(b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool) -> Operands:
    """As `layouts.weights`, but MX scales are swizzled: (E, ceil(N/128) ceil(K/128) 512) for forward and for dgrad."""
    if recipe is not Recipe.MXFP8:
        return layouts.weights(b_EKN, recipe, forward=forward, dgrad=dgrad)
    (num_groups, k, n), fp8 = b_EKN.shape, machine_of(b_EKN.device).fp8_dtype
    scale_shape = num_groups, -(-k // ATOM) * -(-n // ATOM) * ATOM * MX_SCALES
    return (
        b_EKN.new_empty((num_groups, n, k) if forward else 0, dtype=fp8),
        b_EKN.new_empty((num_groups, k, n) if dgrad else 0, dtype=fp8),
        b_EKN.new_empty(scale_shape if forward else 0, dtype=recipe.scale_dtype),
        b_EKN.new_empty(scale_shape if dgrad else 0, dtype=recipe.scale_dtype),
    )


def swizzled(scale_EBL: Tensor) -> Tensor:
    """Converts a checkpoint's MX scales, (E, ceil(C/32), lines), to those of `weights`. C: the contraction."""
    num_groups, blocks, lines = scale_EBL.shape
    one = 127  # the code of 2^0
    codes = F.pad(scale_EBL.view(torch.uint8), (0, -lines % ATOM, 0, -blocks % MX_SCALES), value=one)
    codes = codes.view(num_groups, -1, MX_SCALES, -(-lines // ATOM), ATOM // 32, 32).permute(0, 3, 1, 5, 4, 2)
    return codes.reshape(num_groups, -1).view(scale_EBL.dtype)
