"""A small MoE layer on `moe.Experts`, trained in bf16 and in FP8 from the same initial weights.

    python examples/moe_layer.py --steps 60 --recipe fp8_blockwise

T tokens, k experts per token, E experts, H hidden, I intermediate features.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouped_gemm import register_weight_cache
from grouped_gemm.moe import Experts

MICRO_BATCHES = 2  # of each step


class MoE(nn.Module):
    """Routes each token to its top k experts. An expert is a SwiGLU MLP."""

    def __init__(self, hidden: int, intermediate: int, num_experts: int, top_k: int, recipe: str) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, num_experts, bias=False)
        # Parameters in the dtype of the activations: what autocast casts is new in each call, and cannot be cached.
        self.experts = Experts(num_experts, hidden, intermediate, recipe=recipe, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) to (T, H), both bfloat16, without a host sync."""
        topk_weights, topk_ids = self.router(x.float()).softmax(-1).topk(self.top_k)  # both (T, k)
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True)
        # Sorts the T * k rows by expert, runs the experts, and adds up each token's weighted rows.
        y: Tensor = self.experts(x, topk_ids, topk_weights)
        return y


def train(recipe: str, steps: int, device: str) -> tuple[list[float], int]:
    """The loss of each step, and the bytes of quantized weights that the micro-batches of a step share.

    The layer learns to imitate a fixed random network.
    """
    torch.manual_seed(0)
    hidden = 64
    layer = MoE(hidden, intermediate=128, num_experts=8, top_k=2, recipe=recipe).to(device)
    teacher = nn.Sequential(nn.Linear(hidden, 128), nn.Tanh(), nn.Linear(128, hidden)).to(device).requires_grad_(False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    handle = register_weight_cache(optimizer)  # weights are quantized once per step, and not by each micro-batch
    losses, shared = [], 0
    for _ in range(steps):
        loss = torch.zeros((), device=device)
        for _ in range(MICRO_BATCHES):
            x = torch.randn(128, hidden, device=device)
            part = F.mse_loss(layer(x.bfloat16()).float(), teacher(x)) / MICRO_BATCHES
            part.backward()  # gradients add up over the micro-batches
            loss += part.detach()
        shared = handle.nbytes
        optimizer.step()  # drops the quantized weights
        optimizer.zero_grad()
        losses.append(loss)
    handle.remove()
    return torch.stack(losses).tolist(), shared  # the one host sync


def main() -> None:
    """Trains in bf16 and in FP8, and prints the losses side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--recipe", default="fp8_blockwise", help="the FP8 recipe: fp8_blockwise, fp8_rowwise or mxfp8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    bf16, _ = train("none", args.steps, args.device)
    fp8, shared = train(args.recipe, args.steps, args.device)
    print(f"{'step':>5} {'bf16':>8} {args.recipe:>16}")
    for step in sorted({*range(0, args.steps, max(1, args.steps // 6)), args.steps - 1}):
        print(f"{step:>5} {bf16[step]:>8.4f} {fp8[step]:>16.4f}")
    print(f"bytes of quantized weights that the {MICRO_BATCHES} micro-batches of a step share: {shared:,}")


if __name__ == "__main__":
    main()
