"""The Torch backend's layouts bit for bit against torch twins, and whole fp8 calls on a product that checks them."""

from __future__ import annotations

import pytest
import torch
from torch_checks import BACKEND, GROUPS, check_activations, check_plan, check_zeros, scaled_grouped_mm

from grouped_gemm import KernelPreference, Pass, Recipe, quantize_weights, reference, testing
from grouped_gemm.backends import candidates, torch_native
from grouped_gemm.backends.base import Health
from grouped_gemm.ops import NAMES
from grouped_gemm.testing import TRAINING, Case, Shape

ROWWISE = (Recipe.FP8_ROWWISE, Recipe.FP8_ROWWISE_POW2)
groups = pytest.mark.parametrize("ends, num_rows", GROUPS, ids=str)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Kernels of ours are used, nothing is required, and the fp8 product is the one of `torch_checks`."""
    monkeypatch.setattr(torch_native, "_has_triton", lambda device: True)
    monkeypatch.setattr(torch_native.F, "scaled_grouped_mm", scaled_grouped_mm)
    monkeypatch.setattr(torch_native.Backend, "requirements", ())
    monkeypatch.setattr(torch_native.Backend, "health", lambda self, device: Health())
    candidates.cache_clear()
    yield
    candidates.cache_clear()


@groups
def test_the_plan(ends, num_rows):
    check_plan(ends, num_rows)


@groups
@pytest.mark.parametrize("recipe", ROWWISE, ids=lambda r: r.value)
def test_activations(ends, num_rows, recipe):
    check_activations(ends, num_rows, recipe)


@groups
def test_zeros(ends, num_rows):
    check_zeros(ends, num_rows)


SHAPES = (
    Shape("mixed", (0, 37, 1, 130, 0), tail=5, k=144, n=48),
    Shape("all_empty", (0, 0), tail=4, k=32, n=16),
    Shape("no_rows", (0, 0), k=32, n=16),
    Shape("one_row", (1,), k=16, n=32),
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("b_contiguous", "kn")
@pytest.mark.parametrize("recipe", (*ROWWISE, Recipe.NONE), ids=lambda r: r.value)
def test_calls(recipe, b_contiguous, shape):
    case = Case(KernelPreference.TORCH, recipe, passes=TRAINING, shape=shape, b_contiguous=b_contiguous)
    inputs = testing.make_inputs(case, torch.device("cpu"))
    found = testing.run(case, inputs)
    for pass_ in TRAINING:
        result = found.of(pass_)
        error = testing.worst_row_error(result, testing.expected(pass_, inputs, recipe))
        assert error <= testing.rounding_tolerance(torch.bfloat16), pass_
        if pass_ is not Pass.WGRAD:
            assert not result[sum(shape.sizes) :].any()
    assert found.db.stride() == inputs.b.stride()


def test_weights_of_a_checkpoint():
    torch.manual_seed(0)
    blocks = reference.weight_blocks(Recipe.FP8_ROWWISE, 1)
    case = Case(KernelPreference.TORCH, Recipe.FP8_ROWWISE, shape=SHAPES[0])
    inputs = testing.make_inputs(case, torch.device("cpu"))
    data, scale = reference.quantize(inputs.b, blocks, case.recipe, torch.float8_e4m3fn)
    weights = quantize_weights(data, case.recipe, scale=scale, dgrad=True, kernel_preference="torch")
    assert torch.equal(weights.forward.data.float(), data.float())
    assert torch.equal(weights.forward.scale, scale[:, 0])
    values = reference.dequantize(data, scale, blocks)
    _, by_line = BACKEND.quantize_weights(values, case.recipe, forward=False, dgrad=True)
    assert torch.equal(weights.dgrad.data.float(), by_line.data.float())


def samples():
    ends = torch.tensor([3, 3, 140], dtype=torch.int32)
    x, dy = torch.randn(150, 48).bfloat16(), torch.randn(150, 32).bfloat16()
    b = torch.randn(3, 48, 32, dtype=torch.bfloat16)
    plan = BACKEND.plan(ends, 150)
    yield "torch_plan", (ends, 150)
    for rows, columns in ((True, True), (True, False), (False, True)):
        yield "torch_quantize_activations", (x, *plan.derived, "fp8_rowwise", rows, columns)
    yield "torch_quantize_weights", (b, "fp8_rowwise", True, True)
    lhs, columns = BACKEND.quantize_activations(x, plan, Recipe.FP8_ROWWISE, rows=True, columns=True)
    _, dy_columns = BACKEND.quantize_activations(dy, plan, Recipe.FP8_ROWWISE, rows=False, columns=True)
    rhs, _ = BACKEND.quantize_weights(b, Recipe.FP8_ROWWISE, forward=True, dgrad=False)
    yield "torch_grouped_mm", (lhs.data, lhs.scale, rhs.data, rhs.scale, plan.derived[0])
    yield "torch_grouped_mm", (x, None, b, None, plan.derived[0])
    yield "torch_wgrad", (x, dy, plan.derived[0])
    yield "torch_scaled_wgrad", (columns.data, columns.scale, dy_columns.data, dy_columns.scale, plan.derived[1])


def test_ops():
    found = set()
    for name, arguments in samples():
        found.add(name)
        tests = ("test_schema", "test_faketensor")
        if name in ("torch_grouped_mm", "torch_scaled_wgrad") or "quantize" in name:
            tests = ("test_faketensor",)  # the other compares with torch.allclose, which has no fp8
        torch.library.opcheck(getattr(torch.ops.grouped_gemm, name).default, arguments, test_utils=tests)
    assert found == {name for name in NAMES if name.startswith("torch_")}


def test_health_compares_with_the_reference(monkeypatch):
    device = torch.device("cpu")
    assert HEALTH(BACKEND, device).is_good
    product = torch_native.F.grouped_mm
    monkeypatch.setattr(torch_native.F, "grouped_mm", lambda *operands, offs: 2 * product(*operands, offs=offs))
    assert HEALTH(BACKEND, device).problem == "a tiny product of none is wrong"


HEALTH = torch_native.Backend.health
