"""A MoE layer whose experts are on several GPUs of one host, beside one that sends routed rows in bf16.

    python -m grouped_gemm bench expert_parallel --ranks 2 --json ep.json      # on 2 GPUs, a few minutes
    python -m grouped_gemm bench expert_parallel --device cpu      # tiny sizes with gloo, to see that it runs

The peer is what users write on torch: an all-to-all of a row for each slot in bf16, whose split sizes the host reads,
an index_select into expert order, torch._grouped_mm, the gate, and all the way back, then the weighted sum.

dispatch: the peer's all-to-all of rows, and our tokens with their ids and weights, in bf16 and in fp8, routing and
quantizing included; also with a capacity of all tokens, so without a host sync, and that as a CUDA graph, which shows
what the host costs. combine: the peer's all-to-all, index_copy and weighted sum, and ours. layer: forward, and a step,
which is forward with the gradients of x, topk_weights and weights; in fp8 with weights quantized once per step. Results
are compared with the peer's first. "symmetric": a capacity, and symmetric memory in place of collectives. Of few
tokens, forward is also a CUDA graph.

Times are medians over repetitions, each between barriers, in microseconds of rank 0 by CUDA events; of few tokens, a
repetition is ten calls.

T, k, E, H, I: tokens of a rank, experts per token, experts of all ranks, hidden and intermediate features.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _calls import captured
from _common import relative_error
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single

from grouped_gemm import cache_weights
from grouped_gemm.moe import experts_forward
from grouped_gemm.moe.expert_parallel import AllToAll

BLOCKWISE = "fp8_blockwise"


class Shape(NamedTuple):
    """Sizes of a layer."""

    tokens: int
    experts: int
    hidden: int
    inner: int
    top_k: int


SHAPES = {"dsv3": Shape(16384, 64, 7168, 2048, 8), "qwen3-30b": Shape(16384, 128, 2048, 768, 8)}
_QWEN3 = SHAPES["qwen3-30b"]
FEW = {"qwen3-30b, 512 tokens": _QWEN3._replace(tokens=512), "qwen3-30b, 64 tokens": _QWEN3._replace(tokens=64)}
TINY = {"tiny": Shape(48, 8, 128, 128, 2)}
# What a line is compared with, and the goal: at most so much of it, or at least so many times as fast. That of dispatch
# is for dsv3.
GOALS = {
    ("dispatch", BLOCKWISE): ("most", 0.25),
    ("dispatch", f"{BLOCKWISE}, capacity"): ("most", 0.25),
    ("dispatch", f"{BLOCKWISE}, symmetric"): ("most", 0.25),
    ("combine", "bf16"): ("most", 0.5),
    ("forward", BLOCKWISE): ("least", 1.8),
    ("step", BLOCKWISE): ("least", 1.8),
    ("forward", "bf16"): ("least", 1.4),
    ("step", "bf16"): ("least", 1.4),
}
ERROR = {"bf16": 1e-2, BLOCKWISE: 0.1}


class Peer:
    """The layer on torch alone."""

    def __init__(self, ids: Tensor, shape: Shape, ranks: int) -> None:
        flat, local = ids.flatten(), shape.experts // ranks
        self.top_k, self.order = ids.shape[1], flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=shape.experts)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        self.sends = counts.view(ranks, -1).sum(1).tolist()
        self.takes = received.view(ranks, -1).sum(1).tolist()
        owners = torch.arange(local, device=ids.device).repeat(ranks).repeat_interleave(received)
        self.arrange = owners.argsort(stable=True)
        self.offs = torch.bincount(owners, minlength=local).cumsum(0).to(torch.int32)

    def dispatch(self, rows: Tensor) -> Tensor:
        """Rows in expert order of what is sent, to the order of arrival."""
        return all_to_all_single(rows.new_empty(sum(self.takes), rows.shape[1]), rows, self.takes, self.sends)

    def combine(self, y: Tensor, weights: Tensor) -> Tensor:
        """(T, H) from rows in the order of local experts."""
        y = torch.index_copy(torch.empty_like(y), 0, self.arrange, y)
        y = all_to_all_single(y.new_empty(weights.numel(), y.shape[1]), y, self.sends, self.takes)
        y = y * weights.flatten()[self.order].unsqueeze(1).to(y.dtype)
        return torch.index_copy(torch.empty_like(y), 0, self.order, y).view(*weights.shape, -1).sum(1)

    def layer(self, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows = self.dispatch(x[self.order // self.top_k])[self.arrange]
        gate, up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=self.offs).chunk(2, -1)
        return self.combine(torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=self.offs), weights)


def median_us(call: Callable[[], Any], is_cuda: bool, repetitions: int, calls: int = 1) -> float:
    times = []
    for i in range(repetitions + 2):
        dist.barrier()
        if is_cuda:
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                call()
            end.record()
            torch.cuda.synchronize()
            taken = begin.elapsed_time(end) * 1e3 / calls
        else:
            start = time.perf_counter()
            call()
            taken = (time.perf_counter() - start) * 1e6
        if i >= 2:
            times.append(taken)
    return statistics.median(times)


def measure(name: str, shape: Shape, device: torch.device, repetitions: int) -> list[dict[str, Any]]:
    """The rows of one shape."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator(device).manual_seed(rank)

    def randn(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(sizes, device=device, generator=generator)).to(torch.bfloat16)

    local, (tokens, experts, hidden, inner, top_k) = shape.experts // ranks, shape
    x, dy = randn(tokens, hidden).requires_grad_(), randn(tokens, hidden)
    gate_up = randn(local, 2 * inner, hidden, scale=hidden**-0.5).requires_grad_()
    down = randn(local, hidden, inner, scale=inner**-0.5).requires_grad_()
    scores = torch.rand(tokens, experts, device=device, generator=generator)
    ids = scores.topk(top_k, -1).indices
    weights = torch.rand(tokens, top_k, device=device, generator=generator).softmax(-1).requires_grad_()
    leaves = x, weights, gate_up, down
    peer = Peer(ids, shape, ranks)
    ours = {
        "bf16": AllToAll(dist.group.WORLD, experts),
        BLOCKWISE: AllToAll(dist.group.WORLD, experts, recipe=BLOCKWISE),
    }
    rows: list[dict[str, Any]] = []

    def run(layer: str) -> Tensor:
        if layer == "peer":
            return Peer(ids, shape, ranks).layer(*leaves)
        recipe = ours[layer].recipe
        return experts_forward(x, ids, weights, gate_up, down, recipe=recipe, mesh=ours[layer])

    def step(layer: str) -> None:
        with cache_weights():
            torch.autograd.grad(run(layer), leaves, dy)

    def timed(part: str, calls: dict[str, Callable[[], Any]], error: dict[str, float]) -> None:
        base = None
        for layer, call in calls.items():
            us = median_us(call, device.type == "cuda", repetitions, 10 if name in FEW else 1)
            base = base or us
            row = {"shape": name, "part": part, "name": layer, "us": us, "of_peer": us / base}
            rows.append(row | ({"error": error[layer]} if layer in error else {}))
            if rank == 0:
                print(f"{name:21} {part:9} {layer:31} {us:9.1f} us {us / base:6.2f} of the peer's", flush=True)

    with torch.no_grad():
        truth = run("peer")
        errors = {layer: relative_error(run(layer), truth) for layer in ours}
        for layer, error in errors.items():
            check(error, f"{name} {layer}", ERROR[layer])
        sent = x.detach()[peer.order // top_k]
        arrived = {layer: one.dispatch(x.detach(), ids, weights.detach()) for layer, one in ours.items()}
        received = randn(sum(peer.takes), hidden)
        dispatches: dict[str, Callable[[], Any]]
        dispatches = {layer: partial(one.dispatch, x.detach(), ids, weights.detach()) for layer, one in ours.items()}
        combines: dict[str, Callable[[], Any]] = {
            "peer": lambda: peer.combine(received, weights),
            "bf16": lambda: ours["bf16"].combine(arrived["bf16"].x, arrived["bf16"].handle),
        }
        fixed: dict[str, AllToAll] = {}  # which live as long as their graphs, as do operands
        operands = []
        for (layer, one), symmetric in product(ours.items() if device.type == "cuda" else (), (False, True)):
            eager = f"{layer}, {'symmetric' if symmetric else 'capacity'}"
            form = f"{layer}, symmetric, graph" if symmetric else f"{layer}, graph"
            fixed[form] = made = AllToAll(
                dist.group.WORLD, experts, recipe=one.recipe, capacity=tokens, symmetric_memory=symmetric
            )
            dispatches[eager] = partial(made.dispatch, x.detach(), ids, weights.detach())
            dispatches[form], _ = captured(dispatches[eager])
            if layer == "bf16":
                given = made.dispatch(x.detach(), ids, weights.detach())
                y = torch.where((given.topk_ids >= 0).any(1, keepdim=True), given.x, 0)
                operands.append((y, given.handle))
                combines[form], _ = captured(partial(made.combine, *operands[-1]))
        timed("dispatch", {"peer": lambda: peer.dispatch(sent), **dispatches}, {})
        timed("combine", combines, {})
        del dispatches, combines, operands
        with cache_weights():
            forwards: dict[str, Callable[[], Any]] = {layer: partial(run, layer) for layer in ("peer", *ours)}
            for form, made in fixed.items() if name in FEW else ():
                ours[form] = made
                forwards[form], _ = captured(partial(run, form))
                errors[form] = relative_error(forwards[form](), truth)
                check(errors[form], f"{name} {form}", ERROR[form.partition(",")[0]])
            timed("forward", forwards, errors)
    if name in FEW:
        return rows
    timed("step", {layer: lambda layer=layer: step(layer) for layer in ("peer", *ours)}, errors)
    return rows


def check(error: float, what: str, most: float) -> None:
    if not error < most:
        raise RuntimeError(f"{what}: expected an error of at most {most}; found {error:.1e}")


def work(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One rank."""
    device = torch.device(args.device, rank if args.device == "cuda" else None)
    if args.device == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{meeting}", rank=rank, world_size=args.ranks)
    shapes = {name: shape for name, shape in (SHAPES | FEW).items() if name.split(",")[0] in args.shapes}
    shapes = shapes if args.device == "cuda" else TINY
    rows = [row for name, shape in shapes.items() for row in measure(name, shape, device, args.repetitions)]
    if rank == 0:
        report(rows)
        if args.json:
            named = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
            run = {"device": named, "ranks": args.ranks, "torch": torch.__version__, "rows": rows}
            args.json.write_text(json.dumps(run, indent=1))
    dist.destroy_process_group()


def report(rows: list[dict[str, Any]]) -> None:
    """Prints which goals are reached."""
    print("\ngoals, in this run")
    for row in rows:
        kind, limit = GOALS.get((row["part"], row["name"]), ("", 0.0))
        has_goal = row["shape"] not in FEW and (row["shape"], row["part"]) != ("qwen3-30b", "dispatch")
        if kind and has_goal:
            figure = row["of_peer"] if kind == "most" else 1 / row["of_peer"]
            reached = figure <= limit if kind == "most" else figure >= limit
            sign = "<=" if kind == "most" else ">="
            what = "of the peer's time" if kind == "most" else "times as fast as the peer"
            state = "reached    " if reached else "NOT reached"
            print(f"  {state} {row['shape']} {row['part']} {row['name']}: {figure:.2f} {what}, goal {sign} {limit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--repetitions", type=int, default=12, help="of each time (%(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    if args.device == "cuda" and torch.cuda.device_count() < args.ranks:
        sys.exit(f"expected {args.ranks} GPUs; torch sees {torch.cuda.device_count()}: use --device cpu for a trial")
    os.environ.setdefault("OMP_NUM_THREADS", "1" if args.device == "cpu" else "8")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args, str(Path(folder) / "meeting")), nprocs=args.ranks)


if __name__ == "__main__":
    main()
