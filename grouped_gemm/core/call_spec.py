"""`CallSpec`: the one description of a call."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch

from grouped_gemm.core.machine import Machine, machine_of
from grouped_gemm.core.preference import BackendKind, KernelPreference
from grouped_gemm.core.recipes import Recipe


class Pass(Enum):
    """One of the three GEMMs of a call that trains."""

    FORWARD = "forward"  # Y = A B, per group of rows
    DGRAD = "dgrad"  # dA = dY B^T, per group of rows
    WGRAD = "wgrad"  # dB = A^T dY: the rows of a group are the contraction


class RowClass(Enum):
    """How many rows a group has on average: all that selection knows of M."""

    DECODE = "decode"  # at most 16
    SMALL = "small"  # at most 256
    LARGE = "large"


DECODE_ROWS, SMALL_ROWS = 16, 256  # the most rows per group of these classes


def row_class(num_rows: int, num_groups: int) -> RowClass:
    """The class of ``num_rows`` rows in ``num_groups`` groups; from shapes, so it never waits for the device."""
    if num_rows <= DECODE_ROWS * num_groups:
        return RowClass.DECODE
    if num_rows <= SMALL_ROWS * num_groups:
        return RowClass.SMALL
    return RowClass.LARGE


class CallSpec(NamedTuple):
    """All that decides how a call runs, known from its arguments without a look at values. Equal calls run alike.

    It is the key of cached decisions, what requirements look at, and what a `Route` is made of. It is a tuple of
    constants because Dynamo passes on nothing else to a function that it does not trace.

    Attributes:
        where: the device that it runs on; or a machine that is not there, to explain what would run on it.
        num_groups: E.
        k: K, in features.
        n: N, out features.
        rows: row class of M and E.
        recipe: how operands are quantized.
        dtype: dtype of ``a``, and of ``b`` before it is quantized.
        out_dtype: dtype of the output.
        passes: what will run, first what the forward call runs.
        b_contiguous: "n" or "k", the fastest axis of ``b``; weights (E, N, K) seen through a transpose have "k".
        has_bias: whether a bias is added.
        group_alignment: every group's size is a multiple of it, as the caller guarantees.
        is_aligned: strides of ``a`` and ``b`` are multiples of 16 bytes, as TMA wants them. Where a tensor starts is
            known at the launch only.
        host_sync: whether a pass may wait for the device.
        captured: whether a CUDA graph is being captured; then it may not, and no replay waits for the host.
        weights: whose layouts for forward and dgrad ``b`` was quantized to beforehand; None: it was not.
        preference: what the argument ``kernel_preference`` asks for.
        context: what the surrounding `prefer` asks for; None: nothing.
    """

    where: torch.device | Machine
    num_groups: int
    k: int
    n: int
    rows: RowClass
    recipe: Recipe = Recipe.NONE
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype = torch.bfloat16
    passes: tuple[Pass, ...] = (Pass.FORWARD,)
    b_contiguous: str = "k"
    has_bias: bool = False
    group_alignment: int = 1
    is_aligned: bool = True
    host_sync: bool = True
    captured: bool = False
    weights: tuple[BackendKind, BackendKind | None] | None = None
    preference: KernelPreference = KernelPreference.AUTO
    context: KernelPreference | None = None

    @property
    def machine(self) -> Machine:
        """The machine that it runs on."""
        return self.where if isinstance(self.where, Machine) else machine_of(self.where)

    def __str__(self) -> str:
        passes = "+".join(p.value for p in self.passes)
        return (
            f"grouped_mm(E={self.num_groups}, K={self.k}, N={self.n}, {self.recipe.value}, "
            f"{dtype_name(self.dtype)}, {self.machine.arch}, {passes})"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its module: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
