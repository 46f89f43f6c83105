"""The implementations of the experts of a MoE layer, by name.

T, k, H, I: tokens, experts per token, hidden and intermediate features. E, M: experts, routed rows; M = T * k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm.core import tracing
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.group_plan import GroupPlan
from grouped_gemm.moe import decode, fused
from grouped_gemm.moe.composed import ExpertWeights, Weights, dense, grouped, run_composed
from grouped_gemm.moe.padding import gathered_to
from grouped_gemm.moe.routing import route
from grouped_gemm.moe.rows import combine, gather
from grouped_gemm.moe.tokens import QuantizedTokens

IMPLEMENTATIONS = ("auto", "grouped_mm", "decode", "batched_mm", "eager_fused", "eager")
# Routed rows up to which "auto" gathers the weights of each row. On a CPU, batched_mm wins up to 4 to 8 rows of a small
# layer. On an H100 the fused layer wins from one token on.
_FEW_ROWS = 4


def run(
    name: str, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights, num_slots: int | None = None,
    quantized: QuantizedTokens | None = None,
) -> Tensor:  # fmt: skip
    """The layer, (T, H), by the implementation of this ``name``. Arguments as of `experts_forward`, checked.

    ``num_slots`` is how many slots are not dropped, if the host knows it. With ``quantized`` tokens, ``x`` has no
    values.

    Raises:
        ValueError: the call is not one for this implementation, or nothing that is batch-invariant runs it.
    """
    chosen = _choose(name, x, topk_ids, topk_weights, experts)
    if chosen != "decode":
        experts = decode.without_quantized(experts, x.dtype)
    is_fused = chosen == "grouped_mm" and fused.can_run(x, topk_weights, experts)
    if quantized is not None and not (is_fused and quantized.recipe is fused.recipe_of(experts)):
        x, quantized = quantized.values(x), None
    if chosen != "grouped_mm":
        return _RUNS[chosen](x, topk_ids, topk_weights, experts)
    multiple = 1 if is_fused else _gathered_to(x, experts)
    routing = route(topk_ids, experts.num_experts, multiple)
    if num_slots is not None:
        routing = routing._replace(source=routing.source[: num_slots + experts.num_experts * (multiple - 1)])
    if is_fused:
        return fused.run(x, topk_weights, experts, routing, quantized)
    return run_composed(x, topk_weights, experts, routing, multiple)


def is_fused(name: str, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> bool:
    """Whether `run` takes the fused kernels for many tokens, with weights as they are. It raises as `run` does."""
    chosen = _choose(name, x, topk_ids, topk_weights, experts)
    return chosen == "grouped_mm" and not experts.weight_only and fused.can_run(x, topk_weights, experts)


def explain(name: str, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> str:
    """What `run` would do, and what of it is fused."""
    chosen = _choose(name, x, topk_ids, topk_weights, experts)
    if chosen == "decode":
        return f"implementation decode, fused:\n{decode.explain(experts)}"
    note = "\n  Before that, the weights are dequantized." if experts.weight_only else ""
    if chosen != "grouped_mm":
        return f"implementation {chosen}{note}"
    experts = decode.like_dense(experts, x.dtype)
    refusal = fused.refusal(x, topk_weights, experts)
    if refusal is None:
        return f"implementation grouped_mm, fused:\n{fused.explain(experts)}{note}"
    text = f"implementation grouped_mm, not fused: {refusal}. It runs gather, grouped_mm, activation and combine.{note}"
    multiple = _gathered_to(x, experts)
    return text if multiple == 1 else f"{text}\n  The gather pads each expert's rows to a multiple of {multiple}."


def _gathered_to(x: Tensor, experts: ExpertWeights) -> int:
    training = fused.needs_gradients(*experts.first, experts.down)
    return gathered_to(experts.recipe, experts.kernel_preference, x.device, training)


def _run_batched(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> Tensor:
    """Each routed row with its own copy of its expert's weights."""
    num_tokens, k = topk_ids.shape
    ids = topk_ids.flatten()
    is_kept = (ids >= 0) & (ids < experts.num_experts)
    ids = torch.where(is_kept, ids, 0).to(torch.int64)
    ends = torch.arange(1, ids.shape[0] + 1, dtype=torch.int32, device=x.device)
    plan = GroupPlan(ends, ids.shape[0]) if experts.is_scaled else None

    def multiply(rows: Tensor, w: Weights, bias: Tensor | None) -> Tensor:
        own, own_bias = dense(w).index_select(0, ids), None if bias is None else bias.index_select(0, ids)
        if plan is not None:
            return grouped(experts, plan)(rows, own, own_bias)
        y = torch.bmm(own, rows.unsqueeze(2)).squeeze(2)
        return y if own_bias is None else y + own_bias

    # A dropped slot multiplies by an expert's weights too, whose gradient must not see what its row holds.
    rows = torch.where(is_kept.unsqueeze(1), x.repeat_interleave(k, dim=0), 0)
    y = experts.run(multiply, rows)
    return _weighted_sum(y.view(num_tokens, k, x.shape[1]), topk_weights, is_kept.view(num_tokens, k))


