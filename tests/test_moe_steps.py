"""`moe.steps` and `moe.activation`: what happens between the GEMMs of a MoE layer, on this machine's device.

On a CPU these are twins in plain torch; tests/interpreter has the kernels.
"""

from __future__ import annotations

import pytest
import steps_checks as checks
import torch

from grouped_gemm import Recipe
from grouped_gemm.core.library import ops
from grouped_gemm.moe.activation import ACTIVATIONS, activate

RECIPES = (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2)
every_form = pytest.mark.parametrize("activation, interleaved, dtype", checks.FORMS, ids=str)
# I: whole blocks; no whole block; blocks of up that do not start where gate's do
every_width = pytest.mark.parametrize("features", (256, 72, 704))
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.value)


@every_form
@pytest.mark.parametrize("features", (72, 1400))
def test_activations_and_their_gradients(activation, interleaved, dtype, features, device):
    checks.check_activate(activation, interleaved, dtype, features, device)


@every_form
@every_width
def test_activations_are_quantized(activation, interleaved, dtype, features, device):
    given = checks.operands(features, activation, dtype, device)
    checks.check_activate_quantize(activation, interleaved, RECIPES[interleaved], given)


@every_form
@every_width
@pytest.mark.parametrize("with_weights", (True, False), ids=("weights", "no weights"))
def test_gradients_are_quantized(activation, interleaved, dtype, features, with_weights, device):
    given = checks.operands(features, activation, dtype, device)
    checks.check_activate_backward_quantize(activation, interleaved, RECIPES[with_weights], with_weights, given)


@pytest.mark.parametrize("sizes, unused", (((0, 0), 0), ((0, 0), 200)), ids=("no rows", "no rows in groups"))
@pytest.mark.parametrize("interleaved, features", ((False, 128), (True, 72), (False, 72)))
def test_nothing_but_empty_groups(sizes, unused, interleaved, features, device):
    given = checks.operands(features, "swiglu", torch.bfloat16, device, sizes, unused)
    checks.check_activate_quantize("swiglu", interleaved, Recipe.FP8_BLOCKWISE, given)
    checks.check_activate_backward_quantize("swiglu", interleaved, Recipe.FP8_BLOCKWISE, True, given)


@pytest.mark.parametrize("num_tokens, features", ((37, 72), (5, 2880), (0, 72)), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@every_recipe
def test_tokens_are_quantized(num_tokens, features, dtype, recipe, device):
    checks.check_quantize_tokens(num_tokens, features, dtype, recipe, device)


def test_bits_repeat(device):
    *rows, _, offs, blocks = checks.operands(704, "swiglu", torch.bfloat16, device)
    for recipe in (None, "fp8_blockwise"):
        if recipe is None:
            runs = [ops.moe_activate_backward(*rows, "swiglu", True, offs)[2] for _ in range(2)]
        else:
            arguments = *rows, blocks, offs, recipe, "swiglu", True
            runs = [ops.moe_activate_backward_quantize(*arguments)[2] for _ in range(2)]
        assert torch.equal(*(dweights.nan_to_num(1e9) for dweights in runs))


def test_offs_out_of_order_and_out_of_range(device):
    *rows, _, _, _ = checks.operands(72, "swiglu", torch.float32, device, (60,), 39)
    expected = ops.moe_activate_backward(*rows, "swiglu", False, torch.tensor([60, 60]).int().to(device))
    for ends in ([-5, 60, 40], [60, -1]):
        found = ops.moe_activate_backward(*rows, "swiglu", False, torch.tensor(ends).int().to(device))
        for one, other, used in zip(found, expected, (slice(60), slice(60), slice(None))):
            assert torch.equal(one[used].nan_to_num(1e9), other[used].nan_to_num(1e9))
    *rows, _, _, _ = checks.operands(72, "swiglu", torch.float32, device, (99,), 0)
    whole = ops.moe_activate_backward(*rows, "swiglu", False, torch.tensor([999]).int().to(device))
    assert all(result.any(1).all() for result in whole)


# `activate`


@every_form
def test_one_tensor_and_two_give_the_same(activation, interleaved, dtype, device):
    kind = ACTIVATIONS[activation]
    _, pre, *_ = checks.operands(72, activation, dtype, device, (40,), 0)
    pre = pre.nan_to_num(0).detach().requires_grad_()
    h = activate(kind, pre, interleaved=interleaved)
    apart = [x.to(dtype).detach().requires_grad_() for x in checks.apart(activation, interleaved, pre)]
    expected = activate(kind, *apart)
    # torch's 1 + tanh cancels; the kernels' sigmoid does not
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4e-5}
    torch.testing.assert_close(h, expected, **close)
    dh = torch.randn_like(h)
    (dpre,) = torch.autograd.grad(h, pre, dh)
    for found, part in zip(checks.apart(activation, interleaved, dpre), torch.autograd.grad(expected, apart, dh)):
        torch.testing.assert_close(found.to(dtype), part, **close)


@pytest.mark.parametrize("interleaved", (False, True))
def test_gradients_have_gradients(interleaved, device):
    pre = torch.randn(5, 16, device=device, requires_grad=True)
    dh = torch.randn(5, 8, device=device, requires_grad=True)
    (dpre,) = torch.autograd.grad(
        activate(ACTIVATIONS["swiglu"], pre, interleaved=interleaved), pre, dh, create_graph=True
    )
    gate, up = checks.apart("swiglu", interleaved, pre)
    (truth,) = torch.autograd.grad(torch.nn.functional.silu(gate) * up, pre, dh.double(), create_graph=True)
    for found, expected in zip(*(torch.autograd.grad(x.square().sum(), (pre, dh)) for x in (dpre, truth))):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
