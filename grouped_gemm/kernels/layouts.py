"""The tensors that the quantizers fill and the products read: shapes, strides and dtypes. Imports no Triton.

An operand that is not wanted is an empty tensor of shape (0,).

M, E, K, N: rows, groups, in and out features. D: K or N. T: tokens in blocks of 128 that start anew with each group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grouped_gemm.device import machine_of
from grouped_gemm.recipes import Recipe

TOKEN_BLOCK = 128
SCALE_ALIGNMENT = 4  # fp32 scales that TMA reads start at multiples of 16 bytes


def activations(
    x_MD: Tensor, num_groups: int, recipe: Recipe, *, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data and scales of an operand of forward and dgrad, then of an operand of wgrad, both of ``x_MD``.

    Returns:
        Data (M, D) fp8, contiguous D; scales fp32, rowwise (M,), blockwise (ceil(D/128), S). In S, the rows of each
        group start at a multiple of 4, after those of the group before: S is M + 3 E, rounded up to such a multiple.
        Data (T/128, D, 128) fp8, contiguous; scales fp32, rowwise (E, D), blockwise (T/128, D). A tile of 128 tokens
        is in one piece: the lines of (D, T) would be too far apart for DRAM to write it at full speed.
        T is ``(M // 128 + E) * 128``, which is enough for any ``offs``.
    """
    num_rows, features = x_MD.shape
    row_data, row_scale, column_data, column_scale = (x_MD.new_empty(0) for _ in range(4))
    if rows:
        row_data = _empty_fp8(x_MD, (num_rows, features))
        scale_shape = (num_rows,)
        if recipe.block is not None:
            padded_rows = num_rows + (SCALE_ALIGNMENT - 1) * num_groups
            scale_shape = -(-features // recipe.block), -(-padded_rows // SCALE_ALIGNMENT) * SCALE_ALIGNMENT
        row_scale = x_MD.new_empty(scale_shape, dtype=torch.float32)
    if columns:
        token_blocks = num_rows // TOKEN_BLOCK + num_groups
        column_data = _empty_fp8(x_MD, (token_blocks, features, TOKEN_BLOCK))
        scale_rows = num_groups if recipe.block is None else token_blocks
        column_scale = x_MD.new_empty(scale_rows, features, dtype=torch.float32)
    return row_data, row_scale, column_data, column_scale


def weights(b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data for forward and for dgrad, then the scales of each; blockwise, both have the first scales.

    Returns:
        Data (E, N, K) fp8, contiguous K, and data (E, K, N) fp8, contiguous N.
        Scales fp32: rowwise (E, N) and (E, K); blockwise (E, ceil(K/128), ceil(N/128)) and nothing.
    """
    num_groups, k, n = b_EKN.shape
    forward_data, dgrad_data, forward_scale, dgrad_scale = (b_EKN.new_empty(0) for _ in range(4))
    if forward:
        forward_data = _empty_fp8(b_EKN, (num_groups, n, k))
        forward_scale = b_EKN.new_empty(num_groups, n, dtype=torch.float32)
    if dgrad:
        dgrad_data = _empty_fp8(b_EKN, (num_groups, k, n))
        dgrad_scale = b_EKN.new_empty(num_groups, k, dtype=torch.float32)
    if recipe.block is not None:
        blocks = num_groups, -(-k // recipe.block), -(-n // recipe.block)
        forward_scale, dgrad_scale = b_EKN.new_empty(blocks, dtype=torch.float32), b_EKN.new_empty(0)
    return forward_data, dgrad_data, forward_scale, dgrad_scale


def _empty_fp8(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Lines start at multiples of 16 bytes, as TMA wants them, whatever their length."""
    *outer, line = shape
    padded = -(-line // 16) * 16
    buffer = x.new_empty(*outer, padded, dtype=machine_of(x.device).fp8_dtype)
    return buffer if padded == line else buffer[..., :line]
