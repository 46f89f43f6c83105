"""`override_torch` runs a model's own calls of torch's `grouped_mm` in FP8, without changes to the model.

python examples/override_existing_model.py --recipe fp8_rowwise
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouped_gemm import explain, override_torch


class Experts(nn.Module):
    """Code that does not know this package, as in the models of transformers."""

    def __init__(self, num_experts: int, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, intermediate, hidden).bfloat16() / hidden**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, intermediate).bfloat16() / intermediate**0.5)

    def forward(self, rows: Tensor, offs: Tensor) -> Tensor:
        """(M, H) rows, sorted by expert, to (M, H)."""
        h = F.relu(F.grouped_mm(rows, self.up.transpose(1, 2), offs=offs))
        return F.grouped_mm(h, self.down.transpose(1, 2), offs=offs)


def relative_error(x: Tensor, truth: Tensor) -> float:
    """The relative error over all elements."""
    return ((x.float() - truth.float()).norm() / truth.float().norm()).item()


def main() -> None:
    """Runs the model on torch, then under an override, as a block and as a decorator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fp8_blockwise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = Experts(num_experts=4, hidden=128, intermediate=256).to(args.device)
    rows = torch.randn(128, 128, device=args.device, dtype=torch.bfloat16, requires_grad=True)
    offs = torch.tensor([40, 40, 90, 128], device=args.device, dtype=torch.int32)

    on_torch = model(rows, offs)
    (grad_on_torch,) = torch.autograd.grad(on_torch.float().square().sum(), rows)

    # A block around the forward pass. Backward runs in FP8 as well, wherever it is called.
    with override_torch(args.recipe):
        y = model(rows, offs)
    (grad,) = torch.autograd.grad(y.float().square().sum(), rows)
    print(
        f"{args.recipe} against torch's bf16: output {relative_error(y, on_torch):.3f}, "
        f"gradient {relative_error(grad, grad_on_torch):.3f}"
    )

    # A decorator stays with the function, so it also applies where other code calls or recomputes the layer.
    decorated = override_torch(args.recipe)(model.forward)
    print(f"the decorated layer gives the same: {torch.equal(decorated(rows, offs), y)}")

    print(explain(rows, model.up.transpose(1, 2), offs, recipe=args.recipe))


if __name__ == "__main__":
    main()
