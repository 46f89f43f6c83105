"""The experts of a MoE layer: `experts_forward` from unsorted tokens, `sorted_experts` from rows in expert order.

T, k, H, I: tokens, experts per token, hidden and intermediate features. E, M: experts, routed rows; M = T * k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm.core import tracing
from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.preference import KernelPreference, Preference
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.functional import grouped_mm
from grouped_gemm.group_plan import GroupPlan
from grouped_gemm.moe.activation import ACTIVATIONS, Activation, activate
from grouped_gemm.moe.routing import route
from grouped_gemm.moe.rows import combine, gather
from grouped_gemm.selection import checks

Weights: TypeAlias = Tensor | QuantizedWeights
IMPLEMENTATIONS = ("auto", "grouped_mm", "batched_mm", "eager_fused", "eager")
_FEW_ROWS = 16  # routed rows up to which "auto" gathers the weights of each row; not measured


@dataclass
class _Experts:  # no NamedTuple: Dynamo of torch 2.10 does not trace a property of one
    """The weights of all experts, checked, and how to run them.

    Attributes:
        first: gate and up, (E, I, H) each; both in one, (E, 2I, H); or one projection without a gate, (E, I, H).
        first_biases: the biases of ``first``, (E, I) or (E, 2I) each; None: no bias.
        down: (E, H, I).
        down_bias: (E, H) or None.
        activation: between the GEMMs.
        interleaved: whether gate and up rows alternate in one tensor. Otherwise all gate rows come before all up rows.
        recipe: of the GEMMs.
        kernel_preference: of the GEMMs.
    """

    first: tuple[Weights, ...]
    first_biases: tuple[Tensor | None, ...]
    down: Weights
    down_bias: Tensor | None
    activation: Activation
    interleaved: bool
    recipe: Recipe | None
    kernel_preference: Preference

    @property
    def is_scaled(self) -> bool:
        """Whether the GEMMs quantize their operands."""
        return self.recipe is not None and self.recipe.is_scaled

    @property
    def num_experts(self) -> int:
        """E."""
        return _shape(self.down)[0]

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views of the gate and up halves of axis 1, or ``x`` alone if it has only one of them."""
        if not self.activation.is_gated or len(self.first) == 2:
            return (x,)
        return (x[:, 0::2], x[:, 1::2]) if self.interleaved else x.chunk(2, dim=1)

    def apart(self) -> _Experts:
        """The same experts with gate and up as two tensors, which are views."""
        first = [half for w in self.first for half in self.gate_and_up(_dense(w))]
        biases = [half for b in self.first_biases if b is not None for half in self.gate_and_up(b)]
        return replace(self, first=tuple(first), first_biases=tuple(biases) or (None,) * len(first), interleaved=False)

    def run(self, multiply: Callable[[Tensor, Weights, Tensor | None], Tensor], rows: Tensor) -> Tensor:
        """The experts on ``rows`` by ``multiply``, which multiplies rows by weights (E, out, in) and adds a bias."""
        projections = [multiply(rows, w, bias) for w, bias in zip(self.first, self.first_biases)]
        h = activate(self.activation, *projections, interleaved=self.interleaved)
        return multiply(h, self.down, self.down_bias)


