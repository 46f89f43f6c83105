"""The tensors that DeepGEMM reads: shapes, strides and dtypes. Imports no Triton. docs/deepgemm.md draws an example.

DeepGEMM's groups start at multiples of 128 rows. The number of blocks of 128 depends on ``offs``, which the host does
not know; `num_blocks` is enough for any ``offs``. If the caller guarantees groups of whole blocks, rows stay where they
are, and only the operands of wgrad are laid out anew.

M, E, D: rows, groups, features. B: blocks of 128 rows. R: rows as DeepGEMM sees them: 128 B, or M without padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grouped_gemm.kernels.quantize.layouts import Operands

BLOCK = 128
# Fields of a block: its first row in x; the rows of its group from there on, 0 past the last group; the rows of x from
# there to the end of its group, or of x; the first block of its group; the number of blocks of its group.
FIELDS = 5


def num_blocks(num_rows: int, num_groups: int) -> int:
    """B: enough for any groups of ``num_rows`` rows and the rows past the last one. No larger than the rows."""
    return torch.sym_min(num_rows // BLOCK + num_groups + 1, num_rows)


def plan(offs: Tensor, num_rows: int, is_aligned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors that are derived from ``offs``, (E,) int32.

    Returns:
        The group of each row, (R,) int32, -1 for rows of no group. Another block of -1 follows in memory, because
        kernels read the block after their own.
        Five numbers for each block, (B, 5) int32, see `FIELDS`.
        The padded number of rows of each group, (E,) int32, multiples of 128.
    """
    blocks = num_blocks(num_rows, offs.shape[0])
    rows = offs.new_empty((blocks + 1) * BLOCK)
    return (
        rows[: num_rows if is_aligned else blocks * BLOCK],
        offs.new_empty(blocks, FIELDS),
        torch.empty_like(offs, memory_format=torch.contiguous_format),
    )


def activations(x_MD: Tensor, blocks: Tensor, num_rows: int, *, rows: bool, columns: bool) -> Operands:
    """Data and scales for forward and dgrad, then for wgrad. What is not wanted has shape (0,).

    Args:
        x_MD: (M, D), D a multiple of 128.
        blocks: (B, 5), from `plan`.
        num_rows: R.
        rows: whether the first is wanted.
        columns: whether the second is wanted.

    Returns:
        Data (R, D) fp8, contiguous; scales (R, D/128) fp32, contiguous along rows, columns 16 bytes aligned.
        Data (128 B D,) fp8: of each group (D, padded rows), contiguous, one group right after the other; scales
        (B, D) fp32, contiguous, one row for each block.
    """
    features = x_MD.shape[1]
    row_data, row_scale, column_data, column_scale = (x_MD.new_empty(0) for _ in range(4))
    if rows:
        row_data = x_MD.new_empty(num_rows, features, dtype=torch.float8_e4m3fn)
        lines = x_MD.new_empty(features // BLOCK, (num_rows + 3) // 4 * 4, dtype=torch.float32)
        row_scale = lines[:, :num_rows].t()
    if columns:
        column_data = x_MD.new_empty(blocks.shape[0] * BLOCK * features, dtype=torch.float8_e4m3fn)
        column_scale = x_MD.new_empty(blocks.shape[0], features, dtype=torch.float32)
    return row_data, row_scale, column_data, column_scale
