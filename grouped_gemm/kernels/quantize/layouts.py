"""The tensors that the quantizers write and the GEMMs read: shapes, strides and dtypes. Imports no Triton.

An operand that is not wanted is an empty tensor of shape (0,).

MX scales, E8M0, are laid out like blockwise ones, but with four in place of one: (ceil(C/128), lines, 4), where C is
the contraction and lines are the rows or columns along it. A step of a kernel covers 128 of C. It reads one aligned
int32 for each line of its tile, from adjacent places for adjacent lines, wherever a group starts. Scales of no values
are 1.

M, E, K, N: rows, groups, in and out features. D: K or N. T: tokens in blocks of 128 that start anew with each group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.recipes import Recipe

Operands = tuple[Tensor, Tensor, Tensor, Tensor]  # data and scales of two layouts; each function says in which order

TOKEN_BLOCK = 128
SCALE_ALIGNMENT = 4  # TMA reads fp32 scales from multiples of 16 bytes
MX_SCALES = 4  # of a line, in 128 of the contraction


def activations(x_MD: Tensor, num_groups: int, recipe: Recipe, *, rows: bool, columns: bool) -> Operands:
    """Data and scales of an operand of forward and dgrad, then of an operand of wgrad, both of ``x_MD``.

    Returns:
        The order is that of `quantize.fp8.quantize_activations`: data and scales by rows, data and scales by columns.
        By rows: data (M, D) fp8, contiguous D; scales rowwise (M,), blockwise (ceil(D/128), S), MX (ceil(D/128), M, 4).
        Along S, the rows of each group start at a multiple of 4: S is M + 3 E, rounded up to a multiple of 4.
        By columns: data (T/128, D, 128) fp8, contiguous, so that a tile of 128 tokens is one piece of memory; scales
        rowwise (E, D), blockwise (T/128, D), MX (T/128, D, 4). T is ``(M // 128 + E) * 128``, enough for any ``offs``.
    """
    num_rows, features = x_MD.shape
    each = (MX_SCALES,) if recipe is Recipe.MXFP8 else ()
    if rows:
        row_data = empty_fp8(x_MD, (num_rows, features))
        scale_shape: tuple[int, ...] = (num_rows,)
        if recipe is Recipe.MXFP8:
            scale_shape = -(-features // 128), num_rows, MX_SCALES
        elif recipe.block is not None:
            padded_rows = num_rows + (SCALE_ALIGNMENT - 1) * num_groups
            scale_shape = -(-features // recipe.block), -(-padded_rows // SCALE_ALIGNMENT) * SCALE_ALIGNMENT
        row_scale = x_MD.new_empty(scale_shape, dtype=recipe.scale_dtype)
    else:
        row_data, row_scale = x_MD.new_empty(0), x_MD.new_empty(0)
    if columns:
        token_blocks = num_rows // TOKEN_BLOCK + num_groups
        column_data = empty_fp8(x_MD, (token_blocks, features, TOKEN_BLOCK))
        scale_rows = num_groups if recipe.block is None else token_blocks
        column_scale = x_MD.new_empty(scale_rows, features, *each, dtype=recipe.scale_dtype)
    else:
        column_data, column_scale = x_MD.new_empty(0), x_MD.new_empty(0)
    return row_data, row_scale, column_data, column_scale


def token_blocks(offs: Tensor, num_rows: int) -> Tensor:
    """(T/128, 4) int32: of each block of tokens its group, its first row, how many rows it has, where scales begin."""
    return offs.new_empty(num_rows // TOKEN_BLOCK + offs.shape[0], 4)


def weights(b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool) -> Operands:
    """Data for forward and for dgrad, then the scales of each. Blockwise, the first scales serve both.

    Returns:
        Data (E, N, K) fp8, contiguous K, and data (E, K, N) fp8, contiguous N.
        Scales: rowwise (E, N) and (E, K); blockwise (E, ceil(K/128), ceil(N/128)) and nothing;
        MX (E, ceil(K/128), N, 4) and (E, ceil(N/128), K, 4).
    """
    num_groups, k, n = b_EKN.shape
    forward_data = empty_fp8(b_EKN, (num_groups, n, k)) if forward else b_EKN.new_empty(0)
    dgrad_data = empty_fp8(b_EKN, (num_groups, k, n)) if dgrad else b_EKN.new_empty(0)
    if recipe.weight_lines > 1:
        blocks = num_groups, -(-k // recipe.weight_lines), -(-n // recipe.weight_lines)
        forward_scale, dgrad_scale = b_EKN.new_empty(blocks, dtype=torch.float32), b_EKN.new_empty(0)
    else:
        forward_scale = _empty_line_scales(b_EKN, k, n, recipe) if forward else b_EKN.new_empty(0)
        dgrad_scale = _empty_line_scales(b_EKN, n, k, recipe) if dgrad else b_EKN.new_empty(0)
    return forward_data, dgrad_data, forward_scale, dgrad_scale


def mx_scales(scale_EBL: Tensor) -> Tensor:
    """Converts a checkpoint's MX scales, (E, ceil(C/32), lines), to those of `weights`, (E, ceil(C/128), lines, 4)."""
    num_groups, blocks, lines = scale_EBL.shape
    one = 127  # the code of 2^0
    codes = F.pad(scale_EBL.view(torch.uint8), (0, 0, 0, -blocks % MX_SCALES), value=one)
    return codes.view(num_groups, -1, MX_SCALES, lines).transpose(2, 3).contiguous().view(scale_EBL.dtype)


def _empty_line_scales(b_EKN: Tensor, c: int, lines: int, recipe: Recipe) -> Tensor:
    """Scales of weights with ``lines`` lines of ``c`` values, where each line has its own."""
    num_groups = b_EKN.shape[0]
    shape = (num_groups, -(-c // 128), lines, MX_SCALES) if recipe is Recipe.MXFP8 else (num_groups, lines)
    return b_EKN.new_empty(shape, dtype=recipe.scale_dtype)


def empty_fp8(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An fp8 tensor whose lines start at multiples of 16 bytes, as TMA requires, whatever their length."""
    *outer, line = shape
    padded = -(-line // 16) * 16
    buffer = x.new_empty(*outer, padded, dtype=machine_of(x.device).fp8_dtype)
    return buffer if padded == line else buffer[..., :line]
