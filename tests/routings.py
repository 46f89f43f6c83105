"""Random routings for tests of the MoE layer's parts, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def routing(
    num_tokens: int, top_k: int, dropped: float = 0.2, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Rows in a random order. A token may have one expert twice.

    Args:
        num_tokens: T.
        top_k: k.
        dropped: the fraction of slots that are dropped, at random.
        device: of the result.

    Returns:
        ``source`` (M,) int32 and ``places`` (T, k) int32, as `moe.rows` has them.
    """
    is_kept = torch.rand(num_tokens * top_k) >= dropped
    slots = torch.randperm(num_tokens * top_k)
    slots = slots[is_kept[slots]]  # the slot of each row that is used
    places = torch.full((num_tokens * top_k,), -1, dtype=torch.int32)
    places[slots] = torch.arange(len(slots), dtype=torch.int32)
    source = torch.full((num_tokens * top_k,), -1, dtype=torch.int32)
    source[: len(slots)] = (slots // max(top_k, 1)).int()
    return source.to(device), places.view(num_tokens, top_k).to(device)
