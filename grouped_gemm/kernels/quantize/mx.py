"""Quantizers of MXFP8: they write what `kernels.gemm` reads. The numbers are those of `reference`, bit for bit.

Scales run along the contraction, and in training every operand is contracted along both of its axes. So each tile is
read once and written twice, straight (as it lies in memory) and transposed, each with scales along its own contiguous
axis. A line has four scales in a tile, which are written together as one int32.

M, E, K, N: rows, groups, in and out features. D: K or N. T: tokens in blocks of 128 that start anew with each group.
R, C: lines and columns of a weight matrix as it lies in memory, C contiguous.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.kernels.common.groups import at_once, group_of_block
from grouped_gemm.kernels.common.launch import cdiv, in_parts, launch, on_device
from grouped_gemm.kernels.common.scaling import inverse_of, magnitude, scale_of, to_fp8
from grouped_gemm.kernels.gemm.mx import ONES
from grouped_gemm.kernels.quantize.layouts import TOKEN_BLOCK, Operands


def quantize_activations(x_MD: Tensor, offs: Tensor, out: Operands) -> None:
    """Fills ``out``, from `layouts.activations`, in one read. Tensors of shape (0,) are not wanted.

    Args:
        x_MD: (M, D), contiguous D; bfloat16, float16 or float32.
        offs: (E,) int32, contiguous: the end row of each group. Any values are safe.
        out: data and scales by rows, data and scales by columns. Columns past the last group become 0, with scales
            of 1.
    """
    by_row, row_scale, by_column, column_scale = out
    (num_rows, features), num_groups = x_MD.shape, offs.shape[0]
    rows, columns = by_row.dim() == 2, by_column.dim() == 3
    # Blocks start anew with each group, so the rows past the last group may need one block more than the column layout.
    blocks = num_rows // TOKEN_BLOCK + num_groups + 1 if columns else cdiv(num_rows, TOKEN_BLOCK)
    if blocks == 0:
        return
    with on_device(x_MD):
        launch(
            _quantize_tiles, (blocks * cdiv(features, 128),),
            x_MD, offs, by_row, as_words(row_scale), by_column, as_words(column_scale),
            num_rows, num_groups, features, x_MD.stride(0), by_row.stride(0),
            constants={
                "ROWS": rows, "COLUMNS": columns, "LIMIT": torch.finfo((by_row if rows else by_column).dtype).max,
                "E_AT_ONCE": at_once(num_groups), "TOKEN_BLOCK": TOKEN_BLOCK,
            },
            num_warps=8,
        )  # fmt: skip


def quantize_weights(b_EKN: Tensor, out: Operands, *, scales: str = "by block") -> None:
    """Fills ``out`` in one read. Tensors of shape (0,) are not wanted.

    Args:
        b_EKN: (E, K, N), K or N contiguous; bfloat16, float16 or float32.
        out: data for forward and for dgrad, then their scales.
        scales: the layout of scales: "by block", where ``out`` is from `layouts.weights`; "swizzled", from
            `torch_native.layouts.weights`; "by line", from `hipblaslt.layouts.weights`.
    """
    for part, into in in_parts(b_EKN, out):
        _quantize_part(part, into, scales)


def _quantize_part(b_EKN: Tensor, out: Sequence[Tensor], scales: str) -> None:
    forward, dgrad, forward_scale, dgrad_scale = out
    # The operand that is contracted along memory's contiguous axis is written straight, the other one transposed.
    w_ERC, straight, transposed, straight_scale, transposed_scale = b_EKN, dgrad, forward, dgrad_scale, forward_scale
    if b_EKN.stride(1) == 1:
        w_ERC = b_EKN.transpose(1, 2)
        straight, transposed, straight_scale, transposed_scale = forward, dgrad, forward_scale, dgrad_scale
    num_groups, lines, columns = w_ERC.shape
    fp8 = forward.dtype if forward.dim() == 3 else dgrad.dtype
    with on_device(b_EKN):
        launch(
            _quantize_weights, (cdiv(lines, 128) * cdiv(columns, 128), num_groups),
            w_ERC, straight, as_words(straight_scale), transposed, as_words(transposed_scale),
            lines, columns, w_ERC.stride(0), w_ERC.stride(1),
            straight.stride(0), straight.stride(-2) if straight.dim() == 3 else 0,
            transposed.stride(0), transposed.stride(-2) if transposed.dim() == 3 else 0,
            constants={
                "STRAIGHT": straight.dim() == 3, "TRANSPOSED": transposed.dim() == 3, "LIMIT": torch.finfo(fp8).max,
                "SCALES": scales,
            },
            num_warps=8,
        )  # fmt: skip


def as_words(scale: Tensor) -> Tensor:
    """MX scales as kernels write them: int32 words of four scales of a line each, the first in the lowest byte.

    An operand that is not wanted is returned unchanged.
    """
    return scale.flatten().view(torch.int32) if scale.dtype == torch.float8_e8m0fnu else scale


@triton.jit
def quantize_tile(
    x, x_stride, height, width,
    straight, straight_stride, straight_scales, straight_scale_stride,
    transposed, transposed_stride, transposed_scales, transposed_scale_stride, summed, stored,
    STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, LIMIT: tl.constexpr, SWIZZLED: tl.constexpr = False,
):  # fmt: skip
    """Quantizes a tile of 128 by 128 values, of which ``height`` by ``width`` exist. Pointers point to its first value.

    A step handles 32 lines, which share the scales of the transposed layout. That takes few registers, so that many
    programs fit on a multiprocessor and keep its memory busy.

    Args:
        straight_scale_stride, transposed_scale_stride: words from one line's scales to the next line's; unused if
            SWIZZLED.
        summed: how many lines have values in the transposed layout; the other lines are zero there.
        stored: how many lines are written to the transposed layout.
    """
    cs = tl.arange(0, 128)
    places = tl.arange(0, 4)
    transposed_codes = tl.zeros((128,), tl.int32)
    for step in range(0, 128, 32):
        rs = step + tl.arange(0, 32)
        mask = (rs < height)[:, None] & (cs < width)[None, :]
        values = tl.load(x + rs.to(tl.int64)[:, None] * x_stride + cs[None, :], mask=mask, other=0)
        if STRAIGHT:
            blocks = values.reshape(32, 4, 32)
            scale = scale_of(tl.max(magnitude(blocks), 2), LIMIT, True)
            codes = _e8m0(scale, (places * 32 < width)[None, :]) << (places * 8)[None, :]
            _store_scales(straight_scales, straight_scale_stride, rs, tl.sum(codes, 1), height, SWIZZLED)
            data = to_fp8(blocks, inverse_of(scale)[:, :, None], LIMIT, straight.dtype.element_ty).reshape(32, 128)
            tl.store(straight + rs.to(tl.int64)[:, None] * straight_stride + cs[None, :], data, mask=mask)
        if TRANSPOSED:
            values = tl.where((rs < summed)[:, None], values, tl.zeros_like(values))
            scale = scale_of(tl.max(magnitude(values), 0), LIMIT, True)
            transposed_codes |= _e8m0(scale, step < summed) << (step // 4)
            data = to_fp8(values, inverse_of(scale)[None, :], LIMIT, transposed.dtype.element_ty)
            targets = transposed + cs.to(tl.int64)[None, :] * transposed_stride + rs[:, None]
            tl.store(targets, data, mask=(rs < stored)[:, None] & (cs < width)[None, :])
    if TRANSPOSED:
        count = tl.where(stored > 0, width, 0)
        _store_scales(transposed_scales, transposed_scale_stride, cs, transposed_codes, count, SWIZZLED)


@triton.jit
def _store_scales(target, stride, lines, codes, count, SWIZZLED: tl.constexpr):
    """Stores the scales of ``lines`` of a tile, of which the first ``count`` exist.

    In the swizzled layout, see `torch_native.layouts`, the other lines of the tile have scales of 1, unless no line of
    the tile exists.
    """
    if SWIZZLED:
        codes = tl.where(lines < count, codes, ONES)
        tl.store(target + lines % 32 * 4 + lines // 32, codes, mask=lines < tl.where(count > 0, 128, 0))
    else:
        tl.store(target + lines * stride, codes, mask=lines < count)


@triton.jit
def _e8m0(scale, has_values):
    """`reference.to_e8m0` as int32. A block without values has the code of 1."""
    return tl.where(has_values, (scale.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127)


@triton.jit(do_not_specialize=["M", "E"])
def _quantize_tiles(
    x, offs, by_row, row_scales, by_column, column_scales,
    M, E, D, x_stride, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr,
    E_AT_ONCE: tl.constexpr, TOKEN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes 128 rows of one group, or past the last group, by 128 features."""
    tl.static_assert(TOKEN_BLOCK == 128)
    d_blocks = tl.cdiv(D, 128)
    block = tl.program_id(0) // d_blocks
    d_block = tl.program_id(0) % d_blocks
    summed = 0
    stored = 0
    if COLUMNS:
        e, start, end, first_block, _ = group_of_block(block, offs, M, E, TOKEN_BLOCK, E_AT_ONCE)
        row = start + (block - first_block) * TOKEN_BLOCK
        height = tl.minimum(end - row, 128)
        summed = tl.where(e < E, height, 0)
        stored = tl.where(block < M // TOKEN_BLOCK + E, 128, 0)
    else:
        row = block * 128
        height = tl.minimum(M - row, 128)
    row64 = tl.cast(row, tl.int64)
    block64 = block.to(tl.int64)
    d64 = d_block.to(tl.int64) * 128
    quantize_tile(
        x + row64 * x_stride + d64, x_stride, height, D - d_block * 128,
        by_row + row64 * row_stride + d64, row_stride, row_scales + d_block.to(tl.int64) * M + row64, 1,
        by_column + (block64 * D + d64) * 128, 128, column_scales + block64 * D + d64, 1,
        summed, stored,
        ROWS, COLUMNS, LIMIT,
    )  # fmt: skip


@triton.jit
def _quantize_weights(
    w, straight, straight_scales, transposed, transposed_scales,
    R, C, w_stride_e, w_stride, straight_stride_e, straight_stride, transposed_stride_e, transposed_stride,
    STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, LIMIT: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Writes a square tile of one matrix. See `quantize_weights` for SCALES."""
    c_blocks = tl.cdiv(C, 128)
    r_blocks = tl.cdiv(R, 128)
    r_block = tl.program_id(0) // c_blocks
    c_block = tl.program_id(0) % c_blocks
    e = tl.program_id(1).to(tl.int64)
    r = r_block.to(tl.int64) * 128
    c = c_block.to(tl.int64) * 128
    height = tl.minimum(R - r_block * 128, 128)
    straight_scale_stride = 1
    transposed_scale_stride = 1
    if SCALES == "by block":
        straight_place = (e * c_blocks + c_block) * R + r
        transposed_place = (e * r_blocks + r_block) * C + c
    elif SCALES == "swizzled":
        straight_place = ((e * r_blocks + r_block) * c_blocks + c_block) * 128
        transposed_place = ((e * c_blocks + c_block) * r_blocks + r_block) * 128
    else:
        tl.static_assert(SCALES == "by line")
        straight_scale_stride = c_blocks
        transposed_scale_stride = r_blocks
        straight_place = (e * r_blocks * 128 + r) * c_blocks + c_block
        transposed_place = (e * c_blocks * 128 + c) * r_blocks + r_block
    quantize_tile(
        w + e * w_stride_e + r * w_stride + c, w_stride, height, C - c_block * 128,
        straight + e * straight_stride_e + r * straight_stride + c, straight_stride,
        straight_scales + straight_place, straight_scale_stride,
        transposed + e * transposed_stride_e + c * transposed_stride + r, transposed_stride,
        transposed_scales + transposed_place, transposed_scale_stride,
        height, height,
        STRAIGHT, TRANSPOSED, LIMIT, SCALES == "swizzled",
    )  # fmt: skip
