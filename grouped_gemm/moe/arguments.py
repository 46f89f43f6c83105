"""The arguments of `experts_forward` and `sorted_experts`: checks, and casts where autocast is on.

T, k, H, I: tokens, experts per token, hidden and intermediate features. E: experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.preference import KernelPreference, Preference, check_bool
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.core.tracing import holds
from grouped_gemm.moe import fused
from grouped_gemm.moe.activation import ACTIVATIONS
from grouped_gemm.moe.composed import ExpertWeights, Weights, shape_of
from grouped_gemm.moe.implementations import IMPLEMENTATIONS
from grouped_gemm.selection import checks
from grouped_gemm.selection.spec import autocast
from grouped_gemm.weight_gradients import is_delaying

WEIGHT_ONLY = "fp8_weight_only"  # a recipe of a layer, not of a GEMM
_RECIPES = tuple(recipe.value for recipe in Recipe)  # Dynamo of torch 2.11 does not iterate over an Enum


def prepared(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Weights | tuple[Weights, Weights],
    down: Weights,
    recipe: Recipe | str | None,
    activation: str,
    interleaved: bool,
    gate_up_bias: Tensor | tuple[Tensor, Tensor] | None,
    down_bias: Tensor | None,
    implementation: str,
    kernel_preference: Preference,
    keep: str,
    accumulate_main_grad: bool,
    batch_invariant: bool,
) -> tuple[Tensor, ExpertWeights]:
    """``x`` and the experts of a call of `experts_forward`, checked, and cast where autocast is on.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    experts = checked(
        "x", x, gate_up, down, gate_up_bias, down_bias, activation, interleaved, recipe, kernel_preference,
        implementation, keep, accumulate_main_grad, batch_invariant,
    )  # fmt: skip
    checks.check_topk_ids(topk_ids, experts.num_experts)
    check_slots(x, topk_ids, topk_weights)
    check_gradients(experts, x, topk_weights)
    return cast_operands("x", x, experts)


