"""Building blocks of the fp8 quantizers, ours and those of the vendors' backends.

A quantizer works on tiles of BLOCK by BLOCK values, in quarters: quarter i holds rows i, i + 4, i + 8 and so on. One
thread then holds four consecutive rows of a column, one from each quarter, and packs their fp8 values into a 32-bit
word. Transposing exchanges values between threads, and words are exchanged faster than single bytes.

A tile is loaded twice: first to find its scales and to write its rows, then to write its transpose. The second load
hits L1. Keeping the tile in registers instead would lower the occupancy.

Pointers to a tile point to its first element. ``rows_left`` and ``columns_left`` count what exists from there on.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from grouped_gemm.kernels.common.groups import tile_position
from grouped_gemm.kernels.common.scaling import four_to_fp8, inverse_of, magnitude, scale_of, to_fp8


@triton.jit
def tile_of_program(D, BLOCK: tl.constexpr, GROUP_M: tl.constexpr):
    """The block of rows and the block of features that this program quantizes; the grid is their product."""
    d_blocks = tl.cdiv(D, BLOCK)
    return tile_position(tl.program_id(0), tl.num_programs(0) // d_blocks, d_blocks, GROUP_M)


@triton.jit
def load_quarter(source, stride, first, rows_left, columns_left, BLOCK: tl.constexpr):
    """Loads every fourth row from row ``first`` on: (BLOCK / 4, BLOCK), zero where there is nothing."""
    rows = 4 * tl.arange(0, BLOCK // 4) + first
    columns = tl.arange(0, BLOCK)
    mask = (rows < rows_left)[:, None] & (columns < columns_left)[None, :]
    return tl.load(source + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0)


@triton.jit
def store_quarter(target, stride, first, rows_left, columns_left, data):
    """Stores what `load_quarter` loads."""
    rows = 4 * tl.arange(0, data.shape[0]) + first
    columns = tl.arange(0, data.shape[1])
    mask = (rows < rows_left)[:, None] & (columns < columns_left)[None, :]
    tl.store(target + rows.to(tl.int64)[:, None] * stride + columns[None, :], data, mask=mask)


@triton.jit
def pack(v0, v1, v2, v3, inverse, LIMIT: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr):
    """Converts four tiles with `scaling.to_fp8` and packs them into 32-bit words, the first tile in the low bytes.

    On NVIDIA GPUs this takes two instructions a word, a quarter of the general code. Triton 3.6.0 also compiles the
    general code wrongly there: it treats a converted byte as a whole register, and its neighbor leaks in.
    """
    if NVIDIA:
        return four_to_fp8(
            v0.to(tl.float32) * inverse,
            v1.to(tl.float32) * inverse,
            v2.to(tl.float32) * inverse,
            v3.to(tl.float32) * inverse,
        )
    else:
        return (
            _byte(to_fp8(v0, inverse, LIMIT, DTYPE), 0)
            | _byte(to_fp8(v1, inverse, LIMIT, DTYPE), 1)
            | _byte(to_fp8(v2, inverse, LIMIT, DTYPE), 2)
            | _byte(to_fp8(v3, inverse, LIMIT, DTYPE), 3)
        )


@triton.jit
def _byte(data, i: tl.constexpr):
    return data.to(tl.uint8, bitcast=True).to(tl.uint32) << (8 * i)


@triton.jit
def store_transposed(
    source, stride, target, target_stride, inverse, rows_left, rows_to_fill, columns_left,
    LIMIT: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loads a tile again, quantizes it, and stores its transpose: a line of ``target`` for each column.

    Lines start at multiples of 4 bytes. The last word of a line is stored whole.

    Args:
        inverse: `scaling.inverse_of` the scale of each column, (BLOCK,), or of all columns, (1,).
        rows_to_fill: rows that are stored; those past ``rows_left`` are zero.
    """
    v0 = load_quarter(source, stride, 0, rows_left, columns_left, BLOCK)
    v1 = load_quarter(source, stride, 1, rows_left, columns_left, BLOCK)
    v2 = load_quarter(source, stride, 2, rows_left, columns_left, BLOCK)
    v3 = load_quarter(source, stride, 3, rows_left, columns_left, BLOCK)
    words = pack(v0, v1, v2, v3, inverse[None, :], LIMIT, DTYPE, NVIDIA)
    rows = 4 * tl.arange(0, BLOCK // 4)
    columns = tl.arange(0, BLOCK)
    targets = target.to(tl.pointer_type(tl.uint32)) + columns.to(tl.int64)[None, :] * (target_stride // 4)
    mask = (rows < rows_to_fill)[:, None] & (columns < columns_left)[None, :]
    tl.store(targets + (rows // 4)[:, None], words, mask=mask)


@triton.jit
def quantize_rows(
    source, stride, target, target_stride, amax, scales, rows_left, scales_left, columns_left,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantizes a tile's rows with scales from ``amax``, one for each row, and stores the first ``scales_left`` scales.

    A row spans several tiles, and only one of them needs to store its scale.
    """
    for i in tl.static_range(4):
        values = load_quarter(source, stride, i, rows_left, columns_left, BLOCK)
        rows = 4 * tl.arange(0, BLOCK // 4) + i
        scale = scale_of(tl.load(amax + rows, mask=rows < rows_left, other=0), LIMIT, POWER_OF_TWO)
        data = to_fp8(values, inverse_of(scale)[:, None], LIMIT, target.dtype.element_ty, NVIDIA)
        store_quarter(target, target_stride, i, rows_left, columns_left, data)
        tl.store(scales + rows, scale, mask=rows < scales_left)


@triton.jit
def quantize_block(
    source, stride, target, target_stride, scales, rows_left, rows_to_fill, scales_to_fill, columns_left,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantizes a tile's rows, each with a scale of its own, and finds the largest magnitude of each column.

    Args:
        rows_to_fill: rows that are stored; those past ``rows_left`` are zero.
        scales_to_fill: scales that are stored.
        ROWS: whether rows are wanted.
        COLUMNS: whether magnitudes of columns are wanted.
        PADDED: whether scales past ``rows_left`` are 1; otherwise they are those of zeros.

    Returns:
        (BLOCK,) magnitudes as integers, see `scaling.magnitude`; all zero without COLUMNS.
    """
    largest = tl.zeros((BLOCK // 4, BLOCK), tl.int32)
    for i in tl.static_range(4):
        values = load_quarter(source, stride, i, rows_left, columns_left, BLOCK)
        magnitudes = magnitude(values)
        if ROWS:
            rows = 4 * tl.arange(0, BLOCK // 4) + i
            scale = scale_of(tl.max(magnitudes, 1), LIMIT, POWER_OF_TWO)
            if PADDED:
                scale = tl.where(rows < rows_left, scale, 1.0)
            data = to_fp8(values, inverse_of(scale)[:, None], LIMIT, target.dtype.element_ty, NVIDIA)
            store_quarter(target, target_stride, i, rows_to_fill, columns_left, data)
            tl.store(scales + rows, scale, mask=rows < scales_to_fill)
        if COLUMNS:
            largest = tl.maximum(largest, magnitudes)
    return tl.max(largest, 0)
