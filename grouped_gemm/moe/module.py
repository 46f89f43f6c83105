"""`Experts`: the experts of a MoE layer as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grouped_gemm.core.preference import KernelPreference, Preference, check_bool
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.moe.activation import ACTIVATIONS
from grouped_gemm.moe.arguments import WEIGHT_ONLY, check_options, parse_recipe
from grouped_gemm.moe.experts import experts_forward
from grouped_gemm.weight_gradients import WgradQueue, delay_wgrad


class Experts(torch.nn.Module):
    """The experts of a MoE layer, without its router: `experts_forward` with weights of its own.

    Args:
        num_experts: E.
        hidden: H, features of a token.
        intermediate: I, features between the two GEMMs.
        activation: as in `experts_forward`.
        interleaved: whether gate and up rows alternate in ``gate_up``.
        bias: whether both GEMMs add biases.
        recipe: as in `experts_forward`.
        implementation: as in `experts_forward`.
        kernel_preference: as in `experts_forward`.
        keep: as in `experts_forward`.
        accumulate_main_grad: as in `experts_forward`.
        batch_invariant: as in `experts_forward`.
        mesh: as in `experts_forward`: the ranks that share the experts. ``num_experts`` are then those of this rank.
        delay_wgrad: whether the gradients of ``gate_up`` and ``down`` wait until `backward_dw`, as in
            `grouped_gemm.delay_wgrad`. "batched_mm", and without a recipe "eager" and "eager_fused", compute these
            gradients in backward. So may "auto" for up to 4 routed rows.
        device: of the parameters.
        dtype: of the parameters; bfloat16, float16 or float32.

    Attributes:
        gate_up: (E, 2I, H); (E, I, H) if the activation has no gate.
        down: (E, H, I).
        gate_up_bias: (E, 2I) or (E, I); None without biases.
        down_bias: (E, H); None without biases.

    Raises:
        TypeError, ValueError: an option is unknown, or two exclude each other, as in `experts_forward`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        activation: str = "swiglu",
        interleaved: bool = False,
        bias: bool = False,
        recipe: Recipe | str | None = None,
        implementation: str = "auto",
        kernel_preference: Preference = KernelPreference.AUTO,
        keep: str = "full",
        accumulate_main_grad: bool = False,
        batch_invariant: bool = False,
        mesh: Any = None,
        delay_wgrad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(
            activation, interleaved, recipe, implementation, kernel_preference, keep, accumulate_main_grad,
            batch_invariant,
        )  # fmt: skip
        width = 2 * intermediate if ACTIVATIONS[activation].is_gated else intermediate

        def empty(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.gate_up, self.down = empty(num_experts, width, hidden), empty(num_experts, hidden, intermediate)
        self.gate_up_bias = empty(num_experts, width) if bias else None
        self.down_bias = empty(num_experts, hidden) if bias else None
        self.activation, self.interleaved = activation, interleaved
        self.recipe, self.implementation, self.kernel_preference = recipe, implementation, kernel_preference
        self.keep, self.accumulate_main_grad, self.batch_invariant = keep, accumulate_main_grad, batch_invariant
        self.mesh = mesh
        check_bool("delay_wgrad", delay_wgrad)
        self._waiting = WgradQueue() if delay_wgrad else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(in features), as `torch.nn.Linear` does it, for each expert."""
        for weight, bias in ((self.gate_up, self.gate_up_bias), (self.down, self.down_bias)):
            bound = weight.shape[2] ** -0.5
            torch.nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                torch.nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """(T, H) from ``x`` (T, H), ``topk_ids`` (T, k) and ``topk_weights`` (T, k), as `experts_forward`."""
        if self._waiting is None:
            return self._forward(x, topk_ids, topk_weights)
        with delay_wgrad(self._waiting):
            return self._forward(x, topk_ids, topk_weights)

    def backward_dw(self) -> None:
        """Computes the gradients of ``gate_up`` and ``down`` that wait, as Megatron-Core calls it after backward.

        It does so for every backward since the last call. Without ``delay_wgrad``, nothing waits.
        """
        if self._waiting is not None:
            self._waiting.backward_dw()

    def _forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return experts_forward(
            x,
            topk_ids,
            topk_weights,
            self.gate_up,
            self.down,
            recipe=self.recipe,
            activation=self.activation,
            interleaved=self.interleaved,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            implementation=self.implementation,
            kernel_preference=self.kernel_preference,
            keep=self.keep,
            accumulate_main_grad=self.accumulate_main_grad,
            batch_invariant=self.batch_invariant,
            mesh=self.mesh,
        )

    def extra_repr(self) -> str:
        """Sizes and options."""
        num_experts, hidden, intermediate = self.down.shape
        parsed, weight_only = parse_recipe(self.recipe)
        recipe = WEIGHT_ONLY if weight_only else (parsed or Recipe.NONE).value
        sizes = f"{num_experts}, hidden={hidden}, intermediate={intermediate}"
        return f"{sizes}, {self.activation}, recipe={recipe}, bias={self.down_bias is not None}"
