"""The blocks of tokens that quantizers of an operand of wgrad work on, as an op. Imports no Triton before it runs."""

from __future__ import annotations

from torch import Tensor

from grouped_gemm.core.library import Size, Steps, define_op, ops
from grouped_gemm.kernels.quantize import layouts


def token_blocks(offs: Tensor, num_rows: int) -> Tensor:
    """What `fp8.find_blocks` finds of groups that end at ``offs``: (T/128, 4) int32."""
    blocks: Tensor = ops.triton_token_blocks(offs, num_rows)
    return blocks


@define_op(replays=True)
def _triton_token_blocks(offs: Tensor, num_rows: Size) -> Steps[Tensor]:
    blocks = layouts.token_blocks(offs, num_rows)
    yield blocks
    from grouped_gemm.kernels.quantize import fp8

    fp8.find_blocks(offs, num_rows, blocks)
