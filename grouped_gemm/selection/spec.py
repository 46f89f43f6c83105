"""From the arguments of a call to its `CallSpec`: autocast, checks, and operands in the form that the passes take.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from grouped_gemm.core import tracing
from grouped_gemm.core.call_spec import CallSpec, Pass, RowClass, row_class
from grouped_gemm.core.dense import dense_rows, dense_weights, materialized
from grouped_gemm.core.machine import is_capturing
from grouped_gemm.core.preference import VALIDATE, KernelPreference, Preference, surrounding
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe, is_fastest
from grouped_gemm.selection import checks

_MANY_GROUPS = 1024  # stands for a data-dependent E, so that a backend with a limit on E refuses the call


def autocast(
    a: Tensor, b: Tensor | QuantizedWeights, bias: Tensor | None
) -> tuple[Tensor, Tensor | QuantizedWeights, Tensor | None]:
    """Casts operands to autocast's dtype, if autocast is on for the device of ``a``."""
    if not isinstance(a, Tensor):
        return a, b, bias  # the checks report it
    device = "cuda" if a.is_cuda else a.device.type  # is_cuda is five times as fast as device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # is_autocast_enabled raises for meta
        return a, b, bias
    checks.check_tensor("a", a, (2,), checks.DTYPES)
    dtype = torch.get_autocast_dtype(device)
    return (
        a.to(dtype),
        b.to(dtype) if isinstance(b, Tensor) and b.dtype in checks.DTYPES else b,
        bias.to(dtype) if isinstance(bias, Tensor) and bias.dtype in checks.DTYPES else bias,
    )


