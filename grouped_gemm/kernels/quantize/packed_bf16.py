"""Quantizer kernels for bfloat16 activations on NVIDIA GPUs from Hopper on, where a register holds two values.

The general kernels are bound by instructions, not by memory. These compare magnitudes and convert values two at a time:
``max.u16x2`` compares them, because the bits of bfloat16 without the sign are ordered as the magnitudes, NaN above all.

The kernels take the arguments of their namesakes in `rowwise` and `blockwise`; D and strides are multiples of 8. As in
`primitives`, a tile is four quarters of every fourth row, here tuples of four (BLOCK / 4, BLOCK / 2) int32. A word
holds two adjacent values of a row, the first in its low half. A tile is loaded twice, the second time from L1.

M, E, D: rows, groups, features. T: tokens in blocks of 128 that start anew with each group.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.core.machine import machine_of
from grouped_gemm.kernels.common.scaling import four_to_fp8, inverse_of, scale_of
from grouped_gemm.kernels.quantize.primitives import tile_of_program


def can_run(x_MD: Tensor) -> bool:
    """Whether these kernels read ``x_MD``: bfloat16 that can be read eight values at a time, on a GPU with u16x2."""
    return (
        x_MD.dtype == torch.bfloat16
        and machine_of(x_MD.device).traits.packed_max
        and x_MD.shape[1] % 8 == 0
        and x_MD.stride(0) % 8 == 0
        and x_MD.data_ptr() % 16 == 0
    )


@triton.jit
def _larger(a, b):
    """The larger of the low halves and the larger of the high halves of two words, as unsigned integers."""
    return tl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _low(words):
    """The low half of each word in fp32. Applied to magnitudes, the bits are still ordered as the values."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(words):
    """The high half of each word in fp32."""
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _pair(low, high):
    """Two fp32 values as fp8, saturated, the first in the low byte."""
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [low, high], dtype=tl.int16, is_pure=True, pack=1
    )


