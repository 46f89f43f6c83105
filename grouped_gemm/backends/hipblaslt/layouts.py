"""The tensors that the quantizers for hipBLASLt write: shapes, strides and dtypes. See docs/rocm.md.

M, E, K, N: rows, groups, in and out features. D: K or N. T: M, rounded up to a multiple of 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.quantize.layouts import Operands

ALIGNMENT = 16  # every size of a scaled GEMM is a multiple, and so are its lines in bytes
MX_DEPTH = 128  # the contraction of an MX GEMM is a multiple
MX_LINES = 128  # MX scales are stored for a multiple of this many lines
MX_BLOCK = 32


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``size``."""
    return -(-size // multiple) * multiple


def activations(x_MD: Tensor, num_groups: int, recipe: Recipe, *, rows: bool, columns: bool) -> Operands:
    """Data and scales for forward and dgrad, then for wgrad, uninitialized. What is not wanted has shape (0,).

    Returns:
        Data (M, D) fp8, contiguous D, and scales (M, 1). MX: 15 more rows, and scales (M + 127, D/32), since a GEMM
        reads a multiple of 16 rows and scales of a multiple of 128 rows.
        Data (D, T) fp8, contiguous T, and scales (E, D, 1). MX: scales (T/32, D rounded up to 128). In this memory the
        groups follow one another, each as (D rounded up to 128, its rows/32).
    """
    num_rows, features = x_MD.shape
    fp8, is_mx = machine_of(x_MD.device).fp8_dtype, recipe is Recipe.MXFP8
    row_data, row_scale, column_data, column_scale = (x_MD.new_empty(0) for _ in range(4))
    if rows:
        row_data = x_MD.new_empty(num_rows + (ALIGNMENT - 1 if is_mx else 0), features, dtype=fp8)
        scale_shape = (num_rows + MX_LINES - 1, features // MX_BLOCK) if is_mx else (num_rows, 1)
        row_scale = x_MD.new_empty(scale_shape, dtype=recipe.scale_dtype)
    if columns:
        tokens = round_up(num_rows, ALIGNMENT)
        column_data = x_MD.new_empty(features, tokens, dtype=fp8)
        blocks = tokens // MX_BLOCK, round_up(features, MX_LINES)
        column_scale = x_MD.new_empty(blocks if is_mx else (num_groups, features, 1), dtype=recipe.scale_dtype)
    return row_data, row_scale, column_data, column_scale


def weights(b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool) -> Operands:
    """Data for forward and for dgrad, then the scales of each.

    Returns:
        Data (E, N, K) fp8, contiguous K, and data (E, K, N) fp8, contiguous N.
        Scales (E, 1, N) and (E, 1, K). MX: (E, N rounded up to 128, K/32) and (E, K rounded up to 128, N/32).
    """
    num_groups, k, n = b_EKN.shape
    fp8, empty = machine_of(b_EKN.device).fp8_dtype, b_EKN.new_empty

    def scale_shape(lines: int, c: int) -> tuple[int, int, int]:
        if recipe is Recipe.MXFP8:
            return num_groups, round_up(lines, MX_LINES), c // MX_BLOCK
        return num_groups, 1, lines

    return (
        empty(num_groups, n, k, dtype=fp8) if forward else empty(0),
        empty(num_groups, k, n, dtype=fp8) if dgrad else empty(0),
        empty(scale_shape(n, k), dtype=recipe.scale_dtype) if forward else empty(0),
        empty(scale_shape(k, n), dtype=recipe.scale_dtype) if dgrad else empty(0),
    )


def mx_scales(scale_EBL: Tensor) -> Tensor:
    """Converts a checkpoint's MX scales, (E, C/32, lines), to those of `weights`, (E, lines rounded up, C/32)."""
    codes = scale_EBL.view(torch.uint8).transpose(1, 2).contiguous()
    padding = round_up(codes.shape[1], MX_LINES) - codes.shape[1]
    return F.pad(codes, (0, 0, 0, padding)).view(scale_EBL.dtype)
