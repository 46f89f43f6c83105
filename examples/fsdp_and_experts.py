"""A small MoE language model on several ranks: FSDP2 for dense weights, expert parallelism for experts.

    torchrun --nproc-per-node 2 examples/fsdp_and_experts.py
    torchrun --nproc-per-node 2 examples/fsdp_and_experts.py --recipes none fp8_blockwise --size large     # on GPUs
    python examples/fsdp_and_experts.py                                                     # the same in one process

The model has the same initial weights and the same batches on any number of ranks, so losses agree with those of one
process up to rounding. Experts are outside of FSDP: each rank has its own, and gets their gradients from the tokens of
all ranks. FSDP averages gradients over ranks, so those of experts are divided by the number of ranks.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from grouped_gemm.cli.language import write
from grouped_gemm.moe import Experts

VOCABULARY, HEADS = 256, 4


class Size(NamedTuple):
    """Sizes of the model and of a batch over all ranks."""

    layers: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    batch: int
    sequence: int


SIZES = {"small": Size(2, 128, 128, 8, 2, 8, 64), "large": Size(4, 2048, 768, 64, 8, 16, 1024)}


class Layer(nn.Module):
    """Attention and a MoE layer. All experts are made on each rank, so that every number of ranks has the same ones."""

    def __init__(self, size: Size, recipe: str, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.top_k = size.top_k
        self.norms = nn.ModuleList(nn.RMSNorm(size.hidden) for _ in range(2))
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden, bias=False)
        self.out = nn.Linear(size.hidden, size.hidden, bias=False)
        self.router = nn.Linear(size.hidden, size.experts, bias=False)
        whole = Experts(size.experts, size.hidden, size.inner)
        ranks, rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
        with torch.random.fork_rng(devices=[]):  # its own random numbers do not count
            self.experts = Experts(size.experts // ranks, size.hidden, size.inner, recipe=recipe, mesh=mesh)
        with torch.no_grad():
            for own, every in zip(self.experts.parameters(), whole.parameters()):
                own.copy_(every.chunk(ranks)[rank])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, hidden) from the same."""
        batch, sequence, hidden = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, sequence, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        tokens = self.norms[1](x).view(-1, hidden)
        weights, ids = self.router(tokens).float().softmax(-1).topk(self.top_k)
        return x + self.experts(tokens, ids, weights).view_as(x)


class Model(nn.Module):
    """Predicts the next byte."""

    def __init__(self, size: Size, recipe: str, mesh: DeviceMesh | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, size.hidden)
        self.layers = nn.ModuleList(Layer(size, recipe, mesh) for _ in range(size.layers))
        self.norm, self.head = nn.RMSNorm(size.hidden), nn.Linear(size.hidden, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, sequence, VOCABULARY) of ``ids`` (batch, sequence)."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))

    def expert_parameters(self) -> list[nn.Parameter]:
        """Those of this rank's experts, which FSDP does not manage."""
        return [p for module in self.modules() if isinstance(module, Experts) for p in module.parameters()]


def train(size: Size, recipe: str, steps: int, device: torch.device, mesh: DeviceMesh | None) -> list[float]:
    """The losses, averaged over ranks, and prints tokens per second."""
    ranks, rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
    model = Model(size, recipe, mesh).to(device)
    experts = model.expert_parameters()
    if mesh is not None:
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, ignored_params=set(experts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)  # some are DTensors, some are not
    texts = write(steps * size.batch, size.sequence + 1, seed=0).data
    losses, begin = [], 0.0
    for step in range(steps):
        if step == 1:  # the first one compiles
            begin = time.perf_counter()
        batch = texts[step * size.batch : (step + 1) * size.batch].chunk(ranks)[rank].to(device).long()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        for p in experts:
            assert p.grad is not None, "experts have tokens from all ranks"
            p.grad /= ranks
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        if mesh is not None:
            dist.all_reduce(mean)
            mean /= ranks
        losses.append(mean.item())
    speed = (steps - 1) * size.batch * size.sequence / (time.perf_counter() - begin)
    if rank == 0:
        print(f"{recipe}: {speed:,.0f} tokens/s, loss {losses[0]:.4f} to {losses[-1]:.4f}", flush=True)
    return losses


def main() -> None:
    """Trains with each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["none", "fp8_blockwise"], help="of the experts")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    mesh, device = None, torch.device(args.device)
    if "RANK" in os.environ:
        if args.device == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        mesh = init_device_mesh(args.device, (int(os.environ["WORLD_SIZE"]),))
    for recipe in args.recipes:
        losses = train(SIZES[args.size], recipe, args.steps, device, mesh)
        if mesh is None or mesh.get_local_rank() == 0:
            print("  " + " ".join(f"{loss:.3f}" for loss in losses), flush=True)
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
