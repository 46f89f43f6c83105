"""From the arguments of a call to its `CallSpec`: autocast, checks, and operands as the passes take them.

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
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.selection import checks

_MANY_GROUPS = 1024  # what selection takes E for where only the device knows it: a backend with a limit on E refuses


def autocast(
    a: Tensor, b: Tensor | QuantizedWeights, bias: Tensor | None
) -> tuple[Tensor, Tensor | QuantizedWeights, Tensor | None]:
    """Operands in autocast's dtype, where it is on for the device of ``a``."""
    if not isinstance(a, Tensor):
        return a, b, bias  # the checks name it
    device = "cuda" if a.is_cuda else a.device.type  # which takes five times as long
    if device == "meta" or not torch.is_autocast_enabled(device):  # which raises for meta
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
    """Checks the arguments of `grouped_mm`, and says what decides how the call runs.

    Returns:
        ``a`` (M, K) with contiguous rows; ``b`` (E, K, N) with K or N contiguous, or (M, N) with contiguous rows where
        ``offs`` splits the contraction; ``offs`` and ``bias``; the spec. Operands that lie so already are not copied.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        checks.check_tangents(a=a, b=b, bias=bias)
    preference = KernelPreference.parse(kernel_preference)
    checks.check_options(out_dtype, group_alignment)
    group_alignment = operator.index(group_alignment)  # under Dynamo, a constant of the graph
    weights = None
    if isinstance(b, Tensor) and b.dim() == 2:
        checks.check_contraction(a, b, offs, bias)
        a, b = dense_rows(a.t()), dense_rows(b)  # columns of a become rows: what is summed over comes first
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
            recipe = b.recipe if recipe is None else recipe
        num_groups, k, n = b.shape
        if tracing.is_data_dependent(offs.shape[0]) or tracing.is_data_dependent(num_groups):
            offs = torch.ops.grouped_gemm.counted_offs(offs, num_groups)
        needs_grad = ((Pass.FORWARD, True), (Pass.DGRAD, needs_gradient(a)), (Pass.WGRAD, b_needs_grad))
    offs = materialized(offs).contiguous()
    bias = None if bias is None else materialized(bias)
    recipe = Recipe.NONE if recipe is None else Recipe.parse(recipe)
    if isinstance(b, QuantizedWeights) and recipe is not b.recipe:
        checks.fail("recipe", f"{b.recipe.value}, as the weights were quantized", recipe.value)
    if VALIDATE.is_on():
        offs = torch.ops.grouped_gemm.checked_offs(offs, a.shape[0], group_alignment)
    captured = is_capturing(a)
    spec = CallSpec(
        a.device,
        num_groups=_MANY_GROUPS if tracing.is_data_dependent(num_groups) else operator.index(num_groups),
        k=operator.index(k),  # under Dynamo, a constant of the graph; M stays symbolic
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
    """All that `describe` looks at, as an eager caller gave it: equal keys pass the same checks and get equal specs.

    To hash it takes a fifth of the time that the checks take. It has the row class of M, and no check of operands that
    are remembered looks at more. Whatever `describe` reads beside must go in here as well.

    Args:
        a: as in `grouped_mm`.
        b: likewise.
        offs: likewise.
        bias: likewise.
        options: its other arguments; the third is ``group_alignment``.

    Returns:
        The key; None for what has to be described each time: calls that Dynamo traces (it guards them itself), two
        2-dimensional operands, whose checks look at M, and arguments that the checks will refuse.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return None
    try:
        num_rows, k = a.shape
        num_groups, _, _ = b.shape
        if isinstance(b, QuantizedWeights):
            b_facts = (b.shape, b.dtype, b.device, b.recipe, b.forward_backend, b.dgrad_backend)
        else:
            b_facts = _facts(b)
        return (
            (type(a), k, a.stride(), a.dtype, a.device, a.layout, a.requires_grad, a.is_neg()),
            row_class(num_rows, num_groups),
            b_facts,
            _facts(offs),
            None if bias is None else _facts(bias),
            options,
            type(options[2]),  # group_alignment=True equals 1, and is an error
            torch.is_grad_enabled(),
            surrounding.kernel_preference,
            surrounding.host_sync,
            is_capturing(a),
        )
    except Exception:
        return None


def _facts(x: Tensor) -> tuple[Any, ...]:
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.layout, x.requires_grad, x.is_neg()


def describe_weights(
    b_EKN: Tensor, b_contiguous: str, recipe: Recipe, dtype: torch.dtype, dgrad: bool, kernel_preference: Preference
) -> CallSpec:
    """What decides who quantizes weights for many calls: a call of large groups with activations of ``dtype``."""
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
    """Whether autograd will ask for the gradient of ``x``."""
    return torch.is_grad_enabled() and x.requires_grad


def _is_aligned(x: Tensor) -> bool:
    """Whether all strides but that of the contiguous axis are multiples of 16 bytes."""
    return all(stride == 1 or stride * x.element_size() % 16 == 0 for stride in x.stride())
