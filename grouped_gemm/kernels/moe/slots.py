"""Kernels between a value for each slot, (T, k), and one for each routed row, (M,). Their twins are in `moe.steps`.

T, k, M: tokens, slots of a token, routed rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.kernels.common.launch import cdiv, launch, on_device

_BLOCK = 256


def scatter(values: Tensor, places: Tensor, out: Tensor) -> None:
    """``out[places[t, j]] = values[t, j]``; other rows keep what they hold.

    Args:
        values: (T, k), contiguous.
        places: (T, k) int32, contiguous; -1: the slot was dropped.
        out: (M,).
    """
    _run(_scatter, values, places, out)


def pick(values: Tensor, places: Tensor, out: Tensor) -> None:
    """``out[t, j] = values[places[t, j]]``, or 0 for a dropped slot.

    Args:
        values: (M,), contiguous.
        places: (T, k) int32, contiguous; -1: the slot was dropped.
        out: (T, k), contiguous.
    """
    _run(_pick, values, places, out)


def _run(kernel, values: Tensor, places: Tensor, out: Tensor) -> None:
    num_slots = places.numel()
    if num_slots == 0:
        return
    with on_device(values):
        launch(
            kernel, (cdiv(num_slots, _BLOCK),), values, places, out, num_slots,
            constants={"BLOCK": _BLOCK}, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["S"])
def _scatter(values, places, out, S, BLOCK: tl.constexpr):
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + slots, mask=slots < S, other=-1)
    value = tl.load(values + slots, mask=slots < S, other=0)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place >= 0)


@triton.jit(do_not_specialize=["S"])
def _pick(values, places, out, S, BLOCK: tl.constexpr):
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(places + slots, mask=slots < S, other=-1)
    value = tl.load(values + place, mask=place >= 0, other=0)
    tl.store(out + slots, value.to(out.dtype.element_ty), mask=slots < S)
