"""The quantizers for hipBLASLt, bit for bit against their torch twins, with the fp8 type of each architecture."""

from __future__ import annotations

import fake_rocm
import pytest
from hipblaslt_checks import GROUPS, check_activations, check_weights

from grouped_gemm import Recipe
from grouped_gemm.core import machine as machine_module

ROWWISE, POW2, MX = Recipe.FP8_ROWWISE, Recipe.FP8_ROWWISE_POW2, Recipe.MXFP8
EACH = (("gfx942", ROWWISE), ("gfx950", MX))
# They differ from rowwise on gfx942 only in a constant of the kernels, and in the fp8 type.
LIKE_ROWWISE = (("gfx942", POW2), ("gfx950", ROWWISE))


@pytest.fixture
def stand_on(monkeypatch):
    def machine(arch: str) -> None:
        found = fake_rocm.machine(arch, "7.1")
        monkeypatch.setattr(machine_module, "_probe", lambda kind, index: found)

    return machine


@pytest.mark.parametrize("ends, num_rows, multiple", GROUPS, ids=str)
@pytest.mark.parametrize("arch, recipe", EACH, ids=str)
def test_activations(arch, recipe, ends, num_rows, multiple, stand_on):
    stand_on(arch)
    check_activations(ends, num_rows, multiple, recipe)


@pytest.mark.parametrize("contiguous", "kn")
@pytest.mark.parametrize("arch, recipe", EACH, ids=str)
def test_weights(arch, recipe, contiguous, stand_on):
    stand_on(arch)
    check_weights(recipe, contiguous)


@pytest.mark.parametrize("arch, recipe", LIKE_ROWWISE, ids=str)
def test_a_recipe_or_an_fp8_type_that_is_like_another(arch, recipe, stand_on):
    stand_on(arch)
    check_activations(*GROUPS[3], recipe)
    check_weights(recipe, "k")
