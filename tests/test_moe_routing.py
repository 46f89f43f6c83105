"""Routing of an MoE layer: `reference.route` against a loop over slots, and the kernels against `reference.route`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from grouped_gemm import Machine, reference
from grouped_gemm.backends import get_backend
from grouped_gemm.core.call_spec import CallSpec, RowClass
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.moe.routing import Routing, route

FAR = 2**40  # its lowest 32 bits are those of expert 0
# ids by token, E
CASES: dict[str, tuple[list[list[int]], int]] = {
    "no expert is empty": ([[1, 2], [0, 1], [2, 0]], 3),
    "empty experts": ([[1, 4], [4, 1], [1, 4]], 7),
    "all tokens to one expert": ([[2], [2], [2], [2]], 5),
    "an expert twice in a token": ([[3, 3, 1], [0, 3, 3]], 4),
    "each token to all experts": ([[2, 0, 1], [0, 1, 2], [1, 2, 0]], 3),
    "one expert": ([[0], [0]], 1),
    "one token": ([[5, 1]], 8),
    "dropped slots": ([[-1, 2], [3, 0], [1, -(2**31)], [2**31 - 1, 2]], 3),
    "only dropped slots": ([[-1], [3]], 3),
    "more experts than slots": ([[1500, 7], [7, 2999]], 3000),
}


def looped(ids: Sequence[Sequence[int]], num_experts: int) -> tuple[list[int], list[int], list[list[int]]]:
    """``offs``, ``source`` and ``places``, expert by expert, token by token and slot by slot."""
    offs, source, places = [], [], [[-1] * len(slots) for slots in ids]
    for e in range(num_experts):
        for token, slots in enumerate(ids):
            for j, expert in enumerate(slots):
                if expert == e:
                    places[token][j] = len(source)
                    source.append(token)
        offs.append(len(source))
    source += [-1] * (sum(map(len, ids)) - len(source))
    return offs, source, places


def assert_equal(found: Routing, expected: Sequence[Tensor]) -> None:
    for name, x, right in zip(Routing._fields, found, expected):
        assert x.dtype == torch.int32 and x.is_contiguous(), name
        assert torch.equal(x, right), name


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("ids, num_experts", CASES.values(), ids=CASES)
def test_rows_are_in_the_order_of_expert_token_and_slot(ids, num_experts, dtype):
    found = route(torch.tensor(ids, dtype=dtype), num_experts)
    offs, source, places = looped(ids, num_experts)
    assert (found.offs.tolist(), found.source.tolist(), found.places.tolist()) == (offs, source, places)


@pytest.mark.parametrize("group_alignment", (2, 16))
@pytest.mark.parametrize("ids, num_experts", CASES.values(), ids=CASES)
def test_padded_experts_keep_the_order_of_their_rows(ids, num_experts, group_alignment):
    """Each expert begins at a multiple, and nothing but padding lies between its last row and the next expert."""
    ends, tokens, rows = looped(ids, num_experts)
    offs, source, places = route(torch.tensor(ids), num_experts, group_alignment)
    assert len(source) == len(tokens) + num_experts * (group_alignment - 1)
    start = first = 0
    for end, padded in zip(ends, offs.tolist()):
        padding = padded - start - (end - first)
        assert padded % group_alignment == 0 and 0 <= padding < group_alignment
        assert source[start:padded].tolist() == tokens[first:end] + [-1] * padding
        for row in range(first, end):
            assert torch.equal(places == start + row - first, torch.tensor(rows) == row)
        start, first = padded, end
    assert (source[start:] == -1).all()
    assert torch.equal(places < 0, torch.tensor(rows) < 0)


def test_an_id_that_does_not_fit_32_bits_is_dropped():
    found = route(torch.tensor([[FAR, 1], [0, -FAR]]), 2)
    assert [x.tolist() for x in found] == [[1, 2], [1, 0, -1, -1], [[-1, 1], [0, -1]]]


@pytest.mark.parametrize("shape", ((0, 2), (0, 1), (3, 0)), ids=str)
def test_without_slots_all_experts_are_empty(shape):
    found = route(torch.empty(shape, dtype=torch.int64), 4)
    assert_equal(found, (torch.zeros(4).int(), torch.empty(0).int(), torch.empty(shape).int()))


def test_ids_may_be_strided():
    wide = torch.randint(-1, 7, (12, 10))
    for ids in (wide[:, ::3], wide.t()[:4], wide[:1].expand(5, -1)):
        assert_equal(route(ids, 6), route(ids.contiguous(), 6))


def test_places_and_source_are_inverse_to_each_other():
    ids = torch.randint(0, 64, (500, 8))
    offs, source, places = route(ids, 64)
    assert offs[-1] == ids.numel() == len(source)
    assert torch.equal(places.flatten().sort().values, torch.arange(len(source), dtype=torch.int32))
    assert torch.equal(source[places.long()], torch.arange(500, dtype=torch.int32)[:, None].expand(-1, 8))


def test_nothing_depends_on_values_that_only_the_device_knows():
    with FakeTensorMode():
        offs, source, places = reference.route(torch.zeros(5, 2, dtype=torch.int64), 3)
    assert (offs.shape, source.shape, places.shape) == ((3,), (10,), (5, 2))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_once_for_any_number_of_tokens():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(route, fullgraph=True, backend=counter, dynamic=True)
    for num_tokens in (3, 5, 300):
        ids = torch.randint(-1, 9, (num_tokens, 2))
        assert_equal(compiled(ids, 8), route(ids, 8))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_number_of_tokens_may_be_data_dependent():
    def kept(ids: Tensor, mask: Tensor) -> Routing:
        return route(ids[mask], 4)

    ids = torch.randint(0, 4, (20, 2))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(kept, fullgraph=True, backend="aot_eager")
        for mask in (ids[:, 0] > 1, ids[:, 0] < 0):
            assert_equal(compiled(ids, mask), kept(ids, mask))


IDS = torch.zeros(3, 2, dtype=torch.int64)
BAD = {
    "not a tensor": ([[0, 1]], 2, TypeError, "^topk_ids: expected a torch.Tensor; found list$"),
    "weights": (IDS.float(), 2, ValueError, "indices that torch.topk returns; found float32$"),
    "int16": (IDS.short(), 2, ValueError, "^topk_ids.dtype: expected one of int32, int64; found int16$"),
    "rank 1": (IDS[0], 2, ValueError, r"found shape \(2,\); pass topk_ids\[:, None\] for one expert per token$"),
    "rank 3": (IDS[None], 2, ValueError, r"^topk_ids: expected a tensor of rank 2; found 3, shape \(1, 3, 2\)$"),
    "no experts": (IDS, 0, ValueError, "^num_experts: expected at least 1 and at most 1048576; found 0$"),
    "too many experts": (IDS, 2**20 + 1, ValueError, "found 1048577$"),
    "a float of experts": (IDS, 2.0, TypeError, "^num_experts: expected an int; found float$"),
    "a bool of experts": (IDS, True, TypeError, "^num_experts: expected an int; found bool$"),
    "too many slots": (
        IDS[:1].expand(2**30, 2), 2, ValueError,
        r"^topk_ids: expected at most 2147483647 entries, T \* k; found 2147483648; split the tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("topk_ids, num_experts, error, message", BAD.values(), ids=BAD)
def test_bad_arguments(topk_ids, num_experts, error, message):
    with pytest.raises(error, match=message):
        route(topk_ids, num_experts)


@pytest.mark.parametrize("interprets", (False, True))
@pytest.mark.parametrize("triton", ("3.5.1", "3.6.0", None))
@pytest.mark.parametrize("vendor, arch", (("nvidia", "sm_90"), ("nvidia", "sm_75"), ("amd", "gfx942"), ("cpu", "cpu")))
def test_kernels_run_where_the_triton_backend_runs(vendor, arch, triton, interprets):
    versions = () if triton is None else (("triton", triton),)
    machine = Machine(vendor, arch, arch, versions, interprets)
    spec = CallSpec(machine, 1, 16, 16, RowClass.DECODE)
    requirements = get_backend(BackendKind.TRITON).requirements
    assert machine.runs_kernels is all(requirement.holds(spec) for requirement in requirements)


# Kernels on a GPU; tests/interpreter has more of them


SIZES = {"one slot": (1, 1, 1), "small": (16, 8, 128), "a block": (128, 8, 64), "blocks": (16384, 8, 128)}
SIZES |= {"many experts": (3000, 6, 4000), "ragged": (1001, 3, 100), "no tokens": (0, 2, 8), "long": (300_000, 2, 5)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("num_tokens, top_k, num_experts", SIZES.values(), ids=SIZES)
def test_kernels_give_what_the_reference_gives(num_tokens, top_k, num_experts, dtype, device):
    skew = torch.rand(num_tokens, top_k, device=device) ** 3  # the first experts get most of the slots
    ids = (skew * (num_experts + 1)).to(dtype) - torch.randint(0, 2, skew.shape, device=device).to(dtype)
    for alignment in (1, 16):
        assert_equal(route(ids, num_experts, alignment), reference.route(ids, num_experts, alignment))


@pytest.mark.gpu
def test_a_graph_follows_other_routing_without_a_host_sync(device):
    ids = torch.zeros(2000, 4, dtype=torch.int64, device=device)
    route(ids, 32)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        route(ids, 32)
        route(ids, 32, 16)
        reference.route(ids, 32)
        with torch.cuda.graph(graph):
            found = route(ids, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(3):
        ids.copy_(torch.randint(-1, 33, ids.shape))
        graph.replay()
        assert_equal(found, reference.route(ids, 32))


@pytest.mark.gpu
def test_the_most_rows_that_int32_can_count(device):
    most = 2**31 - 1
    needed = 5 * most * 4  # ids, source, places, the rows to compare them with, and the results of comparing
    if torch.cuda.mem_get_info(device)[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory")
    ids = torch.zeros(most, 1, dtype=torch.int32, device=device)
    ids[0], ids[-1] = 7, 1
    offs, source, places = route(ids, 2)
    assert offs.tolist() == [most - 2, most - 1]
    rows = torch.arange(most - 1, dtype=torch.int32, device=device)
    assert places[0] == source[-1] == -1
    assert torch.equal(places[1:, 0], rows)
    assert torch.equal(source[:-1], rows.add_(1))
