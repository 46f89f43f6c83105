"""The order of an MoE layer's rows: a counting sort of slots by expert.

A slot is one of the k choices of a token; slots are numbered token by token. A block is a run of slots that one program
sorts. A table (B, E) has, for each block and expert, how many slots up to the end of the block go to that expert or to
one before it. So its last row is ``offs``. Three launches: count each block, add up the blocks, place the slots. If one
block holds all slots, the last launch alone does it. Where experts are padded, a launch between the last two moves
their ends, from which the last one takes where each expert begins.

T, k, E: tokens, experts per token, experts. S = T * k: slots. B: blocks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.kernels.common.groups import MOST_AT_ONCE, at_once
from grouped_gemm.kernels.common.launch import cdiv, launch, on_device

_SMALL, _LARGE = 128, 1024  # slots of a block: powers of two, so that S rounded up to blocks is at most 2^31
_SUMS = {"BLOCK_P": 256, "BLOCK_E": 8}  # 8 experts of a table fill a sector of memory, 32 bytes


def route(topk_ids: Tensor, offs: Tensor, source: Tensor | None, places: Tensor, group_alignment: int = 1) -> None:
    """Fills ``offs``, ``source`` and ``places`` with what `reference.route` returns.

    Args:
        topk_ids: (T, k) int32 or int64, contiguous; any values. S < 2^31.
        offs: (E,) int32; E <= 2^20, so that expert and slot of a block fit 31 bits.
        source: (S,) int32; (S + E * (group_alignment - 1),) with padding. None: it is not wanted, without padding.
        places: (T, k) int32.
        group_alignment: each expert's rows are padded to a multiple of it.
    """
    num_slots, num_experts = places.numel(), offs.shape[0]
    block, num_warps = (_SMALL, 4) if num_slots <= _SMALL else (_LARGE, 8)
    num_blocks, is_padded = max(cdiv(num_slots, block), 1), group_alignment > 1
    table = offs.new_empty(num_blocks, num_experts) if num_blocks > 1 or is_padded else None
    sizes = num_slots, num_experts
    constants = {"BLOCK": block, "E_AT_ONCE": at_once(num_experts - 1)}
    with on_device(topk_ids):
        if table is not None:
            launch(_count, (num_blocks,), topk_ids, table, *sizes, constants=constants, num_warps=num_warps)
            grid = (cdiv(num_experts, _SUMS["BLOCK_E"]),)
            ends = offs.new_empty(num_experts) if is_padded else offs
            launch(_add_blocks, grid, table, ends, num_blocks, num_experts, constants=_SUMS, num_warps=4)
            if is_padded:
                padding = {"ALIGNMENT": group_alignment, "E_AT_ONCE": constants["E_AT_ONCE"]}
                launch(_pad, (1,), ends, offs, num_experts, constants=padding, num_warps=4)
                assert source is not None, "without padding only"
                source.fill_(-1)
        launch(
            _place, (num_blocks,), topk_ids, table, offs, source, places, *sizes, topk_ids.shape[1],
            constants=constants, num_warps=num_warps,
        )  # fmt: skip


@triton.jit(do_not_specialize=["S"])
def _count(topk_ids, table, S, E, BLOCK: tl.constexpr, E_AT_ONCE: tl.constexpr):
    """The table's row of one block, from the slots of this block alone."""
    block = tl.program_id(0)
    _, expert = _slots_of(block, topk_ids, S, E, BLOCK)
    _store_ends(expert, table + block.to(tl.int64) * E, E, E_AT_ONCE)


@triton.jit(do_not_specialize=["B"])
def _add_blocks(table, offs, B, E, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr):
    """Adds to each row of the table the rows before it, for BLOCK_E experts. The last row is ``offs``."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, B, BLOCK_P):
        block = first + tl.arange(0, BLOCK_P)
        at = table + block.to(tl.int64)[:, None] * E + e[None, :]
        mask = (block < B)[:, None] & (e < E)[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, before[None, :] + tl.cumsum(counts, 0), mask=mask)
        before += tl.sum(counts, 0)
    tl.store(offs + e, before, mask=e < E)


@triton.jit
def _pad(ends, padded, E, ALIGNMENT: tl.constexpr, E_AT_ONCE: tl.constexpr):
    """The ends of all experts, each padded to a multiple of ALIGNMENT rows. For one program."""
    before = 0
    for first in range(0, E, E_AT_ONCE):
        e = first + tl.arange(0, E_AT_ONCE)
        sizes = tl.load(ends + e, mask=e < E, other=0) - tl.load(ends - 1 + e, mask=(e > 0) & (e < E), other=0)
        sizes = tl.cdiv(sizes, ALIGNMENT) * ALIGNMENT
        tl.store(padded + e, before + tl.cumsum(sizes, 0), mask=e < E)
        before += tl.sum(sizes)


@triton.jit(do_not_specialize=["S"])
def _place(topk_ids, table, offs, source, places, S, E, k, BLOCK: tl.constexpr, E_AT_ONCE: tl.constexpr):
    """Finds the rows of a block's slots. Dropped slots get the rows after the last expert's.

    Without a table, the block has all slots, and ``offs`` is written here.
    """
    block = tl.program_id(0)
    number, expert = _slots_of(block, topk_ids, S, E, BLOCK)
    if table is None:
        _store_ends(expert, offs, E, E_AT_ONCE)
    number = tl.sort(expert * BLOCK + number)
    expert = number // BLOCK
    slot = block * BLOCK + number % BLOCK
    is_slot = expert <= E
    is_kept = expert < E
    row = tl.arange(0, BLOCK)  # in this block
    if table is not None:
        # Rows before this slot's: those of experts before its own, in later blocks; those of earlier blocks, of experts
        # up to its own; and ``row``, those of this block.
        ends = table + block.to(tl.int64) * E
        has_before = (expert > 0) & is_slot
        row += tl.load(offs - 1 + expert, mask=has_before, other=0)
        row -= tl.load(ends - 1 + expert, mask=has_before, other=0)
        row += tl.where(is_kept, tl.load(ends - E + expert, mask=is_kept & (slot >= BLOCK), other=0), block * BLOCK)
    if source is not None:
        tl.store(source + row, tl.where(is_kept, slot // k, -1), mask=is_slot)
    tl.store(places + slot, tl.where(is_kept, row, -1), mask=is_slot)


@triton.jit
def _slots_of(block, topk_ids, S, E, BLOCK: tl.constexpr):
    """The slots of a block, numbered from 0, and their experts: E for a dropped slot, E + 1 past the last slot."""
    number = tl.arange(0, BLOCK)
    slot = block * BLOCK + number
    expert = tl.load(topk_ids + slot, mask=slot < S, other=0)
    expert = tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)
    return number, tl.where(slot < S, expert, E + 1)


@triton.jit
def _store_ends(expert, ends, E, E_AT_ONCE: tl.constexpr):
    """Stores to ``ends``, for each expert, how many slots go to it or to one before it."""
    before = 0
    for first in range(0, E_AT_ONCE if E_AT_ONCE < MOST_AT_ONCE else E, E_AT_ONCE):
        is_now = (expert >= first) & (expert < first + E_AT_ONCE)
        counts = tl.histogram(expert - first, E_AT_ONCE, mask=is_now)
        e = first + tl.arange(0, E_AT_ONCE)
        tl.store(ends + e, before + tl.cumsum(counts, 0), mask=e < E)
        before += tl.sum(counts)
