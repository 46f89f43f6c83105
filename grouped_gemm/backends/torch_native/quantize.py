"""For torch's grouped GEMMs: the offset plan, the quantizer of rowwise activations, and zeros that torch leaves out.

The numbers are those of `reference`, bit for bit; `layouts` describes the layouts. `kernels.quantize.fp8` quantizes
weights, `quantize_mx` MX activations.

M, E, D: rows, groups, features. T: tokens, the rows of groups that are padded to multiples of 32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.backends.torch_native.layouts import TOKENS, num_tokens, token_blocks
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.groups import groups_in_blocks
from grouped_gemm.kernels.common.launch import cdiv, launch, next_power_of_2, num_processors, on_device
from grouped_gemm.kernels.common.scaling import inverse_of, scale_of
from grouped_gemm.kernels.quantize.fp8 import TILE, find_amax, quantize_activations, scaling_constants
from grouped_gemm.kernels.quantize.layouts import TOKEN_BLOCK, Operands
from grouped_gemm.kernels.quantize.primitives import quantize_rows, store_transposed, tile_of_program

_AT_ONCE = 32  # blocks for each program of `_find_blocks`
_PROGRAMS_PER_GROUP = 32  # which write an empty group's zeros, or return at once


def fill_plan(offs: Tensor, num_rows: int, out: tuple[Tensor, Tensor]) -> None:
    """Fills ``out``, from `layouts.plan`. Any values of ``offs`` (E,) int32 are safe."""
    num_groups = offs.shape[0]
    with on_device(offs):
        launch(
            _lay_out, (1,), offs, *out, num_rows, num_groups,
            constants={"E_PADDED": next_power_of_2(num_groups + 1), "TOKENS": TOKENS},
        )  # fmt: skip


def find_blocks(ends: Tensor, token_ends: Tensor, num_rows: int, blocks: Tensor) -> None:
    """Fills ``blocks``, from `layouts.token_blocks`. ``ends`` and ``token_ends`` are from `fill_plan`."""
    num_groups, block_count = ends.shape[0], blocks.shape[0]
    with on_device(ends):
        launch(
            _find_blocks, (cdiv(block_count, _AT_ONCE),),
            ends, token_ends, blocks, num_tokens(num_rows, num_groups), num_groups, block_count,
            constants={"E_PADDED": next_power_of_2(num_groups + 1), "BLOCK": TOKEN_BLOCK, "AT_ONCE": _AT_ONCE},
        )  # fmt: skip


def quantize(
    x_MD: Tensor, ends: Tensor, token_ends: Tensor, recipe: Recipe, out: Operands, blocks: Tensor | None = None
) -> None:
    """Fills ``out``, from `layouts.activations`. Tensors of shape (0,) are not wanted.

    Without columns, ``x_MD`` is read once; with columns twice, because a column's scale needs the whole group.

    Args:
        x_MD: (M, D), contiguous D, a multiple of 16; bfloat16, float16 or float32.
        ends: (E,) int32, and
        token_ends: (E,) int32, both from `fill_plan`.
        recipe: rowwise.
        out: data and scales by rows, data and scales by columns. With columns, rows past the last group
            are not written, nor are tokens.
        blocks: from `find_blocks`; None: they are found here, where they are needed.
    """
    by_row, row_scale, by_column, column_scale = out
    if by_column.dim() == 1:
        nothing = by_column
        quantize_activations(x_MD, ends, recipe, (by_row, row_scale, nothing, nothing))
        return
    (num_rows, features), num_groups, rows = x_MD.shape, ends.shape[0], by_row.dim() == 2
    if blocks is None:
        blocks = token_blocks(ends, num_rows)
        find_blocks(ends, token_ends, num_rows, blocks)
    with on_device(x_MD):
        row_amax, column_amax = find_amax(x_MD, blocks, num_groups, rows=rows)
        launch(
            _quantize_tiles, (len(blocks) * cdiv(features, TOKEN_BLOCK),),
            x_MD, blocks, by_row, row_scale, by_column, column_scale, row_amax, column_amax,
            num_groups, features, by_column.shape[1], x_MD.stride(0),
            constants={"ROWS": rows} | scaling_constants(x_MD, recipe, by_column.dtype) | {"TOKENS": TOKENS} | TILE,
            num_warps=4,
        )  # fmt: skip


def zero_tail(x_MD: Tensor, ends: Tensor) -> None:
    """Sets rows past the last group to 0, in place. ``x_MD`` is contiguous."""
    num_rows, features = x_MD.shape
    _write_zeros(x_MD, ends, (2 * num_processors(x_MD.device), 1), num_rows, features, is_tail=True)


def zero_empty_groups(x_EKN: Tensor, ends: Tensor) -> None:
    """Sets the matrices of empty groups to 0, in place. ``x_EKN`` is contiguous."""
    num_groups, k, n = x_EKN.shape
    _write_zeros(x_EKN, ends, (_PROGRAMS_PER_GROUP, num_groups), 0, k * n, is_tail=False)


def _write_zeros(x: Tensor, ends: Tensor, grid: tuple[int, int], num_rows: int, width: int, *, is_tail: bool) -> None:
    with on_device(x):
        launch(_zero, grid, x, ends, num_rows, ends.shape[0], width, constants={"TAIL": is_tail, "BLOCK": 4096})


@triton.jit(do_not_specialize=["M", "E"])
def _lay_out(offs, ends, token_ends, M, E, E_PADDED: tl.constexpr, TOKENS: tl.constexpr):
    """Writes the end of each group in rows and in tokens."""
    _, last_rows, first_blocks, last_blocks = groups_in_blocks(offs, M, E, TOKENS, E_PADDED)
    groups = tl.arange(0, E_PADDED)
    tokens = tl.cumsum(tl.maximum(last_blocks - first_blocks, 1), 0) * TOKENS
    tl.store(ends + groups, last_rows, mask=groups < E)
    tl.store(token_ends + groups, tokens, mask=groups < E)


@triton.jit(do_not_specialize=["T", "E", "B"])
def _find_blocks(ends, token_ends, blocks, T, E, B, E_PADDED: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Writes four numbers for each block of tokens: its group, E past the last one; its first row; the number of rows
    from there to the end of its group, 0 in an empty one; its first token. Even an empty group has tokens, so every
    group has a block."""
    token_starts, _, first_blocks, last_blocks = groups_in_blocks(token_ends, T, E, BLOCK, E_PADDED)
    groups = tl.arange(0, E_PADDED)
    starts = tl.load(ends + groups - 1, mask=(groups > 0) & (groups <= E), other=0)
    block = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    e = tl.minimum(tl.sum((last_blocks[None, :] <= block[:, None]).to(tl.int32), 1), E)
    is_own = groups[None, :] == e[:, None]
    below = (block - tl.sum(tl.where(is_own, first_blocks[None, :], 0), 1)) * BLOCK
    row = tl.sum(tl.where(is_own, starts[None, :], 0), 1) + below
    end = tl.load(ends + e, mask=e < E, other=0)
    target = blocks + 4 * block
    mask = block < B
    tl.store(target, e, mask=mask)
    tl.store(target + 1, row, mask=mask)
    tl.store(target + 2, tl.where(e < E, end - row, 0), mask=mask)
    tl.store(target + 3, tl.sum(tl.where(is_own, token_starts[None, :], 0), 1) + below, mask=mask)


