"""The interpreter rounds as the hardware does; the other tests in this folder rely on it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from grouped_gemm.kernels.common.launch import launch


@triton.jit
def _cast(x, y, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y + index, tl.load(x + index).to(y.dtype.element_ty))


@triton.jit
def _dot(x, y, out, SIZE: tl.constexpr):
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
    launch(_cast, (1,), x, y, constants={"SIZE": 1024})
    assert torch.equal(y.float().nan_to_num(1e30), x.to(dtype).float().nan_to_num(1e30))


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.bfloat16), ids=str)
def test_dot_multiplies_values_and_not_bits(dtype):
    x, y = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32)
    launch(_dot, (1,), x, y, out, constants={"SIZE": 32})
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-6, atol=1e-5)


def _cast_by_triton_alone(x):
    y = torch.empty_like(x, dtype=torch.bfloat16)
    _cast[(1,)](x, y, SIZE=x.numel())
    return y


def test_other_kernels_run_as_they_do_without_this_package():
    x = torch.randn(64)
    before = _cast_by_triton_alone(x)
    launch(_cast, (1,), x, torch.empty_like(before), constants={"SIZE": 64})
    assert torch.equal(_cast_by_triton_alone(x), before)
    with pytest.raises(interpreter.InterpreterError):
        launch(_cast, (1,), x, torch.empty_like(before), constants={"SIZE": 63})
    assert torch.equal(_cast_by_triton_alone(x), before)
    assert not torch.equal(before, x.bfloat16()), "Triton rounds correctly now: simplify kernels/common/interpreter.py"


def test_several_threads_may_launch():
    xs = torch.randn(4, 1024)
    ys = torch.empty(4, 1024, dtype=torch.bfloat16)

    def cast(i):
        for _ in range(5):
            launch(_cast, (1,), xs[i], ys[i], constants={"SIZE": 1024})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(cast, range(4)))
    assert torch.equal(ys, xs.bfloat16())
