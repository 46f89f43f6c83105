"""The kernels of `moe.packing` under the interpreter."""

from __future__ import annotations

import packing_checks as checks
import pytest
import torch

from grouped_gemm import Recipe
from grouped_gemm.kernels.moe import packing


def test_ranks_of_tokens(monkeypatch):
    monkeypatch.setattr(packing, "_IDS", 16)  # so that there are several programs
    checks.check_find_ranks("cpu", 5)


def test_limited_rows_of_ranks(monkeypatch):
    monkeypatch.setattr(packing, "_IDS", 16)
    checks.check_limit_rows("cpu", 3)


def test_local_ids(monkeypatch):
    monkeypatch.setattr(packing, "_IDS", 16)
    checks.check_local_ids("cpu")


@pytest.mark.parametrize("num_tokens", (5, 0))
@pytest.mark.parametrize("recipe", (Recipe.NONE, Recipe.FP8_BLOCKWISE), ids=str)
def test_rows_for_peers(recipe, num_tokens):
    checks.check_pack_for_peers("cpu", recipe, num_tokens)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_sums_of_peers(dtype):
    checks.check_combine_of_peers("cpu", dtype)


@pytest.mark.parametrize("recipe", (Recipe.NONE, Recipe.FP8_BLOCKWISE_POW2), ids=str)
@pytest.mark.parametrize("features, dtype", ((72, torch.float32), (1160, torch.bfloat16)), ids=str)
def test_rows(features, dtype, recipe):
    checks.check_pack(features, dtype, recipe, "cpu", has_gaps=features == 72)
