"""A fake `deep_gemm` that checks its operands as DeepGEMM 0.1.5 does, multiplies with torch, and records its calls.

It checks what the host code of the package asserts, and what its kernels assume: see docs/deepgemm.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 128
calls: list[tuple[str, tuple[Any, ...]]] = []


def get_mk_alignment_for_contiguous_layout() -> int:
    return BLOCK


def check_dense(x: Tensor) -> None:
    """DeepGEMM's `major_check`."""
    assert x.dim() in (2, 3)
    if x.dim() == 3:
        assert x.stride(0) == x.size(-2) * x.size(-1)
    assert 1 in x.stride()[-2:]


def check_scales_of_lines(scale: Tensor, lines: int, blocks: int) -> None:
    """Scales are as DeepGEMM's transform would make them: contiguous lines, columns at multiples of 16 bytes."""
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, (lines, blocks))
    assert scale.stride() == (1, -(-lines // 4) * 4)
    assert scale.isfinite().all() and (scale > 0).all(), "a scale was never written"


def check_map(row_map: Tensor, rows: int, num_groups: int) -> None:
    assert (row_map.dtype, tuple(row_map.shape)) == (torch.int32, (rows,)) and row_map.is_contiguous()
    assert row_map.min() >= -1 and row_map.max() < num_groups
    for block in row_map.split(BLOCK):
        group = block[0]
        in_group = int((block == group).sum())
        assert (block[:in_group] == group).all() and (block[in_group:] == -1).all(), "a block has rows of two groups"


def multiply(lhs: Tensor, rhs_EOC: Tensor, out: Tensor, row_map: Tensor, *, skips: bool) -> None:
    """Blocks of no group are skipped and stored as zeros, or multiplied by the first group's matrix."""
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    for first in range(0, len(lhs), BLOCK):
        rows, group = slice(first, first + BLOCK), int(row_map[first])
        out[rows] = (lhs[rows].double() @ rhs_EOC[max(group, 0)].double().t()).to(out.dtype)
        if skips and group < 0:
            out[rows] = 0


def m_grouped_fp8_fp4_gemm_nt_contiguous(a, b, out, row_map, recipe=None) -> None:
    (a_data, a_scale), (b_data, b_scale) = a, b
    calls.append(("scaled_grouped_mm", (a_data, a_scale, b_data, b_scale, out, row_map)))
    (rows, k), (num_groups, n, _) = a_data.shape, b_data.shape
    assert recipe == (1, BLOCK, BLOCK) and b_data.shape[2] == k and tuple(out.shape) == (rows, n)
    assert a_data.dtype == b_data.dtype == torch.float8_e4m3fn
    check_dense(a_data)
    check_dense(b_data)
    assert a_data.stride(1) == 1 and b_data.stride(2) == 1, (
        "Hopper's fp8 GEMM needs both contiguous along the contraction"
    )
    check_scales_of_lines(a_scale, rows, k // BLOCK)
    assert tuple(b_scale.shape) == (num_groups, n // BLOCK, k // BLOCK)
    check_dense(b_scale)
    check_map(row_map, rows, num_groups)
    lhs = a_data.double() * a_scale.double().repeat_interleave(BLOCK, 1)
    rhs = b_data.double() * b_scale.double().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    multiply(lhs, rhs, out, row_map, skips=True)


def m_grouped_bf16_gemm_nt_contiguous(a, b, out, row_map) -> None:
    calls.append(("grouped_mm", (a, b, out, row_map)))
    assert a.dtype == b.dtype == torch.bfloat16 and a.shape[1] == b.shape[2] and a.shape[1] % 64 == 0
    check_dense(b)
    assert a.stride(1) == 1 and a.stride(0) % 8 == 0 and a.data_ptr() % 16 == 0
    check_map(row_map, a.shape[0], b.shape[0])
    multiply(a, b, out, row_map, skips=False)


def k_grouped_fp8_gemm_nt_contiguous(a, b, out, sizes, sizes_on_device, c=None) -> None:
    calls.append(("scaled_wgrad", (*a, *b, out, sizes, sizes_on_device, c)))
    num_groups, p, q = out.shape
    tokens = sum(sizes)
    assert isinstance(sizes, list) and sizes_on_device.tolist() == sizes and sizes_on_device.dtype == torch.int32
    assert len(sizes) == num_groups and all(size % BLOCK == 0 for size in sizes) and tokens > 0
    assert out.dtype == torch.float32 and out.is_contiguous() and c is out, "the GEMM adds to its output"
    factors = []
    for (data, scale), features in ((a, p), (b, q)):
        assert data.dtype == torch.float8_e4m3fn and data.is_contiguous() and data.numel() == tokens * features
        check_scales_of_lines(scale, features, tokens // BLOCK)
        factors.append((data, scale))
    first = 0
    for e, size in enumerate(sizes):
        values = []
        for data, scale in factors:
            lines = data[first * scale.shape[0] :][: size * scale.shape[0]].view(scale.shape[0], size).double()
            scales = scale[:, first // BLOCK : (first + size) // BLOCK].double()
            values.append(lines * scales.repeat_interleave(BLOCK, 1))
        out[e] += (values[0] @ values[1].t()).float()
        first += size
