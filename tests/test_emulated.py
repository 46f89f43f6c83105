"""Tests of Emulated alone: its fast dequantization, and results that do not depend on the memory of operands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from grouped_gemm import Recipe, grouped_mm, quantize_weights, reference
from grouped_gemm.backends import emulated

ENDS = torch.tensor([3], dtype=torch.int32)
SCALED = [recipe for recipe in Recipe if recipe.is_scaled]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz], ids=str)
def test_every_fp8_code_has_the_value_that_torch_gives_it(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
    for data in (codes, codes.t(), codes[:, 3:11], codes[:4]):  # the last without a NaN
        values, power = emulated._to_fp32(data)
        assert torch.equal((values * power).nan_to_num(nan=1e9), data.float().nan_to_num(nan=1e9))


@pytest.mark.parametrize("recipe", SCALED, ids=lambda r: r.value)
@pytest.mark.parametrize("size", [(256, 128), (200, 75), (1, 33)], ids=str)
@pytest.mark.parametrize("is_transposed", [False, True], ids=["in_rows", "in_columns"])
def test_operands_are_dequantized_as_the_reference_does(recipe, size, is_transposed):
    x = torch.randn(size[::-1]).t() if is_transposed else torch.randn(size)
    every_form = (
        reference.row_blocks(recipe),
        reference.column_blocks(recipe),
        reference.weight_blocks(recipe, 1)[1:],
        reference.weight_blocks(recipe, 2)[1:],
    )
    for blocks in every_form:
        data, scale = reference.quantize(x, blocks, recipe, torch.float8_e4m3fn)
        assert torch.equal(emulated._dequantize(data, scale, blocks), reference.dequantize(data, scale, blocks))


@pytest.mark.parametrize("recipe", SCALED, ids=lambda r: r.value)
def test_large_scales_give_the_values_of_the_reference(recipe):
    """A scale of 2^120 or more, together with ordinary ones and one that is NaN."""
    x = torch.randn(256, 256)
    x[1] *= 3.1e38 / x[1].abs().max()  # from 3.3e38 a power-of-two scale rounds values up to Inf
    x[2] = 0
    for blocks in (reference.row_blocks(recipe), reference.weight_blocks(recipe, 1)[1:]):
        data, scale = reference.quantize(x, blocks, recipe, torch.float8_e4m3fn)
        assert scale.float().max() >= 2.0**119
        scale[-1] = float("nan")
        expected = reference.dequantize(data, scale, blocks)
        assert torch.equal(emulated._dequantize(data, scale, blocks).nan_to_num(nan=7), expected.nan_to_num(nan=7))
    y = grouped_mm(x[:3], torch.full((1, 256, 16), 2.0**-20), ENDS, recipe=recipe)
    assert y.isfinite().all()


@pytest.mark.parametrize("exponent", [119, 120, 127])
@pytest.mark.parametrize("recipe", [Recipe.FP8_BLOCKWISE, Recipe.MXFP8], ids=lambda r: r.value)
def test_a_checkpoint_with_large_scales_keeps_its_finite_values(recipe, exponent):
    w = torch.tensor([0.0, -1.0]).repeat_interleave(16).expand(1, 128, 32).to(torch.float8_e4m3fn)
    shape = (1, 1, 1) if recipe is Recipe.FP8_BLOCKWISE else (1, 4, 32)
    scale = reference.to_e8m0(torch.tensor(2.0**exponent)).to(recipe.scale_dtype).expand(shape)
    weights = quantize_weights(w, recipe, scale=scale, dtype=torch.float32)
    y = grouped_mm(torch.full((3, 128), 2.0**-20), weights, ENDS)
    assert torch.equal(y[:, :16], torch.zeros(3, 16))
    assert torch.equal(y[:, 16:], torch.full((3, 16), -(2.0 ** (exponent - 13))))


def test_a_row_does_not_depend_on_where_its_group_starts_with_several_threads(two_threads):
    """On a CPU, the rounding of a matmul depends on the alignment of its operands, so a group needs its own memory."""
    a, b = torch.randn(5, 17), torch.randn(2, 50, 17).transpose(1, 2)
    alone = grouped_mm(a, b[1:], torch.tensor([5], dtype=torch.int32))
    for start in range(1, 17):
        shifted = torch.cat([torch.randn(start, 17), a])
        y = grouped_mm(shifted, b, torch.tensor([start, start + 5], dtype=torch.int32))
        assert torch.equal(y[start:], alone)
