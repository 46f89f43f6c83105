"""What rows between ranks hold, by the ops of `moe.packing`: checked against plain loops, on any device."""

from __future__ import annotations

import torch
from kernel_checks import assert_same

from grouped_gemm import Recipe, reference
from grouped_gemm.core.library import ops
from grouped_gemm.moe import packing
from grouped_gemm.moe.packing import unpack
from grouped_gemm.testing import poisoned_memory

E, W, DIGEST = 8, 4, 2**31 - 1
IDS = torch.tensor([[0, 1, 7], [3, 3, 2], [-1, 8, 2**31], [2**32, 5, -7], [6, 0, 4]])
# (T, W): the ranks of these ids, each with two experts
GOES = [[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1]]
NUMBERS = [[2, 3], [1, 3], [2, 2], [2, 2]]  # tokens and slots of each rank


def check_find_ranks(device: torch.device | str, num_copies: int = 1) -> None:
    """Tokens in the order of ranks, then of tokens."""
    ids = IDS.repeat(num_copies, 1).to(device)
    numbers, places = ops.moe_find_ranks(ids, E, W, DIGEST)
    goes = torch.tensor(GOES, dtype=torch.bool).repeat(num_copies, 1)
    expected = torch.full(goes.shape, -1, dtype=torch.int32)
    expected.t()[goes.t()] = torch.arange(int(goes.sum()), dtype=torch.int32)
    assert_same(places.cpu(), expected, "places")
    expected = torch.tensor([[num_copies * n for n in row] + [DIGEST] for row in NUMBERS], dtype=torch.int32)
    assert_same(numbers.cpu(), expected, "numbers")


def check_pack(
    features: int, dtype: torch.dtype, recipe: Recipe, device: torch.device | str, has_gaps: bool = False
) -> None:
    """Places may leave gaps, which are not written; ids that are no int32 become -1."""
    (num_tokens, top_k), num_rows = IDS.shape, 11 if has_gaps else 7
    wide = torch.randn(num_tokens, features + 8)
    x = wide.to(device, dtype)[:, 8:]
    weights = torch.rand(num_tokens, top_k).to(device, torch.bfloat16)
    places = ops.moe_find_ranks(IDS.to(device), E, W, DIGEST)[1]
    if has_gaps:
        places = torch.where(places >= 0, places + 2 * (places > 2) + 2 * (places > 5), -1).to(torch.int32)
    with poisoned_memory():
        packed = ops.moe_pack(x, IDS.to(device), weights, places, num_rows, recipe.value)
    assert packed.dtype == torch.uint8 and packed.stride(0) % 64 == 0
    data, scale, ids, row_weights = unpack(packed, features, top_k, dtype, recipe)
    if recipe.is_scaled:
        values, scales = reference.quantize(x, reference.row_blocks(recipe), recipe, data.dtype)
    else:
        values, scales = x, None
    expected_ids = torch.where((IDS >= 0) & (IDS < 2**31), IDS, -1).int()
    used = []
    for t, row in ((t, row) for t, rows in enumerate(places.tolist()) for row in rows if row >= 0):
        used.append(row)
        assert_same(data[row], values[t], f"features of token {t}")
        if scales is not None:
            assert scale is not None
            assert_same(scale[row], scales[t], f"scales of token {t}")
        assert_same(ids[row].cpu(), expected_ids[t], f"ids of token {t}")
        assert_same(row_weights[row], weights[t].float(), f"weights of token {t}")
    assert len(set(used)) == len(used) == 7
    gaps = [row for row in range(num_rows) if row not in used]
    assert (packed[gaps] == 255).all()
    alone = ops.moe_pack(x, None, None, places, num_rows, recipe.value)
    assert_same(unpack(alone, features, 0, dtype, recipe).data[used], data[used], "features without slots")


def check_limit_rows(device: torch.device | str, num_copies: int = 1) -> None:
    """What does not fit has no place, and its token is lost."""
    numbers, places = ops.moe_find_ranks(IDS.repeat(num_copies, 1).to(device), E, W, DIGEST)
    goes = torch.tensor(GOES).repeat(num_copies, 1)
    for capacity in (num_copies, 2 * num_copies):
        limited, lost, told = ops.moe_limit_rows(places, numbers, capacity)
        order = goes.cumsum(0) - 1
        fits = (goes > 0) & (order < capacity)
        expected = torch.where(fits, torch.arange(W) * capacity + order, -1)
        assert_same(limited.cpu(), expected.int(), "places")
        assert lost.dtype == torch.bool
        assert_same(lost.cpu(), (goes > 0).ne(fits).any(1), "lost tokens")
        counts, is_lost = [num_copies * n for n, _ in NUMBERS], int(capacity == num_copies)
        assert told.tolist() == [[count, is_lost] for count in counts]


