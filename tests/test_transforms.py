"""Batched gradients, vectorized Jacobians and Hessians, and `torch.func.vmap` give the results of a loop."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import hessian, jacobian
from torch.func import vmap

from grouped_gemm import Recipe, cache_weights, grouped_mm, quantize_weights
from grouped_gemm.testing import TRAINING, Case, Shape, cases, make_inputs

SHAPE = Shape("small", (3, 0, 2), tail=1, k=16, n=32)
RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)
NUM_SAMPLES = 3

of_every_recipe = pytest.mark.parametrize(
    "case", cases(recipes=RECIPES, passes=(TRAINING,), shapes=(SHAPE,), dtypes=(torch.bfloat16, torch.float32)), ids=str
)


def operands(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    """a, b and dy, all finite, and offs."""
    inputs = make_inputs(case, device)
    return inputs.a.nan_to_num(0).requires_grad_(), inputs.b.requires_grad_(), inputs.dy.nan_to_num(0), inputs.offs


def call(case: Case, a, b, offs, **options) -> torch.Tensor:
    return grouped_mm(a, b, offs, recipe=case.recipe, kernel_preference=case.backend, **options)


def assert_equal(found, right) -> None:
    for ours, theirs in zip(found, right):
        assert torch.equal(ours, theirs)


def samples_of(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(NUM_SAMPLES, *x.shape, device=x.device).to(x.dtype)


def stacked(results) -> list[torch.Tensor]:
    """Tuples of tensors, one for each sample, as a tuple of stacked tensors."""
    return [torch.stack(tensors) for tensors in zip(*results)]


@of_every_recipe
def test_batched_gradients(case, device):
    a, b, dy, offs = operands(case, device)
    y = call(case, a, b, offs)
    batch = samples_of(dy)
    one_by_one = stacked([torch.autograd.grad(y, (a, b), sample, retain_graph=True) for sample in batch])
    assert_equal(torch.autograd.grad(y, (a, b), batch, is_grads_batched=True, retain_graph=True), one_by_one)
    assert_equal(vmap(lambda sample: torch.autograd.grad(y, (a, b), sample, retain_graph=True))(batch), one_by_one)


@of_every_recipe
def test_batched_gradients_of_the_weight_gradient_form(case, device):
    a, _, dy, offs = operands(case, device)
    dy.requires_grad_()
    c = call(case, a.t(), dy, offs)
    batch = samples_of(c)
    one_by_one = stacked([torch.autograd.grad(c, (a, dy), sample, retain_graph=True) for sample in batch])
    assert_equal(torch.autograd.grad(c, (a, dy), batch, is_grads_batched=True), one_by_one)


@of_every_recipe
def test_a_vectorized_jacobian(case, device):
    a, b, _, offs = operands(case, device)

    def layer(a):
        return call(case, a, b, offs)

    assert torch.equal(jacobian(layer, a, vectorize=True), jacobian(layer, a))


@pytest.mark.parametrize("case", cases(passes=(TRAINING,), shapes=(SHAPE,), dtypes=(torch.float32,)), ids=str)
def test_a_vectorized_hessian(case, device):
    a, b, _, offs = operands(case, device)

    def loss(a, b):
        return call(case, a, b, offs).pow(3).sum()

    for ours, theirs in zip(hessian(loss, (a, b), vectorize=True), hessian(loss, (a, b))):
        for block, right in zip(ours, theirs):
            torch.testing.assert_close(block, right)


@of_every_recipe
@pytest.mark.parametrize("in_dims", [(0, None), (1, None), (None, 0), (0, 0)], ids=str)
def test_vmap_over_layers_that_train(case, in_dims, device):
    a, b, _, offs = operands(case, device)
    batched = [x if dim is None else samples_of(x).movedim(0, dim) for x, dim in zip((a, b), in_dims)]
    batched = [x.detach().requires_grad_() for x in batched]

    def sample(i):
        return [x if dim is None else x.select(dim, i) for x, dim in zip(batched, in_dims)]

    found = vmap(lambda a, b: call(case, a, b, offs), in_dims=in_dims)(*batched)
    right = torch.stack([call(case, *sample(i), offs) for i in range(NUM_SAMPLES)])
    assert torch.equal(found, right)
    dy = torch.randn_like(right)
    assert_equal(torch.autograd.grad(found, batched, dy), torch.autograd.grad(right, batched, dy))


def test_vmap_takes_batched_offs_and_bias_and_nests():
    a, b, bias = torch.randn(2, 6, 16), torch.randn(3, 16, 32), torch.randn(3, 3, 32, requires_grad=True)
    offs = torch.tensor([[1, 1, 6], [0, 4, 5]], dtype=torch.int32)

    def layer(a, offs, bias):
        return grouped_mm(a, b, offs, bias=bias)

    found = vmap(vmap(layer, in_dims=(None, None, 0)), in_dims=(0, 0, None))(a, offs, bias)
    right = torch.stack([torch.stack([layer(a[i], offs[i], bias[j]) for j in range(3)]) for i in range(2)])
    assert torch.equal(found, right)
    assert_equal(torch.autograd.grad(found.sum(), bias), torch.autograd.grad(right.sum(), bias))


def test_vmap_takes_quantized_weights_and_uses_the_weight_cache():
    a, b, offs = torch.randn(2, 6, 16), torch.randn(3, 16, 32), torch.tensor([1, 1, 6], dtype=torch.int32)
    weights = quantize_weights(b, "mxfp8")
    right = torch.stack([grouped_mm(sample, weights, offs) for sample in a])
    assert torch.equal(vmap(lambda a: grouped_mm(a, weights, offs))(a), right)
    with cache_weights() as cache:
        assert torch.equal(vmap(lambda a: grouped_mm(a, b, offs, recipe="mxfp8"))(a), right)
        assert b in cache


def test_vmap_over_other_tensors_does_not_change_the_layer():
    a, b = torch.randn(6, 16, requires_grad=True), torch.randn(3, 16, 32, requires_grad=True)
    offs, factors = torch.tensor([1, 1, 6], dtype=torch.int32), torch.randn(4)
    found = vmap(lambda factor: grouped_mm(a, b, offs) * factor)(factors)
    right = torch.stack([grouped_mm(a, b, offs) * factor for factor in factors])
    assert torch.equal(found, right)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), (a, b)), torch.autograd.grad(right.sum(), (a, b)))


@pytest.mark.parametrize("nesting", ["grad", "vmap of grad", "grad in vmap"])
def test_other_transforms_are_refused_with_a_remedy(nesting):
    a, b, offs = torch.randn(6, 16), torch.randn(3, 16, 32), torch.tensor([1, 1, 6], dtype=torch.int32)

    def loss(a, b):
        return grouped_mm(a, b, offs).sum()

    calls = {
        "grad": lambda: torch.func.grad(loss)(a, b),
        "vmap of grad": lambda: vmap(torch.func.grad(loss), in_dims=(0, None))(samples_of(a), b),
        "grad in vmap": lambda: vmap(lambda b: torch.func.grad(loss)(a, b))(samples_of(b)),
    }
    with pytest.raises(RuntimeError, match=r"found torch\.func\.grad.*use torch\.autograd\.grad"):
        calls[nesting]()


def test_batched_gradients_refuse_a_graph_that_would_be_lost():
    a, b = torch.randn(6, 16, requires_grad=True), torch.randn(3, 16, 32)
    y = grouped_mm(a, b, torch.tensor([1, 1, 6], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="create_graph=False with batched gradients"):
        torch.autograd.grad(y, a, samples_of(y), is_grads_batched=True, create_graph=True)


def test_vmap_over_no_samples_is_refused():
    b, offs = torch.randn(3, 16, 32), torch.tensor([1, 1, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="at least one sample under vmap"):
        vmap(lambda a: grouped_mm(a, b, offs))(torch.randn(0, 6, 16))
