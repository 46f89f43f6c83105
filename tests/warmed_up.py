"""Runs `warmup`, then calls of each row class, and prints what the calls still compiled, as JSON.

    TRITON_CACHE_DIR=<empty> python tests/warmed_up.py

`test_triton_gpu` starts it in a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from grouped_gemm import grouped_mm, warmup

NUM_GROUPS = 6
# M of the calls; warmup uses none of them. The scales of rows are (K/128, S), with S = M + 18 rounded up to a multiple
# of 4 (`kernels.quantize.layouts`). S is a multiple of 16 for the first M of each class, but not for the second or for
# warmup's. So a kernel that Triton specializes on that stride is compiled again; no kernel may be specialized on it.
ROWS: dict[str, tuple[int, ...]] = {"decode": (46, 49), "small": (462, 463), "large": (1806, 2584)}


def compiled() -> set[str]:
    """The files that Triton has written: each kernel has a folder, named after its hash."""
    directory = Path(os.environ["TRITON_CACHE_DIR"])
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}


def main(device: str, k: int, n: int, rows: dict[str, tuple[int, ...]]) -> None:
    options: dict[str, Any] = {"recipe": "fp8_blockwise", "kernel_preference": "triton"}
    b = torch.randn(NUM_GROUPS, n, k, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    print(warmup(b, rows=tuple(rows), **options), file=sys.stderr, flush=True)
    known = compiled()
    found: dict[str, Any] = {"known": len(known), "new": {}}
    for name, sizes in rows.items():
        for num_rows in sizes:
            a = torch.randn(num_rows, k, device=device, dtype=torch.bfloat16)
            ends = [0, 1, *(num_rows * e // NUM_GROUPS for e in range(2, NUM_GROUPS))]
            offs = torch.tensor(ends, device=device, dtype=torch.int32)
            grouped_mm(a, b.detach(), offs, **options)
            y = grouped_mm(a.requires_grad_(), b, offs, **options)
            torch.autograd.grad(y, (a, b), torch.ones_like(y))
            new = compiled() - known
            known |= new
            found["new"][f"{name}, M = {num_rows}"] = sorted(new)
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:] == ["cpu"]:  # with TRITON_INTERPRET=1, which compiles nothing: to try the script itself
        main("cpu", 48, 32, {"decode": ROWS["decode"]})
    else:
        main("cuda", 256, 256, ROWS)
