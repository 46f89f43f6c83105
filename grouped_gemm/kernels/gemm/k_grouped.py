"""The K-grouped GEMM of wgrad: each group's rows are its contraction.

Operands without scales are read as they are, (M, D). fp8 operands have contiguous tokens, because Hopper's fp8 MMA
needs both operands contiguous along the contraction. Their quantizer writes (T/128, D, 128): blocks of 128 tokens that
start anew with each group, with zeros after a group's last token. So groups need no masks, no alignment for TMA, and no
offsets on the host. Blockwise, block b has row b of the scales.

M, T, E: rows, tokens in blocks, groups. P, Q: features of the first and the second operand. A tile is BLOCK_M of P by
BLOCK_N of Q, and a step covers BLOCK_K tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged
from triton.tools.tensor_descriptor import TensorDescriptor

from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import AUTOTUNE
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.groups import at_once, group_at, tile_position
from grouped_gemm.kernels.common.launch import can_use_tma, cdiv, kind_of, launch, launcher, on_device, packed
from grouped_gemm.kernels.gemm.mx import ONES, add_mx_dot
from grouped_gemm.kernels.gemm.tile_search import wgrad_tile
from grouped_gemm.kernels.gemm.tiles import Tile
from grouped_gemm.kernels.quantize.layouts import TOKEN_BLOCK

if TYPE_CHECKING:
    from grouped_gemm.kernels.gemm import k_grouped_hopper

_MOST_RAGGED_ROWS = 1 << 30  # what a ragged descriptor can address


def wgrad(
    lhs: Tensor,
    lhs_scale: Tensor | None,
    rhs: Tensor,
    rhs_scale: Tensor | None,
    offs: Tensor,
    num_rows: int,
    recipe: Recipe,
    out_EPQ: Tensor,
    accumulate: bool = False,
) -> None:
    """Per group, the transpose of its rows of ``lhs`` times its rows of ``rhs``, with fp32 accumulation.

    Args:
        lhs: (M, P), contiguous P: bfloat16, float16 or float32; or (T/128, P, 128) fp8, contiguous.
        lhs_scale: scales of fp8, contiguous: rowwise (E, P) and blockwise (T/128, P) fp32, MX (T/128, P, 4) E8M0.
        rhs: (M, Q) or (T/128, Q, 128), as ``lhs``.
        rhs_scale: rowwise (E, Q), blockwise (T/128, Q), MX (T/128, Q, 4).
        offs: (E,) int32, contiguous: the end row of each group. Any values are safe.
        num_rows: M.
        recipe: any.
        out_EPQ: what is filled, (E, P, Q), contiguous; bfloat16, float16 or float32. Exactly zero for an empty group.
        accumulate: whether to add to ``out_EPQ``, which is float32 then. An empty group is neither read nor written.
    """
    if num_rows == 0:
        if not accumulate:
            out_EPQ.zero_()
        return
    num_groups, p, q = out_EPQ.shape
    strides = p, lhs.stride(), q, rhs.stride()
    places = (lhs.data_ptr() | rhs.data_ptr()) & 15
    is_far = num_rows > _MOST_RAGGED_ROWS
    key = (lhs.dtype, strides, num_groups, recipe, out_EPQ.dtype, lhs.device, places, is_far, accumulate)
    if AUTOTUNE.is_on_now():  # as in `m_grouped`
        gemm = _gemm_for(lhs, rhs, out_EPQ, recipe, is_far, accumulate)
    else:
        found = _gemms.get(key)
        gemm = found or _gemms.setdefault(key, _gemm_for(lhs, rhs, out_EPQ, recipe, is_far, accumulate))
    if recipe is Recipe.MXFP8:
        lhs_scale, rhs_scale = packed(lhs_scale), packed(rhs_scale)
    with on_device(lhs):
        gemm.run(lhs, lhs_scale, rhs, rhs_scale, offs, num_rows, out_EPQ)


class _Gemm:
    """How to launch the kernel below for calls that differ only in M."""

    def __init__(self, out_EPQ: Tensor, kind: str, tma: bool, tile: Tile, accumulate: bool) -> None:
        self._shape = num_groups, p, q = out_EPQ.shape
        self.tile = tile
        self._tma = tma
        # Not persistent: groups differ in length, so the hardware gives each free multiprocessor the next tile.
        self._grid = (num_groups * cdiv(p, tile.block_m) * cdiv(q, tile.block_n),)
        self._launch = launcher(
            _wgrad,
            {
                "KIND": kind,
                "TMA": tma,
                "TOKEN_BLOCK": TOKEN_BLOCK,
                "E_AT_ONCE": at_once(num_groups),
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m,
                "ACCUMULATE": accumulate,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def run(
        self,
        lhs: Tensor,
        lhs_scale: Tensor | None,
        rhs: Tensor,
        rhs_scale: Tensor | None,
        offs: Tensor,
        num_rows: int,
        out_EPQ: Tensor,
    ) -> None:
        """Fills ``out_EPQ``; arguments as of `wgrad`."""
        lhs_arg, rhs_arg, tile = lhs, rhs, self.tile
        if self._tma and lhs_scale is None:  # reads zeros past the end of a group
            lhs_arg = create_ragged_descriptor(lhs, [tile.block_k, tile.block_m])
            rhs_arg = create_ragged_descriptor(rhs, [tile.block_k, tile.block_n])
        elif self._tma:
            lhs_arg = TensorDescriptor.from_tensor(lhs.view(-1, TOKEN_BLOCK), [tile.block_m, tile.block_k])
            rhs_arg = TensorDescriptor.from_tensor(rhs.view(-1, TOKEN_BLOCK), [tile.block_n, tile.block_k])
        self._launch(
            self._grid,
            lhs_arg,
            lhs_scale,
            rhs_arg,
            rhs_scale,
            offs,
            out_EPQ,
            num_rows,
            *self._shape,
            lhs.stride(0),
            rhs.stride(0),
        )


_gemms: dict[tuple[Any, ...], _Gemm | k_grouped_hopper.Gemm] = {}  # by everything that `_gemm_for` reads


def _gemm_for(
    lhs: Tensor, rhs: Tensor, out_EPQ: Tensor, recipe: Recipe, is_far: bool, accumulate: bool
) -> _Gemm | k_grouped_hopper.Gemm:
    machine = machine_of(lhs.device)
    kind = kind_of(lhs, recipe)
    tma = can_use_tma(lhs, rhs) and not is_far
    if tma and machine.traits.kernels == "hopper":
        from grouped_gemm.kernels.gemm import k_grouped_hopper

        if k_grouped_hopper.can_run(lhs, rhs, kind):
            return k_grouped_hopper.Gemm(lhs, rhs, out_EPQ, kind, accumulate)
    _, p, q = out_EPQ.shape
    return _Gemm(out_EPQ, kind, tma, wgrad_tile(machine, kind, p, q, tma), accumulate)


@triton.jit(do_not_specialize=["M", "E"])
def _wgrad(
    lhs,
    lhs_scale,
    rhs,
    rhs_scale,
    offs,
    out,
    M,
    E,
    P,
    Q,
    lhs_stride,
    rhs_stride,
    KIND: tl.constexpr,
    TMA: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    E_AT_ONCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    BLOCKWISE: tl.constexpr = KIND == "blockwise"
    MX: tl.constexpr = KIND == "mx" or KIND == "mx upcast"
    SCALED: tl.constexpr = KIND == "rowwise" or BLOCKWISE or MX
    tl.static_assert(TOKEN_BLOCK % BLOCK_K == 0 and (not (BLOCKWISE or MX) or BLOCK_K == TOKEN_BLOCK))
    tiles_p = tl.cdiv(P, BLOCK_M)
    tiles_q = tl.cdiv(Q, BLOCK_N)
    e = tl.program_id(0) // (tiles_p * tiles_q)
    tile_p, tile_q = tile_position(tl.program_id(0) % (tiles_p * tiles_q), tiles_p, tiles_q, GROUP_M)
    first_p = tile_p * BLOCK_M
    first_q = tile_q * BLOCK_N
    ps = first_p + tl.arange(0, BLOCK_M)
    qs = first_q + tl.arange(0, BLOCK_N)
    ts = tl.arange(0, BLOCK_K)

    start, end, first_block, last_block = group_at(e, offs, M, E, TOKEN_BLOCK, E_AT_ONCE)
    length = end - start
    if SCALED:
        start = first_block * TOKEN_BLOCK
        length = (last_block - first_block) * TOKEN_BLOCK
    if not TMA:
        if SCALED:
            lhs_tiles = ps[:, None] * TOKEN_BLOCK + ts[None, :]  # within a block of tokens, so 32 bits are enough
            rhs_tiles = qs[:, None] * TOKEN_BLOCK + ts[None, :]
        else:
            lhs_tiles = lhs + (start + ts).to(tl.int64)[:, None] * lhs_stride + ps[None, :]
            rhs_tiles = rhs + (start + ts).to(tl.int64)[:, None] * rhs_stride + qs[None, :]
    if BLOCKWISE or MX:
        lhs_scales = lhs_scale + first_block.to(tl.int64) * P + ps
        rhs_scales = rhs_scale + first_block.to(tl.int64) * Q + qs

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(0, length, BLOCK_K):
        if BLOCKWISE or MX:
            p_scales = tl.load(lhs_scales, mask=ps < P, other=ONES if MX else 0)
            q_scales = tl.load(rhs_scales, mask=qs < Q, other=ONES if MX else 0)
            lhs_scales += P
            rhs_scales += Q
        if SCALED:
            block = first_block + t // TOKEN_BLOCK
            if TMA:
                lhs_PT = lhs.load([block * P + first_p, t % TOKEN_BLOCK])
                rhs_QT = rhs.load([block * Q + first_q, t % TOKEN_BLOCK])
            else:
                lines = tl.cast(block, tl.int64) * TOKEN_BLOCK
                lhs_PT = tl.load(lhs + (lines * P + t % TOKEN_BLOCK) + lhs_tiles, mask=(ps < P)[:, None], other=0.0)
                rhs_QT = tl.load(rhs + (lines * Q + t % TOKEN_BLOCK) + rhs_tiles, mask=(qs < Q)[:, None], other=0.0)
            lhs_tile = lhs_PT
            rhs_tile = rhs_QT.T
        else:
            if TMA:
                lhs_TP = load_ragged(lhs, start, length, [t, first_p])
                rhs_tile = load_ragged(rhs, start, length, [t, first_q])
            else:
                in_group = (ts < length - t)[:, None]
                lhs_TP = tl.load(lhs_tiles, mask=in_group & (ps < P)[None, :], other=0.0)
                rhs_tile = tl.load(rhs_tiles, mask=in_group & (qs < Q)[None, :], other=0.0)
                lhs_tiles += BLOCK_K * tl.cast(lhs_stride, tl.int64)
                rhs_tiles += BLOCK_K * tl.cast(rhs_stride, tl.int64)
            lhs_tile = lhs_TP.T
        if BLOCKWISE:
            acc += tl.dot(lhs_tile, rhs_tile) * p_scales[:, None] * q_scales[None, :]
        elif MX:
            acc = add_mx_dot(lhs_tile, p_scales, rhs_tile, q_scales, acc, KIND == "mx")
        else:
            acc = tl.dot(lhs_tile, rhs_tile, acc, input_precision="ieee")
    if KIND == "rowwise":
        p_scales = tl.load(lhs_scale + e.to(tl.int64) * P + ps, mask=ps < P, other=0)
        q_scales = tl.load(rhs_scale + e.to(tl.int64) * Q + qs, mask=qs < Q, other=0)
        acc = acc * p_scales[:, None] * q_scales[None, :]
    target = out + e.to(tl.int64) * P * Q + ps.to(tl.int64)[:, None] * Q + qs[None, :]
    mask = (ps < P)[:, None] & (qs < Q)[None, :]
    if ACCUMULATE:
        # One addition per value, so bits repeat. Loading the old values would spill registers, and so would 64-bit
        # offsets within the tile.
        corner = out + e.to(tl.int64) * P * Q + first_p.to(tl.int64) * Q + first_q
        offsets = tl.arange(0, BLOCK_M)[:, None] * Q + tl.arange(0, BLOCK_N)[None, :]
        added = (ps < tl.where(length > 0, P, 0))[:, None] & (qs < Q)[None, :]
        tl.atomic_add(corner + offsets, acc, mask=added, sem="relaxed")
    else:
        tl.store(target, acc.to(out.dtype.element_ty), mask=mask)


def group_sums(x_MN: Tensor, offs: Tensor, out_EN: Tensor) -> None:
    """Fills ``out_EN`` (E, N) with the sum of each group's rows of (M, N), contiguous N, accumulated in fp32."""
    (num_rows, columns), num_groups = x_MN.shape, offs.shape[0]
    with on_device(x_MN):
        launch(
            _group_sums, (num_groups, cdiv(columns, 64)),
            x_MN, offs, out_EN, num_rows, num_groups, columns, x_MN.stride(0),
            constants={
                "TOKEN_BLOCK": TOKEN_BLOCK, "E_AT_ONCE": at_once(num_groups),
                "BLOCK_M": 128, "BLOCK_N": 64,
            },
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "E"])
def _group_sums(
    x, offs, out, M, E, N, x_stride,
    TOKEN_BLOCK: tl.constexpr, E_AT_ONCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end, _, _ = group_at(e, offs, M, E, TOKEN_BLOCK, E_AT_ONCE)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(start, end, BLOCK_M):
        rows = row + tl.arange(0, BLOCK_M)
        source = x + rows.to(tl.int64)[:, None] * x_stride + columns[None, :]
        acc += tl.load(source, mask=(rows < end)[:, None] & (columns < N)[None, :], other=0).to(tl.float32)
    tl.store(out + e.to(tl.int64) * N + columns, tl.sum(acc, 0).to(out.dtype.element_ty), mask=columns < N)
