"""`gmm`, `permute` and `unpermute`, as the older package with this import name has them.

Megatron-Core up to 0.16, MegaBlocks and others call these. New code calls `grouped_mm`.

T, k, M, H: tokens, experts of each token, rows in the order of experts, features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grouped_gemm import backend
from grouped_gemm.core import tracing
from grouped_gemm.functional import grouped_mm
from grouped_gemm.selection import checks

__all__ = ["backend", "gmm", "permute", "unpermute"]


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Multiplies each group of rows by its own matrix; differentiable in ``a`` and ``b``.

    Args:
        a: (M, K); bfloat16, float16 or float32.
        b: (E, K, N), or (E, N, K) with ``trans_b``.
        batch_sizes: (E,) integers on the CPU or on the device of ``a``: how many rows each group has. Rows past their
            sum belong to no group.
        trans_b: whether ``b`` is (E, N, K).

    Returns:
        (M, N), whose rows past the last group are zero.

    Raises:
        TypeError, ValueError: as `grouped_gemm.grouped_mm`.
        NoBackendError: no backend runs the call.
    """
    checks.check_tensor("a", a, (2,), checks.DTYPES)
    checks.check_tensor("b", b, (3,), checks.DTYPES)
    return grouped_mm(a, b.transpose(1, 2) if trans_b else b, backend.ends(batch_sizes, a))


def permute(
    input_act: Tensor, indices: Tensor, num_out_tokens: int | None = None, max_token_num: int = 0
) -> tuple[Tensor, Tensor]:
    """Copies tokens into the order of their experts; differentiable in ``input_act``. The host does not wait.

    Args:
        input_act: (T, H).
        indices: (T, k), or (T,) where k is 1: integers, the experts of each token.
        num_out_tokens: M, of the T * k rows those that are kept, the first ones; None, 0 or less: all of them.
        max_token_num: not used. The older package allocates memory by it.

    Returns:
        The rows, (M, H), sorted by expert; those of one expert in the order of tokens. And the place of each token's
        rows among them, (k * T,) int32: that of slot j of token t is at j * T + t, and -1 where its row is not kept.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and found.
    """
    checks.check_tensor("input_act", input_act, (2,), checks.DTYPES)
    checks.check_tensor("indices", indices, (1, 2), (torch.int64, torch.int32))
    num_tokens = input_act.shape[0]
    if indices.shape[0] != num_tokens:
        checks.fail("indices.shape[0]", f"{num_tokens}, the tokens of input_act", indices.shape[0])
    checks.check_device("indices", indices, "input_act", input_act.device)
    if num_out_tokens is not None and (isinstance(num_out_tokens, bool) or not isinstance(num_out_tokens, int)):
        raise TypeError(f"num_out_tokens: expected an int or None; found {type(num_out_tokens).__name__}")
    slots = indices if indices.dim() == 2 else indices[:, None]
    num_rows = slots.numel()
    num_kept = num_rows if num_out_tokens is None or num_out_tokens <= 0 else min(num_out_tokens, num_rows)
    order = torch.argsort(slots.flatten(), stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(num_rows, device=order.device))
    places = torch.where(places < num_kept, places, -1)
    places_kT = places.view(slots.shape).t().int().contiguous()
    tokens = order[:num_kept] // max(slots.shape[1], 1)
    return _Permute.apply(input_act, tokens, places_kT), places_kT.flatten()


def unpermute(input_act: Tensor, row_id_map: Tensor, probs: Tensor | None = None) -> Tensor:
    """Sums the rows of each token, times their probabilities; differentiable in ``input_act`` and ``probs``.

    Sums are in fp32, in the order of slots. The host does not wait.

    Args:
        input_act: (M, H), rows in the order of experts.
        row_id_map: (k * T,) int32, from `permute`.
        probs: (T, k), the factor of each row; None: 1, and k is 1.

    Returns:
        (T, H) in the dtype of ``input_act``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and found.
    """
    checks.check_tensor("input_act", input_act, (2,), checks.DTYPES)
    checks.check_tensor("row_id_map", row_id_map, (1,), (torch.int32, torch.int64))
    checks.check_device("row_id_map", row_id_map, "input_act", input_act.device)
    if probs is not None:
        checks.check_tensor("probs", probs, (2,), checks.DTYPES)
        checks.check_device("probs", probs, "input_act", input_act.device)
        if probs.numel() != row_id_map.numel():
            checks.fail("probs", f"(T, k) of T * k = {row_id_map.numel()}, as row_id_map has them", tuple(probs.shape))
    top_k, num_tokens = (1, row_id_map.numel()) if probs is None else (probs.shape[1], probs.shape[0])
    places_kT = row_id_map.view(top_k, num_tokens)
    if torch.compiler.is_compiling():  # by torch 2.11, the Function's gradients would be zero
        return _sum_of_slots(input_act, places_kT, probs)
    return _Unpermute.apply(input_act, places_kT, probs)


