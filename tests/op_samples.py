"""Arguments of ops that launch kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grouped_gemm.core.library import ops
from grouped_gemm.moe import decode, gemms, packing, routing, steps  # noqa: F401, define their ops

Samples = Iterator[tuple[str, tuple[Any, ...]]]  # names of ops, and arguments


def samples(device: str = "cpu") -> Samples:
    """Of kernels that Triton interprets."""
    with torch.device(device):
        yield from _samples()


def _samples() -> Samples:
    ends = torch.tensor([3, 3, 20], dtype=torch.int32)
    a, dy = torch.randn(24, 16, dtype=torch.bfloat16), torch.randn(24, 48, dtype=torch.bfloat16)
    b, bias = torch.randn(3, 16, 48, dtype=torch.bfloat16), torch.randn(3, 48)
    yield "triton_grouped_mm", (a, None, b, None, bias, ends, "none", torch.float32)
    yield "triton_wgrad", (a, None, dy, None, ends, 24, "none", torch.float32)
    yield "triton_wgrad_add", (torch.randn(3, 16, 48), a, None, dy, None, ends, 24, "none")
    yield "triton_group_sums", (dy, ends, torch.float32)
    ids = torch.tensor([[0, 3], [4, -1], [1, 1]]).t()
    yield "moe_route", (ids, 4)
    yield "moe_find_ranks", (ids, 4, 2, 9)
    found = torch.tensor([[0, 1], [2, -1]]).int(), torch.tensor([[2, 3, 9], [1, 1, 9]]).int()
    yield "moe_limit_rows", (*found, 1)
    yield "moe_local_ids", (torch.arange(12).int().view(4, 3), torch.tensor([[2, 0], [1, 1]]).int(), 4)
    yield "moe_pack", (dy[:2], ids, torch.rand(2, 3), torch.tensor([[0, 1], [2, -1]]).int(), 3, "fp8_blockwise")
    buffer, shifts = torch.zeros(4096, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)
    told = torch.ones(2, 2, dtype=torch.int32)
    yield "moe_pack_for_peers", (buffer, dy[:2], ids, torch.rand(2, 3), found[0], told, shifts, 1, 3, "fp8_blockwise")
    dh, offs, recipe = torch.randn(20, 24, dtype=torch.bfloat16), torch.tensor([3, 3, 20]).int(), "fp8_blockwise"
    own = ops.triton_token_blocks(offs, 20)
    yield "moe_activate", (dy, "swiglu", False)
    yield "moe_activate_gradient", (dy, dy, "gelu", False)
    source = torch.arange(20).int()
    rows, weighted = (dh, dy[:20], None, source, None), (dh, dy[:20], torch.rand(20, 1), source, source[:, None])
    yield "moe_activate_backward", (*weighted, "swiglu", True, offs)
    yield "moe_activate_backward_quantize", (*weighted, own, offs, recipe, "swiglu", True)
    yield "moe_activate_backward_quantize", (*rows, own, offs, recipe, "swiglu", False)
    yield "moe_activate_quantize", (dy[:20], own, recipe, "swiglu", False, 3)
    yield "moe_quantize_tokens", (dy, recipe)
    blocks = ops.triton_token_blocks(ends, 24)
    yield "triton_token_blocks", (ends, 24)
    yield "triton_quantize_activations", (a, ends, "fp8_rowwise", True, True, blocks)
    for recipe in ("fp8_rowwise", "fp8_blockwise", "mxfp8"):
        yield "triton_quantize_activations", (a, ends, recipe, True, True)
        yield "triton_quantize_weights", (b, recipe, True, True)


def hopper_samples(device: torch.device) -> Samples:
    """Of the kernels for Hopper, and of those that only they use."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16()

    (e, h, i), tokens = (4, 256, 128), 40  # experts, features
    x, gate_up, down = randn(tokens, h), randn(e, 2 * i, h), randn(e, h, i)
    ids = torch.randint(e, (tokens, 2), device=device, dtype=torch.int32)
    offs, source, places = ops.moe_route(ids, e)[:3]
    dh, pre, weights = randn(2 * tokens, i), randn(2 * tokens, 2 * i), torch.rand(tokens, 2, device=device)
    for recipe in ("none", "fp8_blockwise"):
        scaled = recipe != "none"
        rows = ops.moe_quantize_tokens(x, recipe) if scaled else (x, None)
        first, last = (
            ops.triton_quantize_weights(w.mT, recipe, True, False)[::2] if scaled else (w, None)
            for w in (gate_up, down)
        )
        gate_up_ECN, down_ECN = first[0].mT, last[0].mT
        blocks = ops.triton_token_blocks(offs, 2 * tokens)
        for keep in ("full", "recipe") if scaled else ("full", "nothing"):
            options = torch.bfloat16, "swiglu", False, keep
            yield "moe_gated_mm", (*rows, source, gate_up_ECN, first[1], offs, recipe, *options)
        yield "moe_gathered_mm", (*rows, source, gate_up_ECN, first[1], offs, torch.bfloat16)
        lhs = ops.triton_quantize_activations(dh, offs, recipe, True, False, blocks)[:2] if scaled else (dh, None)
        yield "triton_grouped_mm", (*lhs, down_ECN, last[1], None, offs, recipe, torch.bfloat16)
        plain = None, None, None
        kind = "blockwise" if scaled else "16 bit"
        operands = (
            first[0],
            None if first[1] is None else first[1].mT,
            None,
            *plain,
            last[0],
            None if last[1] is None else last[1].mT,
            None,
        )
        yield "moe_decode", (x[:2].contiguous(), ids[:2], weights[:2], *operands, kind, recipe, "swiglu", False)
    yield "moe_gathered_wgrad", (x, pre, source, True, offs, torch.bfloat16)
    yield "moe_gathered_wgrad_add", (torch.randn(e, h, 2 * i, device=device), x, pre, source, True, offs)
    yield "triton_wgrad", (dh, None, pre, None, offs, 2 * tokens, "none", torch.bfloat16)
    weighted = weights, source, places
    yield "moe_activate_backward", (dh, pre, *weighted, "swiglu", False, offs)
    yield "moe_combine", (pre, weights, places)
