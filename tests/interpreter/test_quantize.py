"""The Triton quantizers against `reference`, bit for bit."""

from __future__ import annotations

import pytest
import torch

from grouped_gemm import Recipe, reference
from grouped_gemm.backends import get_backend
from grouped_gemm.preference import KernelPreference

BACKEND = get_backend(KernelPreference.TRITON)
FP8 = torch.float8_e4m3fn
RECIPES = tuple(recipe for recipe in Recipe if recipe.is_scaled)
# ends of groups, M, D, dtype, recipes: an empty group, whole and short blocks, rows past the last group; ends out of
# order and out of range; nothing but empty groups
ACTIVATIONS = (
    ([130, 130, 258], 270, 136, torch.bfloat16, RECIPES),
    ([-5, 200, 40, 999], 263, 50, torch.float32, RECIPES[::2]),
    ([0, 0], 20, 50, torch.bfloat16, RECIPES[::2]),
)
CASES = [(*case, recipe) for *case, recipes in ACTIVATIONS for recipe in recipes]


def assert_same(found, expected):
    """Bit for bit; every NaN is a NaN."""
    assert found.shape == expected.shape
    assert torch.equal(found.float().nan_to_num(1e38), expected.float().nan_to_num(1e38))


def by_block(scale, blocks):
    """MX scales (ceil(depth/128), lines, 4) as (lines, blocks), and 1 in what is past the last block."""
    scale = scale.transpose(-3, -2).flatten(-2)
    assert (scale[..., blocks:].float() == 1).all()
    return scale[..., :blocks]


def by_tokens(scale, ends, num_rows):
    """`reference.quantize_columns`' MX scales (blocks, D) as (T/128, D, 4); 1 where no token is."""
    laid = torch.ones(num_rows // 128 + len(ends), 4, scale.shape[1])
    block = 0
    for tokens, rows in zip(reference.group_slices(ends), reference.column_scale_slices(ends, Recipe.MXFP8)):
        laid.flatten(0, 1)[4 * block : 4 * block + rows.stop - rows.start] = scale[rows].float()
        block += -(-(tokens.stop - tokens.start) // 128)
    return laid.transpose(1, 2)


def activations(num_rows, features, dtype):
    """Rows of very different sizes, with a NaN, an infinity, a row of zeros and one of denormals."""
    x = torch.randn(num_rows, features) * torch.randn(num_rows, 1).mul(4).exp()
    x[3, 5], x[7, 1], x[9], x[11] = torch.nan, torch.inf, 0, 1e-40
    return x.to(dtype)


def in_groups(scale, ends, recipe):
    """Which scales of rows are of groups; blockwise, with those that fill a group up to a multiple of four."""
    if recipe.block is None:
        return slice(0, ends[-1])
    lengths = (group.stop - group.start for group in reference.group_slices(ends))
    return slice(0, sum(-(-length // 4) * 4 for length in lengths))


def scales_by_row(scale, ends):
    """(M, D/128) from the layout of the kernel, in which a group's scales begin at a multiple of four."""
    groups, begin = [scale[:, :0]], 0
    for group in reference.group_slices(ends):
        length = group.stop - group.start
        groups.append(scale[:, begin : begin + length])
        begin += -(-length // 4) * 4
    assert begin <= scale.shape[1]
    return torch.cat(groups, 1).t()


@pytest.mark.parametrize("ends, num_rows, features, dtype, recipe", CASES, ids=str)
def test_activations(ends, num_rows, features, dtype, recipe):
    torch.manual_seed(0)
    x = activations(num_rows, features, dtype)
    plan = BACKEND.plan(torch.tensor(ends, dtype=torch.int32), num_rows)
    rows, columns = BACKEND.quantize_activations(x, plan, recipe, rows=True, columns=True)

    ends = reference.group_ends(plan.offs, num_rows)
    data, scale = reference.quantize(x[: ends[-1]], reference.row_blocks(recipe), recipe, FP8)
    assert_same(rows.data[: ends[-1]], data)
    if recipe is Recipe.MXFP8:
        assert_same(by_block(rows.scale, scale.shape[1])[: ends[-1]], scale)
    elif recipe.block is None:
        assert_same(rows.scale[: ends[-1], None], scale)
    else:
        assert_same(scales_by_row(rows.scale, ends), scale)

    data, scale = reference.quantize_columns(x, ends, recipe, FP8)
    assert_same(columns.scale, by_tokens(scale, ends, num_rows) if recipe is Recipe.MXFP8 else scale)
    by_token = columns.data.transpose(1, 2).flatten(0, 1)
    padding = torch.ones(by_token.shape[0], dtype=torch.bool)
    block = 0
    for group in reference.group_slices(ends):
        tokens = slice(block * 128, block * 128 + group.stop - group.start)
        assert_same(by_token[tokens], data[group])
        padding[tokens] = False
        block += -(-(group.stop - group.start) // 128)
    # zero where the last block of a group is short, and past the last group; NaN where the scale is
    assert not by_token[padding].float().nan_to_num(0).any()

    for wanted in ({"rows": True, "columns": False}, {"rows": False, "columns": True}):
        alone = BACKEND.quantize_activations(x, plan, recipe, **wanted)
        for one, both in zip(alone, (rows, columns)):
            if one is not None:
                whole = one is alone[1]
                assert_same(*(x.data if whole else x.data[: ends[-1]] for x in (one, both)))
                if whole:
                    assert_same(one.scale, both.scale)
                elif recipe is Recipe.MXFP8:
                    assert_same(one.scale[:, : ends[-1]], both.scale[:, : ends[-1]])
                else:
                    written = in_groups(one.scale, ends, recipe)
                    assert_same(one.scale[..., written], both.scale[..., written])


@pytest.mark.parametrize("contiguous", "kn")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.value)
def test_weights(recipe, contiguous):
    torch.manual_seed(0)
    b = torch.randn(2, 150, 130, dtype=torch.bfloat16)
    b[0, 3, 4] = torch.nan
    b = b.transpose(1, 2).contiguous().transpose(1, 2) if contiguous == "k" else b
    both = BACKEND.quantize_weights(b, recipe, forward=True, dgrad=True)
    for operand in both:
        data, scale = reference.quantize(b, reference.weight_blocks(recipe, operand.axis), recipe, FP8)
        assert_same(operand.data, data)
        if recipe is Recipe.MXFP8:
            lines = by_block(operand.scale, scale.shape[operand.axis])
            assert_same(lines if operand.axis == 2 else lines.transpose(1, 2), scale)
        else:
            assert_same(operand.scale, scale if recipe.block else scale.squeeze(operand.axis))
        assert operand.data.stride(operand.axis) == 1
        assert operand.data.stride(3 - operand.axis) % 16 == 0  # for TMA, whatever K and N
    alone = (
        BACKEND.quantize_weights(b, recipe, forward=True, dgrad=False)[0],
        BACKEND.quantize_weights(b, recipe, forward=False, dgrad=True)[1],
    )
    for one, operand in zip(alone, both):
        assert_same(one.data, operand.data)
        assert_same(one.scale, operand.scale)
