"""Quantizer kernels for bfloat16 on NVIDIA GPUs from Hopper on, where a register holds two values.

The general kernels are bound by instructions, not by memory. These compare magnitudes and convert values two at a time:
``max.u16x2`` compares them, because the bits of bfloat16 without the sign are ordered as the magnitudes, NaN above all.

A tile of 128 by 128 values is read once and stays in registers, as (128, 64) words. A word holds two adjacent values of
a row, the first in its low half. A thread holds 16 adjacent rows of 4 adjacent words. So it has whole pieces of rows
and whole pieces of the transpose, and threads exchange nothing but maxima and scales. This is written in Gluon, since
plain Triton chooses layouts itself, and chooses others. A tile is a tuple of four chunks, each with four rows of every
thread: work on one chunk at a time takes fewer registers. Row 16 t + 4 i + j of a tile is row 4 t + j of chunk i.

D, C and strides of operands are multiples of 8, strides of results are multiples of 16.

M, E, D: rows, groups, features. R, C: lines and columns of a weight matrix as it lies in memory, C contiguous.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005 - Triton does not unpack tuples with a star

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from grouped_gemm.core.machine import machine_of
from grouped_gemm.kernels.common.scaling import four_to_fp8, scale_of

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7 renamed it

# Launches of kernels that find the scales of tiles, and of those that know them. With more registers, fewer programs
# would run at once.
TILES = {"num_warps": 4, "maxnreg": 168}
SCALED_TILES = {"num_warps": 4, "maxnreg": 128}

# Layouts of a tile's words, (128, 64), of a chunk's, (32, 64), and of the transpose: words of four rows, (32, 64). They
# differ in which registers of a thread follow each other. The eight lanes along a row read 128 bytes, a cache line.
_TILE = gl.constexpr(gl.BlockedLayout([16, 4], [4, 8], [2, 2], [1, 0]))
_CHUNK = gl.constexpr(gl.BlockedLayout([4, 4], [4, 8], [2, 2], [1, 0]))
_TRANSPOSE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [2, 0], [0, 1], [0, 2]],
        lane_bases=[[0, 4], [0, 8], [0, 16], [4, 0], [8, 0]],
        warp_bases=[[0, 32], [16, 0]],
        block_bases=[],
        shape=[32, 64],
    )
)
_LINES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # of scales: one for each thread


def can_run(x: Tensor, num_blocks: int) -> bool:
    """Whether these kernels read ``x``: bfloat16 that can be read eight values at a time, on a GPU with u16x2.

    ``num_blocks``: blocks of 128 rows, the second axis of a grid.
    """
    return (
        x.dtype == torch.bfloat16
        and machine_of(x.device).traits.packed_max
        and x.shape[-1] % 8 == 0
        and all(stride % 8 == 0 for stride in x.stride()[:-1])
        and x.data_ptr() % 16 == 0
        and num_blocks < 2**16
    )


@gluon.jit
def _larger(a, b):
    """The larger of the low halves and the larger of the high halves of two words, as unsigned integers."""
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _opaque(words):
    """``words``, as new values to the compiler: it would keep what it once computed from them in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _pair(low, high):
    """Two fp32 values as fp8, saturated, the first in the low byte."""
    return gl.inline_asm_elementwise(
        "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [low, high], dtype=gl.int16, is_pure=True, pack=1
    )


@gluon.jit
def _low(words):
    """The low half of each word in fp32. Applied to magnitudes, the bits are still ordered as the values."""
    return (words << 16).to(gl.float32, bitcast=True)