def _run_eager(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> Tensor:
    """A loop over experts that finds each one's tokens on the host."""
    k = topk_ids.shape[1]
    by_slot = x.new_zeros(topk_ids.numel(), x.shape[1])
    if not experts.is_scaled:  # quantized apart, gate and up would have other blocks
        experts = experts.apart()
    for e in range(experts.num_experts):
        tokens, slots = torch.where(topk_ids == e)
        y = experts.run(_one_expert(experts, e), x[tokens])
        by_slot = by_slot.index_put((tokens * k + slots,), y)
    is_kept = (topk_ids >= 0) & (topk_ids < experts.num_experts)
    return _weighted_sum(by_slot.view(*topk_ids.shape, x.shape[1]), topk_weights, is_kept)


def _weighted_sum(y_TkH: Tensor, topk_weights: Tensor, is_kept: Tensor) -> Tensor:
    """(T, H): the slots that are kept, summed in fp32 and in their order, as `combine` does."""
    if y_TkH.shape[1] == 0:
        return y_TkH.sum(1)  # zeros that have gradients
    total = y_TkH.new_zeros(y_TkH.shape[0], y_TkH.shape[2], dtype=torch.float32)
    weights = torch.where(is_kept, topk_weights.float(), 0)  # so that gradients do not see those of dropped slots
    for j in range(y_TkH.shape[1]):
        total = total + torch.where(is_kept[:, j, None], weights[:, j, None] * y_TkH[:, j].float(), 0)
    return total.to(y_TkH.dtype)


def _run_eager_fused(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> Tensor:
    """The same loop over slices of sorted rows: one host sync for all experts, gate and up in one matmul."""
    offs, source, places = route(topk_ids, experts.num_experts)
    rows, outputs, start = gather(x, source, places), [], 0
    for e, end in enumerate(offs.tolist()):
        outputs.append(experts.run(_one_expert(experts, e), rows[start:end]))
        start = end
    outputs.append(rows.new_zeros(len(rows) - start, x.shape[1]))
    return combine(torch.cat(outputs), topk_weights, source, places)


def _one_expert(experts: ExpertWeights, e: int) -> Callable[[Tensor, Weights, Tensor | None], Tensor]:
    """Multiplies rows by the weights of expert ``e``: in plain torch, or if quantized as the only group of a call."""

    def multiply(rows: Tensor, w: Weights, bias: Tensor | None) -> Tensor:
        own_bias = None if bias is None else bias[e]
        if isinstance(w, QuantizedWeights) or experts.is_scaled:
            own = w[e] if isinstance(w, QuantizedWeights) else w[e : e + 1]
            end = torch.tensor([len(rows)], dtype=torch.int32, device=rows.device)
            one_bias = None if own_bias is None else own_bias[None]
            return grouped(experts, GroupPlan(end, len(rows)))(rows, own, one_bias)
        y = F.linear(rows, w[e])
        return y if own_bias is None else y + own_bias

    return multiply


def _run_row_by_row(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> Tensor:
    """Each routed row in GEMMs of its own, so that no other row decides how it is computed. For a CPU; a host sync."""
    num_experts, ids = experts.num_experts, topk_ids.flatten().tolist()
    rows = [experts.run(_one_expert(experts, 0), x[:0])]  # if all slots are dropped, the graph still has all operands
    for slot, e in enumerate(ids):
        row = x[slot // topk_ids.shape[1]].unsqueeze(0)
        rows.append(experts.run(_one_expert(experts, e), row) if 0 <= e < num_experts else torch.zeros_like(row))
    is_kept = (topk_ids >= 0) & (topk_ids < num_experts)
    return _weighted_sum(torch.cat(rows).view(*topk_ids.shape, x.shape[1]), topk_weights, is_kept)


_RUNS: dict[str, Callable[[Tensor, Tensor, Tensor, ExpertWeights], Tensor]] = {
    "decode": decode.run,
    "batched_mm": _run_batched,
    "eager_fused": _run_eager_fused,
    "eager": _run_eager,
    "row by row": _run_row_by_row,
}


def _choose(name: str, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> str:
    if name == "batched_mm" and tracing.holds(topk_ids.numel() == 0):  # it has no weights to gather
        return "grouped_mm"
    if name == "decode":
        refusal = decode.refusal(x, topk_ids, topk_weights, experts)
        if refusal is not None:
            raise ValueError(f"implementation decode: {refusal}")
        return name
    if experts.batch_invariant:
        return _choose_invariant(x, topk_weights, experts)
    if name != "auto":
        return name
    if decode.is_faster(topk_ids, experts) and decode.refusal(x, topk_ids, topk_weights, experts) is None:
        return "decode"
    weights = (*experts.first, experts.down)
    only_grouped = experts.accumulate_main_grad or any(isinstance(w, QuantizedWeights) for w in weights)
    if (
        torch.compiler.is_compiling()  # a choice by the number of rows would bound T
        or only_grouped
        or experts.is_scaled
        or not 0 < topk_ids.numel() <= _FEW_ROWS
        or fused.can_run(x, topk_weights, experts)
    ):
        return "grouped_mm"
    return "batched_mm"


def _choose_invariant(x: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> str:
    """The implementation by which a token's result does not depend on other tokens: fused kernels, whatever T is.

    Raises:
        ValueError: fused kernels do not run the call.
    """
    refusal = fused.refusal(x, topk_weights, decode.like_dense(experts, x.dtype))
    if refusal is None:
        return "grouped_mm"
    if x.device.type == "cpu" and not experts.accumulate_main_grad:
        return "row by row"
    raise ValueError(f"batch_invariant: the kernels whose results do not depend on the batch do not run: {refusal}")
