"""A small MoE layer on `grouped_mm`, trained in bf16 and in FP8 from the same initial weights.

    python examples/moe_layer.py --steps 60 --recipe fp8_blockwise

T tokens, k experts per token, E experts, H hidden, I intermediate features.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouped_gemm import grouped_mm


class MoE(nn.Module):
    """Routes each token to its top k experts. An expert is a SwiGLU MLP."""

    def __init__(self, hidden: int, intermediate: int, num_experts: int, top_k: int, recipe: str) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.recipe = num_experts, top_k, recipe
        self.router = nn.Linear(hidden, num_experts, bias=False)
        # One matrix per expert, (out features, in features) as in nn.Linear; gate rows before up rows.
        self.gate_up = nn.Parameter(torch.randn(num_experts, 2 * intermediate, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, intermediate) / intermediate**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(T, H) to (T, H), without a host sync."""
        weights, experts = self.router(x).softmax(-1).topk(self.top_k)  # both (T, k)
        weights = weights / weights.sum(-1, keepdim=True)

        # Sort the T * k rows by expert. Row i of the sorted rows belongs to token order[i] // k.
        sorted_experts, order = experts.flatten().sort(stable=True)
        rows = x[order // self.top_k]
        # offs[e] is where the rows of expert e end. An expert may have no rows.
        every_expert = torch.arange(self.num_experts, device=x.device)
        offs = torch.searchsorted(sorted_experts, every_expert, right=True, out_int32=True)

        gate, up = grouped_mm(rows, self.gate_up.transpose(1, 2), offs, recipe=self.recipe).chunk(2, dim=-1)
        y = grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs, recipe=self.recipe)

        # Back into the order of tokens, then the weighted sum of each token's k rows.
        y = y[order.argsort()].view(len(x), self.top_k, -1)
        return (y * weights[..., None]).sum(1)


def train(recipe: str, steps: int, device: str) -> list[float]:
    """The loss of each step. The layer learns to imitate a fixed random network."""
    torch.manual_seed(0)
    hidden = 64
    layer = MoE(hidden, intermediate=128, num_experts=8, top_k=2, recipe=recipe).to(device)
    teacher = nn.Sequential(nn.Linear(hidden, 128), nn.Tanh(), nn.Linear(128, hidden)).to(device).requires_grad_(False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.randn(256, hidden, device=device)
        # Parameters stay in fp32. Autocast casts them, and the rows, to bf16 before grouped_mm quantizes them.
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = F.mse_loss(layer(x).float(), teacher(x).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()  # the one host sync


def main() -> None:
    """Trains in bf16 and in FP8, and prints the losses side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--recipe", default="fp8_blockwise", help="the FP8 recipe: fp8_blockwise, fp8_rowwise or mxfp8")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    bf16 = train("none", args.steps, args.device)
    fp8 = train(args.recipe, args.steps, args.device)
    print(f"{'step':>5} {'bf16':>8} {args.recipe:>16}")
    for step in sorted({*range(0, args.steps, max(1, args.steps // 6)), args.steps - 1}):
        print(f"{step:>5} {bf16[step]:>8.4f} {fp8[step]:>16.4f}")


if __name__ == "__main__":
    main()
