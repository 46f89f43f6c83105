"""The reference: quantization, grouped GEMMs and routing in plain torch. Kernels and tests are compared with it.

Formulas of every recipe that quantizes (docs/numerics.md gives the reasons):

    scale = max(amax, limit * 2^-126) * (1 / limit) amax over a block, limit: largest finite value of the fp8 type
    scale = 2^ceil(log2(scale))                     if the recipe requires powers of two
    data  = fp8(clamp(x * (1 / scale), -limit, limit))
    value = data * scale

All arithmetic is fp32, rounded to nearest even. A NaN or Inf in a block makes its scale NaN or Inf, and every value of
the block NaN: it never becomes a finite number. The last block of an axis or a group may be short.

M, E, K, N: rows, groups, in and out features. D: K or N.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm.core.recipes import Recipe

Blocks = tuple[int | None, ...]  # the size of a block along each axis; None: the whole axis


def row_blocks(recipe: Recipe) -> Blocks:
    """Blocks of activations (M, D), with scales along D, the contraction of forward and dgrad."""
    return (1, recipe.block)


def column_blocks(recipe: Recipe) -> Blocks:
    """Blocks of one group's activations (M_e, D), with scales along M_e, the contraction of wgrad."""
    return (recipe.block, 1)


def weight_blocks(recipe: Recipe, axis: int) -> Blocks:
    """Blocks of weights (E, K, N); ``axis``, 1 or 2, is the contraction."""
    sides = (recipe.block, recipe.weight_lines)
    return (1, *sides) if axis == 1 else (1, *sides[::-1])


def scales(amax: Tensor, recipe: Recipe, fp8_dtype: torch.dtype) -> Tensor:
    """The scales of blocks with largest magnitudes ``amax``, in fp32, even for recipes that store E8M0."""
    limit = torch.finfo(fp8_dtype).max
    scale = amax.float().clamp(min=limit * 2.0**-126) * (1 / limit)
    if not recipe.power_of_two_scales:
        return scale
    # Rounds up to a power of two: the addition carries a nonzero mantissa into the exponent.
    bits = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    return torch.where(scale.isfinite(), bits.view(torch.float32), scale)


def to_e8m0(scale: Tensor) -> Tensor:
    """Converts fp32 powers of two, at least 2^-126, to float8_e8m0fnu: the exponent alone. NaN and Inf become NaN."""
    return (scale.view(torch.int32) >> 23).to(torch.uint8).view(torch.float8_e8m0fnu)


def to_fp8(x: Tensor, scale: Tensor, fp8_dtype: torch.dtype) -> Tensor:
    """``x / scale`` in fp8, saturated. It clamps first: torch's cast to e4m3fnuz turns values out of range into NaN."""
    limit = torch.finfo(fp8_dtype).max
    return (x.float() * scale.reciprocal()).clamp(-limit, limit).to(fp8_dtype)


