"""Two ranks train a small model with FSDP2, and with experts sharded over them. Prints the errors.

    RANK=<0 or 1> python tests/ranks.py <device type> <rendezvous file> <backend>:<recipe> ...

Prints a line of JSON for each pair of backend and recipe: the errors by check. `test_ranks` starts the ranks.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from grouped_gemm import BackendKind, Recipe, cache_weights, grouped_mm
from grouped_gemm.backends import get_backend

RANKS, LAYERS, MICRO_BATCHES, STEPS = 2, 2, 2, 2
E, K, N = 4, 128, 256
ENDS = (40, 40, 70, 96)
M = 100


class Job(NamedTuple):
    """What one rank runs for a pair of backend and recipe."""

    rank: int
    device: torch.device
    mesh: DeviceMesh
    backend: BackendKind
    recipe: Recipe

    def gemm(self, a: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return grouped_mm(a, w.transpose(1, 2), offs, recipe=self.recipe, kernel_preference=self.backend)

    def offs(self, ends: tuple[int, ...] = ENDS) -> Tensor:
        return torch.tensor(ends, dtype=torch.int32, device=self.device)

    def rows(self, rank: int, micro_batch: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(100 * micro_batch + rank)
        return torch.randn(M, K, generator=generator).to(self.device, torch.bfloat16)


class Experts(torch.nn.Module):
    """An up and a down projection, with weights (E, N, K) and (E, K, N) in fp32."""

    def __init__(self, job: Job, form: str) -> None:
        super().__init__()
        self.job, self.form = job, form
        self.up = torch.nn.Parameter(torch.randn(E, N, K, device=job.device) / K**0.5)
        self.down = torch.nn.Parameter(torch.randn(E, K, N, device=job.device) / N**0.5)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        if self.form == "checkpointed":
            return checkpoint(self.layer, x, offs, use_reentrant=False)
        if self.form == "compiled":
            return torch.compile(self.layer, fullgraph=True, backend="eager")(x, offs)
        return self.layer(x, offs)

    def layer(self, x: Tensor, offs: Tensor) -> Tensor:
        # FSDP has already cast the weights, so this cast is a no-op.
        y = torch.nn.functional.silu(self.job.gemm(x, self.up.to(x.dtype), offs))
        return x + self.job.gemm(y, self.down.to(x.dtype), offs)


class Model(torch.nn.Module):
    """A model with the same initial weights on every rank and every time."""

    def __init__(self, job: Job, form: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Experts(job, form) for _ in range(LAYERS))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, offs)
        return x

    def backward(self, x: Tensor, offs: Tensor) -> None:
        self(x, offs).float().square().mean().backward()


def sharded(job: Job, form: str) -> Model:
    model = Model(job, form)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.layers, model):
        fully_shard(module, mesh=job.mesh, mp_policy=policy)
    return model


@contextmanager
def quantizations(job: Job) -> Iterator[list[Recipe]]:
    """A list that grows by the recipe each time that weights are quantized."""
    backend: Any = get_backend(job.backend)
    counted: list[Recipe] = []
    quantize = backend.quantize_weights

    def count(b: Tensor, recipe: Recipe, **layouts: bool):
        counted.append(recipe)
        return quantize(b, recipe, **layouts)

    backend.quantize_weights = count
    try:
        yield counted
    finally:
        del backend.quantize_weights


def gradients_equal_those_of_the_whole_model(job: Job, form: str) -> None:
    """FSDP averages gradients over the ranks; the whole model runs the rows of both, and halving is exact."""
    whole, model = Model(job), sharded(job, form)
    for rank in range(RANKS):
        whole.backward(job.rows(rank), job.offs())
    model.backward(job.rows(job.rank), job.offs())
    for ours, right in zip(model.parameters(), whole.parameters()):
        assert isinstance(ours.grad, DTensor)
        torch.testing.assert_close(ours.grad.full_tensor(), right.grad / RANKS, rtol=1e-5, atol=1e-8)


def the_weight_cache_does_not_change_training(job: Job, form: str) -> None:
    """Parameters after several steps of a fused optimizer; each micro-batch gathers and frees the weights."""
    trained = []
    for block in (nullcontext, cache_weights):
        model = sharded(job, form)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        with block(), quantizations(job) as counted:
            for step in range(STEPS):
                for i in range(MICRO_BATCHES):
                    model.backward(job.rows(job.rank, step * MICRO_BATCHES + i), job.offs())
                optimizer.step()
                optimizer.zero_grad()
        trained.append([p.full_tensor() for p in cast(Iterator[DTensor], model.parameters())])
    assert all(torch.equal(plain, cached) for plain, cached in zip(*trained))
    if job.recipe.is_scaled:
        assert len(counted) == STEPS * LAYERS * 2, f"weights were quantized {len(counted)} times"


def experts_may_be_sharded(job: Job) -> None:
    """Local experts, rows and ends on each rank; the gradient of the weights is sharded as they are."""
    torch.manual_seed(0)
    whole = torch.randn(E, N, K, device=job.device, dtype=torch.bfloat16)
    w = torch.nn.Parameter(distribute_tensor(whole, job.mesh, [Shard(0)]))
    own = whole.chunk(RANKS)[job.rank].clone().requires_grad_()
    offs = job.offs(((60, 90), (0, 100))[job.rank])
    results = []
    for weights in (w, own):
        a = job.rows(job.rank).requires_grad_()
        y = job.gemm(a, weights, offs)
        assert type(y) is Tensor
        results.append((y, *torch.autograd.grad(y, (a, weights), torch.ones_like(y))))
    (*found, dw), (*wanted, own_dw) = results
    assert all(torch.equal(x, right) for x, right in zip(found, wanted))
    assert isinstance(dw, DTensor)
    assert dw.placements == (Shard(0),)
    assert torch.equal(dw.to_local(), own_dw)


CHECKS: dict[str, Callable[[Job], None]] = {
    f"{check.__name__}, {form}": partial(check, form=form)
    for check, forms in (
        (gradients_equal_those_of_the_whole_model, ("plain", "checkpointed", "compiled")),
        (the_weight_cache_does_not_change_training, ("plain", "checkpointed")),
    )
    for form in forms
}
CHECKS["experts_may_be_sharded"] = experts_may_be_sharded


def main(device_type: str, rendezvous: str, *pairs: str) -> None:
    rank = int(os.environ["RANK"])
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS
    )
    mesh = init_device_mesh(device_type, (RANKS,))
    for pair in pairs:
        backend, recipe = pair.split(":")
        job = Job(rank, device, mesh, BackendKind(backend), Recipe(recipe))
        torch._dynamo.reset()
        for name, check in CHECKS.items():
            try:
                check(job)
            except Exception:
                print(json.dumps({name: traceback.format_exc()}), flush=True)
                return  # the other rank may wait for this one
        print(json.dumps({}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
