"""The experts of a MoE layer composed of calls: gather, grouped GEMMs, activation, combine. Every option runs so.

T, k, H, I: tokens, experts per token, hidden and intermediate features. E, M: experts, routed rows; M = T * k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from grouped_gemm.core.preference import Preference
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.functional import grouped_mm
from grouped_gemm.group_plan import GroupPlan
from grouped_gemm.moe.activation import Activation, activate
from grouped_gemm.moe.routing import Routing
from grouped_gemm.moe.rows import combine, gather

Weights: TypeAlias = Tensor | QuantizedWeights


@dataclass
class ExpertWeights:  # no NamedTuple: Dynamo of torch 2.10 does not trace a property of one
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
        keep: what fused kernels keep for backward, "full" or "recipe".
        accumulate_main_grad: whether backward adds the gradients of the weights to ``main_grad``.
        batch_invariant: whether a token's result must not depend on the other tokens of the call.
        weight_only: whether the weights alone are quantized, by ``recipe``, and the GEMMs compute in the dtype of x.
    """

    first: tuple[Weights, ...]
    first_biases: tuple[Tensor | None, ...]
    down: Weights
    down_bias: Tensor | None
    activation: Activation
    interleaved: bool
    recipe: Recipe | None
    kernel_preference: Preference
    keep: str = "full"
    accumulate_main_grad: bool = False
    batch_invariant: bool = False
    weight_only: bool = False

    @property
    def is_scaled(self) -> bool:
        """Whether the GEMMs quantize their operands."""
        return self.recipe is not None and self.recipe.is_scaled

    @property
    def num_experts(self) -> int:
        """E."""
        return shape_of(self.down)[0]

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views of the gate and up halves of axis 1, or ``x`` alone if it has only one of them."""
        if not self.activation.is_gated or len(self.first) == 2:
            return (x,)
        return (x[:, 0::2], x[:, 1::2]) if self.interleaved else x.chunk(2, dim=1)

    def apart(self) -> ExpertWeights:
        """The same experts with gate and up as two tensors, which are views."""
        first = [half for w in self.first for half in self.gate_and_up(dense(w))]
        biases = [half for b in self.first_biases if b is not None for half in self.gate_and_up(b)]
        return replace(self, first=tuple(first), first_biases=tuple(biases) or (None,) * len(first), interleaved=False)

    def run(self, multiply: Callable[[Tensor, Weights, Tensor | None], Tensor], rows: Tensor) -> Tensor:
        """The experts on ``rows`` by ``multiply``, which multiplies rows by weights (E, out, in) and adds a bias."""
        projections = [multiply(rows, w, bias) for w, bias in zip(self.first, self.first_biases)]
        h = activate(self.activation, *projections, interleaved=self.interleaved)
        return multiply(h, self.down, self.down_bias)


def run_composed(
    x: Tensor, topk_weights: Tensor, experts: ExpertWeights, routing: Routing, group_alignment: int = 1
) -> Tensor:
    """Gather, grouped GEMMs, activation and combine, each a call of its own.

    The gather writes zeros between experts that ``routing`` has padded, to multiples of ``group_alignment``.
    """
    offs, source, places = routing
    rows = gather(x, source, places)
    y = experts.run(grouped(experts, GroupPlan(offs, source.shape[0], group_alignment)), rows)
    return combine(y, topk_weights, source, places)


def grouped(experts: ExpertWeights, plan: GroupPlan) -> Callable[[Tensor, Weights, Tensor | None], Tensor]:
    """Grouped GEMMs of rows in expert order, which share ``plan``."""

    def multiply(rows: Tensor, w: Weights, bias: Tensor | None) -> Tensor:
        return grouped_mm(
            rows,
            as_b(w),
            plan,
            recipe=experts.recipe,
            bias=bias,
            kernel_preference=experts.kernel_preference,
            accumulate_main_grad=experts.accumulate_main_grad,
        )

    return multiply


def dense(w: Weights) -> Tensor:
    """``w``, which is a tensor: `_checked` lets quantized weights through to grouped GEMMs only."""
    assert isinstance(w, Tensor), "checked: these weights are not quantized"
    return w


def shape_of(w: Weights) -> tuple[int, ...]:
    """(E, out, in) of weights; quantized ones have the shape that `grouped_mm` sees, (E, in, out)."""
    if isinstance(w, QuantizedWeights):
        num_experts, inner, out = w.shape
        return num_experts, out, inner
    return tuple(w.shape)


def as_b(w: Weights) -> Weights:
    """Weights as `grouped_mm` takes them."""
    return w if isinstance(w, QuantizedWeights) else w.transpose(1, 2)
