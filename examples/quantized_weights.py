"""Inference with experts from an FP8 checkpoint: `quantize_weights` takes its weights and scales as they are.

    python examples/quantized_weights.py

It makes a checkpoint in the format of DeepSeek-V3: e4m3fn weights (E, N, K), one fp32 scale per 128x128 block.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from grouped_gemm import grouped_mm, quantize_weights

E, K, N = 4, 256, 384  # experts, in features, out features


def make_checkpoint(path: Path) -> Tensor:
    """Saves quantized weights, and returns the original ones, (E, N, K)."""
    w = torch.randn(E, N, K) / K**0.5
    blocks = w.view(E, N // 128, 128, K // 128, 128)
    scale = blocks.abs().amax((2, 4), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    data = (blocks / scale).view(E, N, K).to(torch.float8_e4m3fn)
    torch.save({"weight": data, "weight_scale_inv": scale.view(E, N // 128, K // 128)}, path)
    return w


def main() -> None:
    """Loads the checkpoint, multiplies with it, and compares with bf16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "experts.pt"
        original = make_checkpoint(path).to(args.device, torch.bfloat16)
        checkpoint = torch.load(path, map_location=args.device)

        # grouped_mm takes (E, K, N). A transpose is a view: no memory is copied for it.
        weights = quantize_weights(
            checkpoint["weight"].transpose(1, 2),
            "fp8_blockwise",
            scale=checkpoint["weight_scale_inv"].transpose(1, 2),
        )
        # They are now in the layout of the chosen backend. Saved like this, they load without conversion.
        torch.save(weights, path)
        weights = torch.load(path)

    rows = torch.randn(300, K, device=args.device, dtype=torch.bfloat16)  # sorted by expert
    offs = torch.tensor([100, 100, 180, 300], device=args.device, dtype=torch.int32)  # the second expert has no rows
    with torch.no_grad():
        y = grouped_mm(rows, weights, offs)  # quantizes the rows, but not the weights again
        expected = grouped_mm(rows, original.transpose(1, 2), offs)

    error = (y.float() - expected.float()).norm() / expected.float().norm()
    print(weights)
    print(f"bytes of weights: {weights.nbytes:,}; in bf16: {original.nbytes:,}")
    print(f"relative error against bf16: {error.item():.3f}")


if __name__ == "__main__":
    main()
