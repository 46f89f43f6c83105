"""The interpreter rounds as the hardware does: without this, no comparison in this folder means anything."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _cast(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y + index, tl.load(x + index).to(y.dtype.element_ty))


@triton.jit
def _product(x, y, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + index, tl.dot(tl.load(x + index), tl.load(y + index)))


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.bfloat16), ids=str)
def test_casts_round_to_nearest_even(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    middles = (codes[1:] + codes[:-1]) / 2
    x = torch.cat(
        [codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1]), torch.tensor([torch.nan])]
    )
    x = torch.cat([x, torch.zeros(1024 - x.numel())])
    y = torch.empty(1024, dtype=dtype)
    _cast[(1,)](x, y, SIZE=1024)
    assert torch.equal(y.float().nan_to_num(1e30), x.to(dtype).float().nan_to_num(1e30))


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.bfloat16), ids=str)
def test_products_are_of_values_and_not_of_bits(dtype):
    x, y = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32)
    _product[(1,)](x, y, out, SIZE=32)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-6, atol=1e-5)
