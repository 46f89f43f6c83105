"""`accumulate_main_grad` and `delay_wgrad` give the gradients of autograd, elsewhere or later."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from grouped_gemm import NoBackendError, Recipe, WgradQueue, delay_wgrad, grouped_mm, quantize_weights, reference

E, K, N = 4, 128, 256
ENDS, M = (10, 10, 37, 50), 54  # group 1 has no rows; the last four rows belong to no group
RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)

# How a parameter is seen as b: its shape, and the view.
FORMS: dict[str, tuple[tuple[int, ...], Any]] = {
    "as it is": ((E, K, N), lambda w: w),
    "transposed": ((E, N, K), lambda w: w.transpose(1, 2)),
    "flat": ((E * N, K), lambda w: w.view(E, N, K).transpose(1, 2)),
}
every_form = pytest.mark.parametrize("shape, view", FORMS.values(), ids=FORMS)
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.value)


def rows(features: int = K, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    return torch.randn(M, features, device=device).to(dtype).requires_grad_()


def weight(*shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Parameter:
    """A parameter with a `main_grad`, (E, N, K) unless ``shape`` says otherwise."""
    w = Parameter(torch.randn(shape or (E, N, K), device=device).to(dtype))
    w.main_grad = torch.randn(w.shape, device=device)
    return w


def offs(device: Any = "cpu") -> Tensor:
    return torch.tensor(ENDS, dtype=torch.int32, device=device)


def call(a: Tensor, b: Any, **options: Any) -> Tensor:
    return grouped_mm(a, b, offs(a.device), **options)


def transposed(a: Tensor, w: Tensor, **options: Any) -> Tensor:
    return call(a, w.transpose(1, 2), **options)


def gradient(a: Tensor, w: Tensor, dy: Tensor, **options: Any) -> Tensor:
    """What autograd gives the parameter."""
    return torch.autograd.grad(transposed(a, w, **options), w, dy)[0]


# accumulate_main_grad


@every_recipe
@every_form
def test_main_grad_gets_the_gradient_of_autograd(shape, view, recipe):
    a, w, bias, dy = rows(), weight(*shape), torch.randn(E, N).requires_grad_(), torch.randn(M, N)
    options: dict[str, Any] = {"recipe": recipe, "bias": bias, "kernel_preference": "emulated"}
    right = torch.autograd.grad(call(a, view(w), **options), (a, w, bias), dy)
    before, version = w.main_grad.clone(), w.main_grad._version
    call(a, view(w), **options, accumulate_main_grad=True).backward(dy)
    assert torch.equal(w.main_grad, before + right[1])
    assert torch.equal(a.grad, right[0]) and torch.equal(bias.grad, right[2])
    assert w.grad is None and w.grad_added_to_main_grad is True and w.main_grad._version > version


@every_recipe
@every_form
def test_every_backend_adds_to_main_grad(shape, view, recipe, backend, device):
    a, dy = rows(K, torch.bfloat16, device), torch.randn(M, N, device=device).bfloat16()
    w = weight(*shape, dtype=torch.bfloat16, device=device)
    options = {"recipe": recipe, "kernel_preference": backend}
    try:
        (right,) = torch.autograd.grad(call(a, view(w), **options), w, dy)
    except NoBackendError as refusal:
        pytest.skip(str(refusal))
    w.main_grad = torch.zeros_like(w.main_grad)
    version = w.main_grad._version
    call(a, view(w), **options, accumulate_main_grad=True).backward(dy)
    torch.testing.assert_close(w.main_grad, right.float(), rtol=2**-8, atol=1e-6)
    with delay_wgrad() as queue:
        call(a, view(w), **options, accumulate_main_grad=True).backward(dy)
    queue.backward_dw()
    torch.testing.assert_close(w.main_grad, 2 * right.float(), rtol=2**-8, atol=2e-6)
    assert w.main_grad._version > version and not w.main_grad.requires_grad


def test_the_gradient_is_not_rounded_to_the_dtype_of_the_weights():
    a, w, dy = rows(dtype=torch.bfloat16), weight(dtype=torch.bfloat16), torch.randn(M, N).bfloat16()
    w.main_grad.zero_()
    transposed(a, w, accumulate_main_grad=True, kernel_preference="emulated").backward(dy)
    truth = reference.wgrad(a.detach(), dy, ENDS, dtype=torch.float64).transpose(1, 2)
    assert (w.main_grad - truth).norm() < 1e-6 * truth.norm()


def test_weights_that_are_used_twice_add_twice():
    a, w, dy = rows(), weight(), torch.randn(M, N)
    expected = w.main_grad + gradient(a, w, dy) + gradient(a, w, 3 * dy)
    y = transposed(a, w, accumulate_main_grad=True)
    other = transposed(a, w, accumulate_main_grad=True)
    torch.autograd.backward((y, other), (dy, 3 * dy))
    torch.testing.assert_close(w.main_grad, expected)


def test_zero_out_wgrad_gives_autograd_zeros():
    a, w = rows(dtype=torch.bfloat16), weight(dtype=torch.bfloat16)
    w.zero_out_wgrad = True
    transposed(a, w, accumulate_main_grad=True).sum().backward()
    assert w.grad.dtype == torch.bfloat16 and w.grad.shape == w.shape and not w.grad.any()
    assert w.grad_added_to_main_grad


def test_autocast_from_fp32_adds_the_gradient_of_the_cast_weights():
    a, w, dy = rows(), weight(), torch.randn(M, N).bfloat16()
    before = w.main_grad.clone()
    with torch.autocast("cpu", torch.bfloat16):
        (right,) = torch.autograd.grad(transposed(a, w), w, dy)
        y = transposed(a, w, accumulate_main_grad=True)
    y.backward(dy)
    torch.testing.assert_close(w.main_grad - before, right, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("why", ("frozen", "no_grad", "quantized"))
def test_weights_without_a_gradient_add_nothing(why):
    a, w = rows(dtype=torch.bfloat16), weight(dtype=torch.bfloat16)
    del w.main_grad
    w.requires_grad_(why != "frozen")
    b = w.transpose(1, 2)
    if why == "quantized":
        b = quantize_weights(b.detach(), "fp8_blockwise", dgrad=True)
    with torch.set_grad_enabled(why != "no_grad"):
        y = call(a, b, accumulate_main_grad=True)
    if why != "no_grad":
        y.sum().backward()
        assert a.grad.any()
    assert not hasattr(w, "grad_added_to_main_grad")


BAD_WEIGHTS: dict[str, Any] = {
    "a slice": lambda w: w[:, :, :64],
    "some of the experts": lambda w: w[:3],
    "computed": lambda w: (2 * w).transpose(1, 2),
    "expanded": lambda w: w[:1].expand(E, N, K).transpose(1, 2),
    "negated": lambda w: torch._neg_view(w),
    "a dtype": lambda w: w.bfloat16(),
}


def test_a_parameter_in_another_memory_order_is_refused():
    w = Parameter(torch.randn(E, K, N).transpose(1, 2))
    w.main_grad = torch.zeros(w.shape)
    with pytest.raises(ValueError, match=r"of a leaf \(4, 256, 128\) with strides \(32768, 1, 256\)"):
        transposed(rows(), w, accumulate_main_grad=True)


@pytest.mark.parametrize("view", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_are_not_all_of_a_parameter_are_refused(view):
    w = weight(E, K, N) if view is BAD_WEIGHTS["negated"] else weight()
    b = view(w)
    a = torch.randn(M, b.shape[1], dtype=b.dtype)
    ends = offs()[: len(b)]
    with pytest.raises(ValueError, match="b: expected all of a contiguous leaf parameter"):
        grouped_mm(a, b, ends, accumulate_main_grad=True)


BAD_MAIN_GRADS: dict[str, tuple[Any, str]] = {
    "none": (lambda w: None, "found none"),
    "dtype": (lambda w: w.main_grad.bfloat16(), r"found bfloat16, \(4, 256, 128\)"),
    "shape": (lambda w: w.main_grad.transpose(1, 2).contiguous(), r"found float32, \(4, 128, 256\)"),
    "strides": (lambda w: torch.randn(E, K, N).transpose(1, 2), r"with strides \(32768, 1, 256\)"),
    "device": (lambda w: torch.empty_like(w.main_grad, device="meta"), "on meta"),
}


@pytest.mark.parametrize("change, found", BAD_MAIN_GRADS.values(), ids=BAD_MAIN_GRADS)
def test_a_main_grad_that_does_not_fit_is_refused_in_forward(change, found):
    w = weight()
    w.main_grad = change(w)
    expected = r"main_grad of b: expected float32, contiguous, \(4, 256, 128\) on cpu, like the parameter; "
    with pytest.raises(ValueError, match=expected + ".*" + found):
        transposed(rows(), w, accumulate_main_grad=True)


def test_the_option_is_a_bool():
    with pytest.raises(TypeError, match="accumulate_main_grad: expected True or False; found 1"):
        transposed(rows(), weight(), accumulate_main_grad=1)


@pytest.mark.parametrize("delays", (False, True))
def test_gradients_of_gradients_and_batched_gradients_are_refused(delays):
    a, w, queue = rows(), weight(), WgradQueue()
    before = w.main_grad.clone()
    with delay_wgrad(queue):
        y = transposed(a, w, accumulate_main_grad=not delays)
    with pytest.raises(RuntimeError, match="found create_graph=True"):
        torch.autograd.grad(y.sum(), (a, w), create_graph=True)
    batch = torch.randn(2, M, N)
    with pytest.raises(RuntimeError, match="found batched gradients"):
        torch.autograd.grad(y, (a, w), batch, is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="found batched gradients"):
        torch.func.vmap(lambda dy: torch.autograd.grad(y, a, dy, retain_graph=True)[0])(batch)
    assert len(queue) == 0 and torch.equal(w.main_grad, before)


def test_vmap_adds_the_gradient_of_each_sample():
    w, batch, dy = weight(), torch.randn(2, M, K), torch.randn(2, M, N)
    expected = w.main_grad + sum(gradient(a, w, g) for a, g in zip(batch, dy))
    torch.func.vmap(lambda a: transposed(a, w, accumulate_main_grad=True))(batch).backward(dy)
    torch.testing.assert_close(w.main_grad, expected)


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("delays", (False, True))
def test_a_checkpointed_call_adds_once(use_reentrant, delays):
    a, w, dy, queue = rows(), weight(), torch.randn(M, N), WgradQueue()
    expected = w.main_grad + gradient(a, w, dy)

    def layer(a: Tensor) -> Tensor:
        if not delays:
            return transposed(a, w, accumulate_main_grad=True)
        with delay_wgrad(queue):
            return transposed(a, w, accumulate_main_grad=True)

    checkpoint(layer, a, use_reentrant=use_reentrant).backward(dy)
    assert len(queue) == delays
    queue.backward_dw()
    assert torch.equal(w.main_grad, expected)


@pytest.mark.parametrize("delays", (False, True))
def test_a_compiled_call_runs_outside_of_the_graph(delays):
    a, w, dy, queue = rows(), weight(), torch.randn(M, N), WgradQueue()
    expected = w.main_grad + gradient(torch.relu(a).detach(), w, dy)

    def layer(a: Tensor) -> Tensor:
        return transposed(torch.relu(a), w, accumulate_main_grad=not delays)

    torch._dynamo.reset()
    with delay_wgrad(queue) if delays else torch.enable_grad():
        torch.compile(layer, backend="aot_eager")(a).backward(dy)
    assert len(queue) == delays
    queue.backward_dw()
    assert torch.equal(w.main_grad if not delays else w.main_grad + w.grad, expected)
    torch._dynamo.reset()
    reason = "accumulate_main_grad or in delay_wgrad runs outside of graphs"
    with pytest.raises(Exception, match=reason), delay_wgrad(queue) if delays else torch.enable_grad():
        torch.compile(layer, backend="aot_eager", fullgraph=True)(a)
    torch._dynamo.reset()


# delay_wgrad


@every_recipe
@every_form
def test_a_delayed_gradient_is_that_of_autograd(shape, view, recipe):
    a, w, bias, dy = rows(), weight(*shape), torch.randn(E, N).requires_grad_(), torch.randn(M, N)
    right = torch.autograd.grad(call(a, view(w), recipe=recipe, bias=bias), (a, w, bias), dy)
    with delay_wgrad() as queue:
        y = call(a, view(w), recipe=recipe, bias=bias)
    y.backward(dy)
    assert torch.equal(a.grad, right[0]) and torch.equal(bias.grad, right[2])
    assert w.grad is None and len(queue) == 1
    queue.backward_dw()
    assert torch.equal(w.grad, right[1]) and len(queue) == 0
    queue.backward_dw()  # nothing waits
    assert torch.equal(w.grad, right[1])


def test_several_calls_wait_in_one_queue():
    a, w, v, dy = rows(), weight(), weight(E, K, N), torch.randn(M, K)
    y = transposed(transposed(a, w), v)
    right = [2 * x for x in torch.autograd.grad(y, (w, v), dy)]
    with delay_wgrad() as queue:
        for _ in range(2):
            transposed(transposed(a, w), v).backward(dy)
    assert len(queue) == 4
    order = []
    for x in (w, v):
        x.register_post_accumulate_grad_hook(order.append)
    queue.backward_dw()
    assert list(map(id, order)) == list(map(id, (v, w, v, w)))
    assert torch.equal(w.grad, right[0]) and torch.equal(v.grad, right[1])


def test_a_delayed_gradient_runs_the_hooks_of_the_parameter():
    a, w = rows(), weight()
    with delay_wgrad() as queue:
        transposed(a, w).sum().backward()
    seen = []
    w.register_hook(lambda gradient: 2 * gradient)
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    queue.backward_dw()
    assert torch.equal(seen[0], 2 * gradient_without_hooks(a, w)) and len(seen) == 1


def gradient_without_hooks(a: Tensor, w: Tensor) -> Tensor:
    return gradient(a, w.detach().requires_grad_(), torch.ones(M, N))


def test_views_of_a_part_of_a_parameter_are_delayed():
    a, w, dy = rows(), weight(E, 2 * N, K), torch.randn(M, N)
    (right,) = torch.autograd.grad(transposed(a, w[:, N:]), w, dy)
    with delay_wgrad() as queue:
        transposed(a, w[:, N:]).backward(dy)
    assert w.grad is None
    queue.backward_dw()
    assert torch.equal(w.grad, right)


def test_autocast_weights_are_delayed():
    a, w, dy = rows(), weight(), torch.randn(M, N).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        (right,) = torch.autograd.grad(transposed(a, w), w, dy)
        with delay_wgrad() as queue:
            y = transposed(a, w)
    y.backward(dy)
    queue.backward_dw()
    assert w.grad.dtype == torch.float32 and torch.equal(w.grad, right)


def test_computed_weights_and_two_matrices_are_not_delayed():
    a, w, g = rows(), weight(), rows(N)
    with delay_wgrad() as queue:
        transposed(a, 2 * w).sum().backward()
        call(a.t(), g).sum().backward()
    assert len(queue) == 0 and w.grad.any() and g.grad.any()


def test_backward_dw_frees_the_operands():
    a, w = rows(), weight()
    dy = torch.randn(M, N)
    kept = weakref.ref(dy)
    with delay_wgrad() as queue:
        transposed(a, w).backward(dy)
    del dy
    assert kept() is not None
    queue.backward_dw()
    assert kept() is None


def test_blocks_nest_and_hold_for_their_thread():
    a, w = rows(), weight()
    run = functools.partial(transposed, a, w)
    with delay_wgrad() as outer:
        with delay_wgrad() as inner:
            run().sum().backward()
        other = threading.Thread(target=lambda: run().sum().backward())
        other.start()
        other.join()
        assert (len(outer), len(inner)) == (0, 1) and w.grad is not None
        run().sum().backward()
    run().sum().backward()
    assert (len(outer), len(inner)) == (1, 1)


def test_a_queue_is_copied_only_when_it_is_empty():
    w, x = torch.randn(1, 16, 16, requires_grad=True), torch.randn(4, 16)
    queue = WgradQueue()
    assert len(copy.deepcopy(queue)) == 0
    with delay_wgrad(queue):
        y = grouped_mm(x, w, torch.tensor([4], dtype=torch.int32))
    y.sum().backward()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RuntimeError, match="found 1; call backward_dw"):
            copied(queue)
