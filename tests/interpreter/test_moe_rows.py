"""The kernels of `moe.rows` against their twins in plain torch: sums have one order, so bits are equal."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_same_bits
from routings import routing

from grouped_gemm.backends import runs_kernels
from grouped_gemm.core.library import ops
from grouped_gemm.kernels.moe import combine, gather
from grouped_gemm.moe import rows as moe_rows

# T, k, H, dtype of rows and of weights: H that no vector load fits, several blocks of H in each kernel, one slot, more
# slots than are unrolled
CASES = (
    (5, 3, 75, torch.bfloat16, torch.float32),
    (3, 8, 1100, torch.bfloat16, torch.bfloat16),
    (4, 1, 2100, torch.float32, torch.float32),
    (3, 17, 300, torch.float16, torch.float32),
    (5, 2, 16, torch.float32, None),
)
every_case = pytest.mark.parametrize("num_tokens, top_k, features, dtype, weights_dtype", CASES, ids=str)


def operands(num_tokens, top_k, features, dtype, weights_dtype):
    """Slices of wider x (T, H), rows (M, H) and weights (T, k), with NaN in whatever must not be read; the routing."""
    torch.manual_seed(0)
    source, places = routing(num_tokens, top_k)
    assert (places < 0).any()
    x, rows = (torch.randn(n, features + 5).to(dtype)[:, 5:] for n in (num_tokens, num_tokens * top_k))
    rows[source < 0] = torch.nan
    if weights_dtype is None:
        return x, rows, None, source, places
    weights = torch.randn(num_tokens, top_k + 1).to(weights_dtype)[:, 1:]
    weights[places < 0] = torch.nan
    return x, rows, weights, source, places


def test_kernels_run_here():
    assert runs_kernels(torch.device("cpu"))


def of_nan(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Memory that must be written."""
    return torch.full(shape, torch.nan, dtype=dtype)


@every_case
def test_combine(num_tokens, top_k, features, dtype, weights_dtype):
    x, rows, weights, _, places = operands(num_tokens, top_k, features, dtype, weights_dtype)
    found, expected = of_nan(x.shape, dtype), of_nan(x.shape, dtype)
    combine.combine(rows, weights, places, found)
    moe_rows._combine(rows, weights, places, expected)
    assert_same_bits(found, expected, "y")


@pytest.mark.parametrize("num_rows", (4, 5, 23))
def test_gather_of_any_number_of_rows(num_rows):
    torch.manual_seed(0)
    places = torch.tensor([[3, -1], [-1, 0], [1, num_rows - 1 if num_rows > 4 else 2]], dtype=torch.int32)
    source = torch.full((num_rows + 1,), -1, dtype=torch.int32)
    source[places.long()] = torch.arange(3, dtype=torch.int32)[:, None].expand(-1, 2)
    x, weights, source = torch.randn(3, 20), torch.rand(3, 2), source[:-1].contiguous()
    for given in (None, weights):
        found, expected = of_nan((num_rows, 20), x.dtype), of_nan((num_rows, 20), x.dtype)
        gather.gather(x, None, given, source, places, found, None)
        moe_rows._gather(x, given, source, places, expected)
        assert_same_bits(found, expected, "rows")


@every_case
def test_gather_with_and_without_weights(num_tokens, top_k, features, dtype, weights_dtype):
    x, rows, weights, source, places = operands(num_tokens, top_k, features, dtype, weights_dtype)
    for factors in (None, weights):
        found, expected = of_nan(rows.shape, dtype), of_nan(rows.shape, dtype)
        gather.gather(x, None, factors, source, places, found, None)
        moe_rows._gather(x, factors, source, places, expected)
        assert_same_bits(found, expected, "rows")


@every_case
def test_both_gradients_of_a_combine(num_tokens, top_k, features, dtype, weights_dtype):
    x, rows, weights, source, places = operands(num_tokens, top_k, features, dtype, weights_dtype or torch.float32)
    rows[0] = torch.nan
    drows, dots = ops.moe_combine_backward(x, rows, weights, source, places, True)
    expected, expected_dots = of_nan(rows.shape, dtype), torch.full_like(dots, torch.nan)
    moe_rows._gather(x, weights, source, places, expected)
    assert_same_bits(drows, expected, "dRows")
    moe_rows._dots(x, rows, places, expected_dots)
    assert not dots[places < 0].any() and dots[places == 0].isnan().all()
    # The sums have another order than torch's.
    torch.testing.assert_close(dots, expected_dots, equal_nan=True)
    alone = ops.moe_combine_backward(x, rows, weights, source, places, False)[1]
    assert_same_bits(alone, dots, "dweights alone")
