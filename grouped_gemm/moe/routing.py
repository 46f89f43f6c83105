"""Routing: from the experts of each token to the order of rows that the layer's GEMMs read.

T, k, E: tokens, experts per token, experts. M = T * k: routed rows. A slot is one of the k choices of a token.
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
        offs: (E,) int32, the end row of each expert.
        source: (M,) int32, the token of each routed row. Rows are in expert order, and those of one expert in the order
            of tokens and slots. Rows at and past ``offs[-1]`` have no token: -1. There are as many as dropped slots.
        places: (T, k) int32, the routed row of each token and slot; -1 for a dropped slot.
    """

    offs: Tensor
    source: Tensor
    places: Tensor


def route(topk_ids: Tensor, num_experts: int) -> Routing:
    """Sorts the slots of all tokens by expert. Deterministic; no host sync.

    Args:
        topk_ids: (T, k) int32 or int64, the experts of each token; T * k < 2^31. Slots with an id outside [0, E) are
            dropped. A token may name an expert twice.
        num_experts: E, at most 2^20.

    Raises:
        TypeError: ``topk_ids`` is not a tensor, or ``num_experts`` not an int.
        ValueError: a rank, a dtype or a size is wrong. The message names it, what was expected and what was found.
    """
    checks.check_topk_ids(topk_ids, num_experts)
    return Routing(*ops.moe_route(topk_ids, num_experts))


@define_op()
def _moe_route(topk_ids: Tensor, num_experts: Size) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    def empty() -> tuple[Tensor, Tensor, Tensor]:
        offs, source = (topk_ids.new_empty(size, dtype=torch.int32) for size in (num_experts, topk_ids.numel()))
        return offs, source, topk_ids.new_empty(topk_ids.shape, dtype=torch.int32)

    yield empty
    checks.check_slots(topk_ids.numel())
    topk_ids = topk_ids.contiguous()
    if not runs_kernels(topk_ids.device):
        yield reference.route(topk_ids, num_experts)
        return
    from grouped_gemm.kernels.moe import routing  # imports Triton

    routed = empty()
    routing.route(topk_ids, *routed)
    yield routed
