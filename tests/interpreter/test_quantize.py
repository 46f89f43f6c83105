"""The Triton quantizers against `reference`, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_checks import BACKEND, activations, check_activations, check_weights

from grouped_gemm import Recipe

RECIPES = tuple(recipe for recipe in Recipe if recipe.is_scaled)
# ends of groups, M, D, dtype, recipes: an empty group, whole and short blocks, rows past the last group; ends out of
# order and out of range; nothing but empty groups. The recipes of powers of two differ only in a constant.
ACTIVATIONS = (
    ([130, 130, 258], 270, 136, torch.bfloat16, RECIPES[::2]),
    ([-5, 200, 40, 999], 263, 50, torch.float32, RECIPES),
    ([0, 0], 20, 50, torch.bfloat16, RECIPES[::2]),
)
CASES = [(*case, recipe) for *case, recipes in ACTIVATIONS for recipe in recipes]


@pytest.mark.parametrize("ends, num_rows, features, dtype, recipe", CASES, ids=str)
def test_activations(ends, num_rows, features, dtype, recipe):
    torch.manual_seed(0)
    x = activations(num_rows, features, dtype)
    check_activations(x, BACKEND.plan(torch.tensor(ends, dtype=torch.int32), num_rows), recipe)


@pytest.mark.parametrize(
    "recipe, contiguous", [*itertools.product(RECIPES[::2], "kn"), *itertools.product(RECIPES[1::2], "k")], ids=str
)
def test_weights(recipe, contiguous):
    torch.manual_seed(0)
    b = torch.randn(2, 150, 130, dtype=torch.bfloat16)
    b[0, 3, 4] = torch.nan
    b = b.transpose(1, 2).contiguous().transpose(1, 2) if contiguous == "k" else b
    check_weights(b, recipe)
