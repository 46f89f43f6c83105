"""Products of MX operands: fp8 tiles with an E8M0 scale for each 32 of the contraction.

R: lines of a tile. Scales are (R,) int32, four for 128 values of a line: `layouts` has them so. In one integer because
loads of at least 32 bits for each thread are the ones that Triton starts some steps ahead.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

ONES = tl.constexpr(0x7F7F7F7F)  # the scales of a line that is not there


@triton.jit
def add_mx_product(lhs, lhs_scales, rhs, rhs_scales, acc, NATIVE: tl.constexpr):
    """``acc`` plus the product of tiles (P, 128) and (128, Q), whose scales are (P,) and (Q,).

    Where it is not ``NATIVE``, operands are widened to bfloat16, which has every e4m3 value times every scale, but for
    what is below 2^-126: there its steps are 2^-133.
    """
    lhs_codes = _unpacked(lhs_scales)
    rhs_codes = _unpacked(rhs_scales)
    if NATIVE:
        return tl.dot_scaled(lhs, lhs_codes.to(tl.uint8), "e4m3", rhs, rhs_codes.to(tl.uint8), "e4m3", acc)
    return tl.dot(_widened(lhs, lhs_codes), _widened(rhs.T, rhs_codes).T, acc)


@triton.jit
def _unpacked(scales):
    """(R, 4) int32 codes of (R,) scales."""
    return (scales[:, None] >> (tl.arange(0, 4) * 8)[None, :]) & 0xFF


@triton.jit
def _widened(data, codes):
    """Values of (R, 128) data in bfloat16; NaN where the scale is."""
    factors = tl.maximum(codes << 23, 0x00400000).to(tl.float32, bitcast=True)  # 2^-127 is subnormal
    factors = tl.fma(factors, tl.zeros_like(factors), factors)  # Inf, from the code of NaN, becomes NaN
    values = data.to(tl.float32).reshape(data.shape[0], 4, 32) * factors[:, :, None]
    return values.to(tl.bfloat16).reshape(data.shape[0], 128)
