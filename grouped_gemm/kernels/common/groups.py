"""Where groups start and end, found from ``offs`` on the device, and the order of their tiles.

``offs`` is used as the caller passed it. Ends that are out of order or outside [0, M] are clamped, as
`reference.group_ends` does, so no kernel accesses memory out of bounds whatever ``offs`` holds.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_end(offs, e, start, M):
    """The end row of group ``e``, which starts at row ``start``."""
    return tl.maximum(start, tl.minimum(tl.load(offs + e), M))


MOST_AT_ONCE = tl.constexpr(1024)  # groups; with more, a kernel takes minutes to compile


def at_once(num_groups: int) -> int:
    """How many groups kernels look at in one step: a power of two above E, so all of them, but at most MOST_AT_ONCE."""
    return min(1 << num_groups.bit_length(), MOST_AT_ONCE.value)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def groups_from(first, row, block, offs, M, E, BLOCK: tl.constexpr, E_AT_ONCE: tl.constexpr):
    """Groups ``first`` to ``first + E_AT_ONCE``, in blocks of BLOCK rows that start anew with each group.

    The last block of a group may be short. Group ``first`` starts at row ``row`` and is at block ``block``. Rows past
    the last group count as group E; later groups are empty.

    Returns:
        Vectors over groups: number, first row, one past the last row, first block, one past the last block.
    """
    e = first + tl.arange(0, E_AT_ONCE)
    starts = tl.load(offs + e - 1, mask=(e > 0) & (e <= E), other=0)
    ends = tl.load(offs + e, mask=e < E, other=0)
    starts = tl.associative_scan(tl.where(e <= E, tl.minimum(tl.maximum(starts, row), M), M), 0, _later)
    ends = tl.associative_scan(tl.where(e < E, tl.minimum(tl.maximum(ends, row), M), M), 0, _later)
    blocks = tl.cdiv(ends - starts, BLOCK)
    last_blocks = block + tl.cumsum(blocks, 0)
    return e, starts, ends, last_blocks - blocks, last_blocks


@triton.jit
def groups_in_blocks(offs, M, E, BLOCK: tl.constexpr, E_PADDED: tl.constexpr):
    """All groups by one `groups_from`, without their numbers. E_PADDED: a power of two above E."""
    _, starts, ends, first_blocks, last_blocks = groups_from(0, 0, 0, offs, M, E, BLOCK, E_PADDED)
    return starts, ends, first_blocks, last_blocks


@triton.jit
def group_at(e, offs, M, E, BLOCK: tl.constexpr, E_AT_ONCE: tl.constexpr):
    """First row, end row, first block and end block of group ``e``, see `groups_from`."""
    row = 0
    block = 0
    start = 0
    end = 0
    first_block = 0
    for first in range(0, E_AT_ONCE if E_AT_ONCE < MOST_AT_ONCE else e + 1, E_AT_ONCE):
        groups, starts, ends, first_blocks, last_blocks = groups_from(first, row, block, offs, M, E, BLOCK, E_AT_ONCE)
        start += tl.sum(tl.where(groups == e, starts, 0))
        end += tl.sum(tl.where(groups == e, ends, 0))
        first_block += tl.sum(tl.where(groups == e, first_blocks, 0))
        row = tl.max(ends)
        block = tl.max(last_blocks)
    return start, end, first_block, first_block + tl.cdiv(end - start, BLOCK)


@triton.jit
def groups_of_blocks(
    block, offs, M, E, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, E_AT_ONCE: tl.constexpr
):  # fmt: skip
    """The groups of a vector of blocks; a block past all groups belongs to group E.

    Returns:
        Vectors over blocks: the group; its first row, end row, first block and end block; and the first row that it
        would have if each group took a multiple of ALIGNMENT rows.
    """
    row = 0
    first_of_step = 0
    e = tl.zeros_like(block)
    start = tl.zeros_like(block)
    end = tl.zeros_like(block)
    first_block = tl.zeros_like(block)
    aligned = tl.zeros_like(block)
    for first in range(0, E_AT_ONCE if E_AT_ONCE < MOST_AT_ONCE else E + 1, E_AT_ONCE):
        groups, starts, ends, firsts, lasts = groups_from(first, row, first_of_step, offs, M, E, BLOCK, E_AT_ONCE)
        is_before = (lasts[None, :] <= block[:, None]) & (groups < E)[None, :]
        is_own = (firsts[None, :] <= block[:, None]) & ((lasts[None, :] > block[:, None]) | (groups == E)[None, :])
        sizes = tl.cdiv(ends - starts, ALIGNMENT) * ALIGNMENT
        e += tl.sum(is_before.to(tl.int32), 1)
        start += tl.sum(tl.where(is_own, starts[None, :], 0), 1)
        end += tl.sum(tl.where(is_own, ends[None, :], 0), 1)
        first_block += tl.sum(tl.where(is_own, firsts[None, :], 0), 1)
        aligned += tl.sum(tl.where(is_before, sizes[None, :], 0), 1)
        row = tl.max(ends)
        first_of_step = tl.max(lasts)
    return e, start, end, first_block, first_block + tl.cdiv(end - start, BLOCK), aligned


@triton.jit
def group_of_block(block, offs, M, E, BLOCK: tl.constexpr, E_AT_ONCE: tl.constexpr):
    """`groups_of_blocks` for one block, without the last result."""
    e, start, end, first_block, last_block, _ = groups_of_blocks(
        block + tl.zeros((1,), tl.int32), offs, M, E, BLOCK, 1, E_AT_ONCE
    )
    return tl.sum(e), tl.sum(start), tl.sum(end), tl.sum(first_block), tl.sum(last_block)


@triton.jit
def pick(vector, e):
    """The element of an integer ``vector`` at index ``e``; 0 past its end."""
    return tl.sum(tl.where(tl.arange(0, vector.shape[0]) == e, vector, 0))


@triton.jit
def tile_position(tile, tile_rows, tile_columns, GROUP_M: tl.constexpr):
    """The tile row and tile column of tile number ``tile``.

    Tiles are numbered in stripes of GROUP_M tile rows: down the first column of a stripe, then down the next column.
    """
    stripe = tile // (GROUP_M * tile_columns)
    height = tl.minimum(tile_rows - stripe * GROUP_M, GROUP_M)
    in_stripe = tile - stripe * GROUP_M * tile_columns
    return stripe * GROUP_M + in_stripe % height, in_stripe // height