@triton.jit(do_not_specialize=["E", "T"])
def _quantize_tiles(
    x, blocks, by_row, row_scales, by_column, column_scales, row_amax, column_amax, E, D, T, x_stride,
    ROWS: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As `rowwise.quantize_tiles`, but the column layout is (D, T).

    The tokens of a group are written up to the next multiple of TOKENS, those of an empty group as TOKENS zeros.
    """
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    ds = d + tl.arange(0, BLOCK)
    e = tl.load(blocks + 4 * block)
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    token = tl.load(blocks + 4 * block + 3)
    source = x + row.to(tl.int64) * x_stride + d
    if e < E:
        if ROWS:
            quantize_rows(
                source, x_stride, by_row + row.to(tl.int64) * D + d, D,
                row_amax + row, row_scales + row, rows_left, tl.where(d_block == 0, rows_left, 0), D - d,
                LIMIT, POWER_OF_TWO, NVIDIA, BLOCK,
            )  # fmt: skip
        lines = e.to(tl.int64) * D + ds
        amax = tl.load(column_amax + lines, mask=ds < D, other=0)
        scale = tl.where(rows_left > 0, scale_of(amax, LIMIT, POWER_OF_TWO), 1.0)
        tl.store(column_scales + lines, scale, mask=ds < D)  # every block of the group stores the same scales
        rows_to_fill = tl.maximum(tl.cdiv(rows_left, TOKENS), 1) * TOKENS
        store_transposed(
            source, x_stride, by_column + d.to(tl.int64) * T + token, T, inverse_of(scale), rows_left, rows_to_fill,
            D - d, LIMIT, by_column.dtype.element_ty, NVIDIA, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "E"])
def _zero(x, ends, M, E, WIDTH, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros rows of WIDTH values: TAIL, those past the last group; otherwise one for each group, where it is empty."""
    e = tl.program_id(1)
    if TAIL:
        first = tl.load(ends + E - 1)
        count = M - first
    else:
        first = e
        count = tl.where(tl.load(ends + e) > tl.load(ends + e - 1, mask=e > 0, other=0), 0, 1)
    size = tl.cast(count, tl.int64) * WIDTH
    target = x + tl.cast(first, tl.int64) * WIDTH
    zeros = tl.zeros((BLOCK,), x.dtype.element_ty)
    for i in range(tl.program_id(0), tl.cast(tl.cdiv(size, BLOCK), tl.int32), tl.num_programs(0)):
        places = tl.cast(i, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + places, zeros, mask=places < size)