def _sum_of_slots(rows_MH: Tensor, places_kT: Tensor, probs_Tk: Tensor | None) -> Tensor:
    """For each token the sum of its rows, (T, H): in fp32, slot by slot."""
    total = rows_MH.new_zeros(places_kT.shape[1], rows_MH.shape[1], dtype=torch.float32)
    for j, places in enumerate(() if tracing.holds(rows_MH.shape[0] == 0) else places_kT):
        rows = rows_MH.index_select(0, places.clamp(min=0)).float()
        if probs_Tk is not None:
            rows *= probs_Tk[:, j, None].float()
        total += rows.masked_fill_(places[:, None] < 0, 0)
    return total.to(rows_MH.dtype)


class _Permute(torch.autograd.Function):
    """Rows of tokens; their gradients come back together as `_sum_of_slots`, without atomic additions.

    What both backwards call has gradients itself, so that gradients of gradients are there.
    """

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, tokens_M: Tensor, places_kT: Tensor) -> Tensor:
        """(M, H)."""
        ctx.save_for_backward(places_kT)
        return x_TH.index_select(0, tokens_M)

    @staticmethod
    def backward(ctx: Any, dy_MH: Tensor) -> tuple[Tensor | None, ...]:
        """dX (T, H)."""
        (places_kT,) = ctx.saved_tensors
        return _sum_of_slots(dy_MH, places_kT, None), None, None


class _Unpermute(torch.autograd.Function):
    """Sums of rows; a row's gradient is that of its token, times its probability."""

    @staticmethod
    def forward(ctx: Any, rows_MH: Tensor, places_kT: Tensor, probs_Tk: Tensor | None) -> Tensor:
        """(T, H)."""
        ctx.save_for_backward(rows_MH, places_kT, probs_Tk)
        return _sum_of_slots(rows_MH, places_kT, probs_Tk)

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        """d rows (M, H), zero where no token asked for one, and d probs (T, k)."""
        rows_MH, places_kT, probs_Tk = ctx.saved_tensors
        num_rows = rows_MH.shape[0]
        drows = dprobs = None
        if ctx.needs_input_grad[0] and tracing.holds(dy_TH.shape[0] == 0):
            drows = torch.zeros_like(rows_MH)
        elif ctx.needs_input_grad[0]:
            asked_by_kT = torch.arange(places_kT.numel(), device=places_kT.device)
            places = torch.where(places_kT < 0, num_rows, places_kT).flatten().long()  # the last is of what was dropped
            slot_of_row = asked_by_kT.new_full((num_rows + 1,), -1).index_copy(0, places, asked_by_kT)[:-1]
            is_asked, slots = slot_of_row[:, None] >= 0, slot_of_row.clamp(min=0)
            drows = dy_TH.index_select(0, slots % dy_TH.shape[0])
            if probs_Tk is not None:
                drows = (drows.float() * probs_Tk.t().flatten().index_select(0, slots)[:, None].float()).to(dy_TH.dtype)
            drows = drows.masked_fill(~is_asked, 0)
        if ctx.needs_input_grad[2]:
            has_rows = not tracing.holds(num_rows == 0)
            by_slot = [
                (rows_MH.index_select(0, places.clamp(min=0)).float() * dy_TH.float()).sum(1).masked_fill(places < 0, 0)
                for places in (places_kT if has_rows else ())
            ]
            dprobs = torch.stack(by_slot, 1).to(probs_Tk.dtype) if by_slot else torch.zeros_like(probs_Tk)
        return drows, None, dprobs
