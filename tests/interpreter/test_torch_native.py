"""The Torch backend's layouts, bit for bit against torch twins, and whole fp8 calls on a fake GEMM that checks them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch_checks import (
    BACKEND,
    GROUPS,
    MANY_GROUPS,
    check_activations,
    check_mx_activations,
    check_mx_weights,
    check_plan,
    check_zeros,
    scaled_grouped_mm,
    unswizzled,
)

from grouped_gemm import BackendKind, Machine, Pass, Recipe, quantize_weights, reference, testing
from grouped_gemm.backends import candidates
from grouped_gemm.backends.base import Health
from grouped_gemm.backends.torch_native import backend as torch_native
from grouped_gemm.backends.torch_native import quantize as torch_native_quantize
from grouped_gemm.core.library import NAMES
from grouped_gemm.testing import TRAINING, Case, Shape

MXFP8 = Recipe.MXFP8
# several programs of the kernel that finds the blocks, where a program has `FEW_BLOCKS`; MX does without this kernel
FEW_GROUPS, FEW_BLOCKS = (list(range(1, 10)), 12), 4
groups = pytest.mark.parametrize("ends, num_rows", GROUPS, ids=str)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Our kernels are used, nothing is required, and the fp8 GEMM is that of `torch_checks`."""
    monkeypatch.setattr(torch_native, "_has_triton", lambda device: True)
    monkeypatch.setattr(torch_native.F, "scaled_grouped_mm", scaled_grouped_mm)
    monkeypatch.setattr(torch_native.Backend, "requirements", ())
    monkeypatch.setattr(torch_native.Backend, "health", lambda self, device: Health())
    candidates.cache_clear()
    yield
    candidates.cache_clear()


@pytest.fixture
def few_blocks_per_program(monkeypatch):
    monkeypatch.setattr(torch_native_quantize, "_AT_ONCE", FEW_BLOCKS)


@pytest.mark.parametrize("ends, num_rows", (*GROUPS, MANY_GROUPS), ids=str)
def test_the_plan(ends, num_rows):
    check_plan(ends, num_rows)


@pytest.mark.parametrize("ends, num_rows", (*GROUPS, FEW_GROUPS), ids=str)
def test_activations(ends, num_rows, few_blocks_per_program):
    check_activations(ends, num_rows, Recipe.FP8_ROWWISE)


def test_activations_with_powers_of_two():
    check_activations(*GROUPS[0], Recipe.FP8_ROWWISE_POW2)


@groups
def test_mx_activations(ends, num_rows):
    check_mx_activations(ends, num_rows)


@pytest.mark.parametrize("b_contiguous", "kn")
def test_mx_weights(b_contiguous):
    check_mx_weights(b_contiguous)


def test_scales_are_swizzled_as_torch_does_it():
    pytest.importorskip("expecttest", reason="torch's own helper for it imports expecttest")
    from torch.testing._internal.common_quantized import to_blocked

    torch.manual_seed(0)
    codes = torch.randint(1, 255, (256, 12), dtype=torch.uint8)
    assert torch.equal(unswizzled(to_blocked(codes), 256, 12), codes)


@groups
def test_zeros(ends, num_rows):
    check_zeros(ends, num_rows)


SHAPES = (
    Shape("mixed", (0, 37, 1, 130, 0), tail=5, k=160, n=192),
    Shape("all_empty", (0, 0), tail=4, k=32, n=64),
    Shape("no_rows", (0, 0), k=32, n=64),
    Shape("one_row", (1,), k=64, n=32),
)


# The recipe of powers of two differs only in a constant of the quantizers, and does not depend on the shape.
CALLS = (
    *itertools.product((Recipe.FP8_ROWWISE, MXFP8, Recipe.NONE), "kn", SHAPES),
    (Recipe.FP8_ROWWISE_POW2, "k", SHAPES[0]),
)


@pytest.mark.parametrize("recipe, b_contiguous, shape", CALLS, ids=lambda x: getattr(x, "name", x))
def test_calls(recipe, b_contiguous, shape):
    case = Case(BackendKind.TORCH, recipe, passes=TRAINING, shape=shape, b_contiguous=b_contiguous)
    inputs = testing.make_inputs(case, torch.device("cpu"))
    found = testing.run(case, inputs)
    for pass_ in TRAINING:
        result = found.of(pass_)
        error = testing.worst_row_error(result, testing.expected(pass_, inputs, recipe))
        assert error <= testing.rounding_tolerance(torch.bfloat16), pass_
        if pass_ is not Pass.WGRAD:
            assert not result[sum(shape.sizes) :].any()
    assert found.db.stride() == inputs.b.stride()