def experts_forward(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Weights | tuple[Weights, Weights],
    down: Weights,
    *,
    recipe: Recipe | str | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    gate_up_bias: Tensor | tuple[Tensor, Tensor] | None = None,
    down_bias: Tensor | None = None,
    implementation: str = "auto",
    kernel_preference: Preference = KernelPreference.AUTO,
) -> Tensor:
    """The experts of a MoE layer: y[t] = sum over j of topk_weights[t, j] * expert(topk_ids[t, j], x[t]).

    An expert is down(act(gate(x)) * up(x)), with biases if there are any. Differentiable in ``x``, ``topk_weights``,
    the weights and the biases. Weighted rows are summed in fp32, in the order of a token's slots, so bits repeat. No
    host sync, except with the implementations "eager" and "eager_fused", and where `explain` announces one.

    Args:
        x: (T, H); bfloat16, float16 or float32.
        topk_ids: (T, k) int32 or int64: the experts of each token. Ids outside [0, E) are dropped: they add nothing.
        topk_weights: (T, k), any float dtype.
        gate_up: (E, 2I, H), gate rows before up rows; or the pair (gate, up), (E, I, H) each, which is never copied
            into one; or (E, I, H) for an activation without a gate. Or such weights from `quantize_weights`, which
            takes them transposed: ``quantize_weights(gate_up.transpose(1, 2), recipe)``.
        down: (E, H, I), or quantized in the same way.
        recipe: how the operands of the GEMMs are quantized, as in `grouped_mm`.
        activation: "swiglu", "geglu", "geglu_tanh", "reglu", or "swiglu_clamped", that of gpt-oss:
            gate * sigmoid(1.702 * gate) * (up + 1) with gate clamped to at most 7 and up to [-7, 7]. Without a gate:
            "silu", "gelu", "gelu_tanh", "relu".
        interleaved: whether gate and up rows alternate in ``gate_up`` and its bias.
        gate_up_bias: (E, 2I), a pair of (E, I), or (E, I), as ``gate_up``.
        down_bias: (E, H).
        implementation: "grouped_mm" sorts the tokens by expert and runs grouped GEMMs. "batched_mm" gathers each routed
            row's weights: for a few rows. "eager" loops over experts in plain torch, as a reference; "eager_fused" is
            the same loop with gate and up in one matmul and one host sync. "auto" picks one of the first two.
        kernel_preference: as in `grouped_mm`.

    Returns:
        (T, H) in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what was found.
        NoBackendError: no backend can run the GEMMs.
    """
    experts = _checked(
        x, gate_up, down, gate_up_bias, down_bias, activation, interleaved, recipe, kernel_preference, implementation
    )
    checks.check_topk_ids(topk_ids, experts.num_experts)
    if not isinstance(topk_weights, Tensor):
        raise TypeError(f"topk_weights: expected a torch.Tensor; found {type(topk_weights).__name__}")
    if not topk_weights.dtype.is_floating_point:
        checks.fail("topk_weights.dtype", "a float dtype", dtype_name(topk_weights.dtype))
    for name, value in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        checks.check_device(name, value, "x", x.device)
        if value.dim() != 2 or value.shape[0] != x.shape[0]:
            checks.fail(f"{name}.shape", f"(T, k) with T = {x.shape[0]}, as x has it", tuple(value.shape))
    if topk_ids.shape != topk_weights.shape:
        checks.fail("topk_weights.shape", f"{tuple(topk_ids.shape)}, as topk_ids has it", tuple(topk_weights.shape))
    return _RUNS[_implementation(implementation, topk_ids, experts)](x, topk_ids, topk_weights, experts)


def sorted_experts(
    rows: Tensor,
    offs: Tensor | GroupPlan,
    gate_up: Weights | tuple[Weights, Weights],
    down: Weights,
    *,
    row_weights: Tensor | None = None,
    recipe: Recipe | str | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    gate_up_bias: Tensor | tuple[Tensor, Tensor] | None = None,
    down_bias: Tensor | None = None,
    kernel_preference: Preference = KernelPreference.AUTO,
) -> Tensor:
    """The experts on rows that are in expert order already, for trainers and expert parallelism.

    Args:
        rows: (M, H); bfloat16, float16 or float32.
        offs: (E,) int32, the end row of each expert, as in `grouped_mm`; or a `GroupPlan`.
        gate_up: as in `experts_forward`.
        down: as in `experts_forward`.
        row_weights: (M,), any float dtype: what each row of the result is multiplied by, in fp32.
        recipe: as in `experts_forward`.
        activation: as in `experts_forward`.
        interleaved: as in `experts_forward`.
        gate_up_bias: as in `experts_forward`.
        down_bias: as in `experts_forward`.
        kernel_preference: as in `experts_forward`.

    Returns:
        (M, H) in the dtype of ``rows``, zero at and past ``offs[-1]``.

    Raises:
        TypeError, ValueError, NoBackendError: as `experts_forward`.
    """
    experts = _checked(
        rows, gate_up, down, gate_up_bias, down_bias, activation, interleaved, recipe, kernel_preference, "grouped_mm"
    )
    if row_weights is not None:
        if not isinstance(row_weights, Tensor):
            raise TypeError(f"row_weights: expected a torch.Tensor; found {type(row_weights).__name__}")
        if row_weights.shape != rows.shape[:1]:
            checks.fail("row_weights.shape", f"({rows.shape[0]},), the rows of rows", tuple(row_weights.shape))
    y = experts.run(_grouped(experts, offs if isinstance(offs, GroupPlan) else GroupPlan(offs, rows.shape[0])), rows)
    return y if row_weights is None else (y.float() * row_weights.float().unsqueeze(1)).to(y.dtype)


