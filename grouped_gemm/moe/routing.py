"""Routing: from the experts of each token to the order of rows that the layer's GEMMs read.

T, k, E: tokens, experts per token, experts. M: routed rows, T * k if nothing is padded. A slot is one of the k choices
of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grouped_gemm import reference
from grouped_gemm.backends import runs_kernels
from grouped_gemm.core.library import Size, Steps, define_op, ops
from grouped_gemm.selection import checks


class Routing(NamedTuple):
    """Where the rows of an MoE layer come from, and where they go. All tensors are on the device of the ids.

    Attributes:
        offs: (E,) int32, the end row of each expert, padding included.
        source: (M,) int32, the token of each routed row. Rows are in expert order, and those of one expert in the order
            of tokens and slots. Rows of padding, which come after those, and rows at and past ``offs[-1]`` have no
            token: -1. Without padding, there are as many as dropped slots.
        places: (T, k) int32, the routed row of each token and slot; -1 for a dropped slot.
    """

    offs: Tensor
    source: Tensor
    places: Tensor


def route(topk_ids: Tensor, num_experts: int, group_alignment: int = 1) -> Routing:
    """Sorts the slots of all tokens by expert. Deterministic; no host sync.

    Args:
        topk_ids: (T, k) int32 or int64, the experts of each token; T * k < 2^31. Slots with an id outside [0, E) are
            dropped. A token may name an expert twice.
        num_experts: E, at most 2^20.
        group_alignment: each expert's rows are padded to a multiple of it. M then is T * k + E * (group_alignment - 1),
            which is enough for any ids.

    Raises:
        TypeError: ``topk_ids`` is not a tensor, or a number not an int.
        ValueError: a rank, a dtype or a size is wrong. The message names it, what was expected and what was found.
    """
    checks.check_topk_ids(topk_ids, num_experts)
    checks.check_options(None, group_alignment)
    return Routing(*ops.moe_route(topk_ids, num_experts, group_alignment))


@define_op(replays=True)
def _moe_route(
    topk_ids: Tensor, num_experts: Size, group_alignment: int | None = None
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    alignment = group_alignment or 1
    num_rows = topk_ids.numel() + num_experts * (alignment - 1)

    def empty() -> tuple[Tensor, Tensor, Tensor]:
        offs, source = (topk_ids.new_empty(size, dtype=torch.int32) for size in (num_experts, num_rows))
        return offs, source, topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)

    yield empty
    checks.check_slots(num_rows)
    topk_ids = topk_ids.contiguous()
    if not runs_kernels(topk_ids.device):
        yield reference.route(topk_ids, num_experts, alignment)
        return
    from grouped_gemm.kernels.moe import routing  # imports Triton

    routed = empty()
    routing.route(topk_ids, *routed, alignment)
    yield routed
