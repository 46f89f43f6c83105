"""Where groups begin and end, found from ``offs`` on the device, and the order of their tiles.

``offs`` is used as the caller gave it. Ends that are out of order or outside [0, M] are moved inside, as
`reference.group_ends` does, so that whatever it holds no kernel touches memory out of bounds.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def group_end(offs, e, start, M):
    """One past the last row of group ``e``, which begins at row ``start``."""
    return tl.maximum(start, tl.minimum(tl.load(offs + e), M))


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def groups_in_blocks(offs, M, E, BLOCK: tl.constexpr, E_PADDED: tl.constexpr):
    """All groups, in blocks of ``BLOCK`` rows that start anew with each group; the last block of a group may be short.

    The rows past the last group are group E. Groups past that one are empty. E_PADDED: a power of two above E.

    Returns:
        Vectors over groups: first row, one past the last row, first block, one past the last block.
    """
    e = tl.arange(0, E_PADDED)
    starts = tl.load(offs + e - 1, mask=(e > 0) & (e <= E), other=0)
    ends = tl.load(offs + e, mask=e < E, other=0)
    starts = tl.associative_scan(tl.where(e <= E, tl.minimum(tl.maximum(starts, 0), M), M), 0, _later)
    ends = tl.associative_scan(tl.where(e < E, tl.minimum(tl.maximum(ends, 0), M), M), 0, _later)
    blocks = tl.cdiv(ends - starts, BLOCK)
    last_blocks = tl.cumsum(blocks, 0)
    return starts, ends, last_blocks - blocks, last_blocks


@triton.jit
def pick(vector, e):
    """The element of ``vector`` with index ``e``, an integer; 0 past its end."""
    return tl.sum(tl.where(tl.arange(0, vector.shape[0]) == e, vector, 0))


@triton.jit
def tile_position(tile, tile_rows, tile_columns, BAND: tl.constexpr):
    """Row and column, in tiles, of tile number ``tile``: down a band of BAND tile rows, then on to the next column."""
    band = tile // (BAND * tile_columns)
    height = tl.minimum(tile_rows - band * BAND, BAND)
    in_band = tile - band * BAND * tile_columns
    return band * BAND + in_band % height, in_band // height
