"""Several ranks run a MoE layer with experts of all of them. Prints the errors.

    RANK=<rank> python tests/expert_parallel_ranks.py <device type> <ranks> <rendezvous file> [<check> ...]

Prints a line of JSON for each check: its name, and the error or an empty string. `test_expert_parallel` starts ranks.
Every check compares with the same layer in one process. All ranks make the same random numbers.

On GPUs, checks with a capacity also use symmetric memory. On a CPU with TRITON_INTERPRET=1, files are that memory:
interpreted kernels write to files of other processes as compiled ones do to other GPUs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from grouped_gemm.moe import Experts, expert_parallel, experts_forward, explain_experts, fused, peer_memory
from grouped_gemm.moe.expert_parallel import AllToAll, SortedRows
from grouped_gemm.moe.routing import route
from grouped_gemm.moe.rows import combine, gather
from grouped_gemm.testing import poisoned_memory

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
E, H, I, TOP_K = 8, 256, 128, 3  # noqa: E741
BLOCKWISE = "fp8_blockwise"
# Relative errors of the result and of the gradients of x, topk_weights, gate_up and down.
CLOSE = {
    (torch.float32, None): (1e-6, 1e-6, 1e-6, 1e-6, 1e-6),
    (torch.bfloat16, None): (5e-3, 5e-3, 1e-3, 1e-3, 1e-3),  # a result is rounded once more for each rank
    (torch.bfloat16, BLOCKWISE): (1e-2, 5e-2, 0.1, 6e-2, 6e-2),  # tokens and gradients of results were in fp8
}


class Job(NamedTuple):
    """One rank."""

    rank: int
    ranks: int
    device: torch.device
    mesh: DeviceMesh

    def own(self, whole: list[Any]) -> Any:
        return whole[self.rank]

    def experts(self, w: Tensor) -> Tensor:
        return w.chunk(self.ranks)[self.rank].clone()


class Layer(NamedTuple):
    """Operands of all ranks: lists have one item for each."""

    gate_up: Tensor
    down: Tensor
    x: list[Tensor]
    ids: list[Tensor]
    weights: list[Tensor]
    dy: list[Tensor]


def layer(
    job: Job, dtype: torch.dtype, tokens: list[int], ids: Callable[[int], Tensor] | None = None, *,
    inner: int = I, seed: int = 0,
) -> Layer:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(job.device, dtype)

    def chosen(t: int) -> Tensor:
        rows = [torch.randperm(E, generator=generator)[:TOP_K] for _ in range(t)]
        return torch.stack(rows) if rows else torch.zeros(0, TOP_K, dtype=torch.int64)

    return Layer(
        randn(E, 2 * inner, H, scale=H**-0.5),
        randn(E, H, inner, scale=inner**-0.5),
        [randn(t, H) for t in tokens],
        [(ids or chosen)(t).to(job.device) for t in tokens],
        [torch.rand(t, TOP_K, generator=generator).to(job.device) for t in tokens],
        [randn(t, H) for t in tokens],
    )


def whole(job: Job, given: Layer, recipe: str | None) -> tuple[Tensor, ...]:
    """This rank's part of result and gradients of the layer in one process."""
    leaves = [t.detach().requires_grad_() for t in (torch.cat(given.x), torch.cat(given.weights), *given[:2])]
    x, weights, gate_up, down = leaves
    y = experts_forward(x, torch.cat(given.ids), weights, gate_up, down, recipe=recipe)
    sizes = [len(x) for x in given.x]
    dx, dweights, dgate_up, ddown = torch.autograd.grad(y, leaves, torch.cat(given.dy))
    rows = [job.own(list(t.split(sizes))) for t in (y, dx, dweights)]
    return (*rows, job.experts(dgate_up), job.experts(ddown))


def parallel(
    job: Job, given: Layer, mesh: Any, run: Callable[..., Tensor] | None = None, **options: Any
) -> tuple[Tensor, ...]:
    """The same with the experts of all ranks; ``run`` has the mesh and the options already."""
    own = job.own(given.x), job.own(given.weights), job.experts(given.gate_up), job.experts(given.down)
    x, weights, gate_up, down = leaves = [t.detach().clone().requires_grad_() for t in own]
    run = run or functools.partial(experts_forward, mesh=mesh, **options)
    y = run(x, job.own(given.ids), weights, gate_up, down)
    return (y, *torch.autograd.grad(y, leaves, job.own(given.dy)))


def assert_close(
    found: Sequence[Tensor], expected: Sequence[Tensor], limits: Sequence[float],
    names: Sequence[str] = ("y", "dx", "dweights", "dgate_up", "ddown"),
) -> None:  # fmt: skip
    for name, one, other, limit in zip(names, found, expected, limits):
        assert one.shape == other.shape, f"{name}: {one.shape}, {other.shape}"
        error = (one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30)
        assert error <= limit, f"{name}: relative error {error:.1e}, at most {limit:.0e}"


def agree(job: Job, tokens: list[int], mesh: Any = None, ids: Callable[[int], Tensor] | None = None) -> None:
    for (dtype, recipe), limits in CLOSE.items():
        given = layer(job, dtype, tokens, ids)
        found = parallel(job, given, mesh or job.mesh, recipe=recipe)
        assert_close(found, whole(job, given, recipe), limits)


def uneven_tokens(job: Job) -> None:
    agree(job, [9 + 4 * rank for rank in range(job.ranks)])


def a_rank_without_tokens(job: Job) -> None:
    agree(job, [0] + [11] * (job.ranks - 1))


def no_tokens_at_all(job: Job) -> None:
    given = layer(job, torch.float32, [0] * job.ranks)
    y, dx, _, dgate_up, ddown = parallel(job, given, job.mesh)
    assert y.shape == dx.shape == (0, H)
    assert not dgate_up.any() and not ddown.any()


