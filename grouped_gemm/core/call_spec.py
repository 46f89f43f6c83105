"""`CallSpec`: the one description of a call."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch

from grouped_gemm.core.machine import Machine, machine_of
from grouped_gemm.core.preference import BackendKind, KernelPreference
from grouped_gemm.core.recipes import Recipe


class Pass(Enum):
    """One of the three GEMMs of a training call."""

    FORWARD = "forward"  # Y = A B for each group of rows
    DGRAD = "dgrad"  # dA = dY B^T for each group of rows
    WGRAD = "wgrad"  # dB = A^T dY for each group: the group's rows are the contraction


class RowClass(Enum):
    """The average number of rows per group, as a class. Selection knows nothing else about M."""

    DECODE = "decode"  # at most 16
    SMALL = "small"  # at most 256
    LARGE = "large"


DECODE_ROWS, SMALL_ROWS = 16, 256  # the most rows per group of these classes


def row_class(num_rows: int, num_groups: int) -> RowClass:
    """The class of ``num_rows`` rows in ``num_groups`` groups. It follows from shapes, without a host sync."""
    if num_rows <= DECODE_ROWS * num_groups:
        return RowClass.DECODE
    if num_rows <= SMALL_ROWS * num_groups:
        return RowClass.SMALL
    return RowClass.LARGE


class CallSpec(NamedTuple):
    """Everything that decides how a call runs, known from its arguments without reading values. Equal specs run alike.

    It is the key of cached decisions, the input of requirements, and the source of a `Route`. It is a tuple of
    constants because Dynamo passes only constants to a function that it does not trace.

    Attributes:
        where: the device that the call runs on; or a hypothetical machine, to explain what would run there.
        num_groups: E.
        k: K, in features.
        n: N, out features.
        rows: row class of M and E.
        recipe: how operands are quantized.
        dtype: dtype of ``a``, and of ``b`` before it is quantized.
        out_dtype: dtype of the output.
        passes: the passes that will run, starting with the pass of the forward call.
        b_contiguous: "n" or "k", the contiguous axis of ``b``; weights (E, N, K) seen through a transpose have "k".
        has_bias: whether a bias is added.
        group_alignment: the caller guarantees that every group's size is a multiple of it.
        is_aligned: strides of ``a`` and ``b`` are multiples of 16 bytes, as TMA requires. The alignment of a tensor's
            start is known only at the launch.
        host_sync: whether a pass may synchronize the host.
        captured: whether a CUDA graph is being captured. If so, no pass may synchronize the host, and replays do not
            wait for it.
        weights: for ``b`` from `quantize_weights`, the backends of its layouts for forward and dgrad; else None.
        preference: the preference in the argument ``kernel_preference``.
        context: the preference of the surrounding `prefer`; None: there is none.
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
        """The machine that the call runs on."""
        return self.where if isinstance(self.where, Machine) else machine_of(self.where)

    def __str__(self) -> str:
        passes = "+".join(p.value for p in self.passes)
        return (
            f"grouped_mm(E={self.num_groups}, K={self.k}, N={self.n}, {self.recipe.value}, "
            f"{dtype_name(self.dtype)}, {self.machine.arch}, {passes})"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without the module, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
