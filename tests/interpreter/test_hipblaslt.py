"""The quantizers for hipBLASLt, bit for bit against their torch twins, in the fp8 type of either architecture."""

from __future__ import annotations

import fake_rocm
import pytest
from hipblaslt_checks import GROUPS, check_activations, check_weights

from grouped_gemm import Recipe, device

RECIPES = (Recipe.FP8_ROWWISE, Recipe.FP8_ROWWISE_POW2, Recipe.MXFP8)


@pytest.fixture(params=("gfx942", "gfx950"), autouse=True)
def arch(request, monkeypatch):
    machine = fake_rocm.machine(request.param, "7.1")
    monkeypatch.setattr(device, "_probe", lambda kind, index: machine)
    return request.param


@pytest.mark.parametrize("ends, num_rows, multiple", GROUPS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.value)
def test_activations(ends, num_rows, multiple, recipe):
    check_activations(ends, num_rows, multiple, recipe)


@pytest.mark.parametrize("contiguous", "kn")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.value)
def test_weights(recipe, contiguous):
    check_weights(recipe, contiguous)
