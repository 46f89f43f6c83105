"""The offset plan and the quantizers for DeepGEMM: padding is part of the one pass that quantizes.

Numbers are those of `reference`, bit for bit. Every row and scale of the padding is written, 0 and 1: DeepGEMM
multiplies it with the rest of its block.

M, E, D: rows, groups, features. B: blocks of 128 rows. R: rows as DeepGEMM sees them. See `layouts`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.backends.deepgemm.layouts import BLOCK, FIELDS
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.groups import MOST_AT_ONCE, at_once, groups_from, groups_of_blocks, tile_position
from grouped_gemm.kernels.common.launch import cdiv, launch, on_device
from grouped_gemm.kernels.common.scaling import four_to_fp8, inverse_of, magnitude, scale_of, to_fp8
from grouped_gemm.kernels.quantize import packed_bf16
from grouped_gemm.kernels.quantize.fp8 import _load_quarter, _store_quarter, _transpose
from grouped_gemm.kernels.quantize.packed_bf16 import (
    _high,
    _larger,
    _load,
    _low,
    _quarters,
    _row_magnitudes,
    _store_rows,
)

_AT_ONCE = 8  # blocks that a program of the plan lays out
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 32, 256  # a tile that is copied


def fill_plan(offs: Tensor, num_rows: int, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Fills ``out``, from `layouts.plan`. Any values of ``offs`` (E,) int32 are safe."""
    row_map, blocks, sizes = out
    num_blocks, num_groups = blocks.shape[0], offs.shape[0]
    if num_rows == 0:
        sizes.zero_()
        return
    with on_device(offs):
        launch(
            _lay_out, (cdiv(num_blocks + 1, _AT_ONCE),),
            offs, row_map, blocks, sizes, num_rows, num_groups, num_blocks,
            constants={
                "E_AT_ONCE": at_once(num_groups), "BLOCK": BLOCK, "FIELDS": FIELDS, "AT_ONCE": _AT_ONCE,
            },
        )  # fmt: skip


