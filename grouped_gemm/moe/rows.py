"""From tokens to rows in expert order and back: `gather` and `combine`, with derivatives of any order.

Both follow from one form: the sum over tokens t and slots j of ``weights[t, j] * <x[t], rows[places[t, j]]>``. Its
gradients are `combine` in ``x``, a weighted `gather` in ``rows``, and dot products in ``weights``. So these three are
each other's gradients.

On a GPU where the Triton backend runs, and on a CPU under Triton's interpreter, each is one kernel. Elsewhere it is
plain torch.

T, k, M, H: tokens, slots of a token, routed rows, features. M may be any number, T * k if `route` routes. Two tensors
describe a routing:

- ``source`` (M,) int32: the token of each row; -1: the row is not used.
- ``places`` (T, k) int32: the row of each slot; -1: the slot was dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grouped_gemm.backends import runs_kernels
from grouped_gemm.core.dense import dense_rows
from grouped_gemm.core.library import Steps, define_op, ops
from grouped_gemm.core.vmap import batched_gradient


def gather(x: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """Copies tokens into expert order; differentiable in ``x``.

    The gradient of a token is the sum of its rows' gradients, in fp32 and in the order of slots: bits repeat. No host
    sync.

    Args:
        x: (T, H), bfloat16, float16 or float32.
        source: (M,) int32: the token of each row; -1: the row is not used.
        places: (T, k) int32: the row of each slot; -1: the slot was dropped.

    Returns:
        (M, H) in the dtype of ``x``; rows that are not used are zero.
    """
    rows: Tensor = _Gather.apply(dense_rows(x), None, source, places)
    return rows


def combine(rows: Tensor, weights: Tensor | None, source: Tensor, places: Tensor) -> Tensor:
    """Sums each token's rows, times their weights; differentiable in ``rows`` and ``weights``.

    Sums are in fp32, in the order of slots: bits repeat. Dropped slots and rows that are not used contribute nothing,
    whatever they hold. NaN in a row reaches the output of its token only. No host sync.

    Args:
        rows: (M, H) in expert order, bfloat16, float16 or float32.
        weights: (T, k), any floating-point dtype; None: all weights are 1.
        source: (M,) int32: the token of each row; -1: the row is not used.
        places: (T, k) int32: the row of each slot; -1: the slot was dropped.

    Returns:
        (T, H) in the dtype of ``rows``.
    """
    y: Tensor = _Combine.apply(dense_rows(rows), None if weights is None else dense_rows(weights), source, places)
    return y


class _Gather(torch.autograd.Function):
    """rows[places[t, j]] = weights[t, j] * x[t], and zero in rows that are not used."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weights: Tensor | None, source: Tensor, places: Tensor) -> Tensor:
        """(M, H) in the dtype of ``x``."""
        ctx.save_for_backward(x_TH if ctx.needs_input_grad[1] else None, weights, source, places)
        if weights is None:
            return ops.moe_gather(x_TH, source, places)
        return ops.moe_combine_backward(x_TH, None, weights, source, places, True)[0]

    @staticmethod
    def backward(ctx: Any, drows_MH: Tensor) -> tuple[Tensor | None, ...]:
        """dX (T, H) and dweights (T, k)."""
        x_TH, weights, source, places = ctx.saved_tensors
        dx = dweights = None
        with batched_gradient(drows_MH):
            drows_MH = dense_rows(drows_MH)
            if ctx.needs_input_grad[0]:
                dx = _Combine.apply(drows_MH, weights, source, places)
            if ctx.needs_input_grad[1]:
                dweights = _Dots.apply(x_TH, drows_MH, weights, source, places)
        return dx, dweights, None, None


class _Combine(torch.autograd.Function):
    """y[t] = the sum over j of weights[t, j] * rows[places[t, j]]."""

    @staticmethod
    def forward(ctx: Any, rows_MH: Tensor, weights: Tensor | None, source: Tensor, places: Tensor) -> Tensor:
        """(T, H) in the dtype of ``rows``."""
        ctx.save_for_backward(rows_MH if ctx.needs_input_grad[1] else None, weights, source, places)
        return ops.moe_combine(rows_MH, weights, places)

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        """dRows (M, H) and dweights (T, k), from one kernel; with ``create_graph=True`` from one for each."""
        rows_MH, weights, source, places = ctx.saved_tensors
        for_rows, for_weights, *_ = ctx.needs_input_grad
        drows = dweights = None
        with batched_gradient(dy_TH):
            dy_TH = dense_rows(dy_TH)
            if for_rows and for_weights and not torch.is_grad_enabled():
                drows, dweights = ops.moe_combine_backward(dy_TH, rows_MH, weights, source, places, True)
                return drows, dweights, None, None
            if for_rows:
                drows = _Gather.apply(dy_TH, weights, source, places)
            if for_weights:
                dweights = _Dots.apply(dy_TH, rows_MH, weights, source, places)
        return drows, dweights, None, None


