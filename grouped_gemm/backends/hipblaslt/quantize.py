"""Quantizers for hipBLASLt: they write what `torch._scaled_mm` reads. Numbers are those of `reference`, bit for bit.

The column layout, for wgrad, is (D, T): each line holds the tokens of all groups, a group's tokens at the places of its
rows. Groups start at multiples of 16 rows, for MX of 128.

M, E, K, N: rows, groups, in and out features. D: K or N. T: M, rounded up to a multiple of 16.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.groups import at_once, group_of_block
from grouped_gemm.kernels.common.launch import cdiv, launch, on_device
from grouped_gemm.kernels.common.scaling import inverse_of, scale_of
from grouped_gemm.kernels.quantize import fp8 as quantize_fp8
from grouped_gemm.kernels.quantize import mx
from grouped_gemm.kernels.quantize.fp8 import TILE, find_amax, find_blocks, scaling_constants
from grouped_gemm.kernels.quantize.layouts import TOKEN_BLOCK, Operands, token_blocks
from grouped_gemm.kernels.quantize.primitives import quantize_rows, store_transposed, tile_of_program


def quantize_activations(
    x_MD: Tensor, offs: Tensor, recipe: Recipe, out: Operands, blocks: Tensor | None = None
) -> None:
    """Fills ``out``, from `layouts.activations`. Tensors of shape (0,) are not wanted.

    Args:
        x_MD: (M, D), contiguous D, a multiple of 16; bfloat16, float16 or float32.
        offs: (E,) int32, contiguous: the end row of each group. Any values are safe. With columns, groups have a
            multiple of 16 rows, for MX of 128, after ends that are out of order or out of range were clamped.
        recipe: rowwise or MX.
        out: data and scales by rows, data and scales by columns. Columns past the last group are not written, nor are
            scales of no values.
        blocks: from `fp8.find_blocks`; None: they are found here, where they are needed.
    """
    by_row, row_scale, by_column, column_scale = out
    num_rows, features = x_MD.shape
    rows, columns = by_row.dim() == 2, by_column.dim() == 2
    if num_rows == 0:
        return
    if recipe is Recipe.MXFP8:
        with on_device(x_MD):
            launch(
                _quantize_mx_tiles, (cdiv(num_rows, TOKEN_BLOCK) * cdiv(features, 128),),
                x_MD, offs, by_row, mx.as_words(row_scale), by_column, mx.as_words(column_scale),
                num_rows, offs.shape[0], features, x_MD.stride(0), by_column.stride(0),
                constants={
                    "ROWS": rows, "COLUMNS": columns, "LIMIT": torch.finfo((by_row if rows else by_column).dtype).max,
                    "E_AT_ONCE": at_once(offs.shape[0]),
                },
                num_warps=8,
            )  # fmt: skip
    elif columns:
        _quantize_both(x_MD, offs, recipe, out, blocks)
    else:
        quantize_fp8.quantize_activations(x_MD, offs, recipe, (by_row, row_scale[:, 0], by_column, column_scale))


def _quantize_both(x_MD: Tensor, offs: Tensor, recipe: Recipe, out: Operands, blocks: Tensor | None) -> None:
    """Quantizes rowwise, with columns, in two reads: a column's scale needs the whole group."""
    by_row, row_scale, by_column, column_scale = out
    num_rows, features = x_MD.shape
    rows = by_row.dim() == 2
    with on_device(x_MD):
        if blocks is None:
            blocks = token_blocks(offs, num_rows)
            find_blocks(offs, num_rows, blocks)
        row_amax, column_amax = find_amax(x_MD, blocks, offs.shape[0], rows=rows)
        launch(
            _quantize_tiles, (len(blocks) * cdiv(features, TOKEN_BLOCK),),
            x_MD, blocks, by_row, row_scale, by_column, column_scale, row_amax, column_amax,
            features, x_MD.stride(0), by_column.stride(0),
            constants={"ROWS": rows} | scaling_constants(x_MD, recipe, by_column.dtype) | TILE, num_warps=4,
        )  # fmt: skip


def quantize_weights(b_EKN: Tensor, recipe: Recipe, out: Operands) -> None:
    """Fills ``out``, from `layouts.weights`. Tensors of shape (0,) are not wanted.

    Args:
        b_EKN: (E, K, N), K or N contiguous; bfloat16, float16 or float32.
        recipe: rowwise or MX.
        out: data for forward and for dgrad, then their scales.
    """
    forward, dgrad, forward_scale, dgrad_scale = out
    if recipe is Recipe.MXFP8:
        mx.quantize_weights(b_EKN, out, scales="by line")
    else:
        by_line = [scale.squeeze(1) if scale.dim() == 3 else scale for scale in (forward_scale, dgrad_scale)]
        quantize_fp8.quantize_weights(b_EKN, recipe, (forward, dgrad, by_line[0], by_line[1]))


@triton.jit(do_not_specialize=["column_stride"])
def _quantize_tiles(
    x, blocks, by_row, row_scales, by_column, column_scales, row_amax, column_amax,
    D, x_stride, column_stride,
    ROWS: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As `rowwise.quantize_tiles`, but the column layout is (D, T)."""
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    row = tl.load(blocks + 4 * block + 1).to(tl.int64)
    rows_left = tl.load(blocks + 4 * block + 2)
    if rows_left > 0:
        source = x + row * x_stride + d
        if ROWS:
            quantize_rows(
                source, x_stride, by_row + row * D + d, D,
                row_amax + row, row_scales + row, rows_left, tl.where(d_block == 0, rows_left, 0), D - d,
                LIMIT, POWER_OF_TWO, NVIDIA, BLOCK,
            )  # fmt: skip
        ds = d + tl.arange(0, BLOCK)
        lines = tl.load(blocks + 4 * block).to(tl.int64) * D + ds
        scale = scale_of(tl.load(column_amax + lines, mask=ds < D, other=0), LIMIT, POWER_OF_TWO)
        tl.store(column_scales + lines, scale, mask=ds < D)  # every block of the group stores the same scales
        store_transposed(
            source, x_stride, by_column + d.to(tl.int64) * column_stride + row, column_stride, inverse_of(scale),
            rows_left, rows_left, D - d, LIMIT, by_column.dtype.element_ty, NVIDIA, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "E", "column_stride"])
def _quantize_mx_tiles(
    x, offs, by_row, row_scales, by_column, column_scales,
    M, E, D, x_stride, column_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr, E_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Writes 128 rows by 128 features. With columns, the rows belong to one group or lie past the last group."""
    d_blocks = tl.cdiv(D, 128)
    block = tl.program_id(0) // d_blocks
    d_block = tl.program_id(0) % d_blocks
    row = block.to(tl.int64) * 128
    d = d_block.to(tl.int64) * 128
    height = tl.minimum(M - block * 128, 128)
    tokens = 0
    scale_stride = 0
    first_scale = row
    if COLUMNS:
        e, _, _, first, last = group_of_block(block, offs, M, E, 128, E_AT_ONCE)
        scale_stride = last - first
        tokens = tl.where(e < E, height, 0)
        first_scale = first.to(tl.int64) * (d_blocks * 128) + d * scale_stride + block - first
    mx.quantize_tile(
        x + row * x_stride + d, x_stride, height, D - d_block * 128,
        by_row + row * D + d, D, row_scales + row * d_blocks + d_block, d_blocks,
        by_column + d * column_stride + row, column_stride, column_scales + first_scale, scale_stride,
        tokens, tokens,
        ROWS, COLUMNS, LIMIT,
    )  # fmt: skip
