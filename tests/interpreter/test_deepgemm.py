"""DeepGEMM's layouts, bit for bit against torch twins, and whole calls on a fake package that checks its operands."""

from __future__ import annotations

import itertools
import sys

import fake_deep_gemm
import padding_checks
import pytest
import torch
from deepgemm_checks import GROUPS, MANY_GROUPS, check_activations, check_plan
from torch._dynamo.testing import CompileCounterWithBackend

from grouped_gemm import Pass, Recipe, functional, grouped_mm, quantize_weights, reference, testing
from grouped_gemm.backends import candidates, get_backend
from grouped_gemm.backends.base import Health
from grouped_gemm.backends.deepgemm import backend as deepgemm
from grouped_gemm.backends.deepgemm import package as deepgemm_package
from grouped_gemm.core.library import NAMES
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.selection.route import route_on
from grouped_gemm.testing import DGRAD, TRAINING, Case, Shape

FP8 = torch.float8_e4m3fn
BACKEND = get_backend(BackendKind.DEEPGEMM)
BLOCKWISE = (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2)


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """The fake package in place of the real one, and a backend without requirements."""
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_deep_gemm)
    monkeypatch.setattr(deepgemm.Backend, "requirements", ())
    monkeypatch.setattr(deepgemm.Backend, "health", lambda self, device: Health())
    deepgemm_package.functions.cache_clear()
    candidates.cache_clear()
    fake_deep_gemm.calls.clear()
    yield
    deepgemm_package.functions.cache_clear()
    candidates.cache_clear()


@pytest.mark.parametrize("ends, num_rows, alignment", (*GROUPS, MANY_GROUPS), ids=str)
def test_the_plan(ends, num_rows, alignment):
    check_plan(ends, num_rows, alignment)


@pytest.mark.parametrize("ends, num_rows, alignment", GROUPS, ids=str)
def test_activations(ends, num_rows, alignment):
    check_activations(ends, num_rows, alignment, Recipe.FP8_BLOCKWISE)


def test_activations_with_powers_of_two():
    check_activations(*GROUPS[0], Recipe.FP8_BLOCKWISE_POW2)


@pytest.mark.parametrize("contiguous", "kn")
@pytest.mark.parametrize("recipe", BLOCKWISE, ids=lambda r: r.value)
def test_weights_from_one_read(recipe, contiguous):
    torch.manual_seed(0)
    b = torch.randn(3, 384, 256, dtype=torch.bfloat16)
    b = b.transpose(1, 2) if contiguous == "k" else b.transpose(1, 2).contiguous()
    data, scale = reference.quantize(b, reference.weight_blocks(recipe, 1), recipe, FP8)
    forward, dgrad = BACKEND.quantize_weights(b, recipe, forward=True, dgrad=True)
    for operand in (forward, dgrad):
        assert torch.equal(operand.data.float(), data.float()) and torch.equal(operand.scale, scale)
    assert forward.data.stride(1) == 1 and dgrad.data.stride(2) == 1
    assert forward.scale.transpose(1, 2).is_contiguous()


MIXED = Shape("mixed", (0, 37, 1, 130, 0), tail=5, k=256, n=128)
SHAPES = (
    MIXED,
    Shape("aligned", (128, 0, 256), tail=7, k=128, n=256, alignment=128),
    Shape("all_empty", (0, 0), tail=4, k=128, n=128),
    Shape("no_rows", (0, 0), k=128, n=128),
    Shape("one_row", (1,), k=128, n=128),
    Shape("many_groups", tuple(i % 4 for i in range(10)), k=128, n=128),
)
# The recipe of powers of two differs only in a constant of the quantizers, and does not depend on the shape.
CALLS = (
    *itertools.product((Recipe.FP8_BLOCKWISE, Recipe.NONE), "kn", SHAPES),
    (Recipe.FP8_BLOCKWISE_POW2, "k", MIXED),
)