# -- implementations


def _grouped(experts: _Experts, plan: GroupPlan) -> Callable[[Tensor, Weights, Tensor | None], Tensor]:
    """Grouped GEMMs of rows in expert order, which share ``plan``."""

    def multiply(rows: Tensor, w: Weights, bias: Tensor | None) -> Tensor:
        options: dict[str, Any] = {"recipe": experts.recipe, "kernel_preference": experts.kernel_preference}
        return grouped_mm(rows, _as_b(w), plan, bias=bias, **options)

    return multiply


def _run_grouped(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: _Experts) -> Tensor:
    offs, source, places = route(topk_ids, experts.num_experts)
    rows = gather(x, source, places)
    y = experts.run(_grouped(experts, GroupPlan(offs, source.shape[0])), rows)
    return combine(y, topk_weights, source, places)


def _run_batched(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: _Experts) -> Tensor:
    """Each routed row with its own copy of its expert's weights."""
    num_tokens, k = topk_ids.shape
    ids = topk_ids.flatten()
    is_kept = (ids >= 0) & (ids < experts.num_experts)
    ids = torch.where(is_kept, ids, 0).to(torch.int64)
    ends = torch.arange(1, ids.shape[0] + 1, dtype=torch.int32, device=x.device)
    plan = GroupPlan(ends, ids.shape[0]) if experts.is_scaled else None

    def multiply(rows: Tensor, w: Weights, bias: Tensor | None) -> Tensor:
        own, own_bias = _dense(w).index_select(0, ids), None if bias is None else bias.index_select(0, ids)
        if plan is not None:
            return _grouped(experts, plan)(rows, own, own_bias)
        y = torch.bmm(own, rows.unsqueeze(2)).squeeze(2)
        return y if own_bias is None else y + own_bias

    y = experts.run(multiply, x.repeat_interleave(k, dim=0))
    return _weighted_sum(y.view(num_tokens, k, x.shape[1]), topk_weights, is_kept.view(num_tokens, k))


def _run_eager(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: _Experts) -> Tensor:
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
    total = y_TkH.new_zeros(y_TkH.shape[0], y_TkH.shape[2], dtype=torch.float32)
    for j in range(y_TkH.shape[1]):
        total = total + torch.where(is_kept[:, j, None], topk_weights[:, j, None].float() * y_TkH[:, j].float(), 0)
    return total.to(y_TkH.dtype)


def _run_eager_fused(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: _Experts) -> Tensor:
    """The same loop over slices of sorted rows: one host sync for all experts, gate and up in one matmul."""
    offs, source, places = route(topk_ids, experts.num_experts)
    rows, outputs, start = gather(x, source, places), [], 0
    for e, end in enumerate(offs.tolist()):
        outputs.append(experts.run(_one_expert(experts, e), rows[start:end]))
        start = end
    outputs.append(rows.new_zeros(len(rows) - start, x.shape[1]))
    return combine(torch.cat(outputs), topk_weights, source, places)


def _one_expert(experts: _Experts, e: int) -> Callable[[Tensor, Weights, Tensor | None], Tensor]:
    """Multiplies rows by the weights of expert ``e``: in plain torch, or with a recipe as the only group of a call."""

    def multiply(rows: Tensor, w: Weights, bias: Tensor | None) -> Tensor:
        own, own_bias = _dense(w)[e], None if bias is None else bias[e]
        if experts.is_scaled:
            end = torch.tensor([len(rows)], dtype=torch.int32, device=rows.device)
            one_bias = None if own_bias is None else own_bias[None]
            return _grouped(experts, GroupPlan(end, len(rows)))(rows, own[None], one_bias)
        y = F.linear(rows, own)
        return y if own_bias is None else y + own_bias

    return multiply


def _dense(w: Weights) -> Tensor:
    """``w``, which is a tensor: `_checked` lets quantized weights through to grouped GEMMs only."""
    assert isinstance(w, Tensor), "checked: these weights are not quantized"
    return w


