"""A fake torch for AMD GPUs that checks its arguments as ROCm builds do, multiplies on the CPU, and records its calls.

Its checks are transcribed from torch's `ScaledBlas.cpp`, `GroupedBlas.cpp` and `GroupedMMUtils.h`. docs/rocm.md lists
what hipBLASLt assumes as well. An operand that torch would have to copy for the library is an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from grouped_gemm.backends import candidates
from grouped_gemm.backends.base import Health
from grouped_gemm.backends.hipblaslt import backend as hipblaslt
from grouped_gemm.core import machine as machine_module
from grouped_gemm.core.machine import Machine
from grouped_gemm.core.preference import BackendKind

BUILDS = {"MI300X": ("gfx942", "6.4"), "MI355X": ("gfx950", "7.1")}
mm_on_cpu = torch.mm


def machine(arch: str, rocm: str) -> Machine:
    name = {"gfx942": "AMD Instinct MI300X", "gfx950": "AMD Instinct MI355X"}[arch]
    return Machine("amd", arch, name, (("torch", torch.__version__), ("rocm", f"{rocm}-123f8eb5")))


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Build:
    """A build of torch with some ROCm, on some GPU.

    Attributes:
        calls: names and tensors, in the order of the calls.
        reads: addresses of the tensors that the host read, with a host sync each.
    """

    def __init__(self, arch: str, rocm: str, grouped: bool = False):
        self.arch, self.rocm, self.grouped = arch, Version(rocm).release, grouped
        self.fp8 = torch.float8_e4m3fnuz if arch == "gfx942" else torch.float8_e4m3fn
        self.calls: list[tuple[str, tuple[Tensor, ...]]] = []
        self.reads: list[int] = []

    def wait_for(self, offs: Tensor) -> list[int]:
        self.reads.append(offs.data_ptr())
        return offs.tolist()

    def mm(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        self.calls.append(("mm", (a, b, out)))
        for x in (a, b, out):
            self._check_not_copied(x)
        assert out.shape == (a.shape[0], b.shape[1]) and out.dtype == a.dtype == b.dtype
        return mm_on_cpu(a, b, out=out)

    def scaled_mm(
        self, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype, out: Tensor
    ) -> Tensor:
        self.calls.append(("scaled_mm", (a, b, scale_a, scale_b, out)))
        assert self.arch == "gfx942" or (self.arch == "gfx950" and self.rocm >= (6, 5)), "an architecture without fp8"
        (m, k), n = a.shape, b.shape[1]
        assert b.shape[0] == k and k % 16 == 0 and n % 16 == 0
        assert a.dtype.is_floating_point and a.dtype.itemsize == b.dtype.itemsize == 1
        if torch.float8_e4m3fn in (a.dtype, b.dtype):
            assert self.rocm >= (6, 5)
        assert out.dtype == out_dtype and out.shape == (m, n), "torch would resize it"
        assert a.stride(1) == 1 and b.stride(0) == 1 and out.stride(1) == 1, (
            "expected rows of a and columns of b to be contiguous"
        )
        for x in (a, b):
            self._check_not_copied(x)
            assert x.data_ptr() % 16 == 0 and max(x.stride()) % 16 == 0, "hipBLASLt loads 16 bytes at a time"
        self._check_not_copied(out)
        if scale_a.dtype == scale_b.dtype == torch.float32:
            return self._rowwise(a, b, scale_a, scale_b, out)
        return self._mx(a, b, scale_a, scale_b, out)

    def _rowwise(self, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: Tensor) -> Tensor:
        assert scale_a.numel() > 1 or scale_b.numel() > 1, "one scale for each tensor"
        assert scale_a.shape == (a.shape[0], 1) and scale_a.is_contiguous()
        assert scale_b.shape == (1, b.shape[1]) and scale_b.t().is_contiguous()
        assert a.dtype == b.dtype == self.fp8
        assert out.dtype == torch.bfloat16
        return self.rowwise_gemm(a, b, scale_a, scale_b, out)

    def rowwise_gemm(self, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: Tensor) -> Tensor:
        with _disable_current_modes():  # this computation is not part of the call
            return out.copy_((a.double() * scale_a) @ (b.double() * scale_b))

    def _mx(self, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out: Tensor) -> Tensor:
        (m, k), n = a.shape, b.shape[1]
        assert scale_a.dtype == scale_b.dtype == torch.float8_e8m0fnu
        blocks = round_up(-(-k // 32), 4)
        assert scale_a.numel() == round_up(m, 128) * blocks and scale_b.numel() == round_up(n, 128) * blocks
        assert scale_a.is_contiguous() and scale_b.is_contiguous()
        assert self.arch == "gfx950" and (7, 0) <= self.rocm < (7, 14)
        assert a.dtype == b.dtype == self.fp8
        assert m % 16 == 0 and k % 128 == 0 and n % 16 == 0
        assert out.dtype in (torch.bfloat16, torch.float16)
        with _disable_current_modes():
            lhs, rhs = (
                x.double() * scale.view(-1, blocks)[: len(x)].double().repeat_interleave(32, 1)
                for x, scale in ((a, scale_a), (b.t(), scale_b))
            )
            return out.copy_(lhs @ rhs.t())

    def scaled_grouped_mm(
        self,
        a: Tensor,
        b: Tensor,
        scale_a: Tensor,
        recipe_a: Any,
        scale_b: Tensor,
        recipe_b: Any,
        *,
        offs: Tensor,
        output_dtype: torch.dtype,
    ) -> Tensor:
        """Rows of a by matrices of b; rows of no group are never written."""
        self.calls.append(("scaled_grouped_mm", (a, b, scale_a, scale_b, offs)))
        rowwise = torch.nn.functional.ScalingType.RowWise
        assert recipe_a == recipe_b == rowwise and output_dtype == torch.bfloat16
        if not self.grouped:
            raise NotImplementedError("grouped gemm is not supported without USE_MSLK on ROCM")
        for x in (a, b):
            assert x.data_ptr() % 16 == 0
        (m, k), (groups, _, n) = a.shape, b.shape
        assert a.stride(1) == 1 and a.stride(0) >= k and a.stride(0) % 16 == 0
        assert b.stride(1) == 1 and b.stride(2) >= k and b.stride(2) % 16 == 0, "b is transposed"
        assert b.shape[1] == k and k % 16 == 0 and n % 16 == 0
        assert offs.dtype == torch.int32 and offs.dim() == 1 and len(offs) == groups
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.shape == (m,) and scale_a.is_contiguous()
        assert scale_b.shape == (groups, n) and scale_b.stride(1) == 1
        assert a.dtype == b.dtype == self.fp8
        out, start = torch.full((m, n), torch.nan, dtype=output_dtype), 0
        for e, end in enumerate(offs.tolist()):
            assert start <= end <= m, "an address out of bounds"
            if start < end:
                lhs, rhs = a[start:end].double() * scale_a[start:end, None], b[e].double() * scale_b[e]
                out[start:end] = lhs @ rhs
            start = end
        return out

    @staticmethod
    def _check_not_copied(x: Tensor) -> None:
        """`prepare_matrix_for_cublas` takes ``x`` without a copy."""
        (rows, columns), (row, column) = x.shape, x.stride()
        by_columns = row == 1 and column >= max(1, rows)
        by_rows = column == 1 and row >= max(1, columns)
        assert x.is_contiguous() or x.t().is_contiguous() or by_columns or by_rows, "torch would copy it"


def install(monkeypatch: pytest.MonkeyPatch, name: str, rocm: str = "", grouped: bool = False) -> Build:
    """Puts a fake build of torch for a machine of BUILDS in place, and makes its health check. Call `forget` later."""
    arch, usual = BUILDS[name]
    build = Build(arch, rocm or usual, grouped)
    found = machine(arch, rocm or usual)
    monkeypatch.setattr(machine_module, "_probe", lambda kind, index: found)
    monkeypatch.setattr(torch, "mm", build.mm)
    monkeypatch.setattr(torch, "_scaled_mm", build.scaled_mm)
    monkeypatch.setattr(torch.nn.functional, "scaled_grouped_mm", build.scaled_grouped_mm, raising=False)
    monkeypatch.setattr(hipblaslt, "_to_host", build.wait_for)
    forget()
    cpu = candidates(torch.device("cpu"))
    (mine,) = (candidate for candidate in cpu if candidate.backend.kind is BackendKind.HIPBLASLT)
    assert mine.health() == Health()
    build.calls.clear()
    build.reads.clear()
    return build


def forget() -> None:
    """Forgets what was found out about a build."""
    hipblaslt._has_grouped_gemm.cache_clear()
    candidates.cache_clear()