def quantize(x: Tensor, blocks: Blocks, recipe: Recipe, fp8_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantizes a tensor in blocks.

    Args:
        x: floating point, any shape; only the first axis may be empty.
        blocks: the sizes of a block.
        recipe: a recipe that quantizes.
        fp8_dtype: type of the data.

    Returns:
        Data with the shape and the memory order of ``x``; and scales in the recipe's dtype, ceil(size / block size)
        along each axis.
    """
    sides = [size if side is None else side for size, side in zip(x.shape, blocks)]
    counts = [-(-size // side) if side else 1 for size, side in zip(x.shape, sides)]
    padding = [side * count - size for size, side, count in zip(x.shape, sides, counts)]
    magnitudes = x.abs()
    if any(padding):
        magnitudes = F.pad(magnitudes, [p for amount in reversed(padding) for p in (0, amount)])
    in_blocks = magnitudes.reshape([n for pair in zip(counts, sides) for n in pair])
    scale = scales(in_blocks.amax(tuple(range(1, in_blocks.dim(), 2))), recipe, fp8_dtype)
    data = torch.empty_like(x, dtype=fp8_dtype).copy_(to_fp8(x, spread(scale, blocks, x.shape), fp8_dtype))
    return data, to_e8m0(scale) if recipe is Recipe.MXFP8 else scale


def spread(scale: Tensor, blocks: Blocks, shape: Sequence[int]) -> Tensor:
    """Repeats the scales of blocks, as fp32 factors that broadcast against a tensor of ``shape``."""
    scale = scale.float()
    for axis, side in enumerate(blocks):
        if side is not None and side > 1:
            repeated = scale.unsqueeze(axis + 1).expand(*scale.shape[: axis + 1], side, *scale.shape[axis + 1 :])
            scale = repeated.flatten(axis, axis + 1).narrow(axis, 0, shape[axis])
    return scale


def dequantize(data: Tensor, scale: Tensor | None, blocks: Blocks) -> Tensor:
    """The values of ``data`` in fp32: multiplied by their scales, if there are any."""
    values = data.float()
    return values if scale is None else values * spread(scale, blocks, data.shape)


def convert_fp8(data: Tensor, scale: Tensor, blocks: Blocks, fp8_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Converts fp8 data and scales to another e4m3 type. The dequantized values stay the same.

    Half of any e4m3fn value is an e4m3fnuz value, so e4m3fn to e4m3fnuz with doubled scales is exact. A scale of 2^127
    or more cannot be doubled, so its data are not halved. Data above 240, which e4m3fnuz lacks, are clamped: with such
    a scale they stand for Inf in fp32.

    Raises:
        ValueError: conversion from e4m3fnuz to e4m3fn, which is not exact.
    """
    if data.dtype == fp8_dtype:
        return data, scale
    if fp8_dtype != torch.float8_e4m3fnuz:
        expected, found = (str(dtype).removeprefix("torch.") for dtype in (fp8_dtype, data.dtype))
        raise ValueError(
            f"b.dtype: expected {expected}, the fp8 type of this device; found {found}; dequantize the weights, and "
            "pass them without scale to quantize them again"
        )
    factor = torch.where(scale.float().abs() < 2.0**127, 2.0, 1.0)
    limit = torch.finfo(fp8_dtype).max
    values = (data.float() / spread(factor, blocks, data.shape)).clamp(-limit, limit)
    larger = scale.float() * factor
    larger = to_e8m0(larger) if scale.dtype == torch.float8_e8m0fnu else larger
    return torch.empty_like(data, dtype=fp8_dtype).copy_(values), larger


def group_ends(offs: Tensor, num_rows: int) -> list[int]:
    """The end row of each group, on the host, clamped to [the previous end, num_rows]."""
    ends, end = [], 0
    for value in offs.tolist():
        end = max(end, min(value, num_rows))
        ends.append(end)
    return ends


def group_slices(ends: Sequence[int]) -> list[slice]:
    """The rows of each group."""
    return [slice(start, end) for start, end in zip((0, *ends[:-1]), ends)]


def column_scale_rows(num_rows: int, num_groups: int, recipe: Recipe) -> int:
    """The number of rows of scales from `quantize_columns`: an upper bound that does not depend on ``offs``."""
    return num_groups if recipe.block is None else num_rows // recipe.block + num_groups


def column_scale_slices(ends: Sequence[int], recipe: Recipe) -> list[slice]:
    """The rows of scales of each group. A group's blocks follow those of the group before."""
    if recipe.block is None:
        return [slice(e, e + 1) for e in range(len(ends))]
    slices, first = [], 0
    for rows in group_slices(ends):
        count = -(-(rows.stop - rows.start) // recipe.block)
        slices.append(slice(first, first + count))
        first += count
    return slices


def quantize_columns(
    x_MD: Tensor, ends: Sequence[int], recipe: Recipe, fp8_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Quantizes an operand of wgrad along the rows of each group. A group's last block may be short.

    Args:
        x_MD: (M, D) activations or output gradients.
        ends: end row of each group.
        recipe: a recipe that quantizes.
        fp8_dtype: type of the data.

    Returns:
        Data (M, D), zero past the last group, and scales (`column_scale_rows`, D), 1 in unused rows.
    """
    num_rows, features = x_MD.shape
    data = torch.zeros(num_rows, features, dtype=fp8_dtype, device=x_MD.device)
    scale_rows = column_scale_rows(num_rows, len(ends), recipe)
    scale = torch.ones(scale_rows, features, dtype=recipe.scale_dtype, device=x_MD.device)
    for rows, blocks in zip(group_slices(ends), column_scale_slices(ends, recipe)):
        if rows.start < rows.stop:
            data[rows], scale[blocks] = quantize(x_MD[rows], column_blocks(recipe), recipe, fp8_dtype)
    return data, scale


def grouped_mm(
    a_MK: Tensor, b_EKN: Tensor, ends: Sequence[int], bias_EN: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Each group of rows times its own matrix, in ``dtype``: (M, N), zero past the last group."""
    out_MN = torch.zeros(a_MK.shape[0], b_EKN.shape[2], dtype=dtype, device=a_MK.device)
    for e, rows in enumerate(group_slices(ends)):
        if rows.start < rows.stop:
            out_MN[rows] = a_MK[rows].to(dtype) @ b_EKN[e].to(dtype)
            if bias_EN is not None:
                out_MN[rows] += bias_EN[e].to(dtype)
    return out_MN


def wgrad(a_MK: Tensor, dy_MN: Tensor, ends: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """``a^T dy`` over the rows of each group, in ``dtype``: (E, K, N)."""
    by_group = [a_MK[rows].to(dtype).t() @ dy_MN[rows].to(dtype) for rows in group_slices(ends)]
    return torch.stack(by_group)


def group_sums(x_MN: Tensor, ends: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """The sum of each group's rows, in ``dtype``, (E, N): the gradient of a bias."""
    return torch.stack([x_MN[rows].sum(0, dtype=dtype) for rows in group_slices(ends)])


def route(topk_ids: Tensor, num_experts: int, group_alignment: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The routing of tokens by a stable sort, without a host sync: ``offs``, ``source`` and ``places`` of `Routing`.

    Args:
        topk_ids: (T, k) int32 or int64, the experts of each token. Ids outside [0, E) are dropped.
        num_experts: E.
        group_alignment: each expert's rows are padded to a multiple of it.
    """
    is_kept = (topk_ids >= 0) & (topk_ids < num_experts)
    experts, order = torch.where(is_kept, topk_ids, num_experts).flatten().sort(stable=True)
    numbers = torch.arange(num_experts, dtype=experts.dtype, device=experts.device)
    offs = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    source = torch.where(experts < num_experts, order // max(topk_ids.shape[1], 1), -1).int()
    rows = torch.arange(len(order), dtype=torch.int32, device=order.device)
    if group_alignment > 1:
        ends = offs
        sizes = torch.diff(ends, prepend=ends.new_zeros(1))
        offs = (-(-sizes // group_alignment) * group_alignment).cumsum(0, dtype=torch.int32)
        moves = torch.nn.functional.pad(offs - ends, (1, 0))  # by the padding of the experts before
        rows = rows + moves[experts]
        unused = source.new_full((len(order) + num_experts * (group_alignment - 1),), -1)
        source = unused.scatter_(0, rows.long(), source)
    places = torch.empty_like(rows).scatter_(0, order, rows).view(topk_ids.shape)
    return offs, source, torch.where(is_kept, places, -1)
