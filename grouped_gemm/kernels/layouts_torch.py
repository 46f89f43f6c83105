"""The tensors that torch's grouped products read: shapes, strides and dtypes. Imports no Triton. docs/layouts.md.

In wgrad torch wants contiguous tokens, in fp8 a multiple of 16 for each group, and never none: CUTLASS has no product
over nothing there. So groups are padded to multiples of 16, an empty one to 16 tokens of zeros. How many that makes
depends on ``offs``, which the host does not know; `num_tokens` is enough for any.

M, E, D: rows, groups, features. T: tokens, the rows of padded groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grouped_gemm.device import machine_of
from grouped_gemm.recipes import Recipe

ALIGNMENT = 16  # bytes, which are values of fp8


def num_tokens(num_rows: int, num_groups: int) -> int:
    """T: what any groups of ``num_rows`` rows fill at most."""
    return (num_rows // ALIGNMENT + num_groups) * ALIGNMENT


def plan(offs: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The end row of each group, in order and within [0, M], and its last token's successor; both (E,) int32."""
    ends = torch.empty_like(offs, memory_format=torch.contiguous_format)
    return ends, torch.empty_like(ends)


def activations(
    x_MD: Tensor, num_groups: int, recipe: Recipe, *, rows: bool, columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Data and scales of an operand of forward and dgrad, then of one of wgrad; what is not wanted has shape (0,).

    Returns:
        Data (M, D) fp8, contiguous D, a multiple of 16; scales (M,).
        Data (D, T) fp8, contiguous T; scales (E, D), contiguous.
    """
    num_rows, features = x_MD.shape
    fp8 = machine_of(x_MD.device).fp8_dtype
    row_data, row_scale, column_data, column_scale = (x_MD.new_empty(0) for _ in range(4))
    if rows:
        row_data = x_MD.new_empty(num_rows, features, dtype=fp8)
        row_scale = x_MD.new_empty(num_rows, dtype=recipe.scale_dtype)
    if columns:
        column_data = x_MD.new_empty(features, num_tokens(num_rows, num_groups), dtype=fp8)
        column_scale = x_MD.new_empty(num_groups, features, dtype=recipe.scale_dtype)
    return row_data, row_scale, column_data, column_scale
