"""`fp8` for bfloat16 activations on NVIDIA GPUs from Hopper on, where one register holds two values.

The general kernel is bound by instructions, not by memory. Here magnitudes are compared two at a time (``max.u16x2``:
the bits of bfloat16 without the sign are in the order of its magnitudes, NaN above all), and converted two at a time.

M, E, D: rows, groups, features. T: tokens in blocks of 128 that start anew with each group.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.core.machine import machine_of
from grouped_gemm.kernels.common.groups import tile_position
from grouped_gemm.kernels.common.scaling import four_to_fp8, inverse_of, scale_of


def can_run(x_MD: Tensor) -> bool:
    """Whether these kernels read ``x_MD``: bfloat16, eight values at a time."""
    return (
        x_MD.dtype == torch.bfloat16
        and machine_of(x_MD.device).traits.packed_max
        and x_MD.shape[1] % 8 == 0
        and x_MD.stride(0) % 8 == 0
        and x_MD.data_ptr() % 16 == 0
    )


@triton.jit
def _larger(a, b):
    """The larger halves of two words, each half for itself."""
    return tl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _low(words):
    """The first of the two values of each word, in fp32; of magnitudes too, as bits."""
    return (words << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(words):
    return (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _pair(low, high):
    """Two fp32 values as fp8, saturated, the first in the low byte."""
    return tl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [low, high], dtype=tl.int16, is_pure=True, pack=1
    )


@triton.jit
def _load(source, stride, first, rows_left, words_left, BLOCK: tl.constexpr):
    """Every fourth row of a tile from row ``first`` on, two values a word: (BLOCK / 4, BLOCK / 2)."""
    rows = 4 * tl.arange(0, BLOCK // 4) + first
    words = tl.arange(0, BLOCK // 2)
    mask = (rows < rows_left)[:, None] & (words < words_left)[None, :]
    return tl.load(source + rows.to(tl.int64)[:, None] * stride + words[None, :], mask=mask, other=0)


@triton.jit
def _row_magnitude(magnitudes, BLOCK: tl.constexpr):
    """The largest magnitude of each row, as the bits of fp32: first among the four words that a thread has."""
    left, right = magnitudes.reshape(BLOCK // 4, BLOCK // 8, 2, 2).split()
    left, right = _larger(left, right).split()
    words = _larger(left, right)
    return tl.maximum(tl.max(words & 0xFFFF, 1) << 16, tl.max(words & 0x7FFF0000, 1))


@triton.jit
def _row_magnitudes(v0, v1, v2, v3, BLOCK: tl.constexpr):
    """`_row_magnitude` of four quarters, in the order of the rows."""
    even = tl.join(_row_magnitude(v0, BLOCK), _row_magnitude(v2, BLOCK))
    odd = tl.join(_row_magnitude(v1, BLOCK), _row_magnitude(v3, BLOCK))
    return tl.join(even, odd).reshape(BLOCK)


@triton.jit
def _quarters(values):
    """What each of four quarters has, of values in the order of the rows."""
    even, odd = values.reshape(values.shape[0] // 4, 2, 2).split()
    v0, v2 = even.split()
    v1, v3 = odd.split()
    return v0, v1, v2, v3


@triton.jit
def _store_rows(target, stride, first, rows_left, words_left, values, inverse, BLOCK: tl.constexpr):
    """Quantizes every fourth row from ``first`` on."""
    rows = 4 * tl.arange(0, BLOCK // 4) + first
    words = tl.arange(0, BLOCK // 2)
    mask = (rows < rows_left)[:, None] & (words < words_left)[None, :]
    data = _pair(_low(values) * inverse[:, None], _high(values) * inverse[:, None])
    tl.store(target + rows.to(tl.int64)[:, None] * stride + words[None, :], data, mask=mask)


@triton.jit(do_not_specialize=["E", "row_scale_stride"])
def _quantize_tiles(
    x, blocks, by_row, row_scales, by_column, column_scales, row_amax, column_amax,
    E, D, x_stride, row_stride, row_scale_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWWISE: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    NVIDIA: tl.constexpr, SCALE_ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """As `quantize._quantize_tiles`; D and the strides are multiples of 8.

    A first look finds the scales, a second one, at what L1 still has, writes. A thread makes one scale of each kind.
    """
    d_blocks = tl.cdiv(D, BLOCK)
    block, d_block = tile_position(tl.program_id(0), tl.num_programs(0) // d_blocks, d_blocks, BAND)
    d = d_block * BLOCK
    e = tl.load(blocks + 4 * block)
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    source = (x + row.to(tl.int64) * x_stride + d).to(tl.pointer_type(tl.int32))
    stride = x_stride // 2
    words_left = (D - d) // 2
    steps = tl.arange(0, BLOCK)
    if not ROWWISE:
        v0 = _load(source, stride, 0, rows_left, words_left, BLOCK) & 0x7FFF7FFF
        v1 = _load(source, stride, 1, rows_left, words_left, BLOCK) & 0x7FFF7FFF
        v2 = _load(source, stride, 2, rows_left, words_left, BLOCK) & 0x7FFF7FFF
        v3 = _load(source, stride, 3, rows_left, words_left, BLOCK) & 0x7FFF7FFF
    if ROWS:
        if ROWWISE:
            amax = tl.load(row_amax + row + steps, mask=steps < rows_left, other=0)
            scales = row_scales + row
            scales_left = tl.where(d_block == 0, rows_left, 0)
        else:
            amax = _row_magnitudes(v0, v1, v2, v3, BLOCK)
            scales = row_scales + d_block.to(tl.int64) * row_scale_stride + tl.load(blocks + 4 * block + 3)
            scales_left = tl.cdiv(rows_left, SCALE_ALIGNMENT) * SCALE_ALIGNMENT
        scale = scale_of(amax, LIMIT, POWER_OF_TWO)
        tl.store(scales + steps, scale, mask=steps < scales_left)
        i0, i1, i2, i3 = _quarters(inverse_of(scale))
    if COLUMNS:
        if ROWWISE:
            lines = tl.minimum(e, E - 1).to(tl.int64) * D + d + steps  # past the last group any scale will do
            amax = tl.load(column_amax + lines, mask=steps < D - d, other=0)
        else:
            lines = block.to(tl.int64) * D + d + steps
            largest = _larger(_larger(v0, v1), _larger(v2, v3))
            amax = tl.join(tl.max(largest & 0xFFFF, 0) << 16, tl.max(largest & 0x7FFF0000, 0)).reshape(BLOCK)
        scale = scale_of(amax, LIMIT, POWER_OF_TWO)
        if ROWWISE:
            if rows_left > 0:  # each block of the group stores the same
                tl.store(column_scales + lines, scale, mask=steps < D - d)
        else:
            scale = tl.where(rows_left > 0, scale, 1.0)
            tl.store(column_scales + lines, scale, mask=steps < D - d)
        low_inverse, high_inverse = inverse_of(scale).reshape(BLOCK // 2, 2).split()
    v0 = _load(source, stride, 0, rows_left, words_left, BLOCK)
    v1 = _load(source, stride, 1, rows_left, words_left, BLOCK)
    v2 = _load(source, stride, 2, rows_left, words_left, BLOCK)
    v3 = _load(source, stride, 3, rows_left, words_left, BLOCK)
    if ROWS:
        target = (by_row + row.to(tl.int64) * row_stride + d).to(tl.pointer_type(tl.int16))
        _store_rows(target, row_stride // 2, 0, rows_left, words_left, v0, i0, BLOCK)
        _store_rows(target, row_stride // 2, 1, rows_left, words_left, v1, i1, BLOCK)
        _store_rows(target, row_stride // 2, 2, rows_left, words_left, v2, i2, BLOCK)
        _store_rows(target, row_stride // 2, 3, rows_left, words_left, v3, i3, BLOCK)
    if COLUMNS:
        low = low_inverse[None, :]
        high = high_inverse[None, :]
        words = tl.arange(0, BLOCK // 2)
        quads = tl.arange(0, BLOCK // 4)
        lines = (by_column + (block.to(tl.int64) * D + d) * BLOCK).to(tl.pointer_type(tl.uint32))
        targets = lines + words[None, :] * (BLOCK // 2) + quads[:, None]
        mask = (words < words_left)[None, :] & (quads >= 0)[:, None]  # of the whole tile, as it was measured
        tl.store(targets, four_to_fp8(_low(v0) * low, _low(v1) * low, _low(v2) * low, _low(v3) * low), mask=mask)
        targets += BLOCK // 4
        tl.store(
            targets, four_to_fp8(_high(v0) * high, _high(v1) * high, _high(v2) * high, _high(v3) * high), mask=mask
        )


@triton.jit
def _amax(x, blocks, row_amax, column_amax, D, x_stride, BLOCK: tl.constexpr, BAND: tl.constexpr):
    """As `quantize._amax`; D and the stride are multiples of 8."""
    d_blocks = tl.cdiv(D, BLOCK)
    block, d_block = tile_position(tl.program_id(0), tl.num_programs(0) // d_blocks, d_blocks, BAND)
    d = d_block * BLOCK
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    if rows_left > 0:
        source = (x + row.to(tl.int64) * x_stride + d).to(tl.pointer_type(tl.int32))
        words = tl.arange(0, BLOCK // 2)
        words_left = (D - d) // 2
        largest = tl.zeros((BLOCK // 4, BLOCK // 2), tl.int32)
        for i in tl.static_range(4):
            magnitudes = _load(source, x_stride // 2, i, rows_left, words_left, BLOCK) & 0x7FFF7FFF
            largest = _larger(largest, magnitudes)
            if row_amax is not None:
                rows = 4 * tl.arange(0, BLOCK // 4) + i
                amax = _row_magnitude(magnitudes, BLOCK)
                tl.atomic_max(row_amax + row + rows, amax, mask=rows < rows_left, sem="relaxed")
        lines = column_amax + tl.load(blocks + 4 * block).to(tl.int64) * D + d + 2 * words
        tl.atomic_max(lines, tl.max(largest & 0xFFFF, 0) << 16, mask=words < words_left, sem="relaxed")
        tl.atomic_max(lines + 1, tl.max(largest & 0x7FFF0000, 0), mask=words < words_left, sem="relaxed")
