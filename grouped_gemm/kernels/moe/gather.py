"""The kernel that gathers tokens into routed rows. With weights and dot products it gives both gradients of a combine.

Its torch twins are in `moe.rows`.

T, k, M = T * k, H: tokens, slots of a token, routed rows, features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.kernels.common.launch import launch, next_power_of_2, on_device

_MOST_SLOTS = 16  # of a tile; more slots take several tiles
_TILE = 2048  # slots times features. With 4096 the kernel takes 100 registers on sm_90, with 2048 it takes 56.


def gather(
    x_TH: Tensor, rows_MH: Tensor | None, weights: Tensor | None, source: Tensor, places: Tensor,
    out_MH: Tensor | None, dots: Tensor | None,
) -> None:  # fmt: skip
    """Writes each token, times its weights, to its rows; and the dot products of each token with other rows.

    Args:
        x_TH: tokens, last axis contiguous.
        rows_MH: the rows of the dot products, last axis contiguous; None without ``dots``.
        weights: (T, k), last axis contiguous; None: all weights are 1.
        source: (M,) int32, contiguous: the token of each row; -1: the row is not used.
        places: (T, k) int32, contiguous: the row of each slot; -1: the slot was dropped.
        out_MH: the routed rows, contiguous; those that are not used are zero. None: they are not wanted.
        dots: (T, k), contiguous; summed in fp32, and zero for dropped slots. None: they are not wanted.
    """
    if places.numel() == 0:
        if out_MH is not None:
            out_MH.zero_()
        return
    (num_tokens, top_k), features, num_rows = places.shape, x_TH.shape[1], source.shape[0]
    slots = min(next_power_of_2(top_k), _MOST_SLOTS)
    block_h = min(next_power_of_2(features), _TILE // slots)
    constants = {"TOP_K": top_k, "SLOTS": slots, "BLOCK_H": block_h}
    strides = (x_TH.stride(0), *(0 if x is None else x.stride(0) for x in (rows_MH, weights)))
    with on_device(x_TH):
        launch(
            _gather, (num_tokens,), x_TH, rows_MH, weights, source, places, out_MH, dots, num_rows, features, *strides,
            constants=constants, num_warps=max(1, slots * block_h // 512),
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _gather(
    x, rows, weights, source, places, out, dots, M, H, x_stride, rows_stride, weights_stride,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The rows and dot products of token t; and zeros in rows t * k to t * k + k, as far as they are not used, and in
    every T * k-th row after them.

    A program for each token reads the token from memory once. One for each row would read it k times.
    """
    t = tl.program_id(0).to(tl.int64)
    for first in range(0, TOP_K, SLOTS):
        slots = first + tl.arange(0, SLOTS)
        place = tl.load(places + t * TOP_K + slots, mask=slots < TOP_K, other=-1)[:, None].to(tl.int64)
        is_used = place >= 0
        if out is not None and weights is not None:
            weight = tl.load(weights + t * weights_stride + slots[:, None], mask=is_used, other=0).to(tl.float32)
        total = tl.zeros((SLOTS, BLOCK_H), tl.float32)
        for h in range(0, H, BLOCK_H):
            hs = h + tl.arange(0, BLOCK_H)[None, :]
            mask = is_used & (hs < H)
            # Every slot loads the token, all but once from L1: a broadcast between warps would synchronize them. The
            # mask keeps a token's NaN out of the dot products of dropped slots.
            values = tl.load(x + t * x_stride + hs + 0 * place, mask=mask, other=0)
            if dots is not None:
                others = tl.load(rows + place * rows_stride + hs, mask=mask, other=0)
                total += values.to(tl.float32) * others.to(tl.float32)
            if out is not None:
                if weights is not None:
                    values = (values.to(tl.float32) * weight).to(out.dtype.element_ty)
                tl.store(out + place * H + hs, values, mask=mask)
        if dots is not None:
            tl.store(dots + t * TOP_K + slots, tl.sum(total, 1).to(dots.dtype.element_ty), mask=slots < TOP_K)
        if out is not None:  # in a loop of its own, because addresses take registers
            for start in range(t * TOP_K, M, tl.num_programs(0) * TOP_K):
                row = (start + slots)[:, None]
                exists = (slots[:, None] < TOP_K) & (row < M)
                is_unused = tl.load(source + row, mask=exists, other=0) < 0
                nothing = tl.zeros((SLOTS, BLOCK_H), out.dtype.element_ty)
                for h in range(0, H, BLOCK_H):
                    hs = h + tl.arange(0, BLOCK_H)[None, :]
                    tl.store(out + row * H + hs, nothing, mask=is_unused & (hs < H))
