"""Quantizers of MXFP8: they write what `kernels.gemm` reads, with the numbers of `reference`, bit for bit.

Scales run along the contraction, of which every operand of training has two: so each tile is read once and written
twice, as it lies (straight) and transposed, each with scales along its own contiguous axis. The four scales that a line
has in a tile are written at once, as one int32.

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
from grouped_gemm.kernels.common.launch import cdiv, in_parts, launch, on_device, packed
from grouped_gemm.kernels.common.scaling import inverse_of, magnitude, scale_of, to_fp8
from grouped_gemm.kernels.gemm.mx import ONES
from grouped_gemm.kernels.quantize.layouts import TOKEN_BLOCK, Operands


def quantize_activations(x_MD: Tensor, offs: Tensor, out: Operands) -> None:
    """Fills ``out``, from `layouts.activations`: what has no elements is not wanted. One read of ``x_MD`` writes both.

    Args:
        x_MD: (M, D), contiguous D; bfloat16, float16 or float32.
        offs: (E,) int32, contiguous: the end row of each group. Any values are safe.
        out: data and scales by rows, data and scales by columns. Columns past the last group become 0, scales 1.
    """
    by_row, row_scale, by_column, column_scale = out
    (num_rows, features), num_groups = x_MD.shape, offs.shape[0]
    rows, columns = by_row.dim() == 2, by_column.dim() == 3
    # In blocks of groups, rows past the last group may need one more than the column layout has.
    blocks = num_rows // TOKEN_BLOCK + num_groups + 1 if columns else cdiv(num_rows, TOKEN_BLOCK)
    if blocks == 0:
        return
    with on_device(x_MD):
        launch(
            _quantize_tiles, (blocks * cdiv(features, 128),),
            x_MD, offs, by_row, packed(row_scale), by_column, packed(column_scale),
            num_rows, num_groups, features, x_MD.stride(0), by_row.stride(0),
            constants={
                "ROWS": rows, "COLUMNS": columns, "LIMIT": torch.finfo((by_row if rows else by_column).dtype).max,
                "E_AT_ONCE": at_once(num_groups), "TOKEN_BLOCK": TOKEN_BLOCK,
            },
            num_warps=8,
        )  # fmt: skip


def quantize_weights(b_EKN: Tensor, out: Operands, *, swizzled: bool = False) -> None:
    """Fills ``out``, from `layouts.weights`: what has no elements is not wanted. One read of ``b`` writes both.

    Args:
        b_EKN: (E, K, N), K or N contiguous; bfloat16, float16 or float32.
        out: data for forward and for dgrad, then their scales.
        swizzled: whether ``out`` is from `torch_native.layouts.weights`.
    """
    for part, into in in_parts(b_EKN, out):
        _quantize_part(part, into, swizzled)


def _quantize_part(b_EKN: Tensor, out: Sequence[Tensor], swizzled: bool) -> None:
    forward, dgrad, forward_scale, dgrad_scale = out
    # Whichever of forward and dgrad sums over the contiguous axis is written straight.
    w_ERC, straight, transposed, straight_scale, transposed_scale = b_EKN, dgrad, forward, dgrad_scale, forward_scale
    if b_EKN.stride(1) == 1:
        w_ERC = b_EKN.transpose(1, 2)
        straight, transposed, straight_scale, transposed_scale = forward, dgrad, forward_scale, dgrad_scale
    num_groups, lines, columns = w_ERC.shape
    fp8 = forward.dtype if forward.dim() == 3 else dgrad.dtype
    with on_device(b_EKN):
        launch(
            _quantize_weights, (cdiv(lines, 128) * cdiv(columns, 128), num_groups),
            w_ERC, straight, packed(straight_scale), transposed, packed(transposed_scale),
            lines, columns, w_ERC.stride(0), w_ERC.stride(1),
            straight.stride(0), straight.stride(-2) if straight.dim() == 3 else 0,
            transposed.stride(0), transposed.stride(-2) if transposed.dim() == 3 else 0,
            constants={
                "STRAIGHT": straight.dim() == 3, "TRANSPOSED": transposed.dim() == 3, "LIMIT": torch.finfo(fp8).max,
                "SWIZZLED": swizzled,
            },
            num_warps=8,
        )  # fmt: skip


@triton.jit
def _quantize_tile(
    x, x_stride, height, width,
    straight, straight_stride, straight_scales, straight_scale_stride,
    transposed, transposed_stride, transposed_scales, transposed_scale_stride, summed, stored,
    STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, LIMIT: tl.constexpr, SWIZZLED: tl.constexpr = False,
):  # fmt: skip
    """128 lines by 128 columns, of which ``height`` by ``width`` are there. Pointers are those of its first element.

    It goes through them in steps of one transposed scale, in few registers, so that many programs fit a multiprocessor
    and keep its memory busy.

    Args:
        straight_scale_stride, transposed_scale_stride: words from a line's scales to the next line's, unless SWIZZLED.
        summed: how many lines the transposed layout has the values of; the other lines are zero in it.
        stored: how many lines the transposed layout has.
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
    """Scales of ``lines`` of a tile, the first ``count`` of which are there.

    Swizzled as `torch_native.layouts` says, lines that are not there have scales too, of 1, unless none is there.
    """
    if SWIZZLED:
        codes = tl.where(lines < count, codes, ONES)
        tl.store(target + lines % 32 * 4 + lines // 32, codes, mask=lines < tl.where(count > 0, 128, 0))
    else:
        tl.store(target + lines * stride, codes, mask=lines < count)


@triton.jit
def _e8m0(scale, has_values):
    """`reference.to_e8m0` as int32; the code of 1 for a block without values."""
    return tl.where(has_values, (scale.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127)


@triton.jit(do_not_specialize=["M", "E"])
def _quantize_tiles(
    x, offs, by_row, row_scales, by_column, column_scales,
    M, E, D, x_stride, row_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LIMIT: tl.constexpr,
    E_AT_ONCE: tl.constexpr, TOKEN_BLOCK: tl.constexpr,
):  # fmt: skip
    """128 rows of one group, or past the last one, by 128 features."""
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
    _quantize_tile(
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
    STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, LIMIT: tl.constexpr, SWIZZLED: tl.constexpr,
):  # fmt: skip
    """A square tile of one matrix."""
    c_blocks = tl.cdiv(C, 128)
    r_blocks = tl.cdiv(R, 128)
    r_block = tl.program_id(0) // c_blocks
    c_block = tl.program_id(0) % c_blocks
    e = tl.program_id(1).to(tl.int64)
    r = r_block.to(tl.int64) * 128
    c = c_block.to(tl.int64) * 128
    height = tl.minimum(R - r_block * 128, 128)
    straight_place = (e * c_blocks + c_block) * R + r
    transposed_place = (e * r_blocks + r_block) * C + c
    if SWIZZLED:
        straight_place = ((e * r_blocks + r_block) * c_blocks + c_block) * 128
        transposed_place = ((e * c_blocks + c_block) * r_blocks + r_block) * 128
    _quantize_tile(
        w + e * w_stride_e + r * w_stride + c, w_stride, height, C - c_block * 128,
        straight + e * straight_stride_e + r * straight_stride + c, straight_stride,
        straight_scales + straight_place, 1,
        transposed + e * transposed_stride_e + c * transposed_stride + r, transposed_stride,
        transposed_scales + transposed_place, 1,
        height, height,
        STRAIGHT, TRANSPOSED, LIMIT, SWIZZLED,
    )  # fmt: skip
