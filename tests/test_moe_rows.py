"""`moe.rows`: gathering tokens into routed rows, combining them, and the gradients of both.

The truth is plain indexing in fp64. T, k, M = T * k, H: tokens, slots of a token, routed rows, features.
"""

from __future__ import annotations

import pytest
import torch
from routings import routing
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from grouped_gemm.moe.rows import combine, gather

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# T, k, H: H that no vector load fits, more than one block of H, a single slot, more slots than are unrolled, no tokens
SHAPES = ((13, 3, 707), (6, 8, 2080), (5, 1, 8), (4, 17, 24), (1, 2, 16), (0, 2, 16))
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def true_rows(x: Tensor, source: Tensor) -> Tensor:
    return x[source.clamp(min=0).long()].masked_fill((source < 0)[:, None], 0)


def true_slots(rows: Tensor, places: Tensor) -> Tensor:
    """The row of each slot, (T, k, H)."""
    return rows[places.clamp(min=0).long()].masked_fill((places < 0)[..., None], 0)


def true_sums(rows: Tensor, weights: Tensor | None, places: Tensor) -> Tensor:
    slots = true_slots(rows, places)
    return (slots if weights is None else slots * weights[..., None].to(rows.dtype)).sum(1)


def true_dots(x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    return (true_slots(rows, places) * x[:, None]).sum(-1)


def weights_by_row(weights: Tensor, places: Tensor) -> Tensor:
    """(M, 1)."""
    by_row = weights.new_zeros(places.numel() + 1)
    by_row[places.long()] = weights  # dropped slots share the last entry
    return by_row[:-1, None]


def assert_rounds_to(found: Tensor, truth: Tensor, magnitude: Tensor, terms: int) -> None:
    """``found`` is ``truth``, summed in fp32 and rounded once to its dtype. ``magnitude``: the sum of magnitudes."""
    limits = torch.finfo(found.dtype)
    bound = truth.abs() * limits.eps / 2 + magnitude * (terms + 1) * 2**-24 * 1.01 + limits.smallest_normal * limits.eps
    assert found.shape == truth.shape
    assert ((found.double() - truth).abs() <= bound).all(), ((found.double() - truth).abs() / bound).max()


def operands(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """x (T, H), rows (M, H) and weights (T, k) in fp32, all leaves; source and places."""
    num_tokens, top_k, features = shape
    x, rows, weights = (
        torch.randn(num_tokens, features),
        torch.randn(num_tokens * top_k, features),
        torch.randn(shape[:2]),
    )
    leaves = (x.to(device, dtype), rows.to(device, dtype), weights.to(device))
    return (*(leaf.requires_grad_() for leaf in leaves), *routing(num_tokens, top_k, device=device))


@pytest.mark.parametrize("num_rows", (10, 14, 40), ids=("all used", "some unused", "more than slots"))
@pytest.mark.parametrize("with_weights", (False, True), ids=("no weights", "weights"))
def test_any_number_of_rows(num_rows, with_weights, device):
    """As in expert parallelism: unused rows lie anywhere, and all rows may be used although slots were dropped."""
    torch.manual_seed(0)
    x, weights = torch.randn(6, 40, device=device), torch.rand(6, 3, device=device)
    slots = torch.randperm(18)[:10]
    places = torch.full((18,), -1, dtype=torch.int32).index_copy(0, slots, torch.randperm(num_rows)[:10].int())
    places[slots[0]] = num_rows - 1 if num_rows - 1 not in places else places[slots[0]]
    source = torch.full((num_rows + 1,), -1, dtype=torch.int32)
    source[places.long()] = torch.arange(18, dtype=torch.int32) // 3  # dropped slots share the last entry
    source, places = source[:-1].to(device), places.view(6, 3).to(device)
    if with_weights:
        rows = torch.randn(num_rows, 40, device=device, requires_grad=True)
        (found,) = torch.autograd.grad(combine(rows, weights, source, places), rows, x)
        by_row = weights.new_zeros(num_rows + 1)
        by_row[places.long()] = weights
        expected = true_rows(x, source) * by_row[:-1, None]
    else:
        found, expected = gather(x, source, places), true_rows(x, source)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_rows_without_tokens_are_zero(device):
    places = torch.empty(0, 2, dtype=torch.int32, device=device)
    source = torch.full((7,), -1, dtype=torch.int32, device=device)
    assert not gather(torch.empty(0, 16, device=device), source, places).any()


def test_tokens_without_rows_are_zero(device):
    """As in expert parallelism, if a rank has tokens whose slots are all dropped: it sends nothing."""
    places = torch.full((5, 2), -1, dtype=torch.int32, device=device)
    source = torch.empty(0, dtype=torch.int32, device=device)
    x, weights = torch.randn(5, 16, device=device), torch.rand(5, 2, device=device)
    results = train(x, weights, source, places, torch.randn_like(x))
    assert [tuple(result.shape) for result in results] == [(5, 16), (5, 16), (5, 2)]
    assert not any(result.any() for result in results)


@every_shape
@every_dtype
def test_gather_and_its_gradient(shape, dtype, device):
    x, drows, _, source, places = operands(shape, dtype, device)
    rows = gather(x, source, places)
    assert torch.equal(rows, true_rows(x, source))
    (dx,) = torch.autograd.grad(rows, x, drows.detach())
    g = drows.detach().double()
    assert dx.dtype == dtype
    assert_rounds_to(dx, true_sums(g, None, places), true_sums(g.abs(), None, places), shape[1])


@every_shape
@every_dtype
@pytest.mark.parametrize("weights_dtype", (torch.float32, torch.bfloat16, None), ids=str)
def test_combine_and_its_gradients(shape, dtype, weights_dtype, device):
    dy, rows, weights, source, places = operands(shape, dtype, device)
    weights = None if weights_dtype is None else weights.detach().to(weights_dtype).requires_grad_()
    y = combine(rows, weights, source, places)
    assert y.dtype == dtype
    r, g = rows.detach().double(), dy.detach().double()
    w = None if weights is None else weights.detach().double()
    assert_rounds_to(y, true_sums(r, w, places), true_sums(r.abs(), None if w is None else w.abs(), places), shape[1])

    leaves = (rows,) if weights is None else (rows, weights)
    drows, *dweights = torch.autograd.grad(y, leaves, dy.detach())
    assert drows.dtype == dtype
    true_drows = true_rows(g, source) * (1 if w is None else weights_by_row(w, places))
    assert_rounds_to(drows, true_drows, true_drows.abs(), 1)
    if weights is not None:
        assert dweights[0].dtype == weights_dtype
        truth, magnitude = true_dots(g, r, places), true_dots(g.abs(), r.abs(), places)
        assert_rounds_to(dweights[0], truth, magnitude, shape[2])


def test_weights_of_one_give_the_bits_of_no_weights(device):
    _, rows, weights, source, places = operands((13, 3, 64), torch.bfloat16, device)
    assert torch.equal(combine(rows, torch.ones_like(weights), source, places), combine(rows, None, source, places))


@pytest.mark.parametrize("wanted", ("rows", "weights"))
def test_one_gradient_alone_has_the_bits_of_both(wanted, device):
    dy, rows, weights, source, places = operands((13, 3, 64), torch.bfloat16, device)
    both = dict(
        zip(("rows", "weights"), torch.autograd.grad(combine(rows, weights, source, places), (rows, weights), dy))
    )
    leaves = {"rows": rows.detach(), "weights": weights.detach()}
    leaf = leaves[wanted].requires_grad_()
    (alone,) = torch.autograd.grad(combine(*leaves.values(), source, places), leaf, dy)
    assert torch.equal(alone, both[wanted])


def test_rows_are_kept_only_for_the_gradient_of_the_weights(device):
    _, rows, weights, source, places = operands((13, 3, 64), torch.bfloat16, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        combine(rows, weights.detach(), source, places)
        gather(rows[:13], source, places)
        assert rows.data_ptr() not in saved
        combine(rows, weights, source, places)
        assert rows.data_ptr() in saved


def test_a_sum_does_not_depend_on_where_its_rows_lie(device):
    _, rows, weights, source, places = operands((13, 5, 40), torch.float32, device)
    y = combine(rows, weights, source, places)
    used = int((source >= 0).sum())
    order = torch.randperm(used, device=device)
    moved_source, moved_rows = source.clone(), rows.detach().clone()
    moved_source[:used], moved_rows[:used] = source[:used][order], rows[:used][order]
    moved_places = torch.where(places < 0, -1, order.argsort()[places.clamp(min=0).long()].int()).int()
    assert torch.equal(combine(moved_rows, weights, moved_source, moved_places), y)


def train(x: Tensor, weights: Tensor, source: Tensor, places: Tensor, dy: Tensor, call=None) -> tuple[Tensor, ...]:
    """y, dX and dweights of a layer that squares each row."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, weights)]
    y = (call or layer)(*leaves, source, places)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def layer(x: Tensor, weights: Tensor, source: Tensor, places: Tensor) -> Tensor:
    return combine(gather(x, source, places).square(), weights, source, places)


def true_layer(x: Tensor, weights: Tensor, source: Tensor, places: Tensor) -> Tensor:
    return true_sums(true_rows(x, source).square(), weights, places)


@every_dtype
def test_bits_repeat(dtype, device):
    x, _, weights, *routed = operands((40, 8, 96), dtype, device)
    dy = torch.randn_like(x)
    assert all(map(torch.equal, train(x, weights, *routed, dy), train(x, weights, *routed, dy)))


# NaN and dropped slots


def test_nothing_reaches_or_leaves_rows_that_are_not_used(device):
    dy, rows, weights, source, places = operands((13, 3, 72), torch.bfloat16, device)
    assert (places < 0).any()
    y = combine(rows, weights, source, places)
    drows, dweights = torch.autograd.grad(y, (rows, weights), dy.detach())
    with torch.no_grad():
        rows[source < 0], weights[places < 0] = torch.nan, torch.nan
    poisoned = combine(rows, weights, source, places)
    assert torch.equal(poisoned, y)
    gradients = torch.autograd.grad(poisoned, (rows, weights), dy.detach())
    assert torch.equal(gradients[0], drows) and torch.equal(gradients[1], dweights)
    assert not drows[source < 0].any() and not dweights[places < 0].any()

    dy = torch.full_like(dy, torch.nan)
    drows, dweights = torch.autograd.grad(combine(rows, weights, source, places), (rows, weights), dy)
    assert not drows[source < 0].any() and drows[source >= 0].isnan().all()
    assert not dweights[places < 0].any() and dweights[places >= 0].isnan().all()
    x = torch.full_like(dy, torch.nan)
    assert not gather(x, source, places)[source < 0].any()


def test_nan_stays_with_its_token(device):
    x, rows, weights, source, places = operands((13, 3, 72), torch.bfloat16, device)
    t = int(source[0])
    is_other = torch.arange(13, device=device) != t
    with torch.no_grad():
        rows[0, 5] = torch.nan
    y = combine(rows, weights, source, places)
    assert y[t].isnan().nonzero().tolist() == [[5]] and y[is_other].isfinite().all()

    dy = torch.randn_like(x)
    drows, dweights = torch.autograd.grad(y, (rows, weights), dy, retain_graph=True)
    assert drows.isfinite().all()
    assert dweights[places == 0].isnan().all() and dweights[places != 0].isfinite().all()
    dy[t] = torch.nan
    drows, _ = torch.autograd.grad(y, (rows, weights), dy)
    assert drows[source == t].isnan().all() and drows[source != t].isfinite().all()

    drows = torch.randn_like(rows)
    drows[0] = torch.nan
    (dx,) = torch.autograd.grad(gather(x, source, places), x, drows)
    assert dx[t].isnan().all() and dx[is_other].isfinite().all()


def test_a_layer_without_slots_gives_zeros(device):
    source, places = routing(5, 2, dropped=1, device=device)
    x, weights = torch.randn(5, 24, device=device), torch.rand(5, 2, device=device)
    assert not any(result.any() for result in train(x, weights, source, places, torch.randn_like(x)))


# Memory


def test_slices_transposes_and_expanded_gradients(device):
    x, _, weights, source, places = operands((13, 3, 40), torch.bfloat16, device)
    wide = torch.zeros(13, 56, dtype=x.dtype, device=device)
    wide[:, 9:49] = x.detach()
    wide_weights = torch.zeros(13, 7, device=device)
    wide_weights[:, 2:5] = weights.detach()
    expected = train(x, weights, source, places, torch.ones_like(x))
    dy = torch.ones((), dtype=x.dtype, device=device).expand(13, 40)
    for tokens in (wide[:, 9:49], x.detach().t().contiguous().t()):
        routed = source, places.t().contiguous().t()
        assert all(map(torch.equal, train(tokens, wide_weights[:, 2:5], *routed, dy), expected))


def test_a_pending_negation_is_resolved(device):
    x, _, weights, source, places = operands((13, 3, 40), torch.float32, device)
    negated = torch._neg_view(x.detach())
    assert torch.equal(gather(negated, source, places), -gather(x, source, places))
    rows = gather(x, source, places).detach()
    y = combine(torch._neg_view(rows), torch._neg_view(weights.detach()), source, places)
    assert torch.equal(y, combine(rows, weights, source, places))


@pytest.mark.gpu
@pytest.mark.alone
def test_more_than_2_to_the_31_values(device):
    num_tokens, top_k, features = 140_000, 2, 8192
    source, places = routing(num_tokens, top_k, device=device)
    x = torch.randn(num_tokens, features, device=device, dtype=torch.bfloat16).requires_grad_()
    weights = torch.rand(num_tokens, top_k, device=device, requires_grad=True)
    rows = gather(x, source, places)
    assert rows.numel() > 2**31
    sample = torch.cat([torch.arange(50), torch.arange(num_tokens - 50, num_tokens)]).to(device)
    some = places[sample]
    assert torch.equal(true_slots(rows, some), x[sample][:, None] * (some >= 0)[..., None])
    y = combine(rows.detach().requires_grad_(), weights, source, places)
    x_64, w_64 = x[sample].detach().double(), weights[sample].detach().double() * (some >= 0)
    assert_rounds_to(y[sample], x_64 * w_64.sum(1, True), x_64.abs() * w_64.sum(1, True), top_k)
    del y
    y = combine(rows, weights, source, places)
    dx, dweights = torch.autograd.grad(y, (x, weights), x.detach())
    squares = x_64.square().sum(1, True) * (some >= 0)
    assert_rounds_to(dweights[sample], squares, squares, features)
    assert (dx[sample].double() - x_64 * w_64.sum(1, True)).abs().max() < 0.1


# Derivatives of derivatives


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_second_derivatives(dtype, device):
    x, _, weights, *routed = operands((13, 3, 40), dtype, device)

    def penalty(call, *leaves):
        """A function of the gradients of the layer, differentiated again."""
        gradients = torch.autograd.grad(call(*leaves, *routed).float().pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.double().square().sum() for g in gradients), leaves)

    found = penalty(layer, x, weights)
    truth = penalty(true_layer, x.detach().double().requires_grad_(), weights.detach().double().requires_grad_())
    for ours, right in zip(found, truth):
        assert (ours.double() - right).norm() <= 10 * torch.finfo(dtype).eps * right.norm()


# torch.compile and CUDA graphs


def test_compiles_once_for_any_number_of_tokens(device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_tokens in (13, 40, 7):
        x, _, weights, *routed = operands((num_tokens, 3, 40), torch.bfloat16, device)
        dy = torch.randn_like(x)
        found = train(x, weights, *routed, dy, compiled)
        assert all(map(torch.equal, found, train(x, weights, *routed, dy)))
    assert counter.frame_count == 1


def test_inductor_agrees_with_eager(device):
    def call(x, weights, source, places):
        return combine(gather(x, source, places), weights, source, places)

    x, _, weights, *routed = operands((13, 3, 40), torch.bfloat16, device)
    dy = torch.randn_like(x)
    found = train(x, weights, *routed, dy, torch.compile(call, fullgraph=True, dynamic=True))
    assert all(map(torch.equal, found, train(x, weights, *routed, dy, call)))


@pytest.mark.gpu
def test_a_cuda_graph_is_replayed_with_another_routing(device):
    """A capture fails at a host sync."""
    x, _, weights, *routed = operands((40, 4, 96), torch.bfloat16, device)
    dy = torch.randn_like(x)
    train(x, weights, *routed, dy)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = train(x, weights, *routed, dy)
    for buffer, other in zip(routed, routing(40, 4, dropped=0.5, device=device)):
        buffer.copy_(other)
    graph.replay()
    assert all(map(torch.equal, results, train(x, weights, *routed, dy)))
