"""The offset plan and the quantizers for DeepGEMM, which pad and quantize in one pass.

The numbers are those of `reference`, bit for bit. DeepGEMM multiplies whole blocks, so the padding is written too: rows
of 0 with scales of 1.

M, E, D: rows, groups, features. B: blocks of 128 rows. R: rows as DeepGEMM sees them. See `layouts`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from grouped_gemm.backends.deepgemm.layouts import BLOCK, FIELDS
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.groups import MOST_AT_ONCE, at_once, groups_from, groups_of_blocks
from grouped_gemm.kernels.common.launch import cdiv, launch, on_device
from grouped_gemm.kernels.common.scaling import inverse_of, scale_of
from grouped_gemm.kernels.quantize import packed_bf16
from grouped_gemm.kernels.quantize.fp8 import scaling_constants
from grouped_gemm.kernels.quantize.primitives import quantize_block, store_transposed, tile_of_program

_AT_ONCE = 8  # blocks for each program of `_lay_out`
_ROWS_AT_ONCE, _COLUMNS_AT_ONCE = 32, 256  # the tile of `_move_rows`


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
    """Fills ``out``, from `layouts.activations`, in one read. Tensors of shape (0,) are not wanted.

    Args:
        x_MD: (M, D), contiguous D, a multiple of 128; bfloat16, float16 or float32.
        blocks: (B, 5), from `fill_plan`.
        recipe: blockwise.
        out: data and scales by rows, data and scales by columns. Columns past the last group are not written.
    """
    by_row, row_scale, by_column, column_scale = out
    features = x_MD.shape[1]
    rows, columns = by_row.dim() == 2, column_scale.dim() == 2
    if blocks.shape[0] == 0:
        return
    num_blocks, d_blocks = blocks.shape[0], features // BLOCK
    args = (
        x_MD, blocks, by_row, row_scale, by_column, column_scale,
        by_row.shape[0], features, x_MD.stride(0), row_scale.stride(1) if rows else 0,
    )  # fmt: skip
    constants: dict[str, Any] = {"ROWS": rows, "COLUMNS": columns}
    constants |= scaling_constants(x_MD, recipe, (by_row if rows else by_column).dtype)
    constants |= {"BLOCK": BLOCK, "FIELDS": FIELDS}
    with on_device(x_MD):
        if columns and packed_bf16.can_run(x_MD, num_blocks):
            grid: tuple[int, ...] = d_blocks, num_blocks
            launch(_quantize_packed, grid, *args, constants=constants, **packed_bf16.TILES)
        else:
            grid = (num_blocks * d_blocks,)
            launch(_quantize_tiles, grid, *args, constants=constants | {"GROUP_M": 8}, num_warps=4)


def pad(x_MD: Tensor, blocks: Tensor) -> Tensor:
    """Copies rows to (128 B, D), each group to a multiple of 128, with zeros between groups."""
    out = x_MD.new_empty(blocks.shape[0] * BLOCK, x_MD.shape[1])
    _move("pad", x_MD, out, blocks)
    return out


def unpad(x_RD: Tensor, blocks: Tensor, out_MD: Tensor) -> None:
    """Undoes `pad`: fills ``out_MD`` with the rows, and with zeros past the last group."""
    _move("unpad", x_RD, out_MD, blocks)


def zero_tail(x_MD: Tensor, blocks: Tensor) -> None:
    """Sets rows past the last group to 0, in place."""
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
    """Writes the fields of each block, the group of each row, including one more block, and the sizes of groups."""
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
    BLOCK: tl.constexpr, FIELDS: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Writes BLOCK rows of one group by BLOCK features in each layout that is wanted, rows at their padded place."""
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    row = tl.load(blocks + FIELDS * block)
    rows_left = tl.load(blocks + FIELDS * block + 1)
    source = x + row.to(tl.int64) * x_stride + d
    padded_row = block.to(tl.int64) * BLOCK
    room = R - block * BLOCK
    amax = quantize_block(
        source, x_stride, by_row + padded_row * D + d, D,
        row_scales + d_block.to(tl.int64) * row_scale_stride + padded_row, rows_left, room, room, D - d,
        ROWS, COLUMNS, True, LIMIT, POWER_OF_TWO, NVIDIA, BLOCK,
    )  # fmt: skip
    if COLUMNS:
        scale = tl.where(rows_left > 0, scale_of(amax, LIMIT, POWER_OF_TWO), 1.0)
        tl.store(column_scales + block.to(tl.int64) * D + d + tl.arange(0, BLOCK), scale)
        if rows_left > 0:
            offset, length = _column_place(blocks, block, d, D, BLOCK, FIELDS)
            store_transposed(
                source, x_stride, by_column + offset, length, inverse_of(scale), rows_left, BLOCK, D - d,
                LIMIT, by_column.dtype.element_ty, NVIDIA, BLOCK,
            )  # fmt: skip