@gluon.jit
def _high(words):
    """The high half of each word in fp32."""
    return (words & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def inverse_of(scale):
    """As `scaling.inverse_of`."""
    return gl.div_rn(gl.full(scale.shape, 1.0, gl.float32, scale.type.layout), scale)


@gluon.jit
def rows_of_tile():
    """The rows of a tile, (128,), one for each thread."""
    return gl.arange(0, 128, layout=_LINES)


@gluon.jit
def words_of_tile():
    """The words of a tile's rows, (64,), one for each thread."""
    return gl.arange(0, 64, layout=_LINES)


@gluon.jit
def _places(i: gl.constexpr):
    """The rows, (32, 1), and words, (1, 64), of chunk ``i``."""
    rows = gl.arange(0, 32, layout=gl.SliceLayout(1, _CHUNK))
    words = gl.arange(0, 64, layout=gl.SliceLayout(0, _CHUNK))
    return (rows // 4 * 16 + 4 * i + rows % 4)[:, None], words[None, :]


@gluon.jit
def _exists(rows, words, rows_left, words_left):
    """Which words exist. So the compiler sees that the four of a thread do together."""
    return (rows < rows_left) & (words // 4 < words_left // 4)


@gluon.jit
def load_tile(source, stride, rows_left, words_left):
    """Loads a tile, zero where there is nothing.

    Args:
        source: bfloat16, the first value of the tile, and
        stride: of its rows.
        rows_left, words_left: what exists from there on.
    """
    pointers = source.to(gl.pointer_type(gl.int32))
    tile = ()
    for i in gl.static_range(4):
        rows, words = _places(i)
        places = rows.to(gl.int64) * (stride // 2) + words
        tile = tile + (gl.load(pointers + places, mask=_exists(rows, words, rows_left, words_left), other=0),)
    return tile


@gluon.jit
def _join_four(parts):
    """Joins what belongs to the four chunks along two new axes: chunk 2 a + b is at (..., b, a)."""
    return gl.join(gl.join(parts[0], parts[1]), gl.join(parts[2], parts[3]))


@gluon.jit
def row_amax(tile):
    """The largest magnitude of each row of a tile, as the bits of fp32: (128,), one for each thread."""
    parts = ()
    for i in gl.static_range(4):
        left, right = (tile[i] & 0x7FFF7FFF).reshape(32, 16, 2, 2).split()
        left, right = _larger(left, right).split()
        parts = parts + (_larger(left, right).reshape(8, 4, 16),)
    words = _join_four(parts).permute(0, 4, 3, 1, 2).reshape(128, 16)
    words = gl.convert_layout(gl.reduce(words, 1, _larger), _LINES)
    return gl.maximum(words << 16, words & 0x7FFF0000)


@gluon.jit
def column_amax(tile):
    """The largest magnitudes of columns, as the bits of fp32, of low and of high halves: (64,), one for each thread."""
    left = _larger(tile[0] & 0x7FFF7FFF, tile[1] & 0x7FFF7FFF)
    right = _larger(tile[2] & 0x7FFF7FFF, tile[3] & 0x7FFF7FFF)
    words = gl.convert_layout(gl.reduce(_larger(left, right), 0, _larger), _LINES)
    return words << 16, words & 0x7FFF0000


@gluon.jit
def tile_amax(tile):
    """The largest magnitude of a tile, as the bits of fp32: a number."""
    left = _larger(tile[0] & 0x7FFF7FFF, tile[1] & 0x7FFF7FFF)
    right = _larger(tile[2] & 0x7FFF7FFF, tile[3] & 0x7FFF7FFF)
    word = gl.reduce(gl.reduce(_larger(left, right), 0, _larger), 0, _larger)
    return gl.maximum(word << 16, word & 0x7FFF0000)


@gluon.jit
def _by_chunk(values):
    """One value for each row of a tile, (128,), as those of the four chunks, (32,)."""
    even, odd = gl.convert_layout(values, gl.SliceLayout(1, _TILE)).reshape(8, 2, 2, 4).permute(0, 3, 1, 2).split()
    v0, v2 = even.split()
    v1, v3 = odd.split()
    return v0.reshape(32), v1.reshape(32), v2.reshape(32), v3.reshape(32)


@gluon.jit
def _four_rows(values):
    """Quantized values of a chunk, (32, 64) fp32, in words of four rows: (8, 64)."""
    even, odd = values.reshape(8, 2, 2, 64).permute(0, 3, 1, 2).split()
    v0, v2 = even.split()
    v1, v3 = odd.split()
    return four_to_fp8(v0, v1, v2, v3)


@gluon.jit
def store_tile(
    tile, by_row, row_stride, row_inverse, rows_left, by_column, column_stride, column_inverse, tokens_left, words_left,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, POLICY: gl.constexpr,
):  # fmt: skip
    """Quantizes a tile, and stores its rows and its transpose, a line for each column.

    Args:
        by_row, by_column: fp8, the first value of the tile in each layout; strides are those of lines there.
        row_inverse: inverse scales of rows, one for each thread.
        column_inverse: inverse scales of columns of low and of high halves, one for each thread.
        rows_left: rows that are stored.
        tokens_left: values of a line that are stored, rounded up to a multiple of 16.
        POLICY: the eviction policy of what is stored.
    """
    pairs = by_row.to(gl.pointer_type(gl.int16))
    if ROWS:
        row_inverse = _by_chunk(row_inverse)
    if COLUMNS:
        low_inverse = gl.convert_layout(column_inverse[0], gl.SliceLayout(0, _CHUNK))[None, :]
        high_inverse = gl.convert_layout(column_inverse[1], gl.SliceLayout(0, _CHUNK))[None, :]
    lows = ()
    highs = ()
    for i in gl.static_range(4):
        chunk = tile[i]
        if ROWS:
            inverse = gl.convert_layout(row_inverse[i], gl.SliceLayout(1, _CHUNK))[:, None]
            data = _pair(_low(chunk) * inverse, _high(chunk) * inverse)
            rows, words = _places(i)
            places = rows.to(gl.int64) * (row_stride // 2) + words
            mask = _exists(rows, words, rows_left, words_left)
            gl.store(pairs + places, data, mask=mask, eviction_policy=POLICY)
        if COLUMNS:
            chunk = _opaque(chunk)
            lows = lows + (_four_rows(_low(chunk) * low_inverse),)
            highs = highs + (_four_rows(_high(chunk) * high_inverse),)
    if COLUMNS:
        lows = gl.convert_layout(_join_four(lows).permute(0, 3, 2, 1).reshape(32, 64), _TRANSPOSE)
        highs = gl.convert_layout(_join_four(highs).permute(0, 3, 2, 1).reshape(32, 64), _TRANSPOSE)
        words = gl.arange(0, 64, layout=gl.SliceLayout(0, _TRANSPOSE))[None, :]
        quads = gl.arange(0, 32, layout=gl.SliceLayout(1, _TRANSPOSE))[:, None]
        lines = by_column.to(gl.pointer_type(gl.int32)) + words.to(gl.int64) * (column_stride // 2) + quads
        mask = (words < words_left) & (quads // 4 * 16 < tokens_left)
        gl.store(lines, lows, mask=mask, eviction_policy=POLICY)
        gl.store(lines + column_stride // 4, highs, mask=mask, eviction_policy=POLICY)


@gluon.jit(do_not_specialize=["row_scale_stride"])
def quantize_blockwise(
    x, blocks, by_row, row_scales, by_column, column_scales,
    D, x_stride, row_stride, row_scale_stride,
    ROWS: gl.constexpr, LIMIT: gl.constexpr, POWER_OF_TWO: gl.constexpr, NVIDIA: gl.constexpr,
    SCALE_ALIGNMENT: gl.constexpr,
):  # fmt: skip
    """As `blockwise.quantize_tiles` with COLUMNS. A thread computes the scales of one row and of two columns."""
    block = gl.program_id(1)
    d = gl.program_id(0) * 128
    row = gl.load(blocks + 4 * block + 1)
    rows_left = gl.load(blocks + 4 * block + 2)
    scale_place = gl.load(blocks + 4 * block + 3)
    words_left = (D - d) // 2
    tile = load_tile(x + row.to(gl.int64) * x_stride + d, x_stride, rows_left, words_left)
    low, high = column_amax(tile)  # before those of rows: that takes fewer registers
    row_inverse = 0
    if ROWS:
        rows = rows_of_tile()
        scale = scale_of(row_amax(tile), LIMIT, POWER_OF_TWO)
        scales = row_scales + (d // 128).to(gl.int64) * row_scale_stride + scale_place
        gl.store(scales + rows, scale, mask=rows < gl.cdiv(rows_left, SCALE_ALIGNMENT) * SCALE_ALIGNMENT)
        row_inverse = inverse_of(scale)
    low = gl.where(rows_left > 0, scale_of(low, LIMIT, POWER_OF_TWO), 1.0)
    high = gl.where(rows_left > 0, scale_of(high, LIMIT, POWER_OF_TWO), 1.0)
    store_column_scales(column_scales + block.to(gl.int64) * D + d, (low, high), words_left)
    store_tile(
        tile, by_row + row.to(gl.int64) * row_stride + d, row_stride, row_inverse, rows_left,
        by_column + (block.to(gl.int64) * D + d) * 128, 128, (inverse_of(low), inverse_of(high)), 128, words_left,
        ROWS, True, "",
    )  # fmt: skip


@gluon.jit
def _add_amax(tile, row_maxima, rows_left, column_maxima, words_left):
    """Updates the largest magnitudes of rows and of columns, where they are wanted, by atomics."""
    if row_maxima is not None:
        rows = rows_of_tile()
        gl.atomic_max(row_maxima + rows, row_amax(tile), mask=rows < rows_left, sem="relaxed")
    if column_maxima is not None:
        low, high = column_amax(tile)
        words = words_of_tile()
        gl.atomic_max(column_maxima + 2 * words, low, mask=words < words_left, sem="relaxed")
        gl.atomic_max(column_maxima + 2 * words + 1, high, mask=words < words_left, sem="relaxed")


@gluon.jit
def find_amax(x, blocks, row_maxima, column_maxima, D, x_stride):
    """As `rowwise.find_amax`."""
    block = gl.program_id(1)
    d = gl.program_id(0) * 128
    e = gl.load(blocks + 4 * block)
    row = gl.load(blocks + 4 * block + 1)
    rows_left = gl.load(blocks + 4 * block + 2)
    if rows_left > 0:
        words_left = (D - d) // 2
        tile = load_tile(x + row.to(gl.int64) * x_stride + d, x_stride, rows_left, words_left)
        if row_maxima is not None:
            row_maxima += row
        _add_amax(tile, row_maxima, rows_left, column_maxima + e.to(gl.int64) * D + d, words_left)


@gluon.jit
def _column_scales(maxima, words_left, LIMIT: gl.constexpr, POWER_OF_TWO: gl.constexpr):
    """The scales of the columns of low and of high halves, one for each thread. No cached line of L1 is read."""
    words = words_of_tile()
    mask = words < words_left
    low = gl.load(maxima + 2 * words, mask=mask, other=0, cache_modifier=".cg")
    high = gl.load(maxima + 2 * words + 1, mask=mask, other=0, cache_modifier=".cg")
    return scale_of(low, LIMIT, POWER_OF_TWO), scale_of(high, LIMIT, POWER_OF_TWO)


@gluon.jit
def store_column_scales(target, scales, words_left):
    """Stores the scales of columns of low and of high halves, one for each thread."""
    words = words_of_tile()
    gl.store(target + 2 * words, scales[0], mask=words < words_left)
    gl.store(target + 2 * words + 1, scales[1], mask=words < words_left)


@gluon.jit(do_not_specialize=["E"])
def quantize_rowwise(
    x, blocks, by_row, row_scales, by_column, column_scales, row_maxima, column_maxima,
    E, D, x_stride, row_stride,
    ROWS: gl.constexpr, LIMIT: gl.constexpr, POWER_OF_TWO: gl.constexpr, NVIDIA: gl.constexpr,
):  # fmt: skip
    """As `rowwise.quantize_tiles`. A thread computes the scales of one row and of two columns."""
    block = gl.program_id(1)
    d = gl.program_id(0) * 128
    e = gl.load(blocks + 4 * block)
    row = gl.load(blocks + 4 * block + 1)
    rows_left = gl.load(blocks + 4 * block + 2)
    words_left = (D - d) // 2
    tile = load_tile(x + row.to(gl.int64) * x_stride + d, x_stride, rows_left, words_left)
    row_inverse = 0
    if ROWS:
        rows = rows_of_tile()
        scale = scale_of(gl.load(row_maxima + row + rows, mask=rows < rows_left, other=0), LIMIT, POWER_OF_TWO)
        gl.store(row_scales + row + rows, scale, mask=rows < gl.where(d == 0, rows_left, 0))
        row_inverse = inverse_of(scale)
    place = gl.minimum(e, E - 1).to(gl.int64) * D + d  # past the last group all values are zero: any scale will do
    scales = _column_scales(column_maxima + place, words_left, LIMIT, POWER_OF_TWO)
    if rows_left > 0:  # every block of the group stores the same scales
        store_column_scales(column_scales + place, scales, words_left)
    store_tile(
        tile, by_row + row.to(gl.int64) * row_stride + d, row_stride, row_inverse, rows_left,
        by_column + (block.to(gl.int64) * D + d) * 128, 128, (inverse_of(scales[0]), inverse_of(scales[1])), 128,
        words_left, ROWS, True, "",
    )  # fmt: skip


@gluon.jit(do_not_specialize=["E", "DELAY"])
def quantize_weights_rowwise(
    w, straight, transposed, line_scales, column_scales, line_maxima, column_maxima, counts,
    E, R, C, w_stride_e, w_stride, straight_stride_e, straight_stride, transposed_stride_e, transposed_stride, DELAY,
    STRAIGHT: gl.constexpr, TRANSPOSED: gl.constexpr, LIMIT: gl.constexpr, POWER_OF_TWO: gl.constexpr,
    NVIDIA: gl.constexpr,
):  # fmt: skip
    """Finds the largest magnitudes of lines and columns and then quantizes, in one launch, two programs for each tile.

    A program that quantizes waits until all of its matrix has been read. Programs take turns: one reads a tile, the
    next quantizes the tile that was read a whole matrix and DELAY tiles before. So it hardly waits, and of a matrix
    that fits into L2, the second read does not go to memory. A program draws its place in this order when it starts. It
    only waits for earlier ones that read; those have started and do not wait, so there is no deadlock, in whatever
    order the GPU starts programs.

    Args:
        line_maxima, column_maxima: (E, R) and (E, C) zeros.
        counts: (E + 1,) zeros: how many tiles of each matrix have been read, and the places that have been drawn.
    """
    c_blocks = gl.cdiv(C, 128)
    tiles = gl.cdiv(R, 128) * c_blocks
    step = gl.atomic_add(counts + E, 1, sem="relaxed")
    ahead = gl.minimum(tiles + DELAY, E * tiles)
    later = step - ahead
    pairs = E * tiles - ahead
    is_first = (step < ahead) | ((later < 2 * pairs) & (later % 2 == 0))
    tile = gl.where(later < 2 * pairs, later // 2, later - pairs)
    if is_first:
        tile = gl.where(step < ahead, step, ahead + tile)
    matrix = tile // tiles
    r_block = (tile - matrix * tiles) // c_blocks
    c_block = tile - matrix * tiles - r_block * c_blocks
    e = matrix.to(gl.int64)
    r = r_block * 128
    c = c_block * 128
    rows_left = R - r
    words_left = (C - c) // 2
    if line_maxima is not None:
        line_maxima += e * R + r
    if column_maxima is not None:
        column_maxima += e * C + c
    source = w + e * w_stride_e + r.to(gl.int64) * w_stride + c
    if is_first:
        values = load_tile(source, w_stride, rows_left, words_left)
        _add_amax(values, line_maxima, rows_left, column_maxima, words_left)
        barrier()
        gl.atomic_add(counts + e, 1, sem="release")
    else:
        while gl.atomic_add(counts + e, 0, sem="acquire") < tiles:
            pass
        values = load_tile(source, w_stride, rows_left, words_left)
        line_inverse = 0
        column_inverse = 0
        if STRAIGHT:
            rows = rows_of_tile()
            amax = gl.load(line_maxima + rows, mask=rows < rows_left, other=0, cache_modifier=".cg")
            scale = scale_of(amax, LIMIT, POWER_OF_TWO)
            gl.store(line_scales + e * R + r + rows, scale, mask=rows < gl.where(c_block == 0, rows_left, 0))
            line_inverse = inverse_of(scale)
        if TRANSPOSED:
            scales = _column_scales(column_maxima, words_left, LIMIT, POWER_OF_TWO)
            if r_block == 0:
                store_column_scales(column_scales + e * C + c, scales, words_left)
            column_inverse = (inverse_of(scales[0]), inverse_of(scales[1]))
        store_tile(
            values, straight + e * straight_stride_e + r.to(gl.int64) * straight_stride + c, straight_stride,
            line_inverse, rows_left,
            transposed + e * transposed_stride_e + c.to(gl.int64) * transposed_stride + r, transposed_stride,
            column_inverse, rows_left, words_left, STRAIGHT, TRANSPOSED, "evict_first",
        )  # fmt: skip


@gluon.jit(do_not_specialize=["scale_stride_e", "scale_stride_r", "scale_stride_c"])
def quantize_weights_blockwise(
    w, straight, transposed, scales,
    R, C, w_stride_e, w_stride, straight_stride_e, straight_stride, transposed_stride_e, transposed_stride,
    scale_stride_e, scale_stride_r, scale_stride_c,
    STRAIGHT: gl.constexpr, TRANSPOSED: gl.constexpr, LIMIT: gl.constexpr, POWER_OF_TWO: gl.constexpr,
    NVIDIA: gl.constexpr,
):  # fmt: skip
    """As `blockwise.quantize_weight_tiles`, on a grid of blocks along C, blocks along R, and E."""
    c_block = gl.program_id(0)
    r_block = gl.program_id(1)
    e = gl.program_id(2).to(gl.int64)
    r = r_block * 128
    c = c_block * 128
    words_left = (C - c) // 2
    tile = load_tile(w + e * w_stride_e + r.to(gl.int64) * w_stride + c, w_stride, R - r, words_left)
    scale = scale_of(tile_amax(tile), LIMIT, POWER_OF_TWO)
    gl.store(scales + e * scale_stride_e + r_block * scale_stride_r + c_block * scale_stride_c, scale)
    inverse = gl.div_rn(1.0, scale)
    rows = gl.full([128], inverse, gl.float32, _LINES)
    words = gl.full([64], inverse, gl.float32, _LINES)
    store_tile(
        tile, straight + e * straight_stride_e + r.to(gl.int64) * straight_stride + c, straight_stride, rows, R - r,
        transposed + e * transposed_stride_e + c.to(gl.int64) * transposed_stride + r, transposed_stride,
        (words, words), R - r, words_left, STRAIGHT, TRANSPOSED, "",
    )  # fmt: skip
