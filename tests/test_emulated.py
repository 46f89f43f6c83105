"""What is Emulated's own: its fast way to dequantize, and its independence of where operands lie in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from grouped_gemm import Recipe, grouped_mm, reference
from grouped_gemm.backends import emulated

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


def test_a_row_does_not_depend_on_where_its_group_starts_with_several_threads(two_threads):
    """A CPU's matrix product rounds by the alignment of its operands: each group needs memory of its own."""
    a, b = torch.randn(5, 17), torch.randn(2, 50, 17).transpose(1, 2)
    alone = grouped_mm(a, b[1:], torch.tensor([5], dtype=torch.int32))
    for start in range(1, 17):
        shifted = torch.cat([torch.randn(start, 17), a])
        y = grouped_mm(shifted, b, torch.tensor([start, start + 5], dtype=torch.int32))
        assert torch.equal(y[start:], alone)