@triton.jit
def _column_place(blocks, block, d, D, BLOCK: tl.constexpr, FIELDS: tl.constexpr):
    """Where the column layout of a tile begins, and the length of its lines: all tokens of the group."""
    first = tl.load(blocks + FIELDS * block + 3)
    length = tl.load(blocks + FIELDS * block + 4) * BLOCK
    return first.to(tl.int64) * BLOCK * D + d.to(tl.int64) * length + (block - first) * BLOCK, length


@gluon.jit(do_not_specialize=["R", "row_scale_stride"])
def _quantize_packed(
    x, blocks, by_row, row_scales, by_column, column_scales, R, D, x_stride, row_scale_stride,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, LIMIT: gl.constexpr, POWER_OF_TWO: gl.constexpr, NVIDIA: gl.constexpr,
    BLOCK: gl.constexpr, FIELDS: gl.constexpr,
):  # fmt: skip
    """As `_quantize_tiles`, where `packed_bf16.can_run`."""
    block = gl.program_id(1)
    d = gl.program_id(0) * BLOCK
    row = gl.load(blocks + FIELDS * block)
    rows_left = gl.load(blocks + FIELDS * block + 1)
    padded_row = block.to(gl.int64) * BLOCK
    room = R - block * BLOCK
    tile = packed_bf16.load_tile(x + row.to(gl.int64) * x_stride + d, x_stride, rows_left, BLOCK // 2)
    low, high = packed_bf16.column_amax(tile)
    row_inverse = 0
    if ROWS:
        rows = packed_bf16.rows_of_tile()
        scale = scale_of(packed_bf16.row_amax(tile), LIMIT, POWER_OF_TWO)
        scale = gl.where(rows < rows_left, scale, 1.0)
        scales = row_scales + (d // BLOCK).to(gl.int64) * row_scale_stride + padded_row
        gl.store(scales + rows, scale, mask=rows < room)
        row_inverse = packed_bf16.inverse_of(scale)
    column_inverse = 0
    offset = 0
    length = 0
    if COLUMNS:
        low = gl.where(rows_left > 0, scale_of(low, LIMIT, POWER_OF_TWO), 1.0)
        high = gl.where(rows_left > 0, scale_of(high, LIMIT, POWER_OF_TWO), 1.0)
        packed_bf16.store_column_scales(column_scales + block.to(gl.int64) * D + d, (low, high), BLOCK // 2)
        column_inverse = (packed_bf16.inverse_of(low), packed_bf16.inverse_of(high))
        offset, length = _column_place(blocks, block, d, D, BLOCK, FIELDS)
    packed_bf16.store_tile(
        tile, by_row + padded_row * D + d, D, row_inverse, room, by_column + offset, length, column_inverse,
        gl.where(rows_left > 0, BLOCK, 0), BLOCK // 2, ROWS, COLUMNS, "",
    )  # fmt: skip


@triton.jit
def _move_rows(
    source, target, blocks, D, source_stride, target_stride,
    MODE: tl.constexpr, BLOCK: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copies rows of a block to their padded place, zeros after them; or back; or zeros rows past the last group."""
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