def quantize_activations(x_MD: Tensor, blocks: Tensor, recipe: Recipe, out: tuple[Tensor, ...]) -> None:
    """Fills ``out``, from `layouts.activations`, by one read: what has no elements is not wanted.

    Args:
        x_MD: (M, D), contiguous D, a multiple of 128; bfloat16, float16 or float32.
        blocks: (B, 5), from `fill_plan`.
        recipe: blockwise.
        out: data and scales by rows, data and scales by columns. Columns past the last group are left as they are.
    """
    by_row, row_scale, by_column, column_scale = out
    features = x_MD.shape[1]
    rows, columns = by_row.dim() == 2, column_scale.dim() == 2
    if blocks.shape[0] == 0:
        return
    quantize_tiles = _quantize_packed if columns and packed_bf16.can_run(x_MD) else _quantize_tiles
    with on_device(x_MD):
        launch(
            quantize_tiles, (blocks.shape[0] * (features // BLOCK),),
            x_MD, blocks, by_row, row_scale, by_column, column_scale,
            by_row.shape[0], features, x_MD.stride(0), row_scale.stride(1) if rows else 0,
            constants={
                "ROWS": rows, "COLUMNS": columns,
                "LIMIT": torch.finfo((by_row if rows else by_column).dtype).max,
                "POWER_OF_TWO": recipe.power_of_two_scales, "NVIDIA": machine_of(x_MD.device).vendor == "nvidia",
                "BLOCK": BLOCK, "FIELDS": FIELDS, "BAND": 8,
            }, num_warps=4,
        )  # fmt: skip


def pad(x_MD: Tensor, blocks: Tensor) -> Tensor:
    """(128 B, D): each group from a multiple of 128 on, zeros between them."""
    out = x_MD.new_empty(blocks.shape[0] * BLOCK, x_MD.shape[1])
    _move("pad", x_MD, out, blocks)
    return out


def unpad(x_RD: Tensor, blocks: Tensor, out_MD: Tensor) -> None:
    """Fills ``out_MD`` with the rows that `pad` padded, and zeros past the last group."""
    _move("unpad", x_RD, out_MD, blocks)


def zero_tail(x_MD: Tensor, blocks: Tensor) -> None:
    """Makes rows past the last group 0, in place."""
    _move("zero tail", x_MD, x_MD, blocks)


def _move(mode: str, source: Tensor, target: Tensor, blocks: Tensor) -> None:
    features = source.shape[1]
    grid = (blocks.shape[0] * (BLOCK // _ROWS_AT_ONCE), cdiv(features, _COLUMNS_AT_ONCE))
    with on_device(source):
        launch(
            _move_rows, grid, source, target, blocks, features, source.stride(0), target.stride(0),
            constants={
                "MODE": mode, "BLOCK": BLOCK, "FIELDS": FIELDS, "ROWS": _ROWS_AT_ONCE, "COLUMNS": _COLUMNS_AT_ONCE,
            },
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "E", "B"])
def _lay_out(
    offs, row_map, blocks, sizes, M, E, B,
    E_AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Fields of each block; the group of each row, also of the block past the last one, which has none; sizes."""
    block = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    e, start, end, first, last, _ = groups_of_blocks(block, offs, M, E, BLOCK, 1, E_AT_ONCE)
    if tl.program_id(0) == 0:
        next_row = 0
        for first_group in range(0, E_AT_ONCE if E_AT_ONCE < MOST_AT_ONCE else E, E_AT_ONCE):
            groups, _starts, ends, firsts, lasts = groups_from(first_group, next_row, 0, offs, M, E, BLOCK, E_AT_ONCE)
            tl.store(sizes + groups, (lasts - firsts) * BLOCK, mask=groups < E)
            next_row = tl.max(ends)
    row = tl.minimum(start + (block - first) * BLOCK, M)
    left = tl.maximum(end - row, 0)
    own = tl.where(e < E, left, 0)
    target = blocks + FIELDS * block
    mask = block < B
    tl.store(target, row, mask=mask)
    tl.store(target + 1, own, mask=mask)
    tl.store(target + 2, left, mask=mask)
    tl.store(target + 3, first, mask=mask)
    tl.store(target + 4, last - first, mask=mask)
    rows = tl.arange(0, BLOCK)
    of_group = tl.where(rows[None, :] < own[:, None], e[:, None], -1)
    tl.store(
        row_map + block[:, None] * BLOCK + rows[None, :], of_group, mask=(block <= B)[:, None] & (rows >= 0)[None, :]
    )


@triton.jit(do_not_specialize=["R", "row_scale_stride"])
def _quantize_tiles(
    x, blocks, by_row, row_scales, by_column, column_scales, R, D, x_stride, row_scale_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """A block of rows by BLOCK features: one read, and each layout that is wanted, the rows at their padded place."""
    d_blocks = D // BLOCK
    block, d_block = tile_position(tl.program_id(0), tl.num_programs(0) // d_blocks, d_blocks, BAND)
    d = d_block * BLOCK
    row = tl.load(blocks + FIELDS * block)
    rows_left = tl.load(blocks + FIELDS * block + 1)
    source = x + row.to(tl.int64) * x_stride + d
    padded_row = block.to(tl.int64) * BLOCK
    room = R - block * BLOCK
    largest = tl.zeros((BLOCK // 4, BLOCK), tl.int32)
    for i in tl.static_range(4):
        values = _load_quarter(source, x_stride, i, rows_left, D - d, BLOCK, BLOCK)
        magnitudes = magnitude(values)
        if ROWS:
            rows = 4 * tl.arange(0, BLOCK // 4) + i
            scale = tl.where(rows < rows_left, scale_of(tl.max(magnitudes, 1), LIMIT, POWER_OF_TWO), 1.0)
            data = to_fp8(values, inverse_of(scale)[:, None], LIMIT, by_row.dtype.element_ty, NVIDIA)
            _store_quarter(by_row + padded_row * D + d, D, i, room, D - d, data)
            scales = row_scales + d_block.to(tl.int64) * row_scale_stride + padded_row
            tl.store(scales + rows, scale, mask=rows < room)
        if COLUMNS:
            largest = tl.maximum(largest, magnitudes)
    if COLUMNS:
        scale = tl.where(rows_left > 0, scale_of(tl.max(largest, 0), LIMIT, POWER_OF_TWO), 1.0)
        tl.store(column_scales + block.to(tl.int64) * D + d + tl.arange(0, BLOCK), scale)
        if rows_left > 0:
            first = tl.load(blocks + FIELDS * block + 3)
            length = tl.load(blocks + FIELDS * block + 4) * BLOCK
            target = by_column + first.to(tl.int64) * BLOCK * D + d.to(tl.int64) * length + (block - first) * BLOCK
            _transpose(
                source, x_stride, target, length, inverse_of(scale), rows_left, BLOCK, D - d,
                LIMIT, by_column.dtype.element_ty, NVIDIA, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["R", "row_scale_stride"])
def _quantize_packed(
    x, blocks, by_row, row_scales, by_column, column_scales, R, D, x_stride, row_scale_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """As `_quantize_tiles`, where `packed_bf16.can_run`: two values of bfloat16 in a register."""
    d_blocks = D // BLOCK
    block, d_block = tile_position(tl.program_id(0), tl.num_programs(0) // d_blocks, d_blocks, BAND)
    d = d_block * BLOCK
    row = tl.load(blocks + FIELDS * block)
    rows_left = tl.load(blocks + FIELDS * block + 1)
    source = (x + row.to(tl.int64) * x_stride + d).to(tl.pointer_type(tl.int32))
    stride = x_stride // 2
    padded_row = block.to(tl.int64) * BLOCK
    room = R - block * BLOCK
    steps = tl.arange(0, BLOCK)
    v0 = _load(source, stride, 0, rows_left, BLOCK // 2, BLOCK) & 0x7FFF7FFF
    v1 = _load(source, stride, 1, rows_left, BLOCK // 2, BLOCK) & 0x7FFF7FFF
    v2 = _load(source, stride, 2, rows_left, BLOCK // 2, BLOCK) & 0x7FFF7FFF
    v3 = _load(source, stride, 3, rows_left, BLOCK // 2, BLOCK) & 0x7FFF7FFF
    if ROWS:
        scale = scale_of(_row_magnitudes(v0, v1, v2, v3, BLOCK), LIMIT, POWER_OF_TWO)
        scale = tl.where(steps < rows_left, scale, 1.0)
        tl.store(row_scales + d_block.to(tl.int64) * row_scale_stride + padded_row + steps, scale, mask=steps < room)
        i0, i1, i2, i3 = _quarters(inverse_of(scale))
    if COLUMNS:
        largest = _larger(_larger(v0, v1), _larger(v2, v3))
        amax = tl.join(tl.max(largest & 0xFFFF, 0) << 16, tl.max(largest & 0x7FFF0000, 0)).reshape(BLOCK)
        scale = tl.where(rows_left > 0, scale_of(amax, LIMIT, POWER_OF_TWO), 1.0)
        tl.store(column_scales + block.to(tl.int64) * D + d + steps, scale)
        low_inverse, high_inverse = inverse_of(scale).reshape(BLOCK // 2, 2).split()
    v0 = _load(source, stride, 0, rows_left, BLOCK // 2, BLOCK)
    v1 = _load(source, stride, 1, rows_left, BLOCK // 2, BLOCK)
    v2 = _load(source, stride, 2, rows_left, BLOCK // 2, BLOCK)
    v3 = _load(source, stride, 3, rows_left, BLOCK // 2, BLOCK)
    if ROWS:
        target = (by_row + padded_row * D + d).to(tl.pointer_type(tl.int16))
        _store_rows(target, D // 2, 0, room, BLOCK // 2, v0, i0, BLOCK)
        _store_rows(target, D // 2, 1, room, BLOCK // 2, v1, i1, BLOCK)
        _store_rows(target, D // 2, 2, room, BLOCK // 2, v2, i2, BLOCK)
        _store_rows(target, D // 2, 3, room, BLOCK // 2, v3, i3, BLOCK)
    if COLUMNS:
        low = low_inverse[None, :]
        high = high_inverse[None, :]
        first = tl.load(blocks + FIELDS * block + 3)
        length = tl.load(blocks + FIELDS * block + 4) * BLOCK  # of a line, all tokens of the group
        begin = first.to(tl.int64) * BLOCK * D + d.to(tl.int64) * length + (block - first) * BLOCK
        words = tl.arange(0, BLOCK // 2)
        quads = tl.arange(0, BLOCK // 4)
        lines = (by_column + begin).to(tl.pointer_type(tl.uint32))
        targets = lines + 2 * words.to(tl.int64)[None, :] * (length // 4) + quads[:, None]
        mask = (words >= 0)[None, :] & (quads < tl.where(rows_left > 0, BLOCK, 0))[:, None]
        tl.store(targets, four_to_fp8(_low(v0) * low, _low(v1) * low, _low(v2) * low, _low(v3) * low), mask=mask)
        targets += length // 4
        tl.store(
            targets, four_to_fp8(_high(v0) * high, _high(v1) * high, _high(v2) * high, _high(v3) * high), mask=mask
        )


@triton.jit
def _move_rows(
    source, target, blocks, D, source_stride, target_stride,
    MODE: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of a block to their padded place, zeros after them; or back; or zeros to those past the last group."""
    block = tl.program_id(0) // (BLOCK // ROWS)
    row = tl.load(blocks + FIELDS * block).to(tl.int64)
    own = tl.load(blocks + FIELDS * block + 1)
    left = tl.load(blocks + FIELDS * block + 2)
    rows = tl.program_id(0) % (BLOCK // ROWS) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    padded = block.to(tl.int64) * BLOCK + rows
    inside = (columns < D)[None, :]
    if MODE == "pad":
        values = tl.load(
            source + (row + rows)[:, None] * source_stride + columns[None, :],
            mask=(rows < own)[:, None] & inside,
            other=0,
        )
        tl.store(
            target + padded[:, None] * target_stride + columns[None, :], values, mask=inside & (rows >= 0)[:, None]
        )
    elif MODE == "unpad":
        values = tl.load(
            source + padded[:, None] * source_stride + columns[None, :], mask=(rows < own)[:, None] & inside, other=0
        )
        tl.store(
            target + (row + rows)[:, None] * target_stride + columns[None, :],
            values,
            mask=(rows < left)[:, None] & inside,
        )
    else:
        zeros = tl.zeros((ROWS, COLUMNS), target.dtype.element_ty)
        mask = (rows < tl.where(own == 0, left, 0))[:, None] & inside
        tl.store(target + (row + rows)[:, None] * target_stride + columns[None, :], zeros, mask=mask)
