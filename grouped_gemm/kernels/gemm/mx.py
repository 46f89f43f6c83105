"""The GEMM step of MX operands: fp8 tiles with an E8M0 scale for every 32 values of the contraction.

R: lines of a tile. Scales are (R,) int32, each with the four scales of 128 values of a line, as in `quantize.layouts`.
They are packed because Triton pipelines only loads of at least 32 bits per thread.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

ONES = tl.constexpr(0x7F7F7F7F)  # the scales of a line that does not exist: 1


@triton.jit
def add_mx_dot(lhs, lhs_scales, rhs, rhs_scales, acc, NATIVE: tl.constexpr):
    """``acc`` plus a (P, 128) tile with scales (P,) times a (128, Q) tile with scales (Q,).

    Unless ``NATIVE``, operands are widened to bfloat16, which represents every e4m3 value times every scale exactly,
    except below 2^-126, where its steps are 2^-133.
    """
    lhs_codes = _unpacked(lhs_scales)
    rhs_codes = _unpacked(rhs_scales)
    if NATIVE:
        return tl.dot_scaled(lhs, lhs_codes.to(tl.uint8), "e4m3", rhs, rhs_codes.to(tl.uint8), "e4m3", acc)
    return tl.dot(_widened(lhs, lhs_codes), _widened(rhs.T, rhs_codes).T, acc)


@triton.jit
def _unpacked(scales):
    """The E8M0 codes of (R,) packed scales: (R, 4) int32."""
    return (scales[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 0xFF


@triton.jit
def _widened(data, codes):
    """The values of (R, 128) data in bfloat16, NaN where the scale is NaN."""
    factors = tl.maximum(codes << 23, 0x00400000).to(tl.float32, bitcast=True)  # 2^-127 is subnormal
    factors = tl.fma(factors, tl.zeros_like(factors), factors)  # the code of NaN gave Inf: Inf * 0 makes it NaN
    values = data.to(tl.float32).reshape(data.shape[0], 4, 32) * factors[:, :, None]
    return values.to(tl.bfloat16).reshape(data.shape[0], 128)