def all_tokens_to_one_rank(job: Job) -> None:
    agree(job, [7] * job.ranks, ids=lambda t: torch.arange(TOP_K).expand(t, -1) % (E // job.ranks))


def dropped_slots(job: Job) -> None:
    agree(job, [7] * job.ranks, ids=lambda t: torch.tensor([[-1, 2, E], [E + 5, -7, E]] * 4)[:t])


def all_slots_dropped(job: Job) -> None:
    """Of rank 0, which then sends nothing, or of every rank: zeros."""
    for without in (1, job.ranks):
        steps = itertools.cycle([0] * without + [E // TOP_K] * (job.ranks - without))
        agree(job, [5] * job.ranks, ids=functools.partial(every_step, steps))


def every_step(steps: Iterator[int], t: int) -> Tensor:
    """Ids (t, TOP_K) at the next step from each other; all are dropped if it is 0."""
    step = next(steps)
    return torch.arange(TOP_K).expand(t, -1) * step if step else torch.full((t, TOP_K), -1)


def transports(job: Job) -> tuple[bool, ...]:
    """Values of ``symmetric_memory`` that run here."""
    return (False, True) if job.device.type == "cuda" else (IS_INTERPRETED,)


def a_fixed_capacity(job: Job) -> None:
    """Rows that no token fills are not written. They reach no gradient, whatever they hold."""
    tokens = [5 + rank for rank in range(job.ranks)]
    for ((dtype, recipe), limits), symmetric in itertools.product(CLOSE.items(), transports(job)):
        given = layer(job, dtype, tokens)
        for implementation in ("auto", "batched_mm") if dtype == torch.float32 else ("auto",):
            dispatcher = AllToAll(job.mesh, E, recipe=recipe, capacity=max(tokens) + 3, symmetric_memory=symmetric)
            with poisoned_memory():
                found = parallel(job, given, dispatcher, recipe=recipe, implementation=implementation)
            assert_close(found, whole(job, given, recipe), limits)
            dispatcher.check()


def tokens_past_the_capacity(job: Job) -> None:
    """They get NaN, others their results, and the next call raises once; NaN reaches no gradient of another token.

    Nor have they gradients on the last rank, where they do fit.
    """
    ids = torch.zeros(6, TOP_K, dtype=torch.int64)
    ids[4:, -1] = E - 1
    given = layer(job, torch.float32, [6] * job.ranks, lambda t: ids)
    for symmetric in transports(job):
        lose_tokens(job, given, AllToAll(job.mesh.get_group(), E, capacity=4, symmetric_memory=symmetric))


def lose_tokens(job: Job, given: Layer, dispatcher: AllToAll) -> None:
    y, dx, _, *of_experts = parallel(job, given, dispatcher)
    assert job.rank == 0 or not any(g.any() for g in of_experts)
    expected, right_dx, *_ = whole(job, given, None)
    assert y[4:].isnan().all() and not y[:4].isnan().any()
    torch.testing.assert_close(y[:4], expected[:4])
    torch.testing.assert_close(dx[:4], right_dx[:4])
    assert not dx[4:].any()
    with pytest.raises(RuntimeError, match="at most 4 tokens for each rank"):
        parallel(job, given, dispatcher)
    parallel(job, given, dispatcher)  # the error is gone; it does not fit again
    with pytest.raises(RuntimeError, match="at most 4 tokens for each rank"):
        dispatcher.check()
    dispatcher.check()


def a_capacity_in_inference_mode(job: Job) -> None:
    """A dispatcher whose first call was in inference mode also trains."""
    given = layer(job, torch.float32, [6] * job.ranks)
    for symmetric in transports(job):
        dispatcher = AllToAll(job.mesh, E, capacity=6, symmetric_memory=symmetric)
        with torch.inference_mode():
            experts_forward(
                job.own(given.x), job.own(given.ids), job.own(given.weights), job.experts(given.gate_up),
                job.experts(given.down), mesh=dispatcher,
            )  # fmt: skip
        assert_close(parallel(job, given, dispatcher), whole(job, given, None), CLOSE[torch.float32, None])


def every_rank_learns_of_a_lost_token(job: Job) -> None:
    """If only one of them raised, the others would wait for it."""
    tokens = [6] + [1] * (job.ranks - 1)
    given = layer(job, torch.float32, tokens, lambda t: torch.zeros(t, TOP_K, dtype=torch.int64))
    for symmetric in transports(job):
        dispatcher = AllToAll(job.mesh, E, capacity=4, symmetric_memory=symmetric)
        parallel(job, given, dispatcher)
        with pytest.raises(RuntimeError, match="at most 4 tokens for each rank"):
            parallel(job, given, dispatcher)


def symmetric_memory_has_the_same_bits(job: Job) -> None:
    """As collectives, in results and gradients, also if another batch goes through the same buffers in between."""
    if not any(transports(job)):
        return
    for dtype, recipe in CLOSE:
        given = layer(job, dtype, [6 + rank for rank in range(job.ranks)])
        other = layer(job, dtype, [job.ranks - rank for rank in range(job.ranks)], seed=1)  # also fewer than before
        one, two = (AllToAll(job.mesh, E, recipe=recipe, capacity=12, symmetric_memory=s) for s in (False, True))
        options: Any = {"recipe": recipe, "implementation": "eager"}  # which is quick under the interpreter
        expected = [parallel(job, g, one, **options) for g in (given, other)]
        both = [
            [t.detach().requires_grad_() for t in (job.own(g.x), job.own(g.weights), job.experts(g.gate_up))]
            for g in (given, other)
        ]
        results = [
            experts_forward(x, job.own(g.ids), w, gate_up, job.experts(g.down), mesh=two, **options)
            for g, (x, w, gate_up) in zip((given, other), both)
        ]
        for g, y, leaves, right in zip((given, other), results, both, expected):
            found = (y, *torch.autograd.grad(y, leaves, job.own(g.dy)))
            for name, one_of, other_of in zip(("y", "dx", "dweights", "dgate_up"), found, right):
                assert torch.equal(one_of, other_of), name


def batches_between_dispatch_and_combine(job: Job) -> None:
    """With gradients, what has arrived is the layer's own: a second dispatch does not change it."""
    if not any(transports(job)):
        return
    given = layer(job, torch.float32, [5] * job.ranks)
    own = job.own(given.x), job.own(given.ids), job.own(given.weights)
    dispatcher = AllToAll(job.mesh, E, capacity=5, symmetric_memory=True)
    first = dispatcher.dispatch(*own)
    second = dispatcher.dispatch(-own[0], *own[1:])
    used = (first.topk_ids >= 0) & (first.topk_ids < E // job.ranks)
    for sign, arrived in ((1, first), (-1, second)):
        weights = (arrived.topk_weights * used).sum(1, keepdim=True)
        y = dispatcher.combine(arrived.x.where(used.any(1, keepdim=True), 0) * weights, arrived.handle)
        torch.testing.assert_close(y, sign * own[0] * own[2].sum(1, keepdim=True))


def results_that_are_what_arrived(job: Job) -> None:
    """Without gradients too, where both lie in one buffer."""
    if not any(transports(job)):
        return
    given = layer(job, torch.float32, [5] * job.ranks)
    x, ids, weights = job.own(given.x), job.own(given.ids), job.own(given.weights)
    dispatcher = AllToAll(job.mesh, E, capacity=5, symmetric_memory=True)
    with torch.no_grad():
        arrived = dispatcher.dispatch(x, ids, weights)
        y = dispatcher.combine(arrived.x, arrived.handle)
    of_ranks = torch.arange(job.ranks, device=ids.device)
    times = (ids.unsqueeze(2) // (E // job.ranks) == of_ranks).any(1).sum(1, keepdim=True)
    torch.testing.assert_close(y, x * times)


def no_slots(job: Job) -> None:
    """Zeros, whose gradients travel."""
    given = layer(job, torch.float32, [4] * job.ranks)
    given = given._replace(ids=[ids[:, :0] for ids in given.ids], weights=[w[:, :0] for w in given.weights])
    for symmetric in transports(job):
        found = parallel(job, given, AllToAll(job.mesh, E, capacity=4, symmetric_memory=symmetric))
        assert not any(t.any() for t in found)


def the_same_bits_on_one_rank(job: Job) -> None:
    """Where all experts of a token are on one rank, nothing is rounded differently, however it travels in bf16."""
    local = E // job.ranks
    given = layer(
        job, torch.bfloat16, [8] * job.ranks,
        lambda t: (torch.arange(t) % job.ranks * local)[:, None] + torch.arange(TOP_K)[None] % local,
    )  # fmt: skip
    found, expected = parallel(job, given, job.mesh), whole(job, given, None)
    for one, other in zip(found, expected):
        assert torch.equal(one, other)


def sharded_weights(job: Job) -> None:
    """DTensors that are sharded over experts get sharded gradients; `Experts` takes the mesh."""
    given = layer(job, torch.float32, [9] * job.ranks)
    weights = [torch.nn.Parameter(distribute_tensor(w, job.mesh, [Shard(0)])) for w in given[:2]]
    y = experts_forward(job.own(given.x), job.own(given.ids), job.own(given.weights), *weights, mesh=job.mesh)
    gradients = torch.autograd.grad(y, weights, job.own(given.dy))
    expected = whole(job, given, None)
    torch.testing.assert_close(y, expected[0])
    for found, right in zip(gradients, expected[3:]):
        assert isinstance(found, DTensor)
        torch.testing.assert_close(found.to_local(), right)
    module = Experts(E // job.ranks, H, I, mesh=job.mesh, device=job.device)
    with torch.no_grad():
        module.gate_up.copy_(job.experts(given.gate_up))
        module.down.copy_(job.experts(given.down))
    torch.testing.assert_close(module(job.own(given.x), job.own(given.ids), job.own(given.weights)), expected[0])


def copied_modules(job: Job) -> None:
    """A copy has the same ranks, and a dispatcher of its own."""
    given = layer(job, torch.float32, [6] * job.ranks)
    own = job.own(given.x), job.own(given.ids), job.own(given.weights)
    dispatcher = AllToAll(job.mesh, E, capacity=6)
    for mesh in (job.mesh, dispatcher):
        module = Experts(E // job.ranks, H, I, mesh=mesh, device=job.device)
        other = copy.deepcopy(module)
        assert torch.equal(other(*own), module(*own))
    assert other.mesh is not dispatcher


class RoutedExperts(torch.nn.Module):
    """A router and experts, with these weights."""

    def __init__(self, router: Tensor, gate_up: Tensor, down: Tensor, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.router = torch.nn.Linear(H, E, bias=False, device=router.device)
        self.experts = Experts(len(gate_up), H, I, mesh=mesh, device=router.device)
        for module, name, w in (
            (self.router, "weight", router), (self.experts, "gate_up", gate_up), (self.experts, "down", down)
        ):  # fmt: skip
            setattr(module, name, torch.nn.Parameter(w.clone()))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K)
        return self.experts(x, ids, weights)

    def step(self, x: Tensor, dy: Tensor, sharing: int = 1) -> tuple[Tensor, Tensor]:
        """Result and gradient of ``x`` in a step of training on the mean over tokens of <y, dy>.

        Gradients of experts are sums over the ranks that are ``sharing`` them, and means over others.
        """
        x = x.clone().requires_grad_()
        y = self(x)
        (y * dy).sum(1).mean().backward()
        for p in self.experts.parameters():
            p.grad /= sharing
        torch.optim.SGD(self.parameters(), lr=1.0, foreach=False).step()  # DTensors of several meshes
        return y, x.grad


def fsdp_and_experts(job: Job) -> None:
    """Experts are shared by pairs of ranks, and FSDP shards each one's over the others; a router over all ranks.

    With 2 ranks, FSDP of experts has one rank. Experts are plain tensors, or DTensors on the mesh of FSDP.
    """
    mesh = init_device_mesh(job.device.type, (job.ranks // 2, 2), mesh_dim_names=("data", "expert"))
    given = layer(job, torch.float32, [9] * job.ranks)
    router = torch.randn(E, H, generator=torch.Generator().manual_seed(1)).to(job.device)
    one = RoutedExperts(router, given.gate_up, given.down, None)
    expected = [job.own(list(t.chunk(job.ranks))) for t in one.step(torch.cat(given.x), torch.cat(given.dy))]
    for are_dtensors in (False, True):
        sharded = [distribute_tensor(w, mesh["expert"], [Shard(0)]) for w in given[:2]]
        gate_up, down = (w if are_dtensors else w.to_local() for w in sharded)
        model = RoutedExperts(router, gate_up, down, mesh["expert"])
        fully_shard(model.experts, mesh=mesh["data"])
        fully_shard(model, mesh=job.mesh)
        y, dx = model.step(job.own(given.x), job.own(given.dy), mesh["expert"].size())
        torch.testing.assert_close(y, expected[0])
        torch.testing.assert_close(dx / job.ranks, expected[1])  # its loss is the mean of fewer tokens
        for found, right in zip(model.parameters(), one.parameters()):
            assert isinstance(found, DTensor)
            full, expected_one = found.full_tensor(), right.detach()
            if len(full) < len(expected_one):  # plain tensors: FSDP knows this rank's experts alone
                expected_one = expected_one.chunk(2)[mesh["expert"].get_local_rank()]
            torch.testing.assert_close(full, expected_one)


def tensor_parallel(job: Job) -> None:
    """All experts on all tokens, with a part of I on each rank."""
    agree_with_shards(job, init_device_mesh(job.device.type, (1, job.ranks), mesh_dim_names=("expert", "tensor")))


def experts_and_tensor_parallel(job: Job) -> None:
    """Experts on half of the ranks each, and of an expert half of I on each of two ranks."""
    mesh = init_device_mesh(job.device.type, (job.ranks // 2, 2), mesh_dim_names=("expert", "tensor"))
    agree_with_shards(job, mesh, mesh["expert"])


def agree_with_shards(job: Job, mesh: DeviceMesh, experts: DeviceMesh | None = None) -> None:
    """Gate, up and down are DTensors that are sharded along I; results and gradients of tokens are partial sums."""
    tensor = mesh["tensor"]
    part = job._replace(rank=mesh["expert"].get_local_rank(), ranks=mesh["expert"].size(), mesh=mesh["expert"])
    for (dtype, recipe), limits in CLOSE.items():
        given = layer(part, dtype, [9] * part.ranks, inner=128 * tensor.size())  # whole blocks of fp8 on each rank
        gate, up = part.experts(given.gate_up).chunk(2, 1)
        tokens = [distribute_tensor(t, tensor, [Replicate()]) for t in (part.own(given.x), part.own(given.weights))]
        along = (gate, Shard(1)), (up, Shard(1)), (part.experts(given.down), Shard(2))
        leaves = [*tokens, *(distribute_tensor(w, tensor, [placement]) for w, placement in along)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        x, weights = (leaf.to_local(grad_placements=[Partial()]) for leaf in leaves[:2])
        gate, up, down = (leaf.to_local() for leaf in leaves[2:])
        y = experts_forward(x, part.own(given.ids), weights, (gate, up), down, recipe=recipe, mesh=experts)
        y = DTensor.from_local(y, tensor, [Partial()]).full_tensor()
        gradients: Any = torch.autograd.grad(y, leaves, part.own(given.dy))
        dx, dweights, dgate, dup, ddown = (g.full_tensor() for g in gradients)
        found = y, dx, dweights, torch.cat((dgate, dup), 1), ddown
        y_limit, dx_limit, dweights_limit, *others = limits
        # Each rank rounds its part of a row, then their sum is rounded: those of y and dx, and the products with dy.
        # A pair of gate and up is not fused: then h and its gradients are rounded more often than in the whole layer.
        partial = 2 * y_limit, 2 * dx_limit, max(dweights_limit, 2 * y_limit)
        of_weights = (limit if dtype == torch.float32 else max(limit, 8e-3) for limit in others)
        assert_close(found, whole(part, given, recipe), (*partial, *of_weights))


def biases_and_a_pair(job: Job) -> None:
    """Gate and up as two tensors, all with biases, which get gradients too."""
    for (dtype, recipe), limits in CLOSE.items():
        given = layer(job, dtype, [9] * job.ranks)
        generator = torch.Generator().manual_seed(1)
        biases = [torch.randn(E, n, generator=generator).to(job.device, dtype) for n in (I, I, H)]
        results = []
        for part, own, mesh in ((job.experts, job.own, job.mesh), (lambda w: w, torch.cat, None)):
            leaves = [own(given.x), own(given.weights), *(part(w) for w in (*given.gate_up.chunk(2, 1), given.down))]
            leaves = [leaf.clone().requires_grad_() for leaf in (*leaves, *(part(b) for b in biases))]
            x, weights, gate, up, down, *(of_gate, of_up, of_down) = leaves
            y = experts_forward(
                x, own(given.ids), weights, (gate, up), down, gate_up_bias=(of_gate, of_up), down_bias=of_down,
                recipe=recipe, mesh=mesh,
            )  # fmt: skip
            results.append([y, *torch.autograd.grad(y, leaves, own(given.dy))])
        found, expected = results
        expected = [*(job.own(list(t.chunk(job.ranks))) for t in expected[:3]), *(job.experts(t) for t in expected[3:])]
        of_rows, (dgate_up, ddown) = limits[:3], limits[3:]
        names = "y", "dx", "dweights", "dgate", "dup", "ddown", "dgate_bias", "dup_bias", "ddown_bias"
        assert_close(found, expected, (*of_rows, *(dgate_up, dgate_up, ddown) * 2), names)


def main_grad_gets_the_sum(job: Job) -> None:
    """Over the tokens of all ranks, added to what is there already."""
    given = layer(job, torch.bfloat16, [9] * job.ranks)
    weights: Any = [torch.nn.Parameter(job.experts(w)) for w in given[:2]]
    for w in weights:
        w.main_grad = torch.ones_like(w, dtype=torch.float32)
    own = job.own(given.x), job.own(given.ids), job.own(given.weights)
    y = experts_forward(*own, *weights, accumulate_main_grad=True, mesh=job.mesh)
    y.backward(job.own(given.dy))
    for w, expected in zip(weights, whole(job, given, None)[3:]):
        assert w.grad is None
        torch.testing.assert_close(w.main_grad - 1, expected.float(), rtol=2e-2, atol=2e-2)


def batch_invariant(job: Job) -> None:
    """The first tokens of each rank have the same bits without the others."""
    given = layer(job, torch.bfloat16, [12] * job.ranks)
    weights = job.experts(given.gate_up), job.experts(given.down)
    own: Any = job.own(given.x), job.own(given.ids), job.own(given.weights)
    run: Any = functools.partial(experts_forward, batch_invariant=True, mesh=job.mesh)
    with torch.no_grad():
        assert torch.equal(run(*own, *weights)[:5], run(*(t[:5] for t in own), *weights))


def a_cuda_graph(job: Job) -> None:
    """Replays with other tokens; then one in which some do not fit: NaN, and `check` raises.

    Only a GPU captures graphs. A CPU runs the same code in the other checks with a capacity.
    """
    if job.device.type != "cuda":
        return
    for recipe, symmetric in itertools.product((None, BLOCKWISE), transports(job)):
        replay(job, recipe, symmetric)


def replay(job: Job, recipe: str | None, symmetric: bool) -> None:
    """Replays of two graphs of one dispatcher by turns."""
    given, other = (layer(job, torch.bfloat16, [12] * job.ranks, seed=seed) for seed in (0, 1))
    other = other._replace(gate_up=given.gate_up, down=given.down)
    for every in (*given.ids, *other.ids):
        every[8:] = -1  # so that 8 tokens at most go to a rank
    dispatcher = AllToAll(job.mesh, E, recipe=recipe, capacity=8, symmetric_memory=symmetric)
    own = job.own(given.x), job.own(given.weights), job.experts(given.gate_up), job.experts(given.down)
    x, weights, gate_up, down = leaves = [t.clone().requires_grad_() for t in own]
    ids, dy = job.own(given.ids).clone(), job.own(given.dy).clone()

    def infer() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (experts_forward(x, ids, weights, gate_up, down, recipe=recipe, mesh=dispatcher),)

    def train() -> tuple[Tensor, ...]:
        y = experts_forward(x, ids, weights, gate_up, down, recipe=recipe, mesh=dispatcher)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    graphs = [captured(call) for call in (infer, train)]
    for now in (other, given):
        with torch.no_grad():
            for static, new in zip((x, ids, weights, dy), (now.x, now.ids, now.weights, now.dy)):
                static.copy_(job.own(new))
        for graph, _ in graphs:
            graph.replay()
        expected = parallel(job, now, AllToAll(job.mesh, E, recipe=recipe, capacity=8), recipe=recipe)
        for _, results in graphs:
            assert_close(results, expected, CLOSE[torch.bfloat16, recipe])
    dispatcher.check()
    for graph, results in graphs:
        ids.zero_()
        graph.replay()
        assert results[0][8:].isnan().all() and not results[0][:8].isnan().any()
        with pytest.raises(RuntimeError, match="at most 8 tokens for each rank"):
            dispatcher.check()
        dispatcher.check()
        ids.copy_(job.own(given.ids))


def captured(call: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A CUDA graph of ``call``, and the results that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # threads of NCCL query events meanwhile
        results = call()
    return graph, results


def gradients_of_gradients(job: Job) -> None:
    """They are those of one process. What travels in fp8 has none, and batched gradients do not travel."""
    given = layer(job, torch.float32, [5] * job.ranks)

    def second(own: Any, ids: Tensor, mesh: Any) -> tuple[Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in own]
        implementation = "eager" if IS_INTERPRETED else "auto"  # which is quicker there
        y = experts_forward(leaves[0], ids, *leaves[1:], mesh=mesh, implementation=implementation)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)

    own = job.own(given.x), job.own(given.weights), job.experts(given.gate_up), job.experts(given.down)
    every = torch.cat(given.x), torch.cat(given.weights), given.gate_up, given.down
    dx, dweights, *of_experts = second(every, torch.cat(given.ids), None)
    rows = [job.own(list(t.chunk(job.ranks))) for t in (dx, dweights)]
    expected = *rows, *(job.experts(t) for t in of_experts)
    assert_close(second(own, job.own(given.ids), job.mesh), expected, CLOSE[torch.float32, None][1:])
    if any(transports(job)):
        dispatcher = AllToAll(job.mesh, E, capacity=5, symmetric_memory=True)
        assert_close(second(own, job.own(given.ids), dispatcher), expected, CLOSE[torch.float32, None][1:])
    with pytest.raises(RuntimeError, match="AllToAll: expected create_graph=False with recipe fp8_blockwise"):
        second(own, job.own(given.ids), AllToAll(job.mesh, E, recipe=BLOCKWISE))
    y = experts_forward(own[0].requires_grad_(), job.own(given.ids), *own[1:], mesh=job.mesh)
    with pytest.raises(RuntimeError, match="experts_forward: expected no batched gradients"):
        torch.autograd.grad(y, own[0], torch.stack([y.detach()] * 2), is_grads_batched=True)


class PaddingDispatcher:
    """Sends rows in expert order, padded with zeros to multiples of 16, as DeepEP does. All ranks have all tokens."""

    def __init__(self, job: Job, given: Layer) -> None:
        self.job, self.given = job, given

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> SortedRows:
        every = [x if rank == self.job.rank else other for rank, other in enumerate(self.given.x)]
        local = E // self.job.ranks
        offs, source, places = route(torch.cat(self.given.ids) - self.job.rank * local, local)
        sizes = torch.diff(offs, prepend=offs.new_zeros(1))
        padded = (-(-sizes // 16) * 16).cumsum(0).to(torch.int32)
        moved = torch.arange(len(source), device=offs.device)
        group = torch.searchsorted(offs, moved, right=True).clamp(max=local - 1)
        to = moved + (padded - offs - (padded.diff(prepend=padded.new_zeros(1)) - sizes))[group]
        used = source >= 0
        rows = x.new_zeros(int(padded[-1]) + 5, H).index_copy(
            0, to[used], gather(torch.cat(every), source, places)[used]
        )
        by_row = weights.new_zeros(len(rows))
        flat, all_places = torch.cat(self.given.weights).flatten(), places.flatten()
        by_row[to[all_places[all_places >= 0].long()]] = flat[all_places >= 0]
        return SortedRows(rows, padded, by_row, 16, (places, to))

    def combine(self, y: Tensor, handle: Any) -> Tensor:
        places, to = handle
        moved = torch.where(places >= 0, to[places.clamp(min=0).long()], -1).to(torch.int32)
        source = torch.zeros(len(y), dtype=torch.int32, device=y.device)  # only its length matters for the sum
        partial = combine(y, None, source, moved)
        dist.all_reduce(partial)
        return self.job.own(list(partial.split([len(x) for x in self.given.x])))


def a_dispatcher_that_pads(job: Job) -> None:
    given = layer(job, torch.float32, [9] * job.ranks)
    own = job.own(given.x), job.own(given.ids), job.own(given.weights)
    with torch.no_grad():
        y = experts_forward(
            *own, job.experts(given.gate_up), job.experts(given.down), mesh=PaddingDispatcher(job, given)
        )
    torch.testing.assert_close(y, whole(job, given, None)[0])


def compiled_with_a_capacity(job: Job) -> None:
    """With gradients: torch 2.11 would make them zero if two ops returned what an autograd.Function returns."""
    for recipe in (None, BLOCKWISE):
        given, limits = layer(job, torch.bfloat16, [6] * job.ranks), CLOSE[torch.bfloat16, recipe]
        dispatcher = AllToAll(job.mesh, E, recipe=recipe, capacity=6)
        torch._dynamo.reset()
        call = functools.partial(experts_forward, mesh=dispatcher, recipe=recipe)
        compiled = torch.compile(call, backend="aot_eager")
        found = parallel(job, given, dispatcher, run=compiled)
        assert_close(found, whole(job, given, recipe), limits)


def compiled_with_symmetric_memory(job: Job) -> None:
    """The graph breaks; without breaks, the error names the option."""
    if not any(transports(job)):
        return
    given, limits = layer(job, torch.bfloat16, [6] * job.ranks), CLOSE[torch.bfloat16, BLOCKWISE]
    torch._dynamo.reset()
    dispatcher = AllToAll(job.mesh, E, recipe=BLOCKWISE, capacity=6, symmetric_memory=True)
    call = functools.partial(experts_forward, mesh=dispatcher, recipe=BLOCKWISE)
    compiled = torch.compile(call, backend="aot_eager")
    assert_close(parallel(job, given, dispatcher, run=compiled), whole(job, given, BLOCKWISE), limits)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="symmetric_memory=True breaks the graph"):
        parallel(job, given, dispatcher, run=torch.compile(call, backend="aot_eager", fullgraph=True))


def compiled_where_the_host_reads(job: Job) -> None:
    """The graph breaks there, and what surrounds it is compiled function by function."""
    given, limits = layer(job, torch.bfloat16, [6] * job.ranks), CLOSE[torch.bfloat16, BLOCKWISE]
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(experts_forward, mesh=job.mesh, recipe=BLOCKWISE), backend="aot_eager")
    for _ in range(2):
        assert_close(parallel(job, given, None, run=compiled), whole(job, given, BLOCKWISE), limits)


def compiled_with_data_dependent_sizes(job: Job) -> None:
    """One graph for any number of rows that are sent and that arrive, also for none. torch 2.10 is refused."""
    recipe, limits = BLOCKWISE, CLOSE[torch.bfloat16, BLOCKWISE]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = functools.partial(experts_forward, mesh=job.mesh, recipe=recipe)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    ids = None, lambda t: torch.arange(TOP_K).expand(t, -1) % (E // job.ranks), lambda t: torch.full((t, TOP_K), -1)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for tokens, chosen in zip((6, 40, 9), ids):
            given = layer(job, torch.bfloat16, [tokens + rank for rank in range(job.ranks)], chosen)
            if expert_parallel._CONFUSES_SIZES:
                with pytest.raises(torch._dynamo.exc.Unsupported, match=r"expected torch >= 2\.11"):
                    parallel(job, given, None, run=compiled)
                return
            assert_close(parallel(job, given, None, run=compiled), whole(job, given, recipe), limits)
    assert counter.frame_count == 1


def wrong_arguments(job: Job) -> None:
    given = layer(job, torch.float32, [4] * job.ranks)
    own = job.own(given.x), job.own(given.ids), job.own(given.weights)
    weights = job.experts(given.gate_up), job.experts(given.down)
    with pytest.raises(ValueError, match=f"num_experts: expected a multiple of {job.ranks} ranks, .*; found {E + 1}"):
        AllToAll(job.mesh, E + 1)
    with pytest.raises(ValueError, match=r"recipe: expected None or one of fp8_blockwise"):
        AllToAll(job.mesh, E, recipe="fp8_rowwise")
    with pytest.raises(TypeError, match="num_experts: expected an int; found float"):
        AllToAll(job.mesh, float(E))  # type: ignore[arg-type]
    for capacity in (0, True):
        with pytest.raises(ValueError, match="capacity: expected None or a number"):
            AllToAll(job.mesh, E, capacity=capacity)
    with pytest.raises(ValueError, match=r"capacity: expected a number of rows .*, with symmetric_memory=True"):
        AllToAll(job.mesh, E, symmetric_memory=True)
    if not any(transports(job)):
        with pytest.raises(ValueError, match="symmetric_memory: expected tensors on a GPU; leave the option out"):
            parallel(job, given, AllToAll(job.mesh, E, capacity=4, symmetric_memory=True))
    with pytest.raises(TypeError, match="mesh: expected a DeviceMesh, a ProcessGroup or a Dispatcher; found str"):
        experts_forward(*own, *weights, mesh="ranks")
    with pytest.raises(ValueError, match=r"mesh: expected one dimension"):
        experts_forward(*own, *weights, mesh=init_device_mesh(job.device.type, (1, job.ranks)))
    with pytest.raises(ValueError, match=r"topk_ids\.shape"):
        experts_forward(own[0], own[1][:2], own[2], *weights, mesh=job.mesh)
    with pytest.raises(ValueError, match="x: expected a tensor of rank 2; found 1"):
        experts_forward(own[0][:, 0], *own[1:], *weights, mesh=job.mesh)
    with pytest.raises(TypeError, match=r"down: expected a torch\.Tensor; found NoneType"):
        experts_forward(*own, weights[0], None, mesh=job.mesh)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"topk_ids and topk_weights: expected \(T, k\) each, with T = 4"):
        AllToAll(job.mesh, E).dispatch(own[0], own[1][:2], own[2][:2])


def a_capture_that_cannot_work(job: Job) -> None:
    """No CPU captures, so it is told that it does. A graph that is captured and replayed is in `a_cuda_graph`."""
    given = layer(job, torch.float32, [4] * job.ranks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_parallel, "is_capturing", lambda x: True)
        with pytest.raises(RuntimeError, match="expected an AllToAll with a capacity while a CUDA graph is captured"):
            parallel(job, given, job.mesh)
        with pytest.raises(RuntimeError, match="expected a call of this AllToAll before a CUDA graph is captured"):
            parallel(job, given, AllToAll(job.mesh, E, capacity=4))
        patch.setattr(peer_memory, "is_capturing", lambda x: True)
        with pytest.raises(
            RuntimeError, match="symmetric_memory: expected a call with the same H, k, dtype and recipe"
        ):
            peer_memory.PeerMemory(job.mesh.get_group(), 4).sums(job.own(given.x), job.own(given.ids), None)


def a_capture_after_larger_rows(job: Job) -> None:
    """Rows that had a buffer before larger ones got theirs still have it: none is made in a capture."""
    if not any(transports(job)):
        return
    given = layer(job, torch.float32, [4] * job.ranks)
    peers = peer_memory.PeerMemory(job.mesh.get_group(), 4)
    small, large = given.x[0], torch.cat([given.x[0]] * 2, 1)
    places = torch.arange(4 * job.ranks, dtype=torch.int32, device=job.device).view(job.ranks, 4).t()

    def sums(x: Tensor) -> Tensor:
        return peers.sums(torch.cat([x] * job.ranks), places, None)

    expected = sums(small)
    sums(large)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_memory, "is_capturing", lambda x: True)
        assert torch.equal(sums(small), expected)


def numbers_of_experts(job: Job) -> None:
    """None, other numbers than the dispatcher has, DTensors with a remainder: errors that each rank finds itself."""
    given = layer(job, torch.float32, [4] * job.ranks)
    own = job.own(given.x), job.own(given.ids), job.own(given.weights)
    weights = job.experts(given.gate_up), job.experts(given.down)
    local = E // job.ranks
    with pytest.raises(ValueError, match=r"num_experts: expected at least 1 .*; found 0"):
        experts_forward(*own, *(w[:0] for w in weights), mesh=job.mesh)
    with pytest.raises(ValueError, match=f"weights: .* of {2 * E} experts on {job.ranks} .*; found {local} experts"):
        experts_forward(*own, *weights, mesh=AllToAll(job.mesh, 2 * E))
    sharded = [distribute_tensor(w[:-1], job.mesh, [Shard(0)]) for w in given[:2]]
    with pytest.raises(ValueError, match=f"weights: expected experts that {job.ranks} ranks share .*; found {E - 1}"):
        experts_forward(*own, *sharded, mesh=job.mesh)


def weights_on_other_ranks(job: Job) -> None:
    """DTensors on another axis of the mesh would be other experts."""
    mesh = init_device_mesh(job.device.type, (2, job.ranks // 2), mesh_dim_names=("data", "expert"))
    given = layer(job, torch.float32, [4] * job.ranks)
    own = job.own(given.x), job.own(given.ids), job.own(given.weights)
    weights = [distribute_tensor(w, mesh["data"], [Shard(0)]) for w in given[:2]]
    for ranks in (mesh["expert"], mesh["expert"].get_group(), AllToAll(mesh["expert"], E)):
        with pytest.raises(ValueError, match=r"weights: expected DTensors on the ranks \[.*\], .*; found some on \["):
            experts_forward(*own, *weights, mesh=ranks)


def explained(job: Job) -> None:
    """What runs on this rank's experts, be they DTensors or not."""
    given = layer(job, torch.bfloat16, [9] * job.ranks)
    own = job.own(given.x), job.own(given.ids), job.own(given.weights)
    weights = [distribute_tensor(w, job.mesh, [Shard(0)]) for w in given[:2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "runs_fused", lambda device: True)
        found = explain_experts(*own, *weights, mesh=job.mesh)
        assert found == explain_experts(*own, *(w.to_local() for w in weights), mesh=job.mesh)
        fixed = explain_experts(*own, *weights, mesh=AllToAll(job.mesh, E, recipe=BLOCKWISE, capacity=20))
    travels = f"a token once to each rank of {job.ranks} with its experts, in"
    assert "grouped_mm, fused" in found
    assert f"{travels} their own dtype, by all-to-all; the host reads how many" in found
    assert f"{travels} fp8_blockwise, by all-to-all; 20 rows for each rank, without a host sync" in fixed


def ranks_with_different_numbers_of_experts(job: Job) -> None:
    """All of them raise, and none waits for another. The next call is as usual."""
    given = layer(job, torch.float32, [4] * job.ranks)
    own = job.own(given.x), job.own(given.ids), job.own(given.weights)
    local = E // job.ranks
    fewer = [job.experts(w)[: local - (job.rank == 1)] for w in given[:2]]
    with pytest.raises(ValueError, match=f"ranks: expected the same E, k, .*; found E = {job.ranks * len(fewer[0])}, "):
        experts_forward(*own, *fewer, mesh=job.mesh)
    agree(job, [4] * job.ranks)


def ranks_that_send_other_rows(job: Job) -> None:
    """As many bytes of another dtype, and rows of another k, would be read as what they are not."""
    given = layer(job, torch.float32, [4] * job.ranks)
    weights = job.experts(given.gate_up), job.experts(given.down)
    x, ids, own_weights = job.own(given.x), job.own(given.ids), job.own(given.weights)
    dtype = torch.bfloat16 if job.rank else torch.float16
    top_k = 1 if job.rank else 2
    mine = f"k = {top_k}, H = {H}, float32, recipe none on this one, not on all"
    with pytest.raises(ValueError, match=f"ranks: .*, {str(dtype).removeprefix('torch.')}, recipe none on this one"):
        experts_forward(x.to(dtype), ids, own_weights, *(w.to(dtype) for w in weights), mesh=job.mesh)
    with pytest.raises(ValueError, match=f"ranks: expected the same E, k, H, .*{mine}"):
        experts_forward(x, ids[:, :top_k], own_weights[:, :top_k], *weights, mesh=job.mesh)
    with pytest.raises(ValueError, match=r"ranks: .*, recipe .* on this one"):
        experts_forward(x, ids, own_weights, *weights, mesh=job.mesh, recipe=None if job.rank else BLOCKWISE)


def a_peer_that_dies(job: Job) -> None:
    """The others raise. With NCCL, its watchdog ends the process instead, so there is nothing to check."""
    if job.device.type == "cuda":
        return
    given = layer(job, torch.float32, [4] * job.ranks)
    parallel(job, given, job.mesh)
    dist.barrier()
    if job.rank == job.ranks - 1:
        print(json.dumps({"check": a_peer_that_dies.__name__, "error": ""}), flush=True)
        os._exit(0)
    with pytest.raises(RuntimeError):
        parallel(job, given, job.mesh)


CHECKS = (
    uneven_tokens,
    a_rank_without_tokens,
    no_tokens_at_all,
    all_tokens_to_one_rank,
    dropped_slots,
    all_slots_dropped,
    a_fixed_capacity,
    tokens_past_the_capacity,
    a_capacity_in_inference_mode,
    every_rank_learns_of_a_lost_token,
    symmetric_memory_has_the_same_bits,
    batches_between_dispatch_and_combine,
    results_that_are_what_arrived,
    no_slots,
    the_same_bits_on_one_rank,
    sharded_weights,
    copied_modules,
    fsdp_and_experts,
    tensor_parallel,
    experts_and_tensor_parallel,
    biases_and_a_pair,
    main_grad_gets_the_sum,
    batch_invariant,
    a_cuda_graph,
    gradients_of_gradients,
    a_dispatcher_that_pads,
    compiled_with_a_capacity,
    compiled_with_symmetric_memory,
    compiled_where_the_host_reads,
    compiled_with_data_dependent_sizes,
    wrong_arguments,
    a_capture_that_cannot_work,
    a_capture_after_larger_rows,
    numbers_of_experts,
    weights_on_other_ranks,
    explained,
    ranks_with_different_numbers_of_experts,
    ranks_that_send_other_rows,
    a_peer_that_dies,  # the last one
)


def checks_of(ranks: int) -> list[Callable[[Job], None]]:
    """Only two ranks compile, which takes longer than all else: graphs of more ranks differ in a constant."""
    return [check for check in CHECKS if ranks == 2 or not check.__name__.startswith("compiled")]


# What uses symmetric memory and is quick under the interpreter.
OF_PEERS = (
    tokens_past_the_capacity,
    a_capacity_in_inference_mode,
    every_rank_learns_of_a_lost_token,
    symmetric_memory_has_the_same_bits,
    batches_between_dispatch_and_combine,
    results_that_are_what_arrived,
    no_slots,
    a_capture_after_larger_rows,
    gradients_of_gradients,
    compiled_with_symmetric_memory,
)


class SharedFiles:
    """A `peer_memory._Buffer` that is a file of each rank, in ``folder``. A step begins with nothing in it."""

    folder = ""
    numbers = itertools.count()

    def __init__(self, group: dist.ProcessGroup, num_bytes: int, device: torch.device) -> None:
        name, rank = f"{self.folder}/{next(self.numbers)}", dist.get_rank(group)

        def opened(w: int) -> Tensor:
            return torch.from_file(f"{name}.{w}", shared=True, size=num_bytes, dtype=torch.uint8)

        self.memory = opened(rank).fill_(255)
        dist.barrier(group)
        self._files = [self.memory if w == rank else opened(w) for w in range(dist.get_world_size(group))]
        self.away = [file.data_ptr() - self.memory.data_ptr() for file in self._files]
        self._group, self._writes = group, False

    def barrier(self) -> None:
        dist.barrier(self._group)
        self._writes = not self._writes
        if self._writes:  # what lasts until the next step is gone
            self.memory.fill_(255)
            dist.barrier(self._group)


def main(device_type: str, ranks: str, rendezvous: str, *names: str) -> None:
    rank = int(os.environ["RANK"])
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(
        backend, f"file://{rendezvous}", timeout=timedelta(seconds=60), rank=rank, world_size=int(ranks)
    )
    if IS_INTERPRETED:
        SharedFiles.folder = os.path.dirname(rendezvous)
        peer_memory._Buffer = SharedFiles  # type: ignore[misc, assignment]
    job = Job(rank, int(ranks), device, init_device_mesh(device_type, (int(ranks),)))
    for check in checks_of(job.ranks):
        if names and check.__name__ not in names:
            continue
        try:
            check(job)
            print(json.dumps({"check": check.__name__, "error": ""}), flush=True)
        except Exception:
            print(json.dumps({"check": check.__name__, "error": traceback.format_exc()}), flush=True)
            return  # the others may wait for this one
    if device_type == "cuda":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