@triton.jit
def _load_quarter(source, stride, first, rows_left, words_left, BLOCK: tl.constexpr):
    """Loads every fourth row from row ``first`` on: (BLOCK / 4, BLOCK / 2) words."""
    rows = 4 * tl.arange(0, BLOCK // 4) + first
    words = tl.arange(0, BLOCK // 2)
    mask = (rows < rows_left)[:, None] & (words < words_left)[None, :]
    return tl.load(source + rows.to(tl.int64)[:, None] * stride + words[None, :], mask=mask, other=0)


@triton.jit
def load_tile(source, stride, rows_left, words_left, BLOCK: tl.constexpr):
    """Loads the four quarters of a tile, zero where there is nothing. ``source`` and ``stride`` count words."""
    return (
        _load_quarter(source, stride, 0, rows_left, words_left, BLOCK),
        _load_quarter(source, stride, 1, rows_left, words_left, BLOCK),
        _load_quarter(source, stride, 2, rows_left, words_left, BLOCK),
        _load_quarter(source, stride, 3, rows_left, words_left, BLOCK),
    )


@triton.jit
def magnitudes_of(tile):
    """The quarters of a tile without signs."""
    return tile[0] & 0x7FFF7FFF, tile[1] & 0x7FFF7FFF, tile[2] & 0x7FFF7FFF, tile[3] & 0x7FFF7FFF


@triton.jit
def _quarter_row_amax(magnitudes, BLOCK: tl.constexpr):
    """The largest magnitude of each row of a quarter, as the bits of fp32. Each thread first reduces its four words."""
    left, right = magnitudes.reshape(BLOCK // 4, BLOCK // 8, 2, 2).split()
    left, right = _larger(left, right).split()
    words = _larger(left, right)
    return tl.maximum(tl.max(words & 0xFFFF, 1) << 16, tl.max(words & 0x7FFF0000, 1))


@triton.jit
def row_amax_of(magnitudes, BLOCK: tl.constexpr):
    """The largest magnitude of each row of a tile, as the bits of fp32: (BLOCK,)."""
    even = tl.join(_quarter_row_amax(magnitudes[0], BLOCK), _quarter_row_amax(magnitudes[2], BLOCK))
    odd = tl.join(_quarter_row_amax(magnitudes[1], BLOCK), _quarter_row_amax(magnitudes[3], BLOCK))
    return tl.join(even, odd).reshape(BLOCK)


@triton.jit
def column_amax_of(magnitudes, BLOCK: tl.constexpr):
    """The largest magnitude of each column of a tile, as the bits of fp32: (BLOCK,)."""
    largest = _larger(_larger(magnitudes[0], magnitudes[1]), _larger(magnitudes[2], magnitudes[3]))
    return tl.join(tl.max(largest & 0xFFFF, 0) << 16, tl.max(largest & 0x7FFF0000, 0)).reshape(BLOCK)


@triton.jit
def by_quarter(values):
    """One value for each row of a tile, (BLOCK,), split into those of the four quarters."""
    even, odd = values.reshape(values.shape[0] // 4, 2, 2).split()
    v0, v2 = even.split()
    v1, v3 = odd.split()
    return v0, v1, v2, v3


@triton.jit
def by_half(values):
    """One value for each column of a tile, (BLOCK,), split into those of low and of high halves."""
    return values.reshape(values.shape[0] // 2, 2).split()


@triton.jit
def _store_quarter(target, stride, first, rows_left, words_left, values, inverse, BLOCK: tl.constexpr):
    """Quantizes and stores every fourth row from row ``first`` on."""
    rows = 4 * tl.arange(0, BLOCK // 4) + first
    words = tl.arange(0, BLOCK // 2)
    mask = (rows < rows_left)[:, None] & (words < words_left)[None, :]
    data = _pair(_low(values) * inverse[:, None], _high(values) * inverse[:, None])
    tl.store(target + rows.to(tl.int64)[:, None] * stride + words[None, :], data, mask=mask)


@triton.jit
def store_rows(target, stride, rows_left, words_left, tile, inverse, BLOCK: tl.constexpr):
    """Quantizes and stores the rows of a tile.

    Args:
        target: fp8, and
        stride: of its rows; multiples of 2.
        inverse: `by_quarter` of the inverse scales of rows.
    """
    pairs = target.to(tl.pointer_type(tl.int16))
    _store_quarter(pairs, stride // 2, 0, rows_left, words_left, tile[0], inverse[0], BLOCK)
    _store_quarter(pairs, stride // 2, 1, rows_left, words_left, tile[1], inverse[1], BLOCK)
    _store_quarter(pairs, stride // 2, 2, rows_left, words_left, tile[2], inverse[2], BLOCK)
    _store_quarter(pairs, stride // 2, 3, rows_left, words_left, tile[3], inverse[3], BLOCK)


@triton.jit
def store_transposed(target, stride, rows_left, words_left, tile, inverse, BLOCK: tl.constexpr):
    """Quantizes a tile and stores its transpose: a line of ``target`` for each column.

    Args:
        target: fp8, and
        stride: of its lines; multiples of 4.
        inverse: `by_half` of the inverse scales of columns.
    """
    low = inverse[0][None, :]
    high = inverse[1][None, :]
    v0, v1, v2, v3 = tile
    words = tl.arange(0, BLOCK // 2)
    quads = tl.arange(0, BLOCK // 4)
    lines = target.to(tl.pointer_type(tl.uint32))
    targets = lines + 2 * words.to(tl.int64)[None, :] * (stride // 4) + quads[:, None]
    mask = (words < words_left)[None, :] & (quads < rows_left)[:, None]
    tl.store(targets, four_to_fp8(_low(v0) * low, _low(v1) * low, _low(v2) * low, _low(v3) * low), mask=mask)
    targets += stride // 4
    tl.store(targets, four_to_fp8(_high(v0) * high, _high(v1) * high, _high(v2) * high, _high(v3) * high), mask=mask)


@triton.jit
def find_amax(x, blocks, row_amax, column_amax, D, x_stride, BLOCK: tl.constexpr, GROUP_M: tl.constexpr):
    """As `rowwise.find_amax`."""
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    if rows_left > 0:
        source = (x + row.to(tl.int64) * x_stride + d).to(tl.pointer_type(tl.int32))
        words = tl.arange(0, BLOCK // 2)
        words_left = (D - d) // 2
        largest = tl.zeros((BLOCK // 4, BLOCK // 2), tl.int32)
        for i in tl.static_range(4):
            magnitudes = _load_quarter(source, x_stride // 2, i, rows_left, words_left, BLOCK) & 0x7FFF7FFF
            largest = _larger(largest, magnitudes)
            if row_amax is not None:
                rows = 4 * tl.arange(0, BLOCK // 4) + i
                amax = _quarter_row_amax(magnitudes, BLOCK)
                tl.atomic_max(row_amax + row + rows, amax, mask=rows < rows_left, sem="relaxed")
        lines = column_amax + tl.load(blocks + 4 * block).to(tl.int64) * D + d + 2 * words
        tl.atomic_max(lines, tl.max(largest & 0xFFFF, 0) << 16, mask=words < words_left, sem="relaxed")
        tl.atomic_max(lines + 1, tl.max(largest & 0x7FFF0000, 0), mask=words < words_left, sem="relaxed")


@triton.jit(do_not_specialize=["E"])
def quantize_rowwise(
    x, blocks, by_row, row_scales, by_column, column_scales, row_amax, column_amax,
    E, D, x_stride, row_stride,
    ROWS: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As `rowwise.quantize_tiles`. A thread computes one scale of each kind."""
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    e = tl.load(blocks + 4 * block)
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    source = (x + row.to(tl.int64) * x_stride + d).to(tl.pointer_type(tl.int32))
    words_left = (D - d) // 2
    steps = tl.arange(0, BLOCK)
    if ROWS:
        amax = tl.load(row_amax + row + steps, mask=steps < rows_left, other=0)
        scale = scale_of(amax, LIMIT, POWER_OF_TWO)
        tl.store(row_scales + row + steps, scale, mask=steps < tl.where(d_block == 0, rows_left, 0))
        row_inverse = by_quarter(inverse_of(scale))
    lines = tl.minimum(e, E - 1).to(tl.int64) * D + d + steps  # past the last group any scale will do
    scale = scale_of(tl.load(column_amax + lines, mask=steps < D - d, other=0), LIMIT, POWER_OF_TWO)
    if rows_left > 0:  # every block of the group stores the same scales
        tl.store(column_scales + lines, scale, mask=steps < D - d)
    column_inverse = by_half(inverse_of(scale))
    tile = load_tile(source, x_stride // 2, rows_left, words_left, BLOCK)
    if ROWS:
        target = by_row + row.to(tl.int64) * row_stride + d
        store_rows(target, row_stride, rows_left, words_left, tile, row_inverse, BLOCK)
    target = by_column + (block.to(tl.int64) * D + d) * BLOCK
    store_transposed(target, BLOCK, BLOCK, words_left, tile, column_inverse, BLOCK)


@triton.jit(do_not_specialize=["row_scale_stride"])
def quantize_blockwise(
    x, blocks, by_row, row_scales, by_column, column_scales,
    D, x_stride, row_stride, row_scale_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    NVIDIA: tl.constexpr, SCALE_ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As `blockwise.quantize_tiles`. A thread computes one scale of each kind."""
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    source = (x + row.to(tl.int64) * x_stride + d).to(tl.pointer_type(tl.int32))
    words_left = (D - d) // 2
    steps = tl.arange(0, BLOCK)
    magnitudes = magnitudes_of(load_tile(source, x_stride // 2, rows_left, words_left, BLOCK))
    if ROWS:
        scale = scale_of(row_amax_of(magnitudes, BLOCK), LIMIT, POWER_OF_TWO)
        scales = row_scales + d_block.to(tl.int64) * row_scale_stride + tl.load(blocks + 4 * block + 3)
        tl.store(scales + steps, scale, mask=steps < tl.cdiv(rows_left, SCALE_ALIGNMENT) * SCALE_ALIGNMENT)
        row_inverse = by_quarter(inverse_of(scale))
    if COLUMNS:
        scale = tl.where(rows_left > 0, scale_of(column_amax_of(magnitudes, BLOCK), LIMIT, POWER_OF_TWO), 1.0)
        tl.store(column_scales + block.to(tl.int64) * D + d + steps, scale, mask=steps < D - d)
        column_inverse = by_half(inverse_of(scale))
    tile = load_tile(source, x_stride // 2, rows_left, words_left, BLOCK)
    if ROWS:
        target = by_row + row.to(tl.int64) * row_stride + d
        store_rows(target, row_stride, rows_left, words_left, tile, row_inverse, BLOCK)
    if COLUMNS:
        target = by_column + (block.to(tl.int64) * D + d) * BLOCK
        store_transposed(target, BLOCK, BLOCK, words_left, tile, column_inverse, BLOCK)
