"""More groups than a kernel handles in one step. Here a step handles two groups, so that few groups suffice."""

from __future__ import annotations

import deepgemm_checks
import fake_rocm
import hipblaslt_checks
import pytest
import torch
import triton.language as tl
from kernel_checks import BACKEND, activations, check_activations

from grouped_gemm import Recipe, grouped_mm, reference
from grouped_gemm.backends.deepgemm import quantize as deepgemm_quantize
from grouped_gemm.core import machine
from grouped_gemm.kernels.common import groups, launch
from grouped_gemm.kernels.gemm import k_grouped

# ends of groups, M: empty groups, short blocks, rows past the last group; ends out of order and out of range
GROUPS = (([0, 130, 130, 131, 262], 270), ([-5, 200, 40, 999, 7], 263))


@pytest.fixture(autouse=True)
def two_groups_per_step(monkeypatch):
    for module in (groups, deepgemm_quantize):
        monkeypatch.setattr(module, "MOST_AT_ONCE", tl.constexpr(2))
    monkeypatch.setattr(k_grouped, "_gemms", {})


@pytest.mark.parametrize("recipe", [Recipe.FP8_BLOCKWISE, Recipe.MXFP8], ids=lambda r: r.value)
@pytest.mark.parametrize("ends, num_rows", GROUPS, ids=str)
def test_activations_in_many_groups(ends, num_rows, recipe):
    torch.manual_seed(0)
    x = activations(num_rows, 50, torch.float32)
    check_activations(x, BACKEND.plan(torch.tensor(ends, dtype=torch.int32), num_rows), recipe)


@pytest.mark.parametrize("recipe", [Recipe.NONE, Recipe.FP8_BLOCKWISE], ids=lambda r: r.value)
def test_gradients_of_many_groups(recipe):
    torch.manual_seed(0)
    ends, num_rows = GROUPS[1]
    offs = torch.tensor(ends, dtype=torch.int32)
    a, b, bias = torch.randn(num_rows, 16), torch.randn(5, 16, 32, requires_grad=True), torch.zeros(5, 32)
    bias.requires_grad_()
    y = grouped_mm(a, b, offs, bias=bias, recipe=recipe, kernel_preference="triton")
    dy = torch.randn_like(y)
    db, dbias = torch.autograd.grad(y, (b, bias), dy)
    inside = reference.group_ends(offs, num_rows)
    truth = reference.wgrad(a, dy, inside)
    assert (db.double() - truth).norm() <= (0.06 if recipe.is_scaled else 1e-6) * truth.norm()
    torch.testing.assert_close(dbias.double(), reference.group_sums(dy, inside), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("ends, num_rows", GROUPS, ids=str)
def test_the_plan_of_many_groups_for_deepgemm(ends, num_rows):
    deepgemm_checks.check_plan(ends, num_rows, 1)


def test_mx_activations_in_many_groups_for_hipblaslt(monkeypatch):
    monkeypatch.setattr(machine, "_probe", lambda kind, index: fake_rocm.machine("gfx950", "7.1"))
    hipblaslt_checks.check_activations((128, 64, 128, 256), 260, 128, Recipe.MXFP8)


@pytest.mark.parametrize("recipe", [Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8], ids=lambda r: r.value)
@pytest.mark.parametrize("contiguous", ["k", "n"])
def test_weights_of_more_experts_than_a_grid_has_programs(recipe, contiguous, monkeypatch):
    torch.manual_seed(0)
    b = torch.randn(3, 40, 72).transpose(1, 2) if contiguous == "k" else torch.randn(3, 72, 40)
    right = BACKEND.quantize_weights(b, recipe, forward=True, dgrad=True)
    monkeypatch.setattr(launch, "_MOST_PROGRAMS", 2)
    found = BACKEND.quantize_weights(b, recipe, forward=True, dgrad=True)
    for ours, theirs in zip(found, right):
        assert torch.equal(ours.data.view(torch.uint8), theirs.data.view(torch.uint8))
        assert torch.equal(ours.scale.view(torch.uint8), theirs.scale.view(torch.uint8))
