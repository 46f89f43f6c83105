"""The quantizer of activations for torch's MX GEMMs. The numbers are those of `reference`, bit for bit.

`layouts` describes the layouts. `kernels.quantize.mx` quantizes weights, and `quantize` makes the offset plan.

M, E, D: rows, groups, features. T: tokens, the rows of groups that are padded to multiples of 32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.backends.torch_native.layouts import ATOM, TOKENS, num_blocks
from grouped_gemm.kernels.common.groups import groups_in_blocks, pick
from grouped_gemm.kernels.common.launch import cdiv, launch, next_power_of_2, on_device
from grouped_gemm.kernels.quantize.layouts import Operands
from grouped_gemm.kernels.quantize.mx import as_words, quantize_tile


def quantize_activations(x_MD: Tensor, ends: Tensor, token_ends: Tensor, out: Operands) -> None:
    """Fills ``out``, from `layouts.activations`, in one read. Tensors of shape (0,) are not wanted.

    Rows past the last group are not written, nor are tokens.

    Args:
        x_MD: (M, D), contiguous D, a multiple of 32; bfloat16, float16 or float32.
        ends: (E,) int32, and
        token_ends: (E,) int32, both from `quantize.fill_plan`.
        out: data and scales by rows, data and scales by columns.
    """
    by_row, row_scale, by_column, column_scale = out
    (num_rows, features), num_groups = x_MD.shape, ends.shape[0]
    rows, columns = by_row.dim() == 2, by_column.dim() == 2
    with on_device(x_MD):
        launch(
            _quantize_tiles, (num_blocks(num_rows, num_groups) * cdiv(features, ATOM),),
            x_MD, ends, token_ends, by_row, as_words(row_scale), by_column, as_words(column_scale),
            num_rows, num_groups, features, x_MD.stride(0), by_column.stride(0),
            constants={
                "ROWS": rows, "COLUMNS": columns, "LIMIT": torch.finfo((by_row if rows else by_column).dtype).max,
                "E_PADDED": next_power_of_2(num_groups + 1), "TOKENS": TOKENS,
            },
            num_warps=8,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "E"])
def _quantize_tiles(
    x, ends, token_ends, by_row, row_scales, by_column, column_scales,
    M, E, D, x_stride, feature_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr, E_PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes 128 rows of one group by 128 features. Even an empty group has tokens, and so a block."""
    d_blocks = tl.cdiv(D, 128)
    block = tl.program_id(0) // d_blocks
    d_block = tl.program_id(0) % d_blocks
    starts, last_rows, first_atoms, last_atoms = groups_in_blocks(ends, M, E, 128, E_PADDED)
    blocks = tl.where(tl.arange(0, E_PADDED) < E, tl.maximum(last_atoms - first_atoms, 1), 0)
    last_blocks = tl.cumsum(blocks, 0)
    e = tl.sum((last_blocks <= block).to(tl.int32))
    if e < E:
        group_blocks = pick(blocks, e)
        first_block = pick(last_blocks, e) - group_blocks
        below = block - first_block
        row = pick(starts, e) + below * 128
        height = tl.minimum(pick(last_rows, e) - row, 128)
        token = tl.load(token_ends + e - 1, mask=e > 0, other=0) + below * 128
        stored = 0
        if COLUMNS:
            stored = tl.maximum(tl.cdiv(height, TOKENS), 1) * TOKENS
        row64 = tl.cast(row, tl.int64)
        d64 = d_block.to(tl.int64) * 128
        row_atom = (pick(first_atoms, e) + below).to(tl.int64) * d_blocks + d_block
        column_atom = first_block.to(tl.int64) * d_blocks + d_block.to(tl.int64) * group_blocks + below
        quantize_tile(
            x + row64 * x_stride + d64, x_stride, height, D - d_block * 128,
            by_row + row64 * D + d64, D, row_scales + row_atom * 128, 1,
            by_column + d64 * feature_stride + tl.multiple_of(token, 32), feature_stride,
            column_scales + column_atom * 128, 1, height, stored,
            ROWS, COLUMNS, LIMIT, True,
        )  # fmt: skip
