"""The numerics of `reference`, against an oracle in scalar Python that shares nothing with it.

The oracle takes one value at a time. It computes in doubles and rounds to fp32 after every operation, which is what
fp32 arithmetic gives: a double holds the product of two fp32 values exactly, and their quotient closely enough.
"""

from __future__ import annotations

import bisect
import doctest
import functools
import itertools
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grouped_gemm import Recipe, grouped_mm, reference

SCALED = tuple(recipe for recipe in Recipe if recipe is not Recipe.NONE)
POW2 = (Recipe.FP8_ROWWISE_POW2, Recipe.FP8_BLOCKWISE_POW2, Recipe.MXFP8)
NONFINITE = (math.nan, math.inf, -math.inf)

# How many values along the contraction share a scale (None: all), and how many lines of weights.
ALONG = {
    Recipe.FP8_ROWWISE: None,
    Recipe.FP8_ROWWISE_POW2: None,
    Recipe.FP8_BLOCKWISE: 128,
    Recipe.FP8_BLOCKWISE_POW2: 128,
    Recipe.MXFP8: 32,
}
ACROSS = {recipe: 128 if ALONG[recipe] == 128 else 1 for recipe in SCALED}


@dataclass(frozen=True)
class Format:
    """An 8-bit float with 4 exponent and 3 mantissa bits: code = sign, exponent, mantissa."""

    dtype: torch.dtype
    bias: int
    finite: int  # codes 0 to finite - 1 are finite; 128 is the sign bit
    nan: tuple[int, ...]
    has_negative_zero: bool

    @functools.cached_property
    def magnitudes(self) -> list[float]:
        """The values of the codes without sign."""
        return [
            math.ldexp(mantissa + (8 if exponent else 0), max(exponent, 1) - self.bias - 3)
            for exponent, mantissa in (divmod(code, 8) for code in range(self.finite))
        ]

    @property
    def limit(self) -> float:
        return self.magnitudes[-1]

    def encode(self, value: float) -> int:
        """The code nearest to ``value``, with ties to even; values over the limit saturate."""
        magnitudes = self.magnitudes
        code = bisect.bisect_right(magnitudes, abs(value)) - 1
        if code + 1 < self.finite:
            above_middle = 2 * abs(value) - (magnitudes[code] + magnitudes[code + 1])
            code += above_middle > 0 or (above_middle == 0 and code % 2)
        is_negative = math.copysign(1, value) < 0 and (code > 0 or self.has_negative_zero)
        return code + 128 if is_negative else code


E4M3FN = Format(torch.float8_e4m3fn, bias=7, finite=127, nan=(0x7F, 0xFF), has_negative_zero=True)
E4M3FNUZ = Format(torch.float8_e4m3fnuz, bias=8, finite=128, nan=(0x80,), has_negative_zero=False)

every_format = pytest.mark.parametrize("fp8", (E4M3FN, E4M3FNUZ), ids=("e4m3fn", "e4m3fnuz"))
every_scaled_recipe = pytest.mark.parametrize("recipe", SCALED, ids=lambda recipe: recipe.value)
every_pow2_recipe = pytest.mark.parametrize("recipe", POW2, ids=lambda recipe: recipe.value)


def fp32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def naive_scale(amax: float, recipe: Recipe, limit: float) -> float:
    scale = fp32(max(amax, math.ldexp(limit, -126)) * fp32(1 / limit))
    if recipe in POW2:
        mantissa, exponent = math.frexp(scale)  # scale = mantissa * 2^exponent, mantissa from 0.5 up to 1
        scale = math.ldexp(1, exponent - 1 if mantissa == 0.5 else exponent)
    return scale


