"""Rows between ranks: the twins on a CPU, the kernels on a GPU. expert_parallel_ranks.py sends them."""

from __future__ import annotations

import packing_checks as checks
import pytest
import torch

from grouped_gemm import Recipe
from grouped_gemm.core.library import ops

RECIPES = (Recipe.NONE, Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2)


@pytest.mark.parametrize("num_copies", (1, 700))
def test_ranks_of_tokens(num_copies, device):
    checks.check_find_ranks(device, num_copies)


@pytest.mark.parametrize("num_copies", (1, 700))
def test_limited_rows_of_ranks(num_copies, device):
    checks.check_limit_rows(device, num_copies)


def test_local_ids(device):
    checks.check_local_ids(device)
    checks.check_local_ids(device, 700)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("features", (1, 72, 1408))
def test_rows(features, dtype, recipe, device):
    checks.check_pack(features, dtype, recipe, device)


def test_rows_with_gaps(device):
    checks.check_pack(136, torch.bfloat16, Recipe.FP8_BLOCKWISE, device, has_gaps=True)
    checks.check_pack(136, torch.bfloat16, Recipe.NONE, device, has_gaps=True)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_rows_for_peers(recipe, device):
    if device.type == "cpu":
        pytest.skip("kernels alone write to other buffers: tests/interpreter runs them")
    checks.check_pack_for_peers(device, recipe)
    checks.check_pack_for_peers(device, recipe, num_tokens=0)
    checks.check_combine_of_peers(device, torch.bfloat16)


def test_no_tokens_and_no_slots(device):
    for shape in ((0, 3), (4, 0)):
        numbers, places = ops.moe_find_ranks(torch.zeros(shape, dtype=torch.int64, device=device), 8, 4, 16)
        assert numbers.tolist() == [[0, 0, 16]] * 4 and places.shape == (shape[0], 4) and (places < 0).all()
        x = torch.randn(shape[0], 16, device=device)
        assert ops.moe_pack(x, None, None, places, 0, "none").shape == (0, 64)
