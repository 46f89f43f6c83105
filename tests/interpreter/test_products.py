"""Forward, dgrad, wgrad and bias on the Triton backend, through `grouped_mm`, against `reference` and Emulated."""

from __future__ import annotations

import pytest
import torch

from grouped_gemm import Recipe, grouped_mm, quantize_weights, reference
from grouped_gemm.kernels import gemm, wgrad

# ends of groups, M: empty groups, rows past the last one; ends out of order and out of range
GROUPS = (([5, 5, 40, 60], 64), ([50, 20, 70, -3], 64), ([0, 0], 7))
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-6}


@pytest.fixture(params=(True, False), ids=("descriptors", "pointers"))
def tma(request, monkeypatch):
    if not request.param:
        for module in (gemm, wgrad):
            monkeypatch.setattr(module, "can_use_tma", lambda *operands: False)
    return request.param


def case(ends, num_rows, k, n, dtype, contiguous):
    """a, b, bias, dy and offs; what lies past the last group is NaN."""
    torch.manual_seed(0)
    offs = torch.tensor(ends, dtype=torch.int32)
    last = reference.group_ends(offs, num_rows)[-1]
    a, dy = torch.randn(num_rows, k), torch.randn(num_rows, n)
    a[last:], dy[last:] = torch.nan, torch.nan
    b = torch.randn(len(ends), n, k).transpose(1, 2)
    b = b if contiguous == "k" else b.contiguous()
    bias = torch.randn(len(ends), n)
    a, b, bias = (x.to(dtype).requires_grad_() for x in (a, b, bias))
    return a, b, bias, dy.to(dtype), offs


def passes(backend, a, b, bias, dy, offs, **options):
    y = grouped_mm(a, b, offs, bias=bias, kernel_preference=backend, **options)
    return (y, *torch.autograd.grad(y, (a, b, bias), dy.to(y.dtype)))


def assert_near(found, truth, bound):
    assert found.shape == truth.shape
    error = (found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)
    assert error <= bound


@pytest.mark.parametrize(
    "dtype, k, n, contiguous",
    (
        (torch.bfloat16, 48, 80, "k"),
        (torch.bfloat16, 48, 80, "n"),
        (torch.float16, 50, 37, "k"),
        (torch.float32, 36, 20, "n"),
    ),
    ids=str,
)
@pytest.mark.parametrize("ends, num_rows", GROUPS, ids=str)
def test_operands_without_scales(ends, num_rows, dtype, k, n, contiguous, tma):
    a, b, bias, dy, offs = operands = case(ends, num_rows, k, n, dtype, contiguous)
    y, da, db, dbias = passes("triton", *operands)
    ends = reference.group_ends(offs, num_rows)
    a, b, bias = a.detach(), b.detach(), bias.detach()
    assert_near(y, reference.grouped_mm(a, b, ends, bias), BOUNDS[dtype])
    assert_near(da, reference.grouped_mm(dy, b.transpose(1, 2), ends), BOUNDS[dtype])
    assert_near(db, reference.wgrad(a, dy, ends), BOUNDS[dtype])
    assert_near(dbias, reference.group_sums(dy, ends), BOUNDS[dtype])
    assert not y[ends[-1] :].any() and not da[ends[-1] :].any()
    assert db.stride() == b.stride()


@pytest.mark.parametrize("recipe", (Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE_POW2), ids=lambda r: r.value)
@pytest.mark.parametrize("k, n, contiguous", ((144, 40, "k"), (50, 37, "n")), ids=str)
def test_fp8(k, n, contiguous, recipe, tma):
    operands = case([5, 5, 140, 150], 160, k, n, torch.bfloat16, contiguous)
    found = passes("triton", *operands, recipe=recipe, out_dtype=torch.float32)
    expected = passes("emulated", *operands, recipe=recipe, out_dtype=torch.float32)
    # Emulated multiplies by scales before it sums; powers of two commute with rounding, so that only the order of sums
    # differs, and how that rounds the gradients to bf16
    bounds = (1e-6, 1e-4, 1e-4, 1e-4) if recipe.power_of_two_scales else (1e-3,) * 4
    for x, truth, bound in zip(found, expected, bounds):
        assert_near(x, truth, bound)


def test_a_nan_stays_in_its_row_and_its_group(tma):
    a, b, bias, dy, offs = case([5, 5, 40, 60], 64, 48, 80, torch.bfloat16, "k")
    a.data[20] = torch.nan
    y, _, db, _ = passes("triton", a, b, bias, dy, offs)
    assert y[20].isnan().all() and y.isnan().sum() == 80
    assert db[2].isnan().all() and not db[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("recipe", (Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE), ids=lambda r: r.value)
def test_a_checkpoints_weights(recipe):
    a, b, _, dy, offs = case([5, 5, 40, 60], 64, 144, 136, torch.bfloat16, "k")
    data, scale = reference.quantize(b.detach(), reference.weight_blocks(recipe, 1), recipe, torch.float8_e4m3fn)
    found, expected = [], []
    for backend, results in (("triton", found), ("emulated", expected)):
        weights = quantize_weights(data, recipe, scale=scale, dgrad=True, kernel_preference=backend)
        y = grouped_mm(a, weights, offs, kernel_preference=backend)
        results += (y, torch.autograd.grad(y, a, dy)[0])
    assert_near(found[0], expected[0], 3e-3)
    # rowwise scales run along what dgrad sums over: the Triton backend quantizes once more, Emulated need not
    assert_near(found[1], expected[1], 3e-3 if recipe.block else 5e-2)
