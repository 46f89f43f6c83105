"""The kernels of routing give the bits of `reference.route`."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from grouped_gemm import reference, testing
from grouped_gemm.kernels.common import groups
from grouped_gemm.kernels.moe import routing
from grouped_gemm.moe.routing import route


def check(ids: torch.Tensor, num_experts: int, group_alignment: int = 1) -> None:
    with testing.poisoned_memory():
        routed = route(ids, num_experts, group_alignment)
    for found, expected in zip(routed, reference.route(ids, num_experts, group_alignment)):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The kernels that were launched."""
    found: list[object] = []
    launch = routing.launch
    monkeypatch.setattr(
        routing, "launch", lambda kernel, *args, **kw: found.append(kernel) or launch(kernel, *args, **kw)
    )
    return found


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8 slots, and two of them at a time, instead of 1024 and 256."""
    monkeypatch.setattr(routing, "_SMALL", 4)
    monkeypatch.setattr(routing, "_LARGE", 8)
    monkeypatch.setattr(routing, "_SUMS", {"BLOCK_P": 2, "BLOCK_E": 4})


@pytest.mark.parametrize("shape, num_experts", (((0, 2), 3), ((1, 1), 1), ((16, 8), 5), ((7, 3), 40)), ids=str)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
def test_few_slots_in_one_launch(shape, num_experts, dtype, launches):
    check(torch.randint(-1, num_experts + 1, shape, dtype=dtype), num_experts)
    assert launches == [routing._place]


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("shape", ((5, 1), (9, 1), (8, 4), (11, 5)), ids=str)  # one or more blocks, full and not
@pytest.mark.parametrize("num_experts", (1, 3, 9))
def test_several_blocks(shape, num_experts, launches):
    check(torch.randint(-1, num_experts + 1, shape), num_experts)
    assert len(launches) == (3 if shape[0] * shape[1] > 8 else 1)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("expert", (-1, 0, 2, 3))
def test_all_tokens_to_one_expert_or_to_none(expert):
    check(torch.full((13, 2), expert), 3)


@pytest.mark.usefixtures("short_blocks")
def test_ids_far_out_of_range_are_dropped():
    far = torch.tensor([2**62, -(2**63), 2**32, 2**31, -(2**31), -(2**32) + 1])
    check(torch.cat([far, torch.arange(4), far])[:, None], 4)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("num_experts", (2, 5, 8))
def test_more_experts_than_a_step_counts(num_experts, monkeypatch):
    for module in (groups, routing):
        monkeypatch.setattr(module, "MOST_AT_ONCE", tl.constexpr(2))
    check(torch.randint(-1, num_experts + 1, (10, 3)), num_experts)


@pytest.mark.usefixtures("short_blocks")
def test_strided_ids():
    check(torch.randint(0, 4, (6, 10)).t()[::2], 4)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("shape", ((0, 2), (3, 1), (11, 5)), ids=str)  # no block, one, several
@pytest.mark.parametrize("num_experts, group_alignment", ((1, 16), (3, 4), (9, 128)))
def test_padded_experts(shape, num_experts, group_alignment, launches, monkeypatch):
    for module in (groups, routing):
        monkeypatch.setattr(module, "MOST_AT_ONCE", tl.constexpr(4))
    check(torch.randint(-1, num_experts + 1, shape), num_experts, group_alignment)
    assert launches == [routing._count, routing._add_blocks, routing._pad, routing._place]
