"""The Triton backend finds the blocks of tokens once per plan; results do not depend on who shares the plan."""

from __future__ import annotations

import pytest
import torch

from grouped_gemm import GroupPlan, grouped_mm
from grouped_gemm.kernels.quantize import fp8

E, M, K, N = 3, 150, 48, 32
OFFS = torch.tensor((5, 5, 140), dtype=torch.int32)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """An entry for each launch of the kernel that finds the blocks."""
    launches: list[object] = []
    launch = fp8.launch

    def counted(kernel, *args, **options):
        if kernel is fp8._find_blocks:
            launches.append(kernel)
        launch(kernel, *args, **options)

    monkeypatch.setattr(fp8, "launch", counted)
    return launches


def train(groups, recipe, needs_grad=True):
    """Gate-up and down, and their gradients."""
    torch.manual_seed(0)
    a, up, down = (torch.randn(*shape).bfloat16() for shape in ((M, K), (E, K, N), (E, N, K)))
    leaves = [x.requires_grad_(needs_grad) for x in (a, up, down)]
    y = a
    for b in (up, down):
        y = grouped_mm(y, b, groups, recipe=recipe, kernel_preference="triton")
    return (y, *torch.autograd.grad(y, leaves, torch.ones_like(y))) if needs_grad else (y,)


@pytest.mark.parametrize("recipe, plain", (("fp8_rowwise", 2), ("fp8_blockwise", 2), ("mxfp8", 0), (None, 0)))
def test_blocks_are_found_once_by_a_call_and_once_by_a_plan(recipe, plain, found):
    """``plain``: how often two calls find them without a shared plan. ``a`` and dY of a call share the blocks."""
    expected = train(OFFS, recipe)
    assert len(found) == plain
    found.clear()
    shared = train(GroupPlan(OFFS, M), recipe)
    assert len(found) == min(plain, 1)
    assert all(map(torch.equal, shared, expected))


@pytest.mark.parametrize("recipe, count", (("fp8_rowwise", 0), ("fp8_blockwise", 1)))
def test_without_gradients_only_blockwise_needs_the_blocks(recipe, count, found):
    train(GroupPlan(OFFS, M), recipe, needs_grad=False)
    assert len(found) == count
