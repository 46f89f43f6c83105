"""The quantizers for hipBLASLt, bit for bit against their torch twins, with the fp8 type of each architecture."""

from __future__ import annotations

import fake_rocm
import pytest
from hipblaslt_checks import GROUPS, check_activations, check_weights

from grouped_gemm import Recipe
from grouped_gemm.core import machine as machine_module

# every recipe with the fp8 types that it has; POW2 differs from rowwise only in a constant of the kernels
ROWWISE, POW2, MX = Recipe.FP8_ROWWISE, Recipe.FP8_ROWWISE_POW2, Recipe.MXFP8
EACH = (("gfx942", ROWWISE), ("gfx950", ROWWISE), ("gfx950", MX))


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


def test_activations_with_powers_of_two(stand_on):
    stand_on("gfx942")
    check_activations(*GROUPS[3], POW2)


@pytest.mark.parametrize("contiguous", "kn")
@pytest.mark.parametrize("arch, recipe", (*EACH, ("gfx942", POW2)), ids=str)
def test_weights(arch, recipe, contiguous, stand_on):
    stand_on(arch)
    check_weights(recipe, contiguous)
