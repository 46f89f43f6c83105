"""Random routings for tests of the MoE layer's parts, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

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


def blocks_of(ends: Sequence[int], num_rows: int, device: torch.device | str = "cpu") -> Tensor:
    """What `quantize.fp8.find_blocks` finds of groups with these end rows: (T/128, 4) int32."""
    blocks, start, scale_start = [], 0, 0
    for e, end in enumerate(ends):
        for row in range(start, end, 128):
            blocks.append((e, row, end - row, scale_start + row - start))
        scale_start += -(-(end - start) // 4) * 4
        start = end
    for i in range(num_rows // 128 + len(ends) - len(blocks)):  # past the last group
        blocks.append((len(ends), start + 128 * i, 0, scale_start + 128 * i))
    return torch.tensor(blocks, dtype=torch.int32, device=device)
