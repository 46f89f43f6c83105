"""`gmm`, `permute` and `unpermute`, with the signatures of the older package of this import name.

Megatron-Core up to 0.16, MegaBlocks and others call these functions. New code should call `grouped_mm`.

T, k, M, H: tokens, experts per token, rows sorted by expert, features.
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
        batch_sizes: (E,) integers on the CPU or on the device of ``a``: the number of rows in each group. Rows past
            their sum belong to no group.
        trans_b: whether ``b`` is (E, N, K).

    Returns:
        (M, N), zero in rows past the last group.

    Raises:
        TypeError, ValueError: as `grouped_gemm.grouped_mm`.
        NoBackendError: no backend can run the call.
    """
    checks.check_tensor("a", a, (2,), checks.DTYPES)
    checks.check_tensor("b", b, (3,), checks.DTYPES)
    return grouped_mm(a, b.transpose(1, 2) if trans_b else b, backend.ends(batch_sizes, a))


def permute(
    input_act: Tensor, indices: Tensor, num_out_tokens: int | None = None, max_token_num: int = 0
) -> tuple[Tensor, Tensor]:
    """Copies tokens into expert order; differentiable in ``input_act``. No host sync.

    Args:
        input_act: (T, H).
        indices: (T, k), or (T,) if k is 1: integers, the experts of each token.
        num_out_tokens: M: only the first M of the T * k sorted rows are kept. None, 0 or less: all of them.
        max_token_num: ignored. The older package uses it to allocate memory.

    Returns:
        The rows, (M, H), sorted by expert, and by token within an expert. And a row map, (k * T,) int32: entry
        j * T + t is the row of slot j of token t, or -1 if that row is not kept.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, what was expected and what was found.
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
    """Sums the rows of each token, weighted by their probabilities; differentiable in ``input_act`` and ``probs``.

    Sums are in fp32, in the order of slots. No host sync.

    Args:
        input_act: (M, H), rows in expert order.
        row_id_map: (k * T,) int32, from `permute`.
        probs: (T, k), the weight of each row; None: k is 1, and weights are 1.

    Returns:
        (T, H) in the dtype of ``input_act``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, what was expected and what was found.
    """
    checks.check_tensor("input_act", input_act, (2,), checks.DTYPES)
    checks.check_tensor("row_id_map", row_id_map, (1,), (torch.int32, torch.int64))
    checks.check_device("row_id_map", row_id_map, "input_act", input_act.device)
    if probs is not None:
        checks.check_tensor("probs", probs, (2,), checks.DTYPES)
        checks.check_device("probs", probs, "input_act", input_act.device)
        if probs.numel() != row_id_map.numel():
            checks.fail("probs", f"(T, k) with T * k = {row_id_map.numel()}, as in row_id_map", tuple(probs.shape))
    top_k, num_tokens = (1, row_id_map.numel()) if probs is None else (probs.shape[1], probs.shape[0])
    places_kT = row_id_map.view(top_k, num_tokens)
    return _Unpermute.apply(input_act, places_kT, probs)


def _sum_of_slots(rows_MH: Tensor, places_kT: Tensor, probs_Tk: Tensor | None) -> Tensor:
    """The sum of each token's rows, (T, H), in fp32, slot by slot."""
    total = rows_MH.new_zeros(places_kT.shape[1], rows_MH.shape[1], dtype=torch.float32)
    for j, places in enumerate(() if tracing.holds(rows_MH.shape[0] == 0) else places_kT):
        rows = rows_MH.index_select(0, places.clamp(min=0)).float()
        if probs_Tk is not None:
            rows *= probs_Tk[:, j, None].float()
        total += rows.masked_fill_(places[:, None] < 0, 0)
    # A new tensor, since forward returns it: see torch.compile in docs/design.md.
    return total.to(rows_MH.dtype, copy=True)


class _Permute(torch.autograd.Function):
    """Gathers the rows of tokens. Backward sums a token's gradients with `_sum_of_slots`, without atomics.

    Both backward functions use differentiable ops only, so second derivatives work.
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
    """Sums rows by token. A row's gradient is its token's gradient times its probability."""

    @staticmethod
    def forward(ctx: Any, rows_MH: Tensor, places_kT: Tensor, probs_Tk: Tensor | None) -> Tensor:
        """(T, H)."""
        ctx.save_for_backward(rows_MH, places_kT, probs_Tk)
        return _sum_of_slots(rows_MH, places_kT, probs_Tk)

    @staticmethod
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        """d rows (M, H), zero for rows that no slot refers to, and d probs (T, k)."""
        rows_MH, places_kT, probs_Tk = ctx.saved_tensors
        num_rows = rows_MH.shape[0]
        drows = dprobs = None
        if ctx.needs_input_grad[0] and tracing.holds(dy_TH.shape[0] == 0):
            drows = torch.zeros_like(rows_MH)
        elif ctx.needs_input_grad[0]:
            slots_kT = torch.arange(places_kT.numel(), device=places_kT.device)
            places = torch.where(places_kT < 0, num_rows, places_kT).flatten().long()  # dropped slots share a last row
            slot_of_row = slots_kT.new_full((num_rows + 1,), -1).index_copy(0, places, slots_kT)[:-1]
            is_used, slots = slot_of_row[:, None] >= 0, slot_of_row.clamp(min=0)
            drows = dy_TH.index_select(0, slots % dy_TH.shape[0])
            if probs_Tk is not None:
                drows = (drows.float() * probs_Tk.t().flatten().index_select(0, slots)[:, None].float()).to(dy_TH.dtype)
            drows = drows.masked_fill(~is_used, 0)
        if ctx.needs_input_grad[2]:
            has_rows = not tracing.holds(num_rows == 0)
            by_slot = [
                (rows_MH.index_select(0, places.clamp(min=0)).float() * dy_TH.float()).sum(1).masked_fill(places < 0, 0)
                for places in (places_kT if has_rows else ())
            ]
            dprobs = torch.stack(by_slot, 1).to(probs_Tk.dtype) if by_slot else torch.zeros_like(probs_Tk)
        return drows, None, dprobs
