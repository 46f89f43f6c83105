"""Checks of the Triton quantizers, bit for bit against `reference`. They run interpreted and on a GPU.

M, E, K, N: rows, groups, in and out features. D: K or N. T: tokens, in blocks of 128; each group starts a new block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grouped_gemm import Recipe, reference
from grouped_gemm.backends import get_backend
from grouped_gemm.backends.base import OffsetPlan
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind

BACKEND = get_backend(BackendKind.TRITON)


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal bit for bit, where all NaNs are equal. Says how many values differ, and where the first of them is."""
    assert found.shape == expected.shape, what
    found, expected = (x.float().nan_to_num(1e38) for x in (found, expected))
    different = found != expected
    if different.any():
        first = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(different.sum())} of {found.numel()} values differ, the first at {first}: "
            f"expected {expected[first].item():.9g}; found {found[first].item():.9g}"
        )


def assert_same_bits(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal bit for bit, NaNs included. Says how far apart finite values are at most."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[found.element_size()]
    different = found.contiguous().view(bits) != expected.contiguous().view(bits)
    if different.any():
        places = different.nonzero()
        first = tuple(places[0].tolist())
        lines = [f"{len(places[:, axis].unique())} of {size}" for axis, size in enumerate(found.shape)]
        apart = (found.double() - expected.double()).abs()
        raise AssertionError(
            f"{what}: {len(places)} of {found.numel()} values differ, the first at {first}: expected "
            f"{expected[first].item():.9g}; found {found[first].item():.9g}. By axis, in {', '.join(lines)}; at most "
            f"{apart.nan_to_num(torch.inf).max().item():.3g} apart, of values up to "
            f"{expected.double().abs().nan_to_num(0, 0, 0).max().item():.3g}"
        )


def activations(num_rows: int, features: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Rows of very different sizes, with a NaN, an infinity, a row of zeros and one of denormals."""
    x = torch.randn(num_rows, features, device=device) * torch.randn(num_rows, 1, device=device).mul(4).exp()
    x[3, 5], x[7, 1], x[9], x[11] = torch.nan, torch.inf, 0, 1e-40
    return x.to(dtype)


def check_activations(x: Tensor, plan: OffsetPlan, recipe: Recipe) -> None:
    """Both layouts of ``x`` (M, D) equal those of `reference`, whether made together or alone."""
    rows, columns = BACKEND.quantize_activations(x, plan, recipe, rows=True, columns=True)
    ends, fp8 = reference.group_ends(plan.offs, len(x)), machine_of(x.device).fp8_dtype
    data, scale = reference.quantize(x[: ends[-1]], reference.row_blocks(recipe), recipe, fp8)
    assert_same(rows.data[: ends[-1]], data, "data by rows")
    if recipe is Recipe.MXFP8:
        assert_same(_by_block(rows.scale, scale.shape[1])[: ends[-1]], scale, "scales of rows")
    elif recipe.block is None:
        assert_same(rows.scale[: ends[-1], None], scale, "scales of rows")
    else:
        assert_same(_scales_by_row(rows.scale, ends), scale, "scales of rows")

    data, scale = reference.quantize_columns(x, ends, recipe, fp8)
    scale = _by_tokens(scale, ends, len(x)) if recipe is Recipe.MXFP8 else scale
    assert_same(columns.scale, scale, "scales of columns")
    by_token = columns.data.float().transpose(1, 2).flatten(0, 1)
    padding = torch.ones(by_token.shape[0], dtype=torch.bool, device=x.device)
    block = 0
    for e, group in enumerate(reference.group_slices(ends)):
        tokens = slice(block * 128, block * 128 + group.stop - group.start)
        assert_same(by_token[tokens], data[group], f"data by columns of group {e}")
        padding[tokens] = False
        block += -(-(group.stop - group.start) // 128)
    # zero in the short last block of a group and past the last group; NaN where the scale is NaN
    assert not by_token[padding].nan_to_num(0).any(), "data by columns of no row"

    alone, _ = BACKEND.quantize_activations(x, plan, recipe, rows=True, columns=False)
    assert_same(alone.data[: ends[-1]], rows.data[: ends[-1]], "data by rows alone")
    if recipe is Recipe.MXFP8:
        assert_same(alone.scale[:, : ends[-1]], rows.scale[:, : ends[-1]], "scales of rows alone")
    else:
        written = _in_groups(ends, recipe)
        assert_same(alone.scale[..., written], rows.scale[..., written], "scales of rows alone")
    _, alone = BACKEND.quantize_activations(x, plan, recipe, rows=False, columns=True)
    assert_same(alone.data, columns.data, "data by columns alone")
    assert_same(alone.scale, columns.scale, "scales of columns alone")


def check_weights(b: Tensor, recipe: Recipe) -> None:
    """The same for ``b`` (E, K, N), for forward and for dgrad."""
    both = BACKEND.quantize_weights(b, recipe, forward=True, dgrad=True)
    fp8 = machine_of(b.device).fp8_dtype
    for operand, what in zip(both, ("forward", "dgrad")):
        data, scale = reference.quantize(b, reference.weight_blocks(recipe, operand.axis), recipe, fp8)
        assert_same(operand.data, data, f"data for {what}")
        if recipe is Recipe.MXFP8:
            lines = _by_block(operand.scale, scale.shape[operand.axis])
            assert_same(lines if operand.axis == 2 else lines.transpose(1, 2), scale, f"scales for {what}")
        else:
            assert_same(operand.scale, scale if recipe.block else scale.squeeze(operand.axis), f"scales for {what}")
        assert operand.data.stride(operand.axis) == 1
        assert operand.data.stride(3 - operand.axis) % 16 == 0  # for TMA, whatever K and N
    alone = (
        BACKEND.quantize_weights(b, recipe, forward=True, dgrad=False)[0],
        BACKEND.quantize_weights(b, recipe, forward=False, dgrad=True)[1],
    )
    for one, operand, what in zip(alone, both, ("forward", "dgrad")):
        assert_same(one.data, operand.data, f"data for {what} alone")
        assert_same(one.scale, operand.scale, f"scales for {what} alone")


def _by_block(scale: Tensor, blocks: int) -> Tensor:
    """MX scales (ceil(contraction / 128), lines, 4) as (lines, blocks); those past the last block are 1."""
    scale = scale.float().transpose(-3, -2).flatten(-2)
    assert (scale[..., blocks:] == 1).all()
    return scale[..., :blocks]


def _by_tokens(scale: Tensor, ends: Sequence[int], num_rows: int) -> Tensor:
    """`reference.quantize_columns`' MX scales (blocks, D) as (T/128, D, 4); 1 where there is no token."""
    laid = torch.ones(num_rows // 128 + len(ends), 4, scale.shape[1], device=scale.device)
    block = 0
    for tokens, rows in zip(reference.group_slices(ends), reference.column_scale_slices(ends, Recipe.MXFP8)):
        laid.flatten(0, 1)[4 * block : 4 * block + rows.stop - rows.start] = scale[rows].float()
        block += -(-(tokens.stop - tokens.start) // 128)
    return laid.transpose(1, 2)


def _in_groups(ends: Sequence[int], recipe: Recipe) -> slice:
    """The scales of rows that belong to groups; blockwise, with the padding of each group to a multiple of four."""
    if recipe.block is None:
        return slice(0, ends[-1])
    lengths = (group.stop - group.start for group in reference.group_slices(ends))
    return slice(0, sum(-(-length // 4) * 4 for length in lengths))


def _scales_by_row(scale: Tensor, ends: Sequence[int]) -> Tensor:
    """(M, D/128), from the kernel's layout, in which a group's scales begin at a multiple of four."""
    groups, begin = [scale[:, :0]], 0
    for group in reference.group_slices(ends):
        length = group.stop - group.start
        groups.append(scale[:, begin : begin + length])
        begin += -(-length // 4) * 4
    assert begin <= scale.shape[1]
    return torch.cat(groups, 1).t()
