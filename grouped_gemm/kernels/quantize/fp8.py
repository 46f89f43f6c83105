"""Quantizers: they write what `kernels.gemm` reads, with the numbers of `reference`, bit for bit.

A program has a tile of 128 by 128. It reads it once from memory, and looks at it a second time in L1, for the layout
that is contiguous along rows: holding it meanwhile would take registers, and so other programs' place. It takes every
fourth row at a time: fp8 of four rows is packed into a word before it crosses between threads, since single bytes
cross slowly.

M, E, K, N: rows, groups, in and out features. D: K or N. T: tokens in blocks of 128 that start anew with each group.
R, C: lines and columns of a weight matrix as it lies in memory, C contiguous.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.groups import at_once, groups_of_blocks, tile_position
from grouped_gemm.kernels.common.launch import cdiv, in_parts, launch, next_power_of_2, on_device
from grouped_gemm.kernels.common.scaling import four_to_fp8, inverse_of, magnitude, scale_of, to_fp8
from grouped_gemm.kernels.quantize import layouts, packed_bf16
from grouped_gemm.kernels.quantize.layouts import SCALE_ALIGNMENT, TOKEN_BLOCK, Operands

_WARPS = 4
_MOST_IN_REGISTERS = 16384  # values of a row


def quantize_activations(
    x_MD: Tensor, offs: Tensor, recipe: Recipe, out: Operands, blocks: Tensor | None = None
) -> None:
    """Fills ``out``, from `layouts.activations`: what has no elements is not wanted.

    One read, blockwise and for the rows alone. A rowwise scale of the column layout needs its whole group first:
    there, a first read finds the scales and a second one writes.

    Args:
        x_MD: (M, D), contiguous D; bfloat16, float16 or float32.
        offs: (E,) int32, contiguous: the end row of each group. Any values are safe.
        recipe: rowwise or blockwise.
        out: data and scales by rows, data and scales by columns. Rows past the last group are left as they are;
            their columns become 0, scales 1.
        blocks: from `find_blocks`; None: they are found here, where they are needed.
    """
    by_row, row_scale, by_column, column_scale = out
    (num_rows, features), num_groups = x_MD.shape, offs.shape[0]
    rows, columns = by_row.dim() == 2, by_column.dim() == 3
    rowwise = recipe.block is None
    fp8 = (by_row if rows else by_column).dtype
    constants = _constants(x_MD, recipe, fp8)
    with on_device(x_MD):
        if rowwise and not columns:
            if num_rows:
                width = next_power_of_2(features)
                whole = width <= _MOST_IN_REGISTERS
                width = max(width, 128) if whole else 4096
                height = max(1, 8192 // width)
                launch(
                    _quantize_rows, (cdiv(num_rows, height),),
                    x_MD, by_row, row_scale, num_rows, features, x_MD.stride(0), by_row.stride(0),
                    constants=constants | {"BLOCK_M": height, "BLOCK_D": width, "WHOLE": whole}, num_warps=8,
                )  # fmt: skip
            return
        if blocks is None:
            blocks = layouts.token_blocks(offs, num_rows)
            find_blocks(offs, num_rows, blocks)
        grid = (len(blocks) * cdiv(features, TOKEN_BLOCK),)
        find_amax, quantize_tiles = _amax, _quantize_tiles
        if columns and packed_bf16.can_run(x_MD):
            find_amax, quantize_tiles = packed_bf16._amax, packed_bf16._quantize_tiles
        tile = {"BLOCK": TOKEN_BLOCK, "BAND": 8}
        row_amax = column_amax = None
        if rowwise:
            column_amax, row_amax = _zeros(x_MD, num_groups * features, num_rows if rows else None)
            column_scale.fill_(1)
            launch(
                find_amax, grid, x_MD, blocks, row_amax, column_amax, features, x_MD.stride(0),
                constants=tile, num_warps=_WARPS,
            )  # fmt: skip
        wanted = {"ROWS": rows, "COLUMNS": columns, "ROWWISE": rowwise}
        launch(
            quantize_tiles, grid,
            x_MD, blocks, by_row, row_scale, by_column, column_scale, row_amax, column_amax,
            num_groups, features, x_MD.stride(0), by_row.stride(0), row_scale.stride(0) if rows else 0,
            constants=wanted | constants | {"SCALE_ALIGNMENT": SCALE_ALIGNMENT} | tile, num_warps=_WARPS,
        )  # fmt: skip


def quantize_weights(b_EKN: Tensor, recipe: Recipe, out: Operands) -> None:
    """Fills ``out``, from `layouts.weights`: what has no elements is not wanted. Rowwise, ``b`` is read twice.

    Args:
        b_EKN: (E, K, N), K or N contiguous; bfloat16, float16 or float32.
        recipe: rowwise or blockwise.
        out: data for forward and for dgrad, then their scales.
    """
    for part, into in in_parts(b_EKN, out):
        _quantize_part(part, recipe, into)


def _quantize_part(b_EKN: Tensor, recipe: Recipe, out: Sequence[Tensor]) -> None:
    forward, dgrad, forward_scale, dgrad_scale = out
    rowwise = recipe.block is None
    # Scales run along lines (straight) or across them (transposed), whichever of K and N the lines are.
    straight, transposed, line_scale, column_scale = forward, dgrad, forward_scale, dgrad_scale
    w_ERC = b_EKN.transpose(1, 2)
    if b_EKN.stride(1) != 1:
        straight, transposed, line_scale, column_scale = dgrad, forward, dgrad_scale, forward_scale
        w_ERC = b_EKN
    if not rowwise:
        line_scale = forward_scale.transpose(1, 2) if b_EKN.stride(1) == 1 else forward_scale  # (E, R, C) blocks
    num_groups, lines, columns = w_ERC.shape
    fp8 = forward.dtype if forward.dim() == 3 else dgrad.dtype
    shape = lines, columns, w_ERC.stride(0), w_ERC.stride(1)
    grid = (cdiv(lines, 128) * cdiv(columns, 128), num_groups)
    with on_device(b_EKN):
        line_amax = column_amax = None
        wants_straight, wants_transposed = straight.dim() == 3, transposed.dim() == 3
        if rowwise:
            line_amax, column_amax = _zeros(
                b_EKN,
                num_groups * lines if wants_straight else None,
                num_groups * columns if wants_transposed else None,
            )
            launch(
                _weight_amax, grid, w_ERC, line_amax, column_amax, *shape, constants={"BLOCK": TOKEN_BLOCK}, num_warps=8
            )
        wanted = {"STRAIGHT": wants_straight, "TRANSPOSED": wants_transposed, "ROWWISE": rowwise}
        launch(
            _quantize_weights, grid,
            w_ERC, straight, transposed, line_scale, column_scale, line_amax, column_amax, *shape,
            straight.stride(0), straight.stride(-2) if wants_straight else 0,
            transposed.stride(0), transposed.stride(-2) if wants_transposed else 0,
            *(line_scale.stride() if not rowwise else (0, 0, 0)),
            constants=wanted | _constants(b_EKN, recipe, fp8) | {"BLOCK": TOKEN_BLOCK, "BAND": 8}, num_warps=8,
        )  # fmt: skip


def find_blocks(offs: Tensor, num_rows: int, blocks: Tensor) -> None:
    """Fills ``blocks``, from `layouts.token_blocks`. Any values of ``offs`` (E,) int32 are safe."""
    num_groups, num_blocks = offs.shape[0], blocks.shape[0]
    groups_at_once = at_once(num_groups)
    blocks_at_once = 32 if groups_at_once < 1024 else 8  # with Triton 3.9, more spill
    with on_device(offs):
        launch(
            _find_blocks, (cdiv(num_blocks, blocks_at_once),),
            offs, blocks, num_rows, num_groups, num_blocks * TOKEN_BLOCK,
            constants={
                "E_AT_ONCE": groups_at_once, "BLOCK": TOKEN_BLOCK,
                "SCALE_ALIGNMENT": SCALE_ALIGNMENT, "AT_ONCE": blocks_at_once,
            },
        )  # fmt: skip


def _zeros(x: Tensor, first: int | None, second: int | None) -> tuple[Tensor | None, Tensor | None]:
    """Two arrays of that many zeros, int32, from one fill, at multiples of 16 bytes; None: it is not wanted."""
    start = -(-(first or 0) // 4) * 4
    zeros = x.new_zeros(start + (second or 0), dtype=torch.int32)
    if first is None or second is None:
        return (None if first is None else zeros), (None if second is None else zeros)
    return zeros[:first], zeros[start:]


def _constants(x: Tensor, recipe: Recipe, fp8: torch.dtype) -> dict[str, Any]:
    return _scaling(recipe, fp8, machine_of(x.device).vendor)


@functools.cache
def _scaling(recipe: Recipe, fp8: torch.dtype, vendor: str) -> dict[str, Any]:
    return {
        "LIMIT": torch.finfo(fp8).max,
        "POWER_OF_TWO": recipe.power_of_two_scales,
        "NVIDIA": vendor == "nvidia",
    }


@triton.jit
def _load_quarter(source, stride, first, rows_left, columns_left, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Every fourth row of a tile from row ``first`` on: (ROWS / 4, COLUMNS), zero past what is left of either."""
    rows = 4 * tl.arange(0, ROWS // 4) + first
    columns = tl.arange(0, COLUMNS)
    mask = (rows < rows_left)[:, None] & (columns < columns_left)[None, :]
    return tl.load(source + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0)


@triton.jit
def _store_quarter(target, stride, first, rows_left, columns_left, data):
    rows = 4 * tl.arange(0, data.shape[0]) + first
    columns = tl.arange(0, data.shape[1])
    mask = (rows < rows_left)[:, None] & (columns < columns_left)[None, :]
    tl.store(target + rows.to(tl.int64)[:, None] * stride + columns[None, :], data, mask=mask)


@triton.jit
def _byte(data, i: tl.constexpr):
    return data.to(tl.uint8, bitcast=True).to(tl.uint32) << (8 * i)


@triton.jit
def _pack(v0, v1, v2, v3, inverse, LIMIT: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr):
    """`scaling.to_fp8` of four tiles as words of 32 bits, the first tile in the low bytes.

    On NVIDIA GPUs by two instructions a word, a quarter of the general way, which Triton 3.6.0 also gets wrong there:
    it takes a converted byte for a whole register, and its neighbour slips in.
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
def _transpose(
    source, stride, target, target_stride, inverse, rows_left, rows_to_fill, columns_left,
    LIMIT: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes a tile with rows contiguous, from what L1 still has of it.

    Lines of ``target`` start at multiples of 4 bytes, and are filled up to the next one.

    Args:
        inverse: `scaling.inverse_of` of each column's scale, (BLOCK,), or of all, (1,).
        rows_to_fill: of which zeros are written past ``rows_left``.
    """
    v0 = _load_quarter(source, stride, 0, rows_left, columns_left, BLOCK, BLOCK)
    v1 = _load_quarter(source, stride, 1, rows_left, columns_left, BLOCK, BLOCK)
    v2 = _load_quarter(source, stride, 2, rows_left, columns_left, BLOCK, BLOCK)
    v3 = _load_quarter(source, stride, 3, rows_left, columns_left, BLOCK, BLOCK)
    words = _pack(v0, v1, v2, v3, inverse[None, :], LIMIT, DTYPE, NVIDIA)
    rows = 4 * tl.arange(0, BLOCK // 4)
    columns = tl.arange(0, BLOCK)
    targets = target.to(tl.pointer_type(tl.uint32)) + columns.to(tl.int64)[None, :] * (target_stride // 4)
    mask = (rows < rows_to_fill)[:, None] & (columns < columns_left)[None, :]
    tl.store(targets + (rows // 4)[:, None], words, mask=mask)


@triton.jit(do_not_specialize=["M"])
def _quantize_rows(
    x, data, scales, M, D, x_stride, data_stride,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Whole rows, in registers where they fit; else the second time they come from L2."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ds = tl.arange(0, BLOCK_D)
    sources = x + rows.to(tl.int64)[:, None] * x_stride + ds[None, :]
    targets = data + rows.to(tl.int64)[:, None] * data_stride + ds[None, :]
    if WHOLE:
        mask = (rows < M)[:, None] & (ds < D)[None, :]
        values = tl.load(sources, mask=mask, other=0)
        scale = scale_of(tl.max(magnitude(values), 1), LIMIT, POWER_OF_TWO)
        tl.store(targets, to_fp8(values, inverse_of(scale)[:, None], LIMIT, data.dtype.element_ty, NVIDIA), mask=mask)
    else:
        largest = tl.zeros((BLOCK_M, BLOCK_D), tl.int32)
        for d in range(0, D, BLOCK_D):
            mask = (rows < M)[:, None] & (ds < D - d)[None, :]
            largest = tl.maximum(largest, magnitude(tl.load(sources + d, mask=mask, other=0)))
        scale = scale_of(tl.max(largest, 1), LIMIT, POWER_OF_TWO)
        inverse = inverse_of(scale)[:, None]
        for d in range(0, D, BLOCK_D):
            mask = (rows < M)[:, None] & (ds < D - d)[None, :]
            values = tl.load(sources + d, mask=mask, other=0)
            tl.store(targets + d, to_fp8(values, inverse, LIMIT, data.dtype.element_ty, NVIDIA), mask=mask)
    tl.store(scales + rows, scale, mask=rows < M)


@triton.jit(do_not_specialize=["M", "E", "T"])
def _find_blocks(
    offs, blocks, M, E, T,
    E_AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, SCALE_ALIGNMENT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Of each block of tokens: its group, E past the last one; its first row; rows from there to the end of its group,
    0 past the last one; where the scales of its rows begin. (T / BLOCK, 4)."""
    block = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    e, start, end, first, _, scale_start = groups_of_blocks(block, offs, M, E, BLOCK, SCALE_ALIGNMENT, E_AT_ONCE)
    row = start + (block - first) * BLOCK
    target = blocks + 4 * block
    mask = block * BLOCK < T
    tl.store(target, e, mask=mask)
    tl.store(target + 1, row, mask=mask)
    tl.store(target + 2, tl.where(e < E, end - row, 0), mask=mask)
    tl.store(target + 3, scale_start + row - start, mask=mask)


@triton.jit
def _amax(x, blocks, row_amax, column_amax, D, x_stride, BLOCK: tl.constexpr, BAND: tl.constexpr):
    """The largest magnitude of each column of each group (E, D), and of each row (M,) if wanted; zero before."""
    d_blocks = tl.cdiv(D, BLOCK)
    block, d_block = tile_position(tl.program_id(0), tl.num_programs(0) // d_blocks, d_blocks, BAND)
    d = d_block * BLOCK
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    if rows_left > 0:
        largest = tl.zeros((BLOCK // 4, BLOCK), tl.int32)
        for i in tl.static_range(4):
            values = _load_quarter(x + row.to(tl.int64) * x_stride + d, x_stride, i, rows_left, D - d, BLOCK, BLOCK)
            magnitudes = magnitude(values)
            largest = tl.maximum(largest, magnitudes)
            if row_amax is not None:
                rows = 4 * tl.arange(0, BLOCK // 4) + i
                tl.atomic_max(row_amax + row + rows, tl.max(magnitudes, 1), mask=rows < rows_left, sem="relaxed")
        ds = d + tl.arange(0, BLOCK)
        columns = column_amax + tl.load(blocks + 4 * block).to(tl.int64) * D + ds
        tl.atomic_max(columns, tl.max(largest, 0), mask=ds < D, sem="relaxed")


@triton.jit(do_not_specialize=["E", "row_scale_stride"])
def _quantize_tiles(
    x, blocks, by_row, row_scales, by_column, column_scales, row_amax, column_amax,
    E, D, x_stride, row_stride, row_scale_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROWWISE: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    NVIDIA: tl.constexpr, SCALE_ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one group by BLOCK features: one read, and each layout that is wanted.

    Blockwise, the tile has its own scales; rowwise, they are those of `_amax`: (M,) of rows, (E, D) of columns.
    """
    d_blocks = tl.cdiv(D, BLOCK)
    block, d_block = tile_position(tl.program_id(0), tl.num_programs(0) // d_blocks, d_blocks, BAND)
    d = d_block * BLOCK
    ds = d + tl.arange(0, BLOCK)
    e = tl.load(blocks + 4 * block)
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    source = x + row.to(tl.int64) * x_stride + d
    if ROWS:
        target = by_row + row.to(tl.int64) * row_stride + d
        if ROWWISE:
            scales = row_scales + row
            scales_left = tl.where(d_block == 0, rows_left, 0)
        else:
            scales = row_scales + d_block.to(tl.int64) * row_scale_stride + tl.load(blocks + 4 * block + 3)
            scales_left = tl.cdiv(rows_left, SCALE_ALIGNMENT) * SCALE_ALIGNMENT
    if (rows_left > 0) & (ROWS or not ROWWISE):
        largest = tl.zeros((BLOCK // 4, BLOCK), tl.int32)
        for i in tl.static_range(4):
            values = _load_quarter(source, x_stride, i, rows_left, D - d, BLOCK, BLOCK)
            magnitudes = magnitude(values)
            if ROWS:
                rows = 4 * tl.arange(0, BLOCK // 4) + i
                if ROWWISE:
                    amax = tl.load(row_amax + row + rows, mask=rows < rows_left, other=0)
                else:
                    amax = tl.max(magnitudes, 1)
                scale = scale_of(amax, LIMIT, POWER_OF_TWO)
                data = to_fp8(values, inverse_of(scale)[:, None], LIMIT, by_row.dtype.element_ty, NVIDIA)
                _store_quarter(target, row_stride, i, rows_left, D - d, data)
                tl.store(scales + rows, scale, mask=rows < scales_left)
            if COLUMNS and not ROWWISE:
                largest = tl.maximum(largest, magnitudes)
        if COLUMNS and not ROWWISE:
            column_scale = scale_of(tl.max(largest, 0), LIMIT, POWER_OF_TWO)
    else:
        column_scale = tl.full((BLOCK,), 1.0, tl.float32)
    if COLUMNS:
        if ROWWISE:
            lines = tl.minimum(e, E - 1).to(tl.int64) * D + ds  # past the last group any scale will do
            column_scale = scale_of(tl.load(column_amax + lines, mask=ds < D, other=0), LIMIT, POWER_OF_TWO)
            if rows_left > 0:  # each block of the group stores the same
                tl.store(column_scales + lines, column_scale, mask=ds < D)
        else:
            tl.store(column_scales + block.to(tl.int64) * D + ds, column_scale, mask=ds < D)
        _transpose(
            source, x_stride, by_column + (block.to(tl.int64) * D + d) * BLOCK, BLOCK,
            inverse_of(column_scale), rows_left, BLOCK, D - d, LIMIT, by_column.dtype.element_ty, NVIDIA, BLOCK,
        )  # fmt: skip


@triton.jit
def _weight_amax(
    w, line_amax, column_amax, R, C, w_stride_e, w_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest `scaling.magnitude` of each line (E, R) and each column (E, C), if wanted; zero before."""
    c_blocks = tl.cdiv(C, BLOCK)
    e = tl.program_id(1).to(tl.int64)
    rs = tl.program_id(0) // c_blocks * BLOCK + tl.arange(0, BLOCK)
    cs = tl.program_id(0) % c_blocks * BLOCK + tl.arange(0, BLOCK)
    sources = w + e * w_stride_e + rs.to(tl.int64)[:, None] * w_stride + cs[None, :]
    magnitudes = magnitude(tl.load(sources, mask=(rs < R)[:, None] & (cs < C)[None, :], other=0))
    if line_amax is not None:
        tl.atomic_max(line_amax + e * R + rs, tl.max(magnitudes, 1), mask=rs < R, sem="relaxed")
    if column_amax is not None:
        tl.atomic_max(column_amax + e * C + cs, tl.max(magnitudes, 0), mask=cs < C, sem="relaxed")


@triton.jit
def _quantize_weights(
    w, straight, transposed, line_scales, column_scales, line_amax, column_amax,
    R, C, w_stride_e, w_stride, straight_stride_e, straight_stride, transposed_stride_e, transposed_stride,
    scale_stride_e, scale_stride_r, scale_stride_c,
    STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, ROWWISE: tl.constexpr,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr, BLOCK: tl.constexpr,
    BAND: tl.constexpr,
):  # fmt: skip
    """A square tile of one matrix: one read, and each layout that is wanted.

    Blockwise, the tile has one scale, in ``line_scales``. Rowwise, scales are those of `_weight_amax`.
    """
    r_block, c_block = tile_position(tl.program_id(0), tl.cdiv(R, BLOCK), tl.cdiv(C, BLOCK), BAND)
    e = tl.program_id(1).to(tl.int64)
    rs = r_block * BLOCK + tl.arange(0, BLOCK)
    cs = c_block * BLOCK + tl.arange(0, BLOCK)
    lines_left = R - r_block * BLOCK
    columns_left = C - c_block * BLOCK
    source = w + e * w_stride_e + r_block.to(tl.int64) * BLOCK * w_stride + c_block * BLOCK
    if ROWWISE:
        if STRAIGHT and c_block == 0:
            scale = scale_of(tl.load(line_amax + e * R + rs, mask=rs < R, other=0), LIMIT, POWER_OF_TWO)
            tl.store(line_scales + e * R + rs, scale, mask=rs < R)
        if TRANSPOSED:
            scale = scale_of(tl.load(column_amax + e * C + cs, mask=cs < C, other=0), LIMIT, POWER_OF_TWO)
            if r_block == 0:
                tl.store(column_scales + e * C + cs, scale, mask=cs < C)
            inverses = inverse_of(scale)
    else:
        largest = tl.zeros((BLOCK // 4, BLOCK), tl.int32)
        for i in tl.static_range(4):
            values = _load_quarter(source, w_stride, i, lines_left, columns_left, BLOCK, BLOCK)
            largest = tl.maximum(largest, magnitude(values))
        scale = scale_of(tl.max(tl.max(largest, 1), 0, keep_dims=True), LIMIT, POWER_OF_TWO)
        target = line_scales + e * scale_stride_e + r_block * scale_stride_r + c_block * scale_stride_c
        tl.store(target + tl.zeros((1,), tl.int32), scale)
        inverses = inverse_of(scale)
    if STRAIGHT:
        target = straight + e * straight_stride_e + r_block.to(tl.int64) * BLOCK * straight_stride + c_block * BLOCK
        for i in tl.static_range(4):
            values = _load_quarter(source, w_stride, i, lines_left, columns_left, BLOCK, BLOCK)
            if ROWWISE:
                lines = 4 * tl.arange(0, BLOCK // 4) + i
                amax = tl.load(line_amax + e * R + r_block * BLOCK + lines, mask=lines < lines_left, other=0)
                inverse = inverse_of(scale_of(amax, LIMIT, POWER_OF_TWO))
            else:
                inverse = inverses
            data = to_fp8(values, inverse[:, None], LIMIT, straight.dtype.element_ty, NVIDIA)
            _store_quarter(target, straight_stride, i, lines_left, columns_left, data)
    if TRANSPOSED:
        target = transposed + e * transposed_stride_e + c_block.to(tl.int64) * BLOCK * transposed_stride
        _transpose(
            source, w_stride, target + r_block * BLOCK, transposed_stride, inverses, lines_left, lines_left,
            columns_left, LIMIT, transposed.dtype.element_ty, NVIDIA, BLOCK,
        )  # fmt: skip
