"""The kernel that sums each token's rows. Its torch twin is in `moe.rows`.

T, k, M = T * k, H: tokens, slots of a token, routed rows, features.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.kernels.common.launch import cdiv, launch, next_power_of_2, on_device

_MOST_UNROLLED = 16  # slots whose loads are in flight together


def combine(
    rows_MH: Tensor, weights: Tensor | None, places: Tensor, y_TH: Tensor,
    lost: Tensor | None = None, shifts: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes each token's weighted sum of its rows, in fp32 and in the order of slots.

    Args:
        rows_MH: rows in expert order, last axis contiguous.
        weights: (T, k), last axis contiguous; None: all weights are 1.
        places: (T, k) int32, contiguous: the row of each slot; -1: the slot was dropped.
        y_TH: the output, contiguous.
        lost: (T,) uint8, contiguous: tokens whose sum is NaN.
        shifts: (k,) int64, contiguous, multiples of 16: how many bytes from ``rows_MH`` a slot's row is; None: 0.
    """
    if places.numel() == 0:
        y_TH.zero_()
        return
    (num_tokens, top_k), features = places.shape, y_TH.shape[1]
    block_h = min(next_power_of_2(features), 1024)
    constants = {"TOP_K": top_k, "UNROLLED": unrolled(top_k), "BLOCK_H": block_h}
    with on_device(y_TH):
        launch(
            _combine, (num_tokens, cdiv(features, block_h)),
            rows_MH, weights, places, lost, shifts, y_TH, features, rows_MH.stride(0),
            0 if weights is None else weights.stride(0),
            constants=constants, num_warps=max(1, block_h // 256),
        )  # fmt: skip


def unrolled(top_k: int) -> int:
    """How many slots one step of the kernel's loop takes: all, or the largest divisor of k up to 16."""
    return next(n for n in range(min(top_k, _MOST_UNROLLED), 0, -1) if top_k % n == 0)


@triton.jit
def _combine(
    rows, weights, places, lost, shifts, y, H, rows_stride, weights_stride,
    TOP_K: tl.constexpr, UNROLLED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """BLOCK_H features of one token. UNROLLED divides TOP_K."""
    t = tl.program_id(0).to(tl.int64)
    hs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, TOP_K, UNROLLED):
        for i in tl.static_range(UNROLLED):
            place = tl.load(places + t * TOP_K + first + i)
            is_used = place >= 0
            row = rows + place.to(tl.int64) * rows_stride
            if shifts is not None:
                shift = tl.multiple_of(tl.load(shifts + first + i), 16)
                row += shift // (rows.dtype.element_ty.primitive_bitwidth // 8)
            values = tl.load(row + hs, mask=hs < tl.where(is_used, H, 0), other=0)
            values = values.to(tl.float32)
            if weights is not None:
                weight = tl.load(weights + t * weights_stride + first + i, mask=is_used, other=0)
                values *= weight.to(tl.float32)
            total += values
    if lost is not None:
        total = tl.where(tl.load(lost + t) != 0, float("nan"), total)
    tl.store(y + t * H + hs, total.to(y.dtype.element_ty), mask=hs < H)
