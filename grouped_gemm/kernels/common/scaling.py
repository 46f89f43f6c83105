"""The arithmetic of all quantizers: that of `reference`, bit for bit.

Magnitudes are compared as integers, by their bits. In that order NaN is above Inf, and Inf above all finite values, so
a NaN reaches the scale of its block, as in torch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitude(x):
    """The bits of |x| in fp32 as integers, which are ordered as the values, NaN above all."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(magnitudes, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """`reference.scales`, from the largest `magnitude` of each block."""
    amax = magnitudes.to(tl.float32, bitcast=True)
    amax = tl.maximum(amax, LIMIT * 2.0**-126, propagate_nan=tl.PropagateNan.ALL)
    scale = amax * (1 / LIMIT)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(bits < 0x7F800000, rounded, scale)
    return scale


@triton.jit
def inverse_of(scale):
    """``1 / scale``, correctly rounded."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def to_fp8(x, inverse, LIMIT: tl.constexpr, DTYPE: tl.constexpr, NVIDIA: tl.constexpr = False):
    """`reference.to_fp8`. ``inverse`` broadcasts against ``x``. On NVIDIA GPUs the conversion itself saturates."""
    scaled = x.to(tl.float32) * inverse
    if not NVIDIA:
        scaled = tl.clamp(scaled, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return scaled.to(DTYPE)


@triton.jit
def four_to_fp8(v0, v1, v2, v3):
    """Four fp32 values as e4m3fn in one word, saturated, the first in the lowest byte. Only for NVIDIA GPUs."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [v0, v1, v2, v3],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    )