@pytest.mark.parametrize("recipe, b_contiguous, shape", CALLS, ids=lambda x: getattr(x, "name", x))
def test_calls(recipe, b_contiguous, shape):
    passes = TRAINING if recipe.is_scaled else DGRAD
    case = Case(BackendKind.DEEPGEMM, recipe, passes=passes, shape=shape, b_contiguous=b_contiguous)
    inputs = testing.make_inputs(case, torch.device("cpu"))
    found = testing.run(case, inputs)
    for pass_ in passes:
        result = found.of(pass_)
        error = testing.worst_row_error(result, testing.expected(pass_, inputs, recipe))
        assert error <= testing.rounding_tolerance(torch.bfloat16), pass_
        if pass_ is not Pass.WGRAD:
            assert not result[sum(shape.sizes) :].any()
    if Pass.WGRAD in passes:
        assert found.db.stride() == inputs.b.stride()
    if not sum(shape.sizes):
        assert not any(name == "scaled_wgrad" for name, _ in fake_deep_gemm.calls)


def test_groups_of_whole_blocks_are_not_copied():
    case = Case(BackendKind.DEEPGEMM, Recipe.NONE, shape=SHAPES[1])
    inputs = testing.make_inputs(case, torch.device("cpu"))
    testing.run(case, inputs)
    ((_, (a, b, out, _)),) = fake_deep_gemm.calls
    assert a.data_ptr() == inputs.a.data_ptr() and b.data_ptr() == inputs.b.data_ptr()
    assert len(out) == len(inputs.a)


def test_saved_tensors_may_be_offloaded():
    case = Case(BackendKind.DEEPGEMM, Recipe.FP8_BLOCKWISE, passes=TRAINING, shape=SHAPES[1])
    inputs = testing.make_inputs(case, torch.device("cpu"))
    expected = testing.run(case, inputs)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        found = testing.run(case, inputs)
    assert torch.equal(found.da, expected.da) and torch.equal(found.db, expected.db)
    for _, arguments in fake_deep_gemm.calls:
        if len(arguments) == 6:  # a GEMM of forward or dgrad; kernels read the block past the last one
            row_map = arguments[5]
            beyond = torch.as_strided(row_map, (128,), (1,), row_map.storage_offset() + len(row_map))
            assert (beyond == -1).all()


def test_weights_of_a_checkpoint():
    torch.manual_seed(0)
    w, scale = torch.randn(2, 128, 256).to(FP8), torch.rand(2, 1, 2) + 0.5  # (E, N, K), (E, N/128, K/128)
    weights = quantize_weights(
        w.transpose(1, 2), "fp8_blockwise", scale=scale.transpose(1, 2), dgrad=True, kernel_preference="deepgemm"
    )
    a = torch.randn(150, 256).bfloat16().requires_grad_()
    y = grouped_mm(a, weights, torch.tensor([20, 150], dtype=torch.int32), kernel_preference="deepgemm")
    y.sum().backward()
    forward, dgrad = (arguments for _, arguments in fake_deep_gemm.calls)
    assert forward[2].data_ptr() == w.data_ptr() and torch.equal(forward[3], scale)
    assert torch.equal(dgrad[3], scale.transpose(1, 2))


def test_each_pass_may_run_on_a_backend_of_its_own(monkeypatch):
    """Forward and dgrad run on DeepGEMM and wgrad on Triton, as in one of AUTO's plans."""
    plan = dict.fromkeys(TRAINING, BackendKind.DEEPGEMM) | {Pass.WGRAD: BackendKind.TRITON}
    monkeypatch.setattr(functional, "route_of", lambda spec: route_on(spec, plan))
    case = Case(BackendKind.DEEPGEMM, Recipe.FP8_BLOCKWISE_POW2, passes=TRAINING, shape=SHAPES[1])
    inputs = testing.make_inputs(case, torch.device("cpu"))
    found = testing.run(case, inputs)
    assert [name for name, _ in fake_deep_gemm.calls] == ["scaled_grouped_mm"] * 2
    for pass_ in TRAINING:
        error = testing.worst_row_error(found.of(pass_), testing.expected(pass_, inputs, case.recipe))
        assert error <= testing.rounding_tolerance(torch.bfloat16), pass_