class _Dots(torch.autograd.Function):
    """dots[t, j] = <x[t], rows[places[t, j]]>."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, rows_MH: Tensor, weights: Tensor, source: Tensor, places: Tensor) -> Tensor:
        """(T, k) in the dtype of ``weights``, which are not read; zero for dropped slots."""
        ctx.save_for_backward(x_TH, rows_MH, source, places)
        return ops.moe_combine_backward(x_TH, rows_MH, weights, source, places, False)[1]

    @staticmethod
    def backward(ctx: Any, ddots: Tensor) -> tuple[Tensor | None, ...]:
        """dX (T, H) and dRows (M, H)."""
        x_TH, rows_MH, source, places = ctx.saved_tensors
        dx = drows = None
        with batched_gradient(ddots):
            ddots = dense_rows(ddots)
            if ctx.needs_input_grad[0]:
                dx = _Combine.apply(rows_MH, ddots, source, places)
            if ctx.needs_input_grad[1]:
                drows = _Gather.apply(x_TH, ddots, source, places)
        return dx, drows, None, None, None


# The ops


@define_op(replays=True)
def _moe_gather(x_TH: Tensor, source: Tensor, places: Tensor) -> Steps[Tensor]:
    out_MH = x_TH.new_empty(source.shape[0], x_TH.shape[1])
    yield out_MH
    if runs_kernels(x_TH.device):
        from grouped_gemm.kernels.moe import gather as kernel

        kernel.gather(x_TH, None, None, source.contiguous(), places.contiguous(), out_MH, None)
    else:
        _gather(x_TH, None, source, places, out_MH)


@define_op(replays=True)
def _moe_combine(
    rows_MH: Tensor, weights: Tensor | None, places: Tensor, lost: Tensor | None = None, shifts: Tensor | None = None
) -> Steps[Tensor]:
    """(T, H).

    Args:
        lost: (T,) bool, tokens whose sum is NaN.
        shifts: (k,) int64, how many bytes from ``rows`` a slot's row is, on another rank; kernels alone read it.
    """
    y_TH = rows_MH.new_empty(places.shape[0], rows_MH.shape[1])
    yield y_TH
    if runs_kernels(rows_MH.device):
        from grouped_gemm.kernels.moe import combine as kernel

        is_lost = None if lost is None else lost.view(torch.uint8)
        kernel.combine(rows_MH, weights, places.contiguous(), y_TH, is_lost, shifts)
    else:
        _combine(rows_MH, weights, places, y_TH)
        if lost is not None:
            y_TH.masked_fill_(lost[:, None], torch.nan)


@define_op(replays=True)
def _moe_combine_backward(
    dy_TH: Tensor, rows_MH: Tensor | None, weights: Tensor | None, source: Tensor, places: Tensor, for_rows: bool
) -> Steps[tuple[Tensor, Tensor]]:
    """dRows of a combine, if ``for_rows``, and dweights, if ``rows`` are given. One that is not wanted is empty."""
    drows = dy_TH.new_empty((source.shape[0], dy_TH.shape[1]) if for_rows else 0)
    dweights = dy_TH.new_empty(0 if rows_MH is None else places.shape, dtype=None if weights is None else weights.dtype)
    yield drows, dweights
    if runs_kernels(dy_TH.device):
        from grouped_gemm.kernels.moe import gather as kernel

        out, dots = drows if for_rows else None, None if rows_MH is None else dweights
        kernel.gather(dy_TH, rows_MH, weights, source.contiguous(), places.contiguous(), out, dots)
        return
    if for_rows:
        _gather(dy_TH, weights, source, places, drows)
    if rows_MH is not None:
        _dots(dy_TH, rows_MH, places, dweights)


# The same in plain torch, without host syncs. One slot at a time: temporaries are no larger than (T, H).


def _gather(x_TH: Tensor, weights: Tensor | None, source: Tensor, places: Tensor, out_MH: Tensor) -> None:
    if len(x_TH) == 0 or len(out_MH) == 0:
        out_MH.zero_()
        return
    last = len(out_MH) - 1  # what dropped slots write to; it is written again at the end
    for j, place in enumerate(places.long().unbind(1)):
        out_MH.index_copy_(0, torch.where(place < 0, last, place), _weighted(x_TH, weights, j))
    token = source[-1:].clamp(min=0)
    for j, place in enumerate(places.index_select(0, token).unbind(1)):
        own = x_TH.index_select(0, token), None if weights is None else weights.index_select(0, token)
        out_MH[-1:] = torch.where((place == last).unsqueeze(1), _weighted(*own, j), out_MH[-1:])
    out_MH.masked_fill_(source[:, None] < 0, 0)


def _weighted(x_TH: Tensor, weights: Tensor | None, slot: int) -> Tensor:
    return x_TH if weights is None else (x_TH.float() * weights[:, slot, None].float()).to(x_TH.dtype)


def _combine(rows_MH: Tensor, weights: Tensor | None, places: Tensor, y_TH: Tensor) -> None:
    if len(rows_MH) == 0:
        y_TH.zero_()
        return
    total = torch.zeros_like(y_TH, dtype=torch.float32)
    for j, place in enumerate(places.unbind(1)):
        rows = rows_MH.index_select(0, place.clamp(min=0)).float()
        if weights is not None:
            rows *= weights[:, j, None].float()
        total += rows.masked_fill_(place[:, None] < 0, 0)
    y_TH.copy_(total)


def _dots(x_TH: Tensor, rows_MH: Tensor, places: Tensor, dots: Tensor) -> None:
    if len(rows_MH) == 0:
        dots.zero_()
        return
    for j, place in enumerate(places.unbind(1)):
        rows = rows_MH.index_select(0, place.clamp(min=0)).float()
        dots[:, j] = (rows * x_TH.float()).sum(1).masked_fill_(place < 0, 0)
