"""The tile of each kernel, in tables by architecture, kind of operands and row class. No call tunes.

M is not a key: calls with more rows run the same machine code, so a row's bits do not depend on M. Comments say which
entries were measured, and where; the others are plausible guesses. `tile_search` has the tiles that were found on the
user's GPU.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from grouped_gemm.core.call_spec import RowClass


class Tile(NamedTuple):
    """How one program works.

    Attributes:
        block_m: rows of an output tile.
        block_n: columns of an output tile.
        block_k: values of the contraction in one step.
        num_warps: warps of a program.
        num_stages: steps whose loads are in flight at once.
        group_m: tile rows of a group that are walked together: programs go down this many tile rows, then on to the
            next column, so that those that run at the same time share operands in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8


_DECODE, _SMALL, _LARGE = RowClass.DECODE, RowClass.SMALL, RowClass.LARGE
_Table = dict[tuple[str, RowClass], Tile]  # (kind, row class); kinds: `launch.kind_of`

# H200, triton 3.6.0, 2026-11-21, 32768x8x2048x7168 balanced: the "large" entries of 16 bit, rowwise and blockwise.
# No other entry and no group_m was measured. `m_grouped_hopper` has its own tiles and runs most calls.
_GEMM_SM90: _Table = {
    ("16 bit", _LARGE): Tile(128, 256, 64, 8, 3, group_m=16),
    ("16 bit", _SMALL): Tile(64, 256, 64, 4, 4, group_m=4),
    ("16 bit", _DECODE): Tile(64, 128, 64, 4, 6, group_m=1),
    ("32 bit", _LARGE): Tile(64, 64, 32, 8, 3),
    ("rowwise", _LARGE): Tile(128, 256, 128, 8, 3, group_m=16),
    ("rowwise", _SMALL): Tile(64, 256, 128, 4, 4, group_m=4),
    ("rowwise", _DECODE): Tile(64, 128, 128, 4, 6, group_m=1),
    ("blockwise", _LARGE): Tile(128, 128, 128, 8, 4, group_m=12),
    ("blockwise", _SMALL): Tile(64, 128, 128, 4, 4, group_m=4),
    ("blockwise", _DECODE): Tile(64, 128, 128, 4, 6, group_m=1),
    ("mx upcast", _LARGE): Tile(128, 128, 128, 8, 3, group_m=12),
    ("mx upcast", _DECODE): Tile(64, 128, 128, 4, 3, group_m=1),
}
# Not measured. Fits the 99 KiB of shared memory of sm_86, sm_89 and sm_120.
_GEMM_NVIDIA: _Table = {
    ("16 bit", _LARGE): Tile(128, 128, 32, 8, 4),
    ("16 bit", _DECODE): Tile(16, 128, 64, 4, 4, group_m=1),
    ("32 bit", _LARGE): Tile(64, 64, 32, 8, 3),
    ("rowwise", _LARGE): Tile(128, 128, 64, 8, 4),
    ("blockwise", _LARGE): Tile(128, 64, 128, 8, 3),
    ("mx", _LARGE): Tile(128, 128, 128, 8, 3),  # with 64 rows, Triton widens the operands for sm_100, silently
    ("mx upcast", _LARGE): Tile(64, 64, 128, 4, 3),
}
# Not measured. Fits the 64 KiB of LDS of gfx942.
_GEMM_AMD: _Table = {
    ("16 bit", _LARGE): Tile(128, 128, 64, 8, 2),
    ("32 bit", _LARGE): Tile(64, 64, 32, 8, 2),
    ("rowwise", _LARGE): Tile(128, 128, 128, 8, 2),
    ("blockwise", _LARGE): Tile(128, 128, 128, 8, 2),
    ("mx", _LARGE): Tile(128, 128, 128, 8, 2),
    ("mx upcast", _LARGE): Tile(128, 128, 128, 8, 2),
}
# For the interpreter: small, so that small cases have several tiles.
_GEMM_CPU: _Table = {
    ("16 bit", _LARGE): Tile(16, 32, 32, 4, 1, group_m=2),
    ("32 bit", _LARGE): Tile(16, 32, 32, 4, 1, group_m=2),
    ("rowwise", _LARGE): Tile(16, 32, 64, 4, 1, group_m=2),
    ("blockwise", _LARGE): Tile(16, 64, 128, 4, 1, group_m=2),
    ("mx", _LARGE): Tile(16, 32, 128, 4, 1, group_m=2),
    ("mx upcast", _LARGE): Tile(16, 32, 128, 4, 1, group_m=2),
}
_GEMM = {"nvidia": _GEMM_NVIDIA, "amd": _GEMM_AMD, "cpu": _GEMM_CPU, "sm_90": _GEMM_SM90}

# wgrad: block_m and block_n count features, block_k tokens. The row class of the call does not matter.
# Not measured, except tiles that are in _GEMM_SM90 as well.
_WGRAD: dict[str, dict[str, Tile]] = {
    "sm_90": {
        "16 bit": Tile(128, 256, 64, 8, 3, group_m=8),
        "32 bit": Tile(64, 64, 32, 8, 3),
        "rowwise": Tile(128, 256, 128, 8, 3, group_m=8),
        "blockwise": Tile(128, 128, 128, 8, 4, group_m=12),
        "mx upcast": Tile(128, 128, 128, 8, 3, group_m=12),
    },
    "nvidia": {
        "16 bit": Tile(128, 128, 32, 8, 4),
        "32 bit": Tile(64, 64, 32, 8, 3),
        "rowwise": Tile(128, 128, 64, 8, 4),
        "blockwise": Tile(128, 128, 128, 8, 2),
        "mx": Tile(128, 128, 128, 8, 3),
        "mx upcast": Tile(32, 64, 128, 4, 3),
    },
    "amd": {
        "16 bit": Tile(128, 128, 64, 8, 2),
        "32 bit": Tile(64, 64, 32, 8, 2),
        "rowwise": Tile(128, 128, 128, 8, 2),
        "blockwise": Tile(128, 128, 128, 8, 2),
        "mx": Tile(128, 128, 128, 8, 2),
        "mx upcast": Tile(128, 128, 128, 8, 2),
    },
    "cpu": {
        "16 bit": Tile(32, 32, 32, 4, 1, group_m=2),
        "32 bit": Tile(32, 32, 32, 4, 1, group_m=2),
        "rowwise": Tile(32, 32, 64, 4, 1, group_m=2),
        "blockwise": Tile(32, 32, 128, 4, 1, group_m=2),
        "mx": Tile(32, 32, 128, 4, 1, group_m=2),
        "mx upcast": Tile(32, 32, 128, 4, 1, group_m=2),
    },
}


@functools.cache
def gemm_tile(vendor: str, arch: str, kind: str, rows: RowClass) -> Tile:
    """The tile of the M-grouped kernel, from the table of the architecture, else of the vendor.

    A row class without an entry takes the tile of the next larger one.
    """
    table = _GEMM.get(arch, _GEMM[vendor])
    larger = (rows, _SMALL, _LARGE) if rows is _DECODE else (rows, _LARGE)
    return next(table[kind, row_class] for row_class in larger if (kind, row_class) in table)


def wgrad_tile(vendor: str, arch: str, kind: str) -> Tile:
    """The tile of the K-grouped kernel, from the table of the architecture, else of the vendor."""
    return _WGRAD.get(arch, _WGRAD[vendor])[kind]