def samples():
    offs = torch.tensor([3, 3, 140], dtype=torch.int32)
    x, dy = torch.randn(150, 256).bfloat16(), torch.randn(150, 128).bfloat16()
    b = torch.randn(3, 256, 128, dtype=torch.bfloat16)
    for alignment in (1, 128):
        plan = BACKEND.plan(offs, 150, alignment)
        yield "deepgemm_plan", (offs, 150, alignment == 128)
        yield "deepgemm_quantize_activations", (x, *plan.derived[:2], "fp8_blockwise", True, True)
    plan = BACKEND.plan(offs, 150)
    lhs, columns = BACKEND.quantize_activations(x, plan, Recipe.FP8_BLOCKWISE, rows=True, columns=True)
    _, dy_columns = BACKEND.quantize_activations(dy, plan, Recipe.FP8_BLOCKWISE, rows=False, columns=True)
    rhs, _ = BACKEND.quantize_weights(b, Recipe.FP8_BLOCKWISE, forward=True, dgrad=True)
    yield "deepgemm_quantize_weights", (b, "fp8_blockwise", True, True)
    scales = lhs.scale, rhs.data.transpose(1, 2), rhs.scale.transpose(1, 2)
    yield "deepgemm_grouped_mm", (lhs.data, *scales, *plan.derived[:2], 150)
    yield "deepgemm_grouped_mm", (x, None, b.transpose(1, 2), None, *plan.derived[:2], 150)
    operands = columns.data, columns.scale, dy_columns.data, dy_columns.scale
    yield "deepgemm_wgrad", (*operands, plan.derived[2], torch.bfloat16)
    yield "deepgemm_wgrad", (*operands, plan.derived[2], torch.float32)
    yield "deepgemm_group_sums", (dy, offs, torch.float32)


def test_ops():
    found = set()
    for name, arguments in samples():
        found.add(name)
        tests = ("test_schema", "test_faketensor")
        if any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 1 for x in arguments):
            tests = ("test_faketensor",)  # test_schema compares arguments with torch.allclose, which has no fp8
        torch.library.opcheck(getattr(torch.ops.grouped_gemm, name).default, arguments, test_utils=tests)
    assert found == {name for name in NAMES if name.startswith("deepgemm_")}


def test_compiles_once_for_any_number_of_rows():
    """The sizes of the plan depend on M, and must not cause another compilation."""
    counter = CompileCounterWithBackend("eager")
    b = torch.randn(3, 128, 128, dtype=torch.bfloat16, requires_grad=True)

    def layer(a, offs):
        return grouped_mm(a, b.transpose(1, 2), offs, recipe="fp8_blockwise", kernel_preference="deepgemm")

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_rows in (100, 130, 300):  # with 0, 1 and 2 whole blocks
        a = torch.randn(num_rows, 128).bfloat16().requires_grad_()
        offs = torch.tensor([5, 5, num_rows - 3], dtype=torch.int32)
        results = [compiled(a, offs), layer(a, offs)]
        assert torch.equal(*results)
        gradients = [torch.autograd.grad(y.float().square().sum(), (a, b)) for y in results]
        assert all(map(torch.equal, *gradients))
    assert counter.frame_count == 1


def test_health_compares_with_the_reference(monkeypatch):
    device = torch.device("cpu")
    assert BACKEND._tiny_run(device).is_good
    monkeypatch.setattr(fake_deep_gemm, "m_grouped_fp8_fp4_gemm_nt_contiguous", lambda *args, **rest: args[2].zero_())
    deepgemm_package.functions.cache_clear()
    assert BACKEND._tiny_run(device).problem == "a tiny GEMM gives wrong results"


PADDING = (("bf16", "own tokens"), ("fp8", "own tokens"), ("fp8", "a dispatcher that pads"))  # seconds each


@pytest.mark.parametrize("row", [r for r in padding_checks.ALL if r[:2] in PADDING], ids=padding_checks.name)
def test_who_pads_the_experts_of_a_layer(row):
    def multiplied() -> int:
        return len(fake_deep_gemm.calls[0][1][0])

    padding_checks.check(row, BackendKind.DEEPGEMM, hidden=128, training=False, multiplied=multiplied)
