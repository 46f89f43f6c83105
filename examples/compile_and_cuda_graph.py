"""`torch.compile(fullgraph=True)` around a grouped GEMM and, on a GPU, a CUDA graph whose routing changes.

python examples/compile_and_cuda_graph.py
python examples/compile_and_cuda_graph.py --backend aot_eager    # without a C++ compiler
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm import grouped_mm

E, K, N = 4, 128, 256  # experts, in features, out features


def layer(rows: Tensor, w: Tensor, offs: Tensor, recipe: str) -> Tensor:
    """(M, K) rows, sorted by expert, times (E, N, K) weights."""
    return F.silu(grouped_mm(rows, w.transpose(1, 2), offs, recipe=recipe))


def ends(*sizes: int, device: str) -> Tensor:
    """Where the rows of each expert end."""
    return torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)


def relative_error(x: Tensor, truth: Tensor) -> float:
    """The relative error over all elements."""
    return ((x.float() - truth.float()).norm() / truth.float().norm()).item()


def compiled(w: Tensor, recipe: str, device: str, backend: str) -> None:
    """Forward and backward in one graph each. M may change from call to call."""
    function = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for sizes in ((40, 0, 50, 38), (90, 20, 0, 30)):
        offs = ends(*sizes, device=device)
        rows = torch.randn(sum(sizes), K, device=device, dtype=torch.bfloat16, requires_grad=True)
        y, eager = function(rows, w, offs, recipe), layer(rows, w, offs, recipe)
        found = (y, *torch.autograd.grad(y.float().square().sum(), (rows, w)))
        expected = (eager, *torch.autograd.grad(eager.float().square().sum(), (rows, w)))
        for what, x, truth in zip(("output", "dA", "dB"), found, expected):
            print(f"M = {len(rows)}, {what}, compiled and eager: {relative_error(x, truth):.1e}")


def captured(w: Tensor, recipe: str) -> None:
    """One capture for one M. A replay reads `rows` and `offs` again, so routing may change; addresses may not."""
    rows = torch.randn(128, K, device="cuda", dtype=torch.bfloat16)
    offs = ends(40, 0, 50, 38, device="cuda")
    with torch.no_grad():
        layer(rows, w, offs, recipe)  # kernels compile before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(rows, w, offs, recipe)
        for sizes in ((40, 0, 50, 38), (10, 100, 18, 0)):
            offs.copy_(ends(*sizes, device="cuda"))
            graph.replay()
            print(f"groups {sizes}, replay and eager: {relative_error(y, layer(rows, w, offs, recipe)):.1e}")


def main() -> None:
    """Compiles the layer, and captures it if there is a GPU. Prints relative differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fp8_blockwise")
    parser.add_argument("--backend", default="inductor", help="the backend of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    w = (torch.randn(E, N, K, device=args.device) / K**0.5).bfloat16().requires_grad_()
    compiled(w, args.recipe, args.device, args.backend)
    if args.device == "cuda":
        captured(w, args.recipe)
    else:
        print("CUDA graph: needs a GPU")


if __name__ == "__main__":
    main()
