"""The kernels between the GEMMs of a MoE layer: activations, and what is quantized with them."""

from __future__ import annotations

import pytest
import steps_checks as checks
import torch
from kernel_checks import assert_same, assert_same_bits

from grouped_gemm import Recipe
from grouped_gemm.backends import runs_kernels
from grouped_gemm.core.library import ops
from grouped_gemm.kernels.quantize.blocks import token_blocks
from grouped_gemm.moe import steps

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # exp(-x) is Inf, as on a GPU
CPU = torch.device("cpu")
FEW = (1, 0, 130)  # rows of groups, where interpreted kernels take long
RECIPES = (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2)
every_form = pytest.mark.parametrize("activation, interleaved, dtype", checks.FORMS, ids=str)
# activation, interleaved, dtype, I: blocks of up that start where gate's do, and not; I of no whole block
BACKWARDS = (
    ("swiglu", False, torch.bfloat16, 128),
    ("geglu", False, torch.bfloat16, 256),
    ("swiglu", False, torch.bfloat16, 72),
    ("swiglu_clamped", True, torch.bfloat16, 72),
    ("geglu", True, torch.float32, 136),
    ("gelu_tanh", False, torch.float16, 136),
)
BACKWARDS_WITHOUT_WEIGHTS = (BACKWARDS[0], *BACKWARDS[2:4], BACKWARDS[5])  # one of each kernel and layout
every_backward = pytest.mark.parametrize("activation, interleaved, dtype, features", BACKWARDS, ids=str)


def test_kernels_run_here():
    assert runs_kernels(CPU)


@pytest.mark.parametrize("sizes", (checks.SIZES, (0, 0), (4, 300)), ids=str)
def test_blocks_of_the_tests_are_those_of_the_kernel(sizes):
    dh, *_, offs, blocks = checks.operands(8, "relu", torch.float32, CPU, sizes)
    assert torch.equal(token_blocks(offs, len(dh)), blocks)


@every_form
def test_activations(activation, interleaved, dtype):
    checks.check_activate(activation, interleaved, dtype, 72, CPU, (1, 0, 20))  # several programs, of 8 or 16 rows


def test_several_steps_of_features():
    checks.check_activate("swiglu", False, torch.bfloat16, 1400, CPU, (1, 5))
    checks.check_activate("swiglu", True, torch.bfloat16, 1400, CPU, (1, 5))


@every_form
def test_activate_and_quantize(activation, interleaved, dtype):
    given = checks.operands(136, activation, dtype, CPU, FEW)
    checks.check_activate_quantize(activation, interleaved, RECIPES[interleaved], given)


@every_backward
def test_gradients_are_quantized(activation, interleaved, dtype, features):
    given = checks.operands(features, activation, dtype, CPU, checks.SIZES if features == 128 else FEW)
    checks.check_activate_backward_quantize(activation, interleaved, Recipe.FP8_BLOCKWISE_POW2, True, given)


@pytest.mark.parametrize("activation, interleaved, dtype, features", BACKWARDS_WITHOUT_WEIGHTS, ids=str)
def test_gradients_without_weights_are_quantized(activation, interleaved, dtype, features):
    given = checks.operands(features, activation, dtype, CPU, FEW)
    checks.check_activate_backward_quantize(activation, interleaved, Recipe.FP8_BLOCKWISE, False, given)


@pytest.mark.parametrize("sizes, unused", (((0, 0), 0), ((0, 0), 20)), ids=("no rows", "no rows in groups"))
def test_nothing_but_empty_groups(sizes, unused):
    for interleaved, features in ((False, 128), (True, 72), (False, 72)):
        given = checks.operands(features, "swiglu", torch.bfloat16, CPU, sizes, unused)
        checks.check_activate_quantize("swiglu", interleaved, Recipe.FP8_BLOCKWISE, given)
        checks.check_activate_backward_quantize("swiglu", interleaved, Recipe.FP8_BLOCKWISE, True, given)


@pytest.mark.parametrize("num_tokens, features", ((37, 72), (5, 1160), (0, 72)), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_tokens(num_tokens, features, dtype):
    checks.check_quantize_tokens(num_tokens, features, dtype, RECIPES[features == 72], CPU)


# Against the quantizers' kernels, and against the twins


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_bits_are_those_of_the_quantizers(recipe):
    *rows, ends, offs, blocks = checks.operands(128, "swiglu", torch.bfloat16, CPU, FEW)
    dpre, _, _, *found = ops.moe_activate_backward_quantize(*rows, blocks, offs, recipe.value, "swiglu", False)
    expected = ops.triton_quantize_activations(dpre, offs, recipe.value, True, False, blocks)
    used = slice(ends[-1]), (slice(None), slice(sum(-(-size // 4) * 4 for size in FEW)))
    for part, one, other, what in zip(used, found, expected, ("data", "scales")):
        assert_same_bits(one[part], other[part], what)


def test_twins_quantize_like_the_kernels(monkeypatch):
    recipe = Recipe.FP8_BLOCKWISE
    x = torch.randn(40, 136).bfloat16()
    by_kernels = ops.moe_quantize_tokens(x, recipe.value)
    monkeypatch.setattr(steps, "runs_kernels", lambda device: False)
    for one, other in zip(by_kernels, ops.moe_quantize_tokens(x, recipe.value)):
        assert_same(one, other, "moe_quantize_tokens")