def check_local_ids(device: torch.device | str, capacity: int = 3) -> None:
    """Ids count from this rank's first expert, in the rows that a rank says it has filled."""
    ids = torch.randint(E, (W * capacity, 2 + 5), dtype=torch.int32, device=device)[:, 1:6]
    counts = torch.tensor([0, capacity, 2, 1])
    for lost in (torch.zeros(W), torch.arange(W) == W - 1):
        told = torch.stack((counts, lost, counts), 1).int().to(device)[:, :2]
        local, any_lost = ops.moe_local_ids(ids, told, 6)
        is_used = torch.arange(capacity) < counts[:, None]
        assert_same(local.cpu(), torch.where(is_used.view(-1, 1), ids.cpu() - 6, -1), "ids")
        assert any_lost.dtype == torch.bool and any_lost.item() == bool(lost.any())


def check_pack_for_peers(device: torch.device | str, recipe: Recipe, num_tokens: int = 5) -> None:
    """Buffers of ranks, here in one memory: kernels write to all what each rank's part of `moe_pack` has."""
    rank, capacity, features, top_k = 1, 4, 200, IDS.shape[1]
    x, weights = torch.randn(5, features, device=device)[:num_tokens], torch.rand(5, top_k, device=device)[:num_tokens]
    ids = IDS[:num_tokens].to(device)
    numbers, places = ops.moe_find_ranks(ids, E, W, DIGEST)
    places, _, told = ops.moe_limit_rows(places, numbers, capacity)
    num_bytes, num_rows = packing.row_bytes(x, top_k, recipe), W * capacity
    size = packing.buffer_bytes(W, num_rows * num_bytes)
    buffers = torch.full((W, size), 255, dtype=torch.uint8, device=device)
    away = [(w - rank) * size for w in range(W)]
    of_rows = [base + (rank - w) * capacity * num_bytes for w, base in enumerate(away)]
    shifts = torch.tensor([of_rows, away], device=device)
    own, slots = (buffers[rank], x), (ids, weights)
    ops.moe_pack_for_peers(*own, *slots, places, told, shifts, rank, num_rows, recipe.value)
    expected = ops.moe_pack(x, *slots, places, num_rows, recipe.value).view(W, capacity, num_bytes)
    for w, count in enumerate(numbers[:, 0].tolist()):
        headers, rows = packing.in_buffer(buffers[w], W, num_rows, num_bytes)
        assert headers[rank].tolist() == [count, 0]
        parts = (unpack(r, features, top_k, x.dtype, recipe) for r in (rows.view(W, capacity, -1)[rank], expected[w]))
        for found, right in zip(*parts):
            if found is not None:
                assert_same(found[:count], right[:count], f"rows for rank {w}")
        rows.view(W, capacity, -1)[rank, :count], headers[rank] = 255, -1
    assert (buffers == 255).all()  # nothing else is written


def check_combine_of_peers(device: torch.device | str, dtype: torch.dtype) -> None:
    """Rows of ranks in one memory: the sums have the bits of those of rows that lie in one tensor."""
    rows = torch.randn(W, 6, 200).to(device, dtype)
    places = torch.tensor([[0, -1, 5, 2], [-1, -1, -1, -1], [1, 0, 3, 3]], dtype=torch.int32, device=device)
    shifts = torch.arange(W, device=device) * rows[0].nbytes
    lost = torch.tensor([False, False, True], device=device)
    in_one = torch.where(places >= 0, places + 6 * torch.arange(W, device=device), -1).int()
    expected = ops.moe_combine(rows.flatten(0, 1), None, in_one)
    assert_same(ops.moe_combine(rows[0], None, places, None, shifts), expected, "sums")
    expected[2] = torch.nan
    assert_same(ops.moe_combine(rows[0], None, places, lost, shifts), expected, "sums, one token lost")
