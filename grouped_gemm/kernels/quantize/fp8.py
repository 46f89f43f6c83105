"""Quantizers of rowwise and blockwise fp8: they write what `kernels.gemm` reads.

The numbers are those of `reference`, bit for bit. The kernels are in `rowwise` and `blockwise`; `packed_bf16` has the
faster ones for bfloat16 on NVIDIA GPUs from Hopper on.

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
from grouped_gemm.kernels.common.groups import at_once, groups_of_blocks
from grouped_gemm.kernels.common.launch import cdiv, in_parts, launch, next_power_of_2, num_processors, on_device
from grouped_gemm.kernels.quantize import blockwise, layouts, packed_bf16, rowwise
from grouped_gemm.kernels.quantize.layouts import SCALE_ALIGNMENT, TOKEN_BLOCK, Operands

TILE = {"BLOCK": TOKEN_BLOCK, "GROUP_M": 8}  # constants of all kernels that work on tiles
_WARPS = 4
_MOST_IN_REGISTERS = 16384  # values of a row


def quantize_activations(
    x_MD: Tensor, offs: Tensor, recipe: Recipe, out: Operands, blocks: Tensor | None = None
) -> None:
    """Fills ``out``, from `layouts.activations`. Tensors of shape (0,) are not wanted.

    Blockwise, and rowwise without columns, ``x_MD`` is read once. Rowwise columns take two reads, because a column's
    scale needs the whole group.

    Args:
        x_MD: (M, D), contiguous D; bfloat16, float16 or float32.
        offs: (E,) int32, contiguous: the end row of each group. Any values are safe.
        recipe: rowwise or blockwise.
        out: data and scales by rows, data and scales by columns. Rows past the last group are not written; their
            columns become 0, with scales of 1.
        blocks: from `find_blocks`; None: they are found here, where they are needed.
    """
    by_row, row_scale, by_column, column_scale = out
    (num_rows, features), num_groups = x_MD.shape, offs.shape[0]
    rows, columns = by_row.dim() == 2, by_column.dim() == 3
    constants = scaling_constants(x_MD, recipe, (by_row if rows else by_column).dtype)
    if recipe.block is None and not columns:
        _quantize_rows(x_MD, by_row, row_scale, constants)
        return
    with on_device(x_MD):
        if blocks is None:
            blocks = layouts.token_blocks(offs, num_rows)
            find_blocks(offs, num_rows, blocks)
        packed = columns and packed_bf16.can_run(x_MD, len(blocks))
        grid = _grid(len(blocks), cdiv(features, TOKEN_BLOCK), packed)
        if recipe.block is None:
            column_scale.fill_(1)
            row_amax, column_amax = find_amax(x_MD, blocks, num_groups, rows=rows)
            args: tuple[Any, ...] = (
                x_MD, blocks, by_row, row_scale, by_column, column_scale, row_amax, column_amax,
                num_groups, features, x_MD.stride(0), by_row.stride(0),
            )  # fmt: skip
            constants = {"ROWS": rows} | constants
            if packed:
                launch(packed_bf16.quantize_rowwise, grid, *args, constants=constants, **packed_bf16.SCALED_TILES)
            else:
                launch(rowwise.quantize_tiles, grid, *args, constants=constants | TILE, num_warps=_WARPS)
        else:
            args = (
                x_MD, blocks, by_row, row_scale, by_column, column_scale,
                features, x_MD.stride(0), by_row.stride(0), row_scale.stride(0) if rows else 0,
            )  # fmt: skip
            alignment = {"SCALE_ALIGNMENT": SCALE_ALIGNMENT}
            if packed:
                constants = {"ROWS": rows} | constants | alignment
                launch(packed_bf16.quantize_blockwise, grid, *args, constants=constants, **packed_bf16.TILES)
            else:
                constants = {"ROWS": rows, "COLUMNS": columns} | constants | alignment | TILE
                launch(blockwise.quantize_tiles, grid, *args, constants=constants, num_warps=_WARPS)


def _quantize_rows(x_MD: Tensor, data_MD: Tensor, scale_M: Tensor, constants: dict[str, Any]) -> None:
    num_rows, features = x_MD.shape
    if num_rows == 0:
        return
    width = next_power_of_2(features)
    whole = width <= _MOST_IN_REGISTERS
    width = max(width, 128) if whole else 4096
    height = max(1, 8192 // width)
    with on_device(x_MD):
        launch(
            rowwise.quantize_rows_alone, (cdiv(num_rows, height),),
            x_MD, data_MD, scale_M, num_rows, features, x_MD.stride(0), data_MD.stride(0),
            constants=constants | {"BLOCK_M": height, "BLOCK_D": width, "WHOLE": whole}, num_warps=8,
        )  # fmt: skip


def _grid(blocks: int, d_blocks: int, packed: bool) -> tuple[int, ...]:
    return (d_blocks, blocks) if packed else (blocks * d_blocks,)


def find_amax(x_MD: Tensor, blocks: Tensor, num_groups: int, *, rows: bool) -> tuple[Tensor | None, Tensor]:
    """Finds the largest magnitudes, see `scaling.magnitude`, of each row, (M,), and each column of a group, (E, D).

    Args:
        x_MD: (M, D), contiguous D.
        blocks: from `find_blocks`, or blocks of 128 rows that have the same first three fields.
        num_groups: E.
        rows: whether those of rows are wanted.

    Returns:
        Two flat int32 tensors, the first None where it is not wanted.
    """
    num_rows, features = x_MD.shape
    column_amax, row_amax = _zeros(x_MD, num_groups * features, num_rows if rows else None)
    assert column_amax is not None
    packed = packed_bf16.can_run(x_MD, len(blocks))
    grid = _grid(len(blocks), cdiv(features, TOKEN_BLOCK), packed)
    args = x_MD, blocks, row_amax, column_amax, features, x_MD.stride(0)
    if packed:
        launch(packed_bf16.find_amax, grid, *args, constants={}, num_warps=_WARPS)
    else:
        launch(rowwise.find_amax, grid, *args, constants=TILE, num_warps=_WARPS)
    return row_amax, column_amax


def quantize_weights(b_EKN: Tensor, recipe: Recipe, out: Operands) -> None:
    """Fills ``out``, from `layouts.weights`. Tensors of shape (0,) are not wanted.

    Rowwise, ``b`` is read twice, unless only the operand that is contracted along its contiguous axis is wanted.

    Args:
        b_EKN: (E, K, N), K or N contiguous; bfloat16, float16 or float32.
        recipe: rowwise or blockwise.
        out: data for forward and for dgrad, then their scales.
    """
    quantize = _quantize_weights_rowwise if recipe.block is None else _quantize_weights_blockwise
    for part, into in in_parts(b_EKN, out):
        quantize(part, recipe, into)


def _quantize_weights_rowwise(b_EKN: Tensor, recipe: Recipe, out: Sequence[Tensor]) -> None:
    forward, dgrad, forward_scale, dgrad_scale = out
    # The operand that is contracted along memory's contiguous axis is written straight, the other one transposed.
    w_ERC, straight, transposed, line_scale, column_scale = b_EKN, dgrad, forward, dgrad_scale, forward_scale
    if b_EKN.stride(1) == 1:
        w_ERC = b_EKN.transpose(1, 2)
        straight, transposed, line_scale, column_scale = forward, dgrad, forward_scale, dgrad_scale
    num_groups, lines, columns = w_ERC.shape
    wants_straight, wants_transposed = straight.dim() == 3, transposed.dim() == 3
    fp8 = (straight if wants_straight else transposed).dtype
    if not wants_transposed and w_ERC.stride(0) == lines * w_ERC.stride(1):  # rows of one matrix, each with its scale
        rows = w_ERC.flatten(0, 1), straight.flatten(0, 1), line_scale.flatten()
        _quantize_rows(*rows, scaling_constants(b_EKN, recipe, fp8))
        return
    shape = lines, columns, w_ERC.stride(0), w_ERC.stride(1)
    strides = *_strides(straight), *_strides(transposed)
    constants = _weight_constants(b_EKN, recipe, straight, transposed)
    r_blocks = cdiv(lines, TOKEN_BLOCK)
    tiles = r_blocks * cdiv(columns, TOKEN_BLOCK)
    line_sizes = num_groups * lines if wants_straight else None
    column_sizes = num_groups * columns if wants_transposed else None
    with on_device(b_EKN):
        if packed_bf16.can_run(w_ERC, r_blocks):
            zeros = _zeros(b_EKN, line_sizes, column_sizes, num_groups + 1)
            launch(
                packed_bf16.quantize_weights_rowwise, (2 * num_groups * tiles,),
                w_ERC, straight, transposed, line_scale, column_scale, *zeros, num_groups,
                *shape, *strides, 2 * num_processors(b_EKN.device),
                constants=constants, **packed_bf16.SCALED_TILES,
            )  # fmt: skip
            return
        line_amax, column_amax = _zeros(b_EKN, line_sizes, column_sizes)
        grid = tiles, num_groups
        launch(
            rowwise.find_weight_amax, grid, w_ERC, line_amax, column_amax, *shape,
            constants={"BLOCK": TOKEN_BLOCK}, num_warps=8,
        )  # fmt: skip
        launch(
            rowwise.quantize_weight_tiles, grid,
            w_ERC, straight, transposed, line_scale, column_scale, line_amax, column_amax, *shape, *strides,
            constants=constants | TILE, num_warps=8,
        )  # fmt: skip


def _quantize_weights_blockwise(b_EKN: Tensor, recipe: Recipe, out: Sequence[Tensor]) -> None:
    forward, dgrad, scale_EKN, _ = out  # the scales of blocks serve both
    w_ERC, straight, transposed, scale_ERC = b_EKN, dgrad, forward, scale_EKN
    if b_EKN.stride(1) == 1:
        w_ERC, scale_ERC = b_EKN.transpose(1, 2), scale_EKN.transpose(1, 2)
        straight, transposed = forward, dgrad
    num_groups, lines, columns = w_ERC.shape
    args = (
        w_ERC, straight, transposed, scale_ERC, lines, columns, w_ERC.stride(0), w_ERC.stride(1),
        *_strides(straight), *_strides(transposed), *scale_ERC.stride(),
    )  # fmt: skip
    constants = _weight_constants(b_EKN, recipe, straight, transposed)
    r_blocks, c_blocks = cdiv(lines, TOKEN_BLOCK), cdiv(columns, TOKEN_BLOCK)
    with on_device(b_EKN):
        if packed_bf16.can_run(w_ERC, r_blocks):
            launch(
                packed_bf16.quantize_weights_blockwise, (c_blocks, r_blocks, num_groups), *args,
                constants=constants, **packed_bf16.TILES,
            )  # fmt: skip
        else:
            launch(
                blockwise.quantize_weight_tiles, (r_blocks * c_blocks, num_groups), *args,
                constants=constants | TILE, num_warps=8,
            )  # fmt: skip


def _strides(data: Tensor) -> tuple[int, int]:
    """From one matrix and one line to the next; 0 where ``data`` is not wanted."""
    return (data.stride(0), data.stride(1)) if data.dim() == 3 else (0, 0)


def _weight_constants(b_EKN: Tensor, recipe: Recipe, straight: Tensor, transposed: Tensor) -> dict[str, Any]:
    fp8 = (straight if straight.dim() == 3 else transposed).dtype
    wanted = {"STRAIGHT": straight.dim() == 3, "TRANSPOSED": transposed.dim() == 3}
    return wanted | scaling_constants(b_EKN, recipe, fp8)


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


@triton.jit(do_not_specialize=["M", "E", "T"])
def _find_blocks(
    offs, blocks, M, E, T,
    E_AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, SCALE_ALIGNMENT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Writes four numbers for each block of tokens: its group, E past the last one; its first row; the number of rows
    from there to the end of its group, 0 past the last one; the place of its first row's scale."""
    block = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    e, start, end, first, _, scale_start = groups_of_blocks(block, offs, M, E, BLOCK, SCALE_ALIGNMENT, E_AT_ONCE)
    row = start + (block - first) * BLOCK
    target = blocks + 4 * block
    mask = block * BLOCK < T
    tl.store(target, e, mask=mask)
    tl.store(target + 1, row, mask=mask)
    tl.store(target + 2, tl.where(e < E, end - row, 0), mask=mask)
    tl.store(target + 3, scale_start + row - start, mask=mask)


def _zeros(x: Tensor, *sizes: int | None) -> list[Tensor | None]:
    """int32 tensors of that many zeros, from one fill, each 16-byte aligned. None: it is not wanted."""
    padded = [-(-(size or 0) // 4) * 4 for size in sizes]
    zeros = x.new_zeros(sum(padded), dtype=torch.int32).split(padded)
    return [None if size is None else part[:size] for size, part in zip(sizes, zeros)]


def scaling_constants(x: Tensor, recipe: Recipe, fp8: torch.dtype) -> dict[str, Any]:
    """The constants LIMIT, POWER_OF_TWO and NVIDIA of kernels that quantize ``x`` into ``fp8``."""
    return _scaling(recipe, fp8, machine_of(x.device).vendor)


@functools.cache
def _scaling(recipe: Recipe, fp8: torch.dtype, vendor: str) -> dict[str, Any]:
    return {
        "LIMIT": torch.finfo(fp8).max,
        "POWER_OF_TWO": recipe.power_of_two_scales,
        "NVIDIA": vendor == "nvidia",
    }