def describe(
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor,
    bias: Tensor | None,
    recipe: Recipe | str | None,
    out_dtype: torch.dtype | None,
    group_alignment: int,
    kernel_preference: Preference,
) -> tuple[Tensor, Tensor | QuantizedWeights, Tensor, Tensor | None, CallSpec]:
    """Checks the arguments of `grouped_mm`, and describes the call.

    Returns:
        ``a`` (M, K) with contiguous rows; ``b`` (E, K, N) with K or N contiguous, or (M, N) with contiguous rows if
        ``offs`` splits the contraction; ``offs`` and ``bias``; the spec. Operands that have this form are not copied.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        checks.check_tangents(a=a, b=b, bias=bias)
    preference = KernelPreference.parse(kernel_preference)
    checks.check_options(out_dtype, group_alignment)
    group_alignment = operator.index(group_alignment)  # makes it a constant of a Dynamo graph
    weights = None
    if isinstance(b, Tensor) and b.dim() == 2:
        checks.check_contraction(a, b, offs, bias)
        a, b = dense_rows(a.t()), dense_rows(b)  # the contraction becomes the first axis of both
        if tracing.is_data_dependent(a.shape[0]) or tracing.is_data_dependent(b.shape[0]):
            torch._check(a.shape[0] == b.shape[0])
        num_groups, k, n = offs.shape[0], a.shape[1], b.shape[1]
        if tracing.is_data_dependent(num_groups):
            torch._check(num_groups >= 1)
        b_contiguous = "n"
        needs_grad = ((Pass.WGRAD, True), (Pass.DGRAD, needs_gradient(a)), (Pass.FORWARD, needs_gradient(b)))
    else:
        checks.check_operands(a, b, offs, bias)
        a = dense_rows(a)
        if isinstance(b, Tensor):
            b, b_contiguous = dense_weights(b)
            b_needs_grad = needs_gradient(b)
        else:
            b_contiguous, b_needs_grad = "k", False
            weights = b.forward_backend, b.dgrad_backend
            recipe = b.recipe if recipe is None or is_fastest(recipe) else recipe
        num_groups, k, n = b.shape
        if tracing.is_data_dependent(offs.shape[0]) or tracing.is_data_dependent(num_groups):
            offs = torch.ops.grouped_gemm.counted_offs(offs, num_groups)
        needs_grad = ((Pass.FORWARD, True), (Pass.DGRAD, needs_gradient(a)), (Pass.WGRAD, b_needs_grad))
    offs = materialized(offs).contiguous()
    bias = None if bias is None else materialized(bias)
    recipe = Recipe.NONE if recipe is None or is_fastest(recipe) else Recipe.parse(recipe)
    if isinstance(b, QuantizedWeights) and recipe is not b.recipe:
        checks.fail("recipe", f"{b.recipe.value}, the recipe of the quantized weights", recipe.value)
    if VALIDATE.is_on():
        offs = torch.ops.grouped_gemm.checked_offs(offs, a.shape[0], group_alignment)
    captured = is_capturing(a)
    spec = CallSpec(
        a.device,
        num_groups=_MANY_GROUPS if tracing.is_data_dependent(num_groups) else operator.index(num_groups),
        k=operator.index(k),  # a constant of a Dynamo graph; M stays symbolic
        n=operator.index(n),
        rows=tracing.row_class_of(a.shape[0], num_groups),
        recipe=recipe,
        dtype=a.dtype,
        out_dtype=a.dtype if out_dtype is None else out_dtype,
        passes=tuple(pass_ for pass_, needed in needs_grad if needed),
        b_contiguous=b_contiguous,
        has_bias=bias is not None,
        group_alignment=group_alignment,
        is_aligned=_is_aligned(a) and (isinstance(b, QuantizedWeights) or _is_aligned(b)),
        host_sync=surrounding.host_sync and not captured,
        captured=captured,
        weights=weights,
        preference=preference,
        context=surrounding.kernel_preference,
    )
    return a, b, offs, bias, spec


def key_of(
    a: Tensor, b: Tensor | QuantizedWeights, offs: Tensor, bias: Tensor | None, options: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Everything that `describe` reads of an eager call. Equal keys pass the same checks and give equal specs.

    Hashing the key takes a fifth of the time of the checks. The key has only the row class of M, and the checks of
    cached calls read no more of M. Anything else that `describe` comes to read must be added here.

    Args:
        a: as in `grouped_mm`.
        b: as in `grouped_mm`.
        offs: as in `grouped_mm`.
        bias: as in `grouped_mm`.
        options: recipe, out_dtype, group_alignment and kernel_preference.

    Returns:
        The key. None for calls that have to be described each time: calls that Dynamo traces and guards itself, calls
        with two 2-dimensional operands, whose checks read M, and arguments that the checks will refuse.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    try:
        num_rows, k = a.shape
        num_groups, _, _ = b.shape
        if isinstance(b, QuantizedWeights):
            b_facts = (b.shape, b.dtype, b.device, b.recipe, b.forward_backend, b.dgrad_backend)
        else:
            b_facts = facts_of(b)
        return (
            (type(a), k, a.stride(), a.dtype, a.device, a.layout, a.requires_grad, a.is_neg()),
            row_class(num_rows, num_groups),
            b_facts,
            facts_of(offs),
            None if bias is None else facts_of(bias),
            options,
            type(options[2]),  # group_alignment=True equals 1, but is an error
            torch.is_grad_enabled(),
            surrounding.kernel_preference,
            surrounding.host_sync,
            is_capturing(a),
        )
    except Exception:
        return None


def facts_of(x: Tensor) -> tuple[Any, ...]:
    """Everything that checks read of a tensor."""
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.layout, x.requires_grad, x.is_neg()


def describe_weights(
    b_EKN: Tensor, b_contiguous: str, recipe: Recipe, dtype: torch.dtype, dgrad: bool, kernel_preference: Preference
) -> CallSpec:
    """The spec that selects the backend of `quantize_weights`: a call with large groups, activations of ``dtype``."""
    return CallSpec(
        b_EKN.device,
        num_groups=b_EKN.shape[0],
        k=b_EKN.shape[1],
        n=b_EKN.shape[2],
        rows=RowClass.LARGE,
        recipe=recipe,
        dtype=dtype,
        out_dtype=dtype,
        passes=(Pass.FORWARD, Pass.DGRAD) if dgrad else (Pass.FORWARD,),
        b_contiguous=b_contiguous,
        preference=KernelPreference.parse(kernel_preference),
        context=surrounding.kernel_preference,
    )


def needs_gradient(x: Tensor) -> bool:
    """Whether autograd will need the gradient of ``x``."""
    return torch.is_grad_enabled() and x.requires_grad


def _is_aligned(x: Tensor) -> bool:
    """Whether all strides, except the one of the contiguous axis, are multiples of 16 bytes."""
    return all(stride == 1 or stride * x.element_size() % 16 == 0 for stride in x.stride())