def check_slots(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """Raises TypeError or ValueError if ids and weights do not fit each other or ``x``."""
    for name, value in (("x", x), ("topk_ids", topk_ids)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; found {type(value).__name__}")
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


def cast_operands(argument: str, x: Tensor, experts: ExpertWeights) -> tuple[Tensor, ExpertWeights]:
    """Both in autocast's dtype, if autocast is on for the device of ``x``, which is the caller's ``argument``.

    Raises:
        ValueError: autocast is off, and weights have another dtype than ``x``.
    """
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        for name, weights in (("gate_up", experts.first), ("down", (experts.down,))):
            for w in weights:
                if w.dtype != x.dtype:
                    expected = f"{dtype_name(x.dtype)}, the dtype of {argument}"
                    checks.fail(f"{name}.dtype", expected, dtype_name(w.dtype))
        return x, experts
    first = [autocast(x, w, bias)[1:] for w, bias in zip(experts.first, experts.first_biases)]
    x, down, down_bias = autocast(x, experts.down, experts.down_bias)
    weights, biases = zip(*first)
    if experts.accumulate_main_grad or is_delaying():  # backward has to find the parameters: the GEMMs cast them
        weights, down = experts.first, experts.down
    return x, replace(experts, first=weights, first_biases=biases, down=down, down_bias=down_bias)


def check_options(
    activation: str, interleaved: bool, recipe: Recipe | str | None, implementation: str,
    kernel_preference: Preference, keep: str, accumulate_main_grad: bool, batch_invariant: bool,
) -> tuple[Recipe | None, bool]:  # fmt: skip
    """Checks what does not depend on tensors. Returns the recipe, and whether it is for weights only.

    Raises:
        TypeError, ValueError: an option is unknown, or two exclude each other.
    """
    if activation not in tuple(ACTIVATIONS):
        checks.fail("activation", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    if implementation not in IMPLEMENTATIONS:
        checks.fail("implementation", f"one of {', '.join(IMPLEMENTATIONS)}", repr(implementation))
    check_bool("interleaved", interleaved)
    check_bool("accumulate_main_grad", accumulate_main_grad)
    if accumulate_main_grad and implementation not in ("auto", "grouped_mm"):
        checks.fail("implementation", "grouped_mm or auto, because of accumulate_main_grad", implementation)
    if interleaved and not ACTIVATIONS[activation].is_gated:
        checks.fail("interleaved", f"False, as {activation} has no gate", interleaved)
    if keep not in ("full", "recipe"):
        checks.fail("keep", "full or recipe", repr(keep))
    KernelPreference.parse(kernel_preference)
    check_bool("batch_invariant", batch_invariant)
    if batch_invariant and implementation not in ("auto", "grouped_mm"):
        checks.fail("implementation", "grouped_mm or auto, because of batch_invariant", implementation)
    return parse_recipe(recipe)


def parse_recipe(recipe: Recipe | str | None) -> tuple[Recipe | None, bool]:
    """The recipe, and whether it is for weights only.

    Raises:
        ValueError: there is no such recipe.
    """
    if isinstance(recipe, str) and recipe.lower() == WEIGHT_ONLY:
        return Recipe.FP8_BLOCKWISE, True
    if isinstance(recipe, str) and recipe.lower() not in _RECIPES:
        checks.fail("recipe", f"a Recipe or one of {', '.join((*_RECIPES, WEIGHT_ONLY))}", repr(recipe))
    return None if recipe is None else Recipe.parse(recipe), False


def check_gradients(experts: ExpertWeights, *others: Tensor | None) -> None:
    """Raises ValueError if gradients are wanted that a recipe for weights only does not have."""
    leaves = (*others, *experts.first, experts.down, *experts.first_biases, experts.down_bias)
    if experts.weight_only:
        check_forward_only(experts.accumulate_main_grad, *leaves)


def check_forward_only(accumulate_main_grad: bool, *leaves: Weights | None) -> None:
    """Raises ValueError, as of a recipe for weights only, if the gradient of a leaf is wanted."""
    if fused.needs_gradients(*leaves) or accumulate_main_grad:
        checks.fail("recipe", "one with gradients, or torch.no_grad()", f"{WEIGHT_ONLY}, which is for forward only")


def checked(
    argument: str,
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
    keep: str,
    accumulate_main_grad: bool,
    batch_invariant: bool,
) -> ExpertWeights:
    """The experts of a call. ``argument`` is the caller's name of ``x``.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    checks.check_tensor(argument, x, (2,), checks.DTYPES)
    parsed, weight_only = check_options(
        activation, interleaved, recipe, implementation, kernel_preference, keep, accumulate_main_grad, batch_invariant
    )
    kind, is_pair = ACTIVATIONS[activation], isinstance(gate_up, (tuple, list))
    first: tuple[Weights, ...] = tuple(gate_up) if isinstance(gate_up, (tuple, list)) else (gate_up,)
    if is_pair and (len(first) != 2 or not kind.is_gated):
        expected = "a pair (gate, up)" if kind.is_gated else f"one tensor (E, I, H), as {activation} has no gate"
        checks.fail("gate_up", expected, f"{len(first)} tensors")
    if interleaved and is_pair:
        checks.fail("interleaved", "False, as gate_up has no gate and up rows in one tensor", interleaved)
    for name, w in (*(("gate_up", w) for w in first), ("down", down)):
        if isinstance(w, QuantizedWeights):
            if implementation not in ("auto", "grouped_mm", "decode") and not weight_only:
                checks.fail(
                    "implementation", f"auto, grouped_mm or decode, because {name} is quantized", implementation
                )
            if weight_only and w.recipe not in (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2):
                checks.fail(f"{name}.recipe", f"fp8_blockwise, because of {WEIGHT_ONLY}", w.recipe.value)
            parsed = w.recipe if weight_only else parsed
        else:
            checks.check_tensor(name, w, (3,), checks.DTYPES)
    hidden, (num_experts, out, inner) = x.shape[1], shape_of(down)
    if out != hidden:
        checks.fail("down.shape", f"(E, H, I) with H = {hidden}, as {argument} has it", (num_experts, out, inner))
    if holds(num_experts == 0) or holds(inner == 0) or holds(hidden == 0):
        checks.fail("down.shape", "(E, H, I), each at least 1", (num_experts, out, inner))
    width = inner if is_pair or not kind.is_gated else 2 * inner
    for w in first:
        if shape_of(w) != (num_experts, width, hidden):
            expected = f"{(num_experts, width, hidden)}: E and I as in down, H as in {argument}"
            checks.fail("gate_up.shape", expected, shape_of(w))
    biases: tuple[Tensor | None, ...] = (None,) * len(first)
    if gate_up_bias is not None:
        biases = tuple(gate_up_bias) if isinstance(gate_up_bias, (tuple, list)) else (gate_up_bias,)
        if len(biases) != len(first):
            checks.fail("gate_up_bias", "a pair" if is_pair else "one tensor", f"{len(biases)} tensors")
        for bias in biases:
            checks.check_tensor("gate_up_bias", bias, (2,), checks.DTYPES)  # also one of a pair: both have one, or none
    for name, w in (*(("gate_up", w) for w in first), ("down", down)):
        checks.check_device(name, w, argument, x.device)
    for name, bias, size in (*(("gate_up_bias", b, width) for b in biases), ("down_bias", down_bias, hidden)):
        if bias is not None:
            checks.check_tensor(name, bias, (2,), checks.DTYPES)
            checks.check_device(name, bias, argument, x.device)
            if bias.shape != (num_experts, size):
                checks.fail(f"{name}.shape", str((num_experts, size)), tuple(bias.shape))
    return ExpertWeights(
        first, biases, down, down_bias, kind, interleaved, parsed, kernel_preference, keep, accumulate_main_grad,
        batch_invariant, weight_only,
    )  # fmt: skip
