"""Kernels that quantize in blocks: activations with one scale per 128 values of a row, and in the column layout one per
128 rows of a column; weights with one scale per square of 128 by 128.

All scales of a tile are found within it, so one kernel writes everything.

E, D: groups, features. R, C: lines and columns of a weight matrix as it lies in memory, C contiguous.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from grouped_gemm.kernels.common.groups import tile_position
from grouped_gemm.kernels.common.scaling import inverse_of, magnitude, scale_of, to_fp8
from grouped_gemm.kernels.quantize.primitives import (
    load_quarter,
    quantize_block,
    store_quarter,
    store_transposed,
    tile_of_program,
)


@triton.jit(do_not_specialize=["row_scale_stride"])
def quantize_tiles(
    x, blocks, by_row, row_scales, by_column, column_scales,
    D, x_stride, row_stride, row_scale_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    NVIDIA: tl.constexpr, SCALE_ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK rows of one group by BLOCK features in each layout that is wanted."""
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    ds = d + tl.arange(0, BLOCK)
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    source = x + row.to(tl.int64) * x_stride + d
    if rows_left > 0:
        amax = quantize_block(
            source, x_stride, by_row + row.to(tl.int64) * row_stride + d, row_stride,
            row_scales + d_block.to(tl.int64) * row_scale_stride + tl.load(blocks + 4 * block + 3),
            rows_left, rows_left, tl.cdiv(rows_left, SCALE_ALIGNMENT) * SCALE_ALIGNMENT, D - d,
            ROWS, COLUMNS, False, LIMIT, POWER_OF_TWO, NVIDIA, BLOCK,
        )  # fmt: skip
        scale = scale_of(amax, LIMIT, POWER_OF_TWO)
    else:
        scale = tl.full((BLOCK,), 1.0, tl.float32)
    if COLUMNS:
        tl.store(column_scales + block.to(tl.int64) * D + ds, scale, mask=ds < D)
        store_transposed(
            source, x_stride, by_column + (block.to(tl.int64) * D + d) * BLOCK, BLOCK,
            inverse_of(scale), rows_left, BLOCK, D - d, LIMIT, by_column.dtype.element_ty, NVIDIA, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["scale_stride_e", "scale_stride_r", "scale_stride_c"])
def quantize_weight_tiles(
    w, straight, transposed, scales,
    R, C, w_stride_e, w_stride, straight_stride_e, straight_stride, transposed_stride_e, transposed_stride,
    scale_stride_e, scale_stride_r, scale_stride_c,
    STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Writes a square tile of one matrix in each layout that is wanted, and its one scale."""
    r_block, c_block = tile_position(tl.program_id(0), tl.cdiv(R, BLOCK), tl.cdiv(C, BLOCK), GROUP_M)
    e = tl.program_id(1).to(tl.int64)
    lines_left = R - r_block * BLOCK
    columns_left = C - c_block * BLOCK
    source = w + e * w_stride_e + r_block.to(tl.int64) * BLOCK * w_stride + c_block * BLOCK
    largest = tl.zeros((BLOCK // 4, BLOCK), tl.int32)
    for i in tl.static_range(4):
        largest = tl.maximum(largest, magnitude(load_quarter(source, w_stride, i, lines_left, columns_left, BLOCK)))
    scale = scale_of(tl.max(tl.max(largest, 1), 0, keep_dims=True), LIMIT, POWER_OF_TWO)
    target = scales + e * scale_stride_e + r_block * scale_stride_r + c_block * scale_stride_c
    tl.store(target + tl.zeros((1,), tl.int32), scale)
    inverse = inverse_of(scale)
    if STRAIGHT:
        target = straight + e * straight_stride_e + r_block.to(tl.int64) * BLOCK * straight_stride + c_block * BLOCK
        for i in tl.static_range(4):
            values = load_quarter(source, w_stride, i, lines_left, columns_left, BLOCK)
            data = to_fp8(values, inverse[:, None], LIMIT, straight.dtype.element_ty, NVIDIA)
            store_quarter(target, straight_stride, i, lines_left, columns_left, data)
    if TRANSPOSED:
        target = transposed + e * transposed_stride_e + c_block.to(tl.int64) * BLOCK * transposed_stride
        store_transposed(
            source, w_stride, target + r_block * BLOCK, transposed_stride, inverse, lines_left, lines_left,
            columns_left, LIMIT, transposed.dtype.element_ty, NVIDIA, BLOCK,
        )  # fmt: skip
