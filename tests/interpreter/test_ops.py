"""``torch.library.opcheck`` on ops that launch Triton kernels: schemas, fakes, no argument is changed or returned."""

from __future__ import annotations

import pytest
import torch

from grouped_gemm.moe import routing, steps  # noqa: F401, define their ops

OPS = torch.ops.grouped_gemm
OFFS = torch.tensor([3, 3, 20], dtype=torch.int32)


def samples():
    a, dy = torch.randn(24, 16, dtype=torch.bfloat16), torch.randn(24, 48, dtype=torch.bfloat16)
    b, bias = torch.randn(3, 16, 48, dtype=torch.bfloat16), torch.randn(3, 48)
    yield "triton_grouped_mm", (a, None, b, None, bias, OFFS, "none", torch.float32)
    yield "triton_wgrad", (a, None, dy, None, OFFS, 24, "none", torch.float32)
    yield "triton_wgrad_add", (torch.randn(3, 16, 48), a, None, dy, None, OFFS, 24, "none")
    yield "triton_group_sums", (dy, OFFS, torch.float32)
    ids = torch.tensor([[0, 3], [4, -1], [1, 1]]).t()
    yield "moe_route", (ids, 4)
    yield "moe_find_ranks", (ids, 4, 2, 9)
    yield "moe_pack", (dy[:2], ids, torch.rand(2, 3), torch.tensor([[0, 1], [2, -1]]).int(), 3, "fp8_blockwise")
    dh, offs, recipe = torch.randn(20, 24, dtype=torch.bfloat16), torch.tensor([3, 3, 20]).int(), "fp8_blockwise"
    own = OPS.triton_token_blocks(offs, 20)
    yield "moe_activate", (dy, "swiglu", False)
    yield "moe_activate_gradient", (dy, dy, "gelu", False)
    source = torch.arange(20).int()
    rows, weighted = (dh, dy[:20], None, source, None), (dh, dy[:20], torch.rand(20, 1), source, source[:, None])
    yield "moe_activate_backward", (*weighted, "swiglu", True, offs)
    yield "moe_activate_backward_quantize", (*weighted, own, offs, recipe, "swiglu", True)
    yield "moe_activate_backward_quantize", (*rows, own, offs, recipe, "swiglu", False)
    yield "moe_activate_quantize", (dy[:20], own, recipe, "swiglu", False, 3)
    yield "moe_quantize_tokens", (dy, recipe)
    blocks = OPS.triton_token_blocks(OFFS, 24)
    yield "triton_token_blocks", (OFFS, 24)
    yield "triton_quantize_activations", (a, OFFS, "fp8_rowwise", True, True, blocks)
    for recipe in ("fp8_rowwise", "fp8_blockwise", "mxfp8"):
        yield "triton_quantize_activations", (a, OFFS, recipe, True, True)
        yield "triton_quantize_weights", (b, recipe, True, True)


@pytest.mark.parametrize("name, arguments", list(samples()), ids=lambda x: x if isinstance(x, str) else "")
def test_op(name, arguments):
    tests = ("test_schema", "test_faketensor")  # opcheck compares outputs elsewhere, which fp8 tensors do not allow
    torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=tests)
