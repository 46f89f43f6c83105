"""torch.compile(fullgraph=True): one graph, forward and backward, and at most one compilation per row class."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_same_bits
from large import RAGGED, layer, train, training, with_sizes
from torch._dynamo.testing import CompileCounterWithBackend

from grouped_gemm import KernelPreference, Pass, Recipe, grouped_mm, prefer, quantize_weights
from grouped_gemm.testing import make_inputs

NUM_GROUPS, K, N = 4, 32, 64
# three sizes of each row class; none is 0 or 1, which Dynamo never makes symbolic
ROWS = (40, 48, 64, 100, 512, 1000, 1100, 2000, 3000)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(num_rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """a, w (E, N, K), bias (E, N) and offs, with an empty group and three rows past the last one."""
    a = torch.randn(num_rows, K, dtype=dtype, requires_grad=True)
    w = torch.randn(NUM_GROUPS, N, K, dtype=dtype, requires_grad=True)
    bias = torch.randn(NUM_GROUPS, N, dtype=dtype, requires_grad=True)
    ends = (num_rows // 4, num_rows // 2, num_rows // 2, num_rows - 3)
    return a, w, bias, torch.tensor(ends, dtype=torch.int32)


def gradients(function, a, w, bias, offs) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of a, w and bias."""
    y = function(a, w, bias, offs)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    return (y, *torch.autograd.grad(y, (a, w, bias), dy))


@pytest.mark.parametrize("recipe", Recipe, ids=lambda r: r.value)
def test_compiles_once_per_row_class_and_agrees_with_eager_bit_for_bit(recipe):
    def layer(a, w, bias, offs):
        return grouped_mm(a, w.transpose(1, 2), offs, recipe=recipe, bias=bias)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_rows in ROWS:
        case = operands(num_rows)
        for ours, eager in zip(gradients(compiled, *case), gradients(layer, *case)):
            assert torch.equal(ours, eager)
    assert counter.frame_count == 3  # decode, small, large


@pytest.mark.gpu
@training(recipes=(Recipe.NONE, Recipe.FP8_BLOCKWISE))
def test_triton_compiles_once_for_a_row_class_and_agrees_with_eager_bit_for_bit(case, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer(case), fullgraph=True, dynamic=True, backend=counter)
    for tail in (70, 471):
        inputs = make_inputs(with_sizes(case, RAGGED.sizes, tail), device)
        for pass_, ours, eager in zip(Pass, train(compiled, inputs), train(layer(case), inputs)):
            assert_same_bits(ours, eager, f"{pass_.value}, M = {len(inputs.a)}")
    assert counter.frame_count == 1, "compiled again for another M of the same row class"


def test_inductor_agrees_with_eager():
    def layer(a, w, bias, offs):
        return grouped_mm(a, w.transpose(1, 2), offs, recipe="fp8_blockwise", bias=bias)

    case = operands(100)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for ours, eager in zip(gradients(compiled, *case), gradients(layer, *case)):
        assert torch.equal(ours, eager)


def test_weight_gradient_form_compiles():
    def layer(a, b, offs):
        return grouped_mm(a.t(), b, offs, recipe="mxfp8")

    a, _, _, offs = operands(100)
    g = torch.randn(100, N, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    dc = torch.randn(NUM_GROUPS, K, N, dtype=torch.bfloat16)
    ours, eager = compiled(a, g, offs), layer(a, g, offs)
    assert torch.equal(ours, eager)
    for mine, theirs in zip(torch.autograd.grad(ours, (a, g), dc), torch.autograd.grad(eager, (a, g), dc)):
        assert torch.equal(mine, theirs)


def test_quantized_weights_compile_with_a_gradient_to_the_activations():
    a, w, _, offs = operands(100)
    weights = quantize_weights(w.detach().transpose(1, 2), "fp8_blockwise", dgrad=True)

    def layer(a, offs):
        return grouped_mm(a, weights, offs)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    ours, eager = compiled(a, offs), layer(a, offs)
    dy = torch.randn_like(eager)
    assert torch.equal(ours, eager)
    assert torch.equal(torch.autograd.grad(ours, a, dy)[0], torch.autograd.grad(eager, a, dy)[0])


def test_a_compiled_function_follows_prefer():
    a, w, _, offs = operands(100)

    def layer(a, w, offs):
        return grouped_mm(a, w.transpose(1, 2), offs)

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(a, w, offs)
    with prefer(KernelPreference.TRITON), pytest.raises(Exception, match="triton, which the context asks for"):
        compiled(a, w, offs)
    compiled(a, w, offs)


def test_a_bad_argument_is_named_while_tracing():
    a, w, _, offs = operands(100)
    compiled = torch.compile(lambda a, w, offs: grouped_mm(a, w, offs), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"b\.shape\[1\]: expected K = 32"):
        compiled(a, w, offs)


def test_validation_happens_when_the_graph_runs(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    a, w, _, offs = operands(100)
    compiled = torch.compile(
        lambda a, w, offs: grouped_mm(a, w.transpose(1, 2), offs), fullgraph=True, backend="aot_eager"
    )
    compiled(a, w, offs)
    with pytest.raises(ValueError, match=r"offs\[1\]: expected at least offs\[0\] = 50; found 20"):
        compiled(a, w, torch.tensor([50, 20, 60, 100], dtype=torch.int32))


def test_autocast_holds_inside_a_graph():
    a, w, bias, offs = operands(100, torch.float32)

    def layer(a, w, bias, offs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return grouped_mm(a, w.transpose(1, 2), offs, bias=bias)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    ours, eager = gradients(compiled, a, w, bias, offs), gradients(layer, a, w, bias, offs)
    assert ours[0].dtype == torch.bfloat16
    for mine, theirs in zip(ours, eager):
        assert torch.equal(mine, theirs)