_RUNS: dict[str, Callable[[Tensor, Tensor, Tensor, _Experts], Tensor]] = {
    "grouped_mm": _run_grouped,
    "batched_mm": _run_batched,
    "eager_fused": _run_eager_fused,
    "eager": _run_eager,
}


def _implementation(name: str, topk_ids: Tensor, experts: _Experts) -> str:
    if name != "auto":
        return name
    is_quantized = any(isinstance(w, QuantizedWeights) for w in (*experts.first, experts.down))
    if is_quantized or experts.is_scaled or not tracing.holds(topk_ids.numel() <= _FEW_ROWS):
        return "grouped_mm"
    return "batched_mm"


# -- checks


def _checked(
    x: Tensor,
    gate_up: Weights | tuple[Weights, Weights],
    down: Weights,
    gate_up_bias: Tensor | tuple[Tensor, Tensor] | None,
    down_bias: Tensor | None,
    activation: str,
    interleaved: bool,
    recipe: Recipe | str | None,
    kernel_preference: Preference,
    implementation: str,
) -> _Experts:
    """The experts of a call.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checks.check_tensor("x", x, (2,), checks.DTYPES)
    if activation not in ACTIVATIONS:
        checks.fail("activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    if implementation not in IMPLEMENTATIONS:
        checks.fail("implementation", f"one of {', '.join(IMPLEMENTATIONS)}", repr(implementation))
    kind, is_pair = ACTIVATIONS[activation], isinstance(gate_up, (tuple, list))
    first: tuple[Weights, ...] = tuple(gate_up) if isinstance(gate_up, (tuple, list)) else (gate_up,)
    if is_pair and (len(first) != 2 or not kind.is_gated):
        expected = "a pair (gate, up)" if kind.is_gated else f"one tensor (E, I, H), as {activation} has no gate"
        checks.fail("gate_up", expected, f"{len(first)} tensors")
    if interleaved and (is_pair or not kind.is_gated):
        checks.fail("interleaved", "False, as gate_up has no gate and up rows in one tensor", interleaved)
    for name, w in (*(("gate_up", w) for w in first), ("down", down)):
        if isinstance(w, QuantizedWeights):
            if implementation not in ("auto", "grouped_mm"):
                checks.fail("implementation", f"grouped_mm or auto, because {name} is quantized", implementation)
        else:
            checks.check_tensor(name, w, (3,), checks.DTYPES)
    hidden, (num_experts, out, inner) = x.shape[1], _shape(down)
    if out != hidden:
        checks.fail("down.shape", f"(E, H, I) with H = {hidden}, as x has it", (num_experts, out, inner))
    width = inner if is_pair or not kind.is_gated else 2 * inner
    for w in first:
        if _shape(w) != (num_experts, width, hidden):
            expected = f"{(num_experts, width, hidden)}: E and I as in down, H as in x"
            checks.fail("gate_up.shape", expected, _shape(w))
    biases: tuple[Tensor | None, ...] = (None,) * len(first)
    if gate_up_bias is not None:
        biases = tuple(gate_up_bias) if isinstance(gate_up_bias, (tuple, list)) else (gate_up_bias,)
        if len(biases) != len(first):
            checks.fail("gate_up_bias", f"{len(first)} tensors, as gate_up has", len(biases))
    for name, bias, size in (*(("gate_up_bias", b, width) for b in biases), ("down_bias", down_bias, hidden)):
        if bias is not None:
            checks.check_tensor(name, bias, (2,), checks.DTYPES)
            if bias.shape != (num_experts, size):
                checks.fail(f"{name}.shape", str((num_experts, size)), tuple(bias.shape))
    parsed = None if recipe is None else Recipe.parse(recipe)
    return _Experts(first, biases, down, down_bias, kind, interleaved, parsed, kernel_preference)


def _shape(w: Weights) -> tuple[int, ...]:
    """(E, out, in) of weights; quantized ones have the shape that `grouped_mm` sees, (E, in, out)."""
    if isinstance(w, QuantizedWeights):
        num_experts, inner, out = w.shape
        return num_experts, out, inner
    return tuple(w.shape)


def _as_b(w: Weights) -> Weights:
    """Weights as `grouped_mm` takes them."""
    return w if isinstance(w, QuantizedWeights) else w.transpose(1, 2)