@pytest.mark.parametrize("recipe", (Recipe.FP8_ROWWISE, MXFP8), ids=lambda r: r.value)
def test_weights_of_a_checkpoint(recipe):
    torch.manual_seed(0)
    blocks = reference.weight_blocks(recipe, 1)
    case = Case(BackendKind.TORCH, recipe, shape=SHAPES[0])
    inputs = testing.make_inputs(case, torch.device("cpu"))
    data, scale = reference.quantize(inputs.b, blocks, case.recipe, torch.float8_e4m3fn)
    weights = quantize_weights(data, case.recipe, scale=scale, dgrad=True, kernel_preference="torch")
    assert torch.equal(weights.forward.data.float(), data.float())
    by_column, _ = BACKEND.quantize_weights(inputs.b, recipe, forward=True, dgrad=False)
    assert torch.equal(weights.forward.scale.float(), by_column.scale.float())
    values = reference.dequantize(data, scale, blocks)
    _, by_line = BACKEND.quantize_weights(values, case.recipe, forward=False, dgrad=True)
    assert torch.equal(weights.dgrad.data.float(), by_line.data.float())
    assert torch.equal(weights.dgrad.scale.float(), by_line.scale.float())


def samples():
    ends = torch.tensor([3, 3, 140], dtype=torch.int32)
    x, dy = torch.randn(150, 96).bfloat16(), torch.randn(150, 32).bfloat16()
    b = torch.randn(3, 96, 32, dtype=torch.bfloat16)
    plan = BACKEND.plan(ends, 150)
    yield "torch_plan", (ends, 150)
    yield "torch_token_blocks", (*plan.derived, 150)
    blocks = torch.ops.grouped_gemm.torch_token_blocks(*plan.derived, 150)
    yield "torch_quantize_activations", (x, *plan.derived, "fp8_rowwise", True, True, blocks)
    yield "torch_grouped_mm", (x, None, b, None, plan.derived[0])
    yield "torch_wgrad", (x, dy, plan.derived[0])
    for recipe in (Recipe.FP8_ROWWISE, MXFP8):
        for rows, columns in ((True, True), (True, False), (False, True)):
            yield "torch_quantize_activations", (x, *plan.derived, recipe.value, rows, columns)
        for forward, dgrad in ((True, True), (True, False), (False, True)):
            yield "torch_quantize_weights", (b, recipe.value, forward, dgrad)
        lhs, columns = BACKEND.quantize_activations(x, plan, recipe, rows=True, columns=True)
        _, dy_columns = BACKEND.quantize_activations(dy, plan, recipe, rows=False, columns=True)
        rhs, _ = BACKEND.quantize_weights(b, recipe, forward=True, dgrad=False)
        yield "torch_grouped_mm", (lhs.data, lhs.scale, rhs.data, rhs.scale, plan.derived[0])
        yield "torch_scaled_wgrad", (columns.data, columns.scale, dy_columns.data, dy_columns.scale, plan.derived[1])


def test_ops():
    found = set()
    for name, arguments in samples():
        found.add(name)
        tests = ("test_schema", "test_faketensor")
        if name in ("torch_grouped_mm", "torch_scaled_wgrad") or "quantize" in name:
            tests = ("test_faketensor",)  # test_schema compares with torch.allclose, which has no fp8
        torch.library.opcheck(getattr(torch.ops.grouped_gemm, name).default, arguments, test_utils=tests)
    assert found == {name for name in NAMES if name.startswith("torch_")}


@pytest.mark.parametrize("arch, recipe", (("sm_90", "fp8_rowwise"), ("sm_100", "mxfp8")))
def test_health_tries_the_fp8_recipe_of_the_architecture(arch, recipe, monkeypatch):
    machine = Machine("nvidia", arch, arch, (("mslk", "2.11.0"),))
    monkeypatch.setattr(torch_native, "machine_of", lambda device: machine)
    device = torch.device("cpu")
    assert HEALTH(BACKEND, device).is_good

    def wrong(*operands, **options):
        return 2 * scaled_grouped_mm(*operands, **options)

    monkeypatch.setattr(torch_native.F, "scaled_grouped_mm", wrong)
    assert HEALTH(BACKEND, device).problem == f"a tiny {recipe} GEMM gives wrong results"


def test_health_compares_with_the_reference(monkeypatch):
    device = torch.device("cpu")
    assert HEALTH(BACKEND, device).is_good
    gemm = torch_native.F.grouped_mm
    monkeypatch.setattr(torch_native.F, "grouped_mm", lambda *operands, offs: 2 * gemm(*operands, offs=offs))
    assert HEALTH(BACKEND, device).problem == "a tiny none GEMM gives wrong results"


HEALTH = torch_native.Backend.health
