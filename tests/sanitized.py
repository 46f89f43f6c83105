"""Runs every Triton kernel once, on small operands. `test_triton_gpu` starts it under compute-sanitizer, which is slow.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitized.py

Prints a line before each call, so that a report of the sanitizer follows the line of its call. It names the kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from kernel_checks import BACKEND
from large import portable_kernels
from routings import routing

from grouped_gemm import Recipe, grouped_mm, reference
from grouped_gemm.core.machine import machine_of
from grouped_gemm.moe import experts_forward
from grouped_gemm.moe.routing import route
from grouped_gemm.moe.rows import combine, gather

# The sizes of 6 groups, of the large row class and of decode. Where K and N are multiples of 16, kernels are those of
# `large`, which has 6 groups as well.
LARGE = (0, 300, 1, 700, 0, 600)
DECODE = (0, 5, 1, 30, 0, 8)


def call(recipe: Recipe, sizes: Sequence[int], k: int, n: int, device: str) -> None:
    """A call without gradients, one with all gradients, and the quantizer of columns alone: all uses of the quantizers.

    Rows past the last group are NaN.
    """
    num_rows, num_groups = sum(sizes) + 7, len(sizes)
    a, dy = (torch.randn(num_rows, d, device=device, dtype=torch.bfloat16) for d in (k, n))
    a[-7:] = dy[-7:] = torch.nan
    b = torch.randn(num_groups, n, k, device=device, dtype=torch.bfloat16).transpose(1, 2)
    bias = torch.randn(num_groups, n, device=device, dtype=torch.bfloat16)
    offs = torch.tensor(sizes, device=device).cumsum(0).int()
    alone = grouped_mm(a, b, offs, recipe=recipe, kernel_preference="triton")
    leaves = [x.requires_grad_() for x in (a, b, bias)]
    y = grouped_mm(a, b, offs, recipe=recipe, bias=bias, kernel_preference="triton")
    gradients = torch.autograd.grad(y, leaves, dy)
    plan = BACKEND.plan(offs, num_rows)
    (_, lhs), (_, rhs) = (
        BACKEND.quantize_activations(x, plan, recipe, rows=False, columns=True) for x in (a.detach(), dy)
    )
    alone_db = BACKEND.wgrad(lhs, rhs, plan, torch.float32, contiguous="n")
    if not all(x.isfinite().all() for x in (alone, y, *gradients, alone_db)):
        raise SystemExit("expected finite results; found NaN or Inf")


def moe(num_tokens: int, top_k: int, features: int, device: str) -> None:
    """Tokens to routed rows and back, with gradients. Some slots are dropped."""
    source, places = routing(num_tokens, top_k, device=device)
    x = torch.randn(num_tokens, features, device=device, dtype=torch.bfloat16).requires_grad_()
    weights = torch.rand(num_tokens, top_k, device=device, requires_grad=True)
    y = combine(gather(x, source, places), weights, source, places)
    if not all(result.isfinite().all() for result in (y, *torch.autograd.grad(y, (x, weights), torch.randn_like(x)))):
        raise SystemExit("expected finite results; found NaN or Inf")


def fused(num_tokens: int, hidden: int, inner: int, device: str) -> None:
    """A fused layer in bf16 and in fp8, kept in fp8 and not, with gradients, into main_grad as well."""
    x, dy = (torch.randn(num_tokens, hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
    gate_up, down = (
        (0.1 * torch.randn(6, *shape, device=device)).bfloat16().requires_grad_()
        for shape in ((2 * inner, hidden), (hidden, inner))
    )
    ids = torch.randint(-1, 5, (num_tokens, 3), device=device)  # expert 5 gets no token
    leaves = x.requires_grad_(), torch.rand(num_tokens, 3, device=device, requires_grad=True), gate_up, down
    totals = [torch.zeros_like(w, dtype=torch.float32) for w in (gate_up, down)]
    gate_up.main_grad, down.main_grad = totals  # type: ignore[attr-defined]
    for recipe, keep in ((None, "full"), ("fp8_blockwise", "full"), ("fp8_blockwise", "recipe")):
        y = experts_forward(x, ids, *leaves[1:], recipe=recipe, keep=keep)
        results = [y, *torch.autograd.grad(y, leaves, dy)]
        y = experts_forward(x, ids, *leaves[1:], recipe=recipe, keep=keep, accumulate_main_grad=True)
        y.backward(dy)
        if not all(result.isfinite().all() for result in (*results, *totals)):
            raise SystemExit("expected finite results; found NaN or Inf")


def main(device: str, large: Sequence[int], k: int, n: int) -> None:
    """``k`` and ``n`` are multiples of 16. Sizes next to them, which TMA cannot read, run as well."""
    torch.manual_seed(0)
    print(f"{device}: {machine_of(device)}", flush=True)

    for recipe in Recipe:
        print(f"shipped kernels, {recipe.value}, large", flush=True)
        call(recipe, large, k, n, device)
    with portable_kernels():
        for recipe in (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE):  # other recipes use the same GEMMs
            print(f"portable kernels, {recipe.value}, large", flush=True)
            call(recipe, large, k, n, device)
    for recipe in (Recipe.NONE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8):
        print(f"odd sizes, {recipe.value}, decode", flush=True)
        call(recipe, DECODE, k + 2, n - 3, device)
    for num_tokens in (10, 300):  # one block of slots, and several
        print(f"routing, {num_tokens} tokens", flush=True)
        ids = torch.randint(-1, 7, (num_tokens, 5), device=device)
        for alignment in (1, 16):
            if not all(map(torch.equal, route(ids, 6, alignment), reference.route(ids, 6, alignment))):
                raise SystemExit("expected the routing of reference.route; found another")
    for top_k, features in ((8, k), (3, k + 3), (17, n)):
        print(f"gather and combine, k = {top_k}, H = {features}", flush=True)
        moe(max(large), top_k, features, device)
    for inner in (k, 64 + 8):  # whole blocks of 128, and not
        print(f"experts, I = {inner}", flush=True)
        fused(200, 128, inner, device)
    if device != "cpu":
        torch.cuda.synchronize()
    print("done", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["cpu"]:  # with TRITON_INTERPRET=1: to try the script itself
        main("cpu", DECODE, 48, 32)
    else:
        main("cuda", LARGE, 256, 256)