def naive_quantize(x: Tensor, sides: Sequence[int | None], recipe: Recipe, fp8: Format) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x`` in blocks of ``sides``; None: the whole axis."""
    sides = [size if side is None else side for size, side in zip(x.shape, sides)]
    counts = [math.ceil(size / side) for size, side in zip(x.shape, sides)]
    values = x.double().flatten().tolist()
    codes, scales = [0] * len(values), torch.empty(counts)
    positions = torch.arange(len(values)).view(x.shape)
    for block in itertools.product(*map(range, counts)):
        window = tuple(slice(i * side, (i + 1) * side) for i, side in zip(block, sides))
        members = positions[window].flatten().tolist()
        scale = naive_scale(max(abs(values[i]) for i in members), recipe, fp8.limit)
        reciprocal = fp32(1 / scale)
        for i in members:
            codes[i] = fp8.encode(fp32(values[i] * reciprocal))
        scales[block] = scale
    return torch.tensor(codes, dtype=torch.uint8).view(x.shape), scales


def wide(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values whose magnitudes go over many powers of two, with some zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(4 * torch.randn(shape, generator=generator))
    return (x * (torch.rand(shape, generator=generator) > 0.02)).to(dtype)


def codes_of(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.uint8)


def assert_same(data: Tensor, scale: Tensor, codes: Tensor, scales: Tensor) -> None:
    assert torch.equal(scale.float(), scales)
    assert torch.equal(codes_of(data), codes)


# fp8


@every_format
def test_torch_and_the_oracle_agree_on_the_values_of_all_256_codes(fp8):
    values = torch.arange(256, dtype=torch.uint8).view(fp8.dtype).float()
    finite = torch.tensor(fp8.magnitudes)
    assert torch.equal(values[: fp8.finite], finite)
    assert torch.equal(values[129 : 128 + fp8.finite], -finite[1:])
    assert values.isnan().nonzero().flatten().tolist() == list(fp8.nan)


@every_format
def test_every_fp8_code_survives_a_round_trip_through_fp32(fp8):
    codes = torch.arange(256, dtype=torch.uint8)
    back = reference.to_fp8(codes.view(fp8.dtype).float(), torch.ones(()), fp8.dtype)
    assert torch.equal(codes_of(back), codes)


@every_format
@pytest.mark.parametrize("factor", (1 + 2**-20, 1.1, 2.0, 1e30))
def test_values_over_the_limit_saturate(fp8, factor):
    x = torch.tensor([fp8.limit * factor, -fp8.limit * factor])
    assert reference.to_fp8(x, torch.ones(()), fp8.dtype).float().tolist() == [fp8.limit, -fp8.limit]


@every_format
def test_a_midpoint_rounds_to_the_even_code_and_its_neighbours_to_the_nearest(fp8):
    values = torch.tensor(fp8.magnitudes)
    middles = (values[:-1] + values[1:]) / 2
    lower = torch.arange(fp8.finite - 1, dtype=torch.uint8)
    down = torch.nextafter(middles, torch.tensor(0.0))
    up = torch.nextafter(middles, torch.tensor(math.inf))
    one = torch.ones(())
    assert torch.equal(codes_of(reference.to_fp8(middles, one, fp8.dtype)), lower + lower % 2)
    assert torch.equal(codes_of(reference.to_fp8(down, one, fp8.dtype)), lower)
    assert torch.equal(codes_of(reference.to_fp8(up, one, fp8.dtype)), lower + 1)


@pytest.mark.parametrize("fp8", (torch.float8_e4m3fn, torch.float8_e4m3fnuz), ids=str)
def test_the_limit_times_a_power_of_two_has_that_power_as_its_scale(fp8):
    powers = 2.0 ** torch.arange(-100, 100)
    amax = torch.finfo(fp8).max * powers
    above = torch.nextafter(amax, torch.tensor(torch.inf))
    for recipe in (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2):
        assert torch.equal(reference.scales(amax, recipe, fp8), powers)
    assert torch.equal(reference.scales(above, Recipe.FP8_BLOCKWISE_POW2, fp8), 2 * powers)


@every_format
def test_values_are_multiplied_by_the_rounded_reciprocal_and_not_divided(fp8):
    scale = wide(200).abs().clamp(min=2.0**-20).view(200, 1)
    values = torch.tensor(fp8.magnitudes)
    x = (values[:-1] + values[1:]) / 2 * scale  # at a midpoint the last bit of fp32 decides
    reciprocals = [fp32(1 / value) for value in scale.flatten().tolist()]
    expected = [[fp8.encode(fp32(v * r)) for v in row] for row, r in zip(x.tolist(), reciprocals)]
    assert codes_of(reference.to_fp8(x, scale, fp8.dtype)).tolist() == expected


@every_format
def test_nan_stays_nan_in_fp8(fp8):
    assert reference.to_fp8(torch.tensor([math.nan]), torch.ones(()), fp8.dtype).float().isnan().all()


# Scales


@every_format
@every_scaled_recipe
def test_the_scale_follows_its_formula_bit_for_bit(recipe, fp8):
    amax = torch.cat([wide(2000).abs(), torch.tensor([0.0, 1e-45, 1e-38, 1.0, fp8.limit, 3.3895e38])])
    expected = torch.tensor([naive_scale(value, recipe, fp8.limit) for value in amax.tolist()])
    assert torch.equal(reference.scales(amax, recipe, fp8.dtype), expected)


@every_pow2_recipe
def test_a_power_of_two_scale_is_at_least_the_exact_one_and_less_than_twice_it(recipe):
    amax = wide(2000).abs()
    exact = reference.scales(amax, Recipe.FP8_ROWWISE, torch.float8_e4m3fn)
    scale = reference.scales(amax, recipe, torch.float8_e4m3fn)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert ((exact <= scale) & (scale < 2 * exact)).all()


@every_format
@every_pow2_recipe
def test_a_power_of_two_scale_equals_an_exact_one_that_is_a_power_of_two(recipe, fp8):
    exponents = torch.arange(-126.0, 119.0)
    powers = torch.exp2(exponents)
    assert torch.equal(reference.scales(powers * fp8.limit, recipe, fp8.dtype), powers)


@every_pow2_recipe
def test_a_scale_just_above_a_power_of_two_rounds_up_to_the_next(recipe):
    amax = torch.nextafter(torch.tensor([448.0, 448.0 * 2**-20]), torch.tensor(math.inf))
    assert reference.scales(amax, recipe, torch.float8_e4m3fn).tolist() == [2.0, 2.0**-19]


def test_e8m0_holds_the_exponent_alone():
    exponents = torch.arange(-126, 128)
    powers = torch.exp2(exponents.double()).float()
    encoded = reference.to_e8m0(powers)
    assert torch.equal(encoded.view(torch.uint8), (exponents + 127).to(torch.uint8))
    assert torch.equal(encoded.float(), powers)


@pytest.mark.parametrize("scale", (math.nan, math.inf))
def test_e8m0_has_one_nan_for_nan_and_inf(scale):
    encoded = reference.to_e8m0(torch.tensor([scale]))
    assert encoded.view(torch.uint8).tolist() == [255]
    assert encoded.float().isnan().all()


# Quantization


@every_format
@every_scaled_recipe
@pytest.mark.parametrize("features", (1, 31, 32, 128, 300))
def test_rows_are_quantized_as_the_oracle_does(recipe, fp8, features):
    x = wide(6, features)
    data, scale = reference.quantize(x, reference.row_blocks(recipe), recipe, fp8.dtype)
    assert scale.dtype == recipe.scale_dtype
    assert_same(data, scale, *naive_quantize(x, (1, ALONG[recipe]), recipe, fp8))


@every_scaled_recipe
@pytest.mark.parametrize("axis", (1, 2))
def test_weights_are_quantized_as_the_oracle_does(recipe, axis):
    w = wide(2, 129, 130)
    sides = (1, ALONG[recipe], ACROSS[recipe]) if axis == 1 else (1, ACROSS[recipe], ALONG[recipe])
    data, scale = reference.quantize(w, reference.weight_blocks(recipe, axis), recipe, E4M3FN.dtype)
    assert_same(data, scale, *naive_quantize(w, sides, recipe, E4M3FN))


@every_scaled_recipe
def test_weights_seen_through_a_transpose_keep_their_order_in_memory(recipe):
    w = wide(2, 40, 48).transpose(1, 2)
    data, scale = reference.quantize(w, reference.weight_blocks(recipe, 1), recipe, E4M3FN.dtype)
    dense = reference.quantize(w.contiguous(), reference.weight_blocks(recipe, 1), recipe, E4M3FN.dtype)
    assert data.stride() == w.stride()
    assert_same(data, scale, codes_of(dense[0]), dense[1].float())


@every_scaled_recipe
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_is_quantized_like_the_same_values_in_fp32(recipe, dtype):
    x = wide(4, 200, dtype=dtype)
    blocks = reference.row_blocks(recipe)
    data, scale = reference.quantize(x.float(), blocks, recipe, E4M3FN.dtype)
    assert_same(*reference.quantize(x, blocks, recipe, E4M3FN.dtype), codes_of(data), scale.float())


@every_format
@every_scaled_recipe
def test_dequantized_values_are_data_times_the_scale_of_their_block(recipe, fp8):
    x = wide(3, 300)
    along = ALONG[recipe] or 300
    data, scale = reference.quantize(x, reference.row_blocks(recipe), recipe, fp8.dtype)
    values = reference.dequantize(data, scale, reference.row_blocks(recipe))
    factors, numbers = scale.float().tolist(), data.float().tolist()
    expected = [[fp32(numbers[i][j] * factors[i][j // along]) for j in range(300)] for i in range(3)]
    assert values.tolist() == expected


def test_an_operand_without_scales_dequantizes_to_itself_in_fp32():
    x = wide(3, 5, dtype=torch.bfloat16)
    values = reference.dequantize(x, None, reference.row_blocks(Recipe.NONE))
    assert values.dtype == torch.float32
    assert torch.equal(values, x.float())


@every_format
@every_scaled_recipe
def test_no_value_moves_by_more_than_half_a_step(recipe, fp8):
    x = wide(8, 300, seed=1)
    blocks = reference.row_blocks(recipe)
    data, scale = reference.quantize(x, blocks, recipe, fp8.dtype)
    error = (reference.dequantize(data, scale, blocks) - x).abs()
    smallest_step = fp8.magnitudes[1] * reference.spread(scale, blocks, x.shape)
    # steps are at most an eighth of the value; fp32 rounds three times on the way
    assert (error <= torch.maximum(x.abs() / 16, smallest_step / 2) * (1 + 2**-20) + x.abs() * 2**-22).all()


# Unusual blocks


@every_format
@every_scaled_recipe
def test_an_all_zero_block_has_a_finite_scale_and_dequantizes_to_zero(recipe, fp8):
    x = torch.zeros(1, 256)
    blocks = reference.row_blocks(recipe)
    data, scale = reference.quantize(x, blocks, recipe, fp8.dtype)
    assert (scale.float() == 2.0**-126).all()
    assert torch.equal(reference.dequantize(data, scale, blocks), x)


@every_format
@every_scaled_recipe
@pytest.mark.parametrize("magnitude", (1e-45, 1e-40, 1e-38, 2.0**-126))
def test_a_tiny_block_stays_within_half_the_smallest_step(recipe, fp8, magnitude):
    x = magnitude * torch.linspace(-1, 1, 64).view(1, 64)
    blocks = reference.row_blocks(recipe)
    data, scale = reference.quantize(x, blocks, recipe, fp8.dtype)
    assert_same(data, scale, *naive_quantize(x, (1, ALONG[recipe]), recipe, fp8))
    error = (reference.dequantize(data, scale, blocks).double() - x.double()).abs()
    assert (error <= torch.maximum(x.double().abs() / 16, scale.double().amax() * fp8.magnitudes[1] / 2)).all()


@every_format
@every_scaled_recipe
def test_a_huge_block_stays_finite(recipe, fp8):
    x = 2.0**127 * torch.linspace(-1, 1, 64).view(1, 64)
    blocks = reference.row_blocks(recipe)
    data, scale = reference.quantize(x, blocks, recipe, fp8.dtype)
    values = reference.dequantize(data, scale, blocks)
    assert_same(data, scale, *naive_quantize(x, (1, ALONG[recipe]), recipe, fp8))
    assert values[0, 0].item() == -(2.0**127) and values[0, -1].item() == 2.0**127


@every_format
def test_the_largest_fp32_survives_an_exact_scale(fp8):
    largest = torch.full((1, 1), torch.finfo(torch.float32).max)
    blocks = reference.row_blocks(Recipe.FP8_ROWWISE)
    data, scale = reference.quantize(largest, blocks, Recipe.FP8_ROWWISE, fp8.dtype)
    assert torch.equal(reference.dequantize(data, scale, blocks), largest)


@every_format
@every_scaled_recipe
@pytest.mark.parametrize("bad", NONFINITE)
def test_nan_and_inf_make_exactly_their_own_block_nan(recipe, fp8, bad):
    x = torch.ones(2, 256)
    x[1, 200] = bad
    blocks = reference.row_blocks(recipe)
    along = ALONG[recipe] or 256
    data, scale = reference.quantize(x, blocks, recipe, fp8.dtype)
    values = reference.dequantize(data, scale, blocks)
    in_block = torch.zeros(2, 256, dtype=torch.bool)
    in_block[1, 200 // along * along : (200 // along + 1) * along] = True
    assert torch.equal(values.isnan(), in_block)
    assert values[~in_block].isfinite().all()


@every_scaled_recipe
@pytest.mark.parametrize("axis", (1, 2))
@pytest.mark.parametrize("bad", NONFINITE)
def test_nan_and_inf_in_weights_reach_their_line_and_leave_other_groups_alone(recipe, axis, bad):
    w = torch.ones(2, 130, 130)
    w[1, 129, 129] = bad
    blocks = reference.weight_blocks(recipe, axis)
    values = reference.dequantize(*reference.quantize(w, blocks, recipe, E4M3FN.dtype), blocks)
    assert values[1, 129, 129].isnan()
    assert values[0].isfinite().all()


# Columns: operands of wgrad


def naive_quantize_columns(x: Tensor, ends: Sequence[int], recipe: Recipe, fp8: Format) -> tuple[Tensor, Tensor]:
    """Codes, which are zero past the last group, and the scales that are in use."""
    codes, scales, start = torch.zeros(x.shape, dtype=torch.uint8), [], 0
    for end in ends:
        if end > start:
            codes[start:end], scale = naive_quantize(x[start:end], (ALONG[recipe], 1), recipe, fp8)
            scales.append(scale)
        elif ALONG[recipe] is None:
            scales.append(torch.ones(1, x.shape[1]))  # a group without rows still has its row of scales
        start = end
    return codes, torch.cat(scales) if scales else torch.ones(0, x.shape[1])


@every_format
@every_scaled_recipe
@pytest.mark.parametrize(
    "ends",
    (
        (150,),
        (0, 33, 33, 161, 200),
        (1, 2, 130),
        (128, 256, 256),
        (0, 0, 0),
    ),
    ids=lambda ends: "-".join(map(str, ends)),
)
def test_columns_are_quantized_along_the_rows_of_each_group(recipe, fp8, ends):
    num_rows = ends[-1] + 7
    x = wide(num_rows, 3)
    data, scale = reference.quantize_columns(x, ends, recipe, fp8.dtype)
    codes, used = naive_quantize_columns(x, ends, recipe, fp8)
    spare = torch.ones(reference.column_scale_rows(num_rows, len(ends), recipe) - used.shape[0], 3)
    assert scale.dtype == recipe.scale_dtype
    assert_same(data, scale, codes, torch.cat([used, spare]))


@every_scaled_recipe
def test_rows_past_the_last_group_have_no_effect(recipe):
    x = wide(100, 3)
    poisoned = x.clone()
    poisoned[60:] = math.nan
    data, scale = reference.quantize_columns(x, (20, 60), recipe, E4M3FN.dtype)
    poisoned_data, poisoned_scale = reference.quantize_columns(poisoned, (20, 60), recipe, E4M3FN.dtype)
    assert_same(poisoned_data, poisoned_scale, codes_of(data), scale.float())


@every_scaled_recipe
def test_the_scales_of_a_group_come_after_those_of_the_one_before(recipe):
    ends = (0, 33, 33, 161, 200)
    expected = {
        None: [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)],
        128: [(0, 0), (0, 1), (1, 1), (1, 2), (2, 3)],
        32: [(0, 0), (0, 2), (2, 2), (2, 6), (6, 8)],
    }[ALONG[recipe]]
    assert [(rows.start, rows.stop) for rows in reference.column_scale_slices(ends, recipe)] == expected


@settings(derandomize=True, deadline=None, max_examples=100)
@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=6), past=st.integers(0, 40))
def test_there_are_enough_rows_of_scales_for_any_groups(sizes, past):
    ends = list(itertools.accumulate(sizes))
    for recipe in SCALED:
        in_use = sum(math.ceil(size / ALONG[recipe]) if ALONG[recipe] else 1 for size in sizes)
        assert reference.column_scale_slices(ends, recipe)[-1].stop == in_use
        assert in_use <= reference.column_scale_rows(ends[-1] + past, len(ends), recipe)


# Conversion between fp8 types


@pytest.mark.parametrize("scale_dtype", (torch.float32, torch.float8_e8m0fnu), ids=str)
@pytest.mark.parametrize("exponent", (-126, -1, 0, 100, 126, 127))
def test_conversion_to_e4m3fnuz_keeps_every_value(scale_dtype, exponent):
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = reference.to_e8m0(torch.tensor([2.0**exponent])).to(scale_dtype)
    converted, doubled = reference.convert_fp8(data, scale, (None,), torch.float8_e4m3fnuz)
    before, after = data.float() * scale.float(), converted.float() * doubled.float()
    assert converted.dtype == torch.float8_e4m3fnuz and doubled.dtype == scale_dtype
    assert torch.equal(after.isnan(), before.isnan())
    assert torch.equal(after.nan_to_num(), before.nan_to_num())


def test_only_blocks_whose_scale_cannot_be_doubled_keep_their_data():
    data = torch.full((2, 4, 3), -1.75).to(torch.float8_e4m3fn)
    scale = torch.tensor([1.0, 2.0**127, float("inf"), float("nan")]).view(2, 2, 1)
    converted, doubled = reference.convert_fp8(data, scale, (1, 2, None), torch.float8_e4m3fnuz)
    assert converted.float()[:, ::2, 0].flatten().tolist() == [-0.875, -1.75, -1.75, -1.75]
    torch.testing.assert_close(
        doubled, scale * torch.tensor([2.0, 1, 1, 1]).view(2, 2, 1), equal_nan=True, rtol=0, atol=0
    )


def test_conversion_keeps_the_order_in_memory():
    data = wide(2, 3, 5).to(torch.float8_e4m3fn).transpose(1, 2)
    assert (
        reference.convert_fp8(data, torch.ones(2, 1, 3), (1, None, 1), torch.float8_e4m3fnuz)[0].stride()
        == data.stride()
    )


@every_format
def test_conversion_to_the_same_type_returns_its_arguments(fp8):
    data, scale = torch.zeros(2, dtype=fp8.dtype), torch.ones(2)
    same_data, same_scale = reference.convert_fp8(data, scale, (None,), fp8.dtype)
    assert same_data is data and same_scale is scale


def test_conversion_to_e4m3fn_is_refused_because_it_is_not_exact():
    with pytest.raises(ValueError, match=r"expected .*float8_e4m3fn, .*; found .*float8_e4m3fnuz"):
        reference.convert_fp8(torch.zeros(2, dtype=torch.float8_e4m3fnuz), torch.ones(2), (1,), torch.float8_e4m3fn)


# Groups


@pytest.mark.parametrize(
    ("offs", "ends"),
    (
        ((3, 3, 10), [3, 3, 10]),
        ((5, 3, 10), [5, 5, 10]),
        ((-4, 2, -1), [0, 2, 2]),
        ((4, 99, 6), [4, 10, 10]),
        ((-(2**31), 2**31 - 1), [0, 10]),
    ),
)
def test_ends_that_are_out_of_order_or_range_are_clamped(offs, ends):
    assert reference.group_ends(torch.tensor(offs, dtype=torch.int32), 10) == ends


@settings(derandomize=True, deadline=None, max_examples=100)
@given(offs=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=8), num_rows=st.integers(0, 100))
def test_groups_never_overlap_or_leave_the_rows_for_any_offs(offs, num_rows):
    slices = reference.group_slices(reference.group_ends(torch.tensor(offs, dtype=torch.int32), num_rows))
    bounds = [0, *(bound for rows in slices for bound in (rows.start, rows.stop)), num_rows]
    assert bounds == sorted(bounds)
    assert len(slices) == len(offs)


# GEMMs. Their operands are integers, so that any order of summation gives the same result.

ENDS = (0, 3, 3, 5)  # an empty group first and in the middle, two rows past the last
ROWS, FEATURES, OUT = 7, 4, 3


def random_integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def group_of(row: int) -> int | None:
    return next((e for e, end in enumerate(ENDS) if row < end), None)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("has_bias", (False, True), ids=("without bias", "with bias"))
def test_grouped_mm_multiplies_each_row_by_the_matrix_of_its_group(dtype, has_bias):
    a, b, bias = (
        random_integers(ROWS, FEATURES, seed=0),
        random_integers(4, FEATURES, OUT, seed=1),
        random_integers(4, OUT, seed=2),
    )
    a[ENDS[-1] :] = math.nan
    expected = torch.zeros(ROWS, OUT, dtype=dtype)
    for row in range(ENDS[-1]):
        e = group_of(row)
        for n in range(OUT):
            expected[row, n] = sum(a[row, k].item() * b[e, k, n].item() for k in range(FEATURES))
            expected[row, n] += bias[e, n].item() if has_bias else 0
    y = reference.grouped_mm(a, b, ENDS, bias if has_bias else None, dtype)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


def test_wgrad_sums_over_the_rows_of_each_group():
    a, dy = random_integers(ROWS, FEATURES, seed=0), random_integers(ROWS, OUT, seed=1)
    a[ENDS[-1] :] = dy[ENDS[-1] :] = math.nan
    expected = torch.zeros(4, FEATURES, OUT, dtype=torch.float64)
    for row in range(ENDS[-1]):
        for k, n in itertools.product(range(FEATURES), range(OUT)):
            expected[group_of(row), k, n] += a[row, k].item() * dy[row, n].item()
    assert torch.equal(reference.wgrad(a, dy, ENDS), expected)


def test_group_sums_add_the_rows_of_each_group():
    x = random_integers(ROWS, OUT, seed=0)
    x[ENDS[-1] :] = math.nan
    expected = torch.zeros(4, OUT, dtype=torch.float64)
    for row in range(ENDS[-1]):
        expected[group_of(row)] += x[row].double()
    assert torch.equal(reference.group_sums(x, ENDS), expected)


# docs/numerics.md

PAGE = Path(__file__).parents[1] / "docs" / "numerics.md"


def test_the_example_of_the_page_is_right():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried > 0 and failed == 0


def errors(recipe: Recipe, dtype: torch.dtype) -> list[float]:
    """Relative Frobenius errors of forward, dgrad and wgrad, as the page describes them."""
    generator = torch.Generator().manual_seed(0)
    a, b, dy = (torch.randn(shape, generator=generator) for shape in ((600, 512), (4, 512, 384), (600, 384)))
    ends = (128, 300, 300, 600)
    a, b, dy = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), dy.to(dtype)
    y = grouped_mm(a, b, torch.tensor(ends, dtype=torch.int32), recipe=recipe, kernel_preference="emulated")
    measured = (y.detach(), *torch.autograd.grad(y, (a, b), dy))
    a, b = a.detach(), b.detach()
    exact = (
        reference.grouped_mm(a, b, ends),
        reference.grouped_mm(dy, b.transpose(1, 2), ends),
        reference.wgrad(a, dy, ends),
    )
    return [((found.double() - truth).norm() / truth.norm()).item() for found, truth in zip(measured, exact)]


@pytest.mark.parametrize("recipe", Recipe, ids=lambda recipe: recipe.value)
def test_the_errors_on_the_page_are_the_measured_ones(recipe):
    name = f"`{recipe.value}`" if recipe.is_scaled else "`none`, bf16"
    (cells,) = re.findall(rf"^\| {name} \| ([0-9.]+)% \| ([0-9.]+)% \| ([0-9.]+)% \|$", PAGE.read_text(), re.MULTILINE)
    stated = [float(cell) / 100 for cell in cells]
    measured = errors(recipe, torch.float32 if recipe.is_scaled else torch.bfloat16)
    assert measured == pytest.approx(stated, rel=0.03)
