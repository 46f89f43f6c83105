"""The public calls: `grouped_mm`, `explain`, `quantize_weights`.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from grouped_gemm import reference, weight_gradients
from grouped_gemm.autograd import GroupedMM, GroupedWgrad, compile_kernels, layouts, run_forward, weights_for
from grouped_gemm.core import vmap
from grouped_gemm.core.dense import dense_weights, materialized
from grouped_gemm.core.machine import fp8_dtype_of
from grouped_gemm.core.preference import KernelPreference, Preference, check_bool
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe, is_fastest
from grouped_gemm.group_plan import GroupPlan, Plans
from grouped_gemm.selection import checks, dtensor
from grouped_gemm.selection.explanation import Explanation
from grouped_gemm.selection.route import (
    Known,
    decision_of,
    expected_route,
    in_fastest_recipe,
    recall,
    remember,
    route_of,
    times_of,
)
from grouped_gemm.selection.spec import autocast, describe, describe_weights, needs_gradient
from grouped_gemm.weight_gradients import destination_of


def grouped_mm(
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor | GroupPlan,
    *,
    recipe: Recipe | str | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    group_alignment: int = 1,
    kernel_preference: Preference = KernelPreference.AUTO,
    accumulate_main_grad: bool = False,
) -> Tensor:
    """Multiplies each group of rows by its own matrix; differentiable in ``a``, ``b`` and ``bias``.

    Rows ``offs[e-1]`` to ``offs[e]`` of ``a`` are multiplied by ``b[e]``, as in `torch.nn.functional.grouped_mm`.
    Rows at and past ``offs[-1]`` of the output are zero, whatever ``a`` holds there. If ``b`` has 2 dimensions,
    ``offs`` splits the contraction instead: ``out[e] = a[:, group] @ b[group]``. Torch's two forms with a
    3-dimensional ``a`` are not supported. The call never synchronizes the host unless `explain` says so. A DTensor
    stands for its local shard (docs/training.md); the result is a plain tensor.

    Args:
        a: (M, K); bfloat16, float16 or float32. (M, M') if ``b`` has 2 dimensions: M' is the contraction.
        b: (E, K, N) in the dtype of ``a``, usually (E, N, K) weights seen through ``transpose(1, 2)``; or weights from
            `quantize_weights`; or (M', N).
        offs: (E,) int32, the end row of each group, on the operands' device. Groups may be empty; ``offs[-1] <= M``.
            From group sizes, compute it as ``sizes.cumsum(0, dtype=torch.int32)``.
            Values out of order or out of range give wrong rows, but never an access out of bounds.
            Or a `GroupPlan`, which several calls with the same groups share.
        recipe: how operands are quantized on the fly, a `Recipe` or its name. None: not at all, or as ``b`` already is.
            "fp8": by none, fp8_rowwise or fp8_blockwise, whichever was measured to be the fastest on this GPU for such
            weights and so many rows per group, as a class; none where no call was measured. `explain` shows the times.
        bias: (E, N), added to each row of its group.
        out_dtype: bfloat16, float16 or float32; None: the dtype of ``a``.
        group_alignment: the caller guarantees that every group's size is a multiple of it, so that backends that pad
            need not.
        kernel_preference: a backend or its name. With AUTO, `prefer` decides, then GROUPED_GEMM_BACKEND, then the
            package.
        accumulate_main_grad: whether backward adds the gradient of ``b`` to the float32 ``main_grad`` of the parameter
            behind it, rather than to ``grad``: docs/training.md.

    Returns:
        (M, N), or (E, M, N) if ``b`` has 2 dimensions.

    Raises:
        TypeError: an argument that should be a tensor or a number is not.
        ValueError: shapes, dtypes or devices do not match; the message names the argument, what was expected and what
            was found.
        NoBackendError: no backend, or not the requested one, can run the call with all its gradients.
    """
    plan = None
    if isinstance(offs, GroupPlan):
        plan, offs = offs, offs.offs
        group_alignment = plan.alignment(group_alignment)
    options = (recipe, out_dtype, group_alignment, kernel_preference)
    if not torch.compiler.is_compiling() and vmap.is_transformed():
        call = functools.partial(_grouped_mm, options, accumulate_main_grad=accumulate_main_grad)
        return vmap.each_sample(call, a, b, offs, bias)
    if weight_gradients.leaves_graphs(accumulate_main_grad):
        return weight_gradients.outside_of_graphs(_grouped_mm, options, a, b, offs, bias, plan, accumulate_main_grad)
    return _grouped_mm(options, a, b, offs, bias, plan, accumulate_main_grad)


def _grouped_mm(
    options: tuple[Any, ...],
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor,
    bias: Tensor | None,
    plan: GroupPlan | None = None,
    accumulate_main_grad: bool = False,
) -> Tensor:
    """`grouped_mm`, outside of vmap.

    ``options`` are recipe, out_dtype, group_alignment and kernel_preference. ``plan`` is the `GroupPlan` of ``offs``.
    """
    weights = b  # the parameter or a view of it, which the next lines may cast or copy
    a, b, bias = autocast(a, b, bias)
    key, known = recall(a, b, offs, bias, options)
    if known is None and any(map(dtensor.is_dtensor, (a, b, offs, bias))):
        a, b, offs, bias = dtensor.local(a=a, b=b, offs=offs, bias=bias)
        key, known = recall(a, b, offs, bias, options)
    if known is None:
        given = a, b, offs, bias
        a, b, offs, bias, spec = describe(a, b, offs, bias, *options)
        if is_fastest(options[0]):
            spec = in_fastest_recipe(spec)
        # Remember no call whose operands were copied or transposed: `describe` must do that again each time. And none
        # from a graph capture, where backends are assumed to be healthy.
        took_as_is = a.stride(1) == 1 and all(x is y for x, y in zip((a, b, offs, bias), given))
        if key is None or not took_as_is or spec.captured:
            known = Known(route_of(spec), None)
        else:  # a new kind of call
            compile_kernels(a, b, bias, offs, expected_route(spec), accumulate_main_grad)
            known = remember(key, route_of(spec), *given)
    route, number = known
    groups: Tensor | Plans = offs
    if plan is not None:
        plan.check_rows(a.shape[0])
        groups = plan.plans(route, offs)
    destination = destination_of(weights, accumulate_main_grad)
    if isinstance(b, Tensor) and b.dim() == 2:
        vmap.check_differentiable()
        return GroupedWgrad.apply(a, b, groups, route)
    if route.dgrad is None and route.wgrad is None and (bias is None or not needs_gradient(bias)):
        return run_forward(a, b, bias, groups, route, number)[0]
    vmap.check_differentiable()
    return GroupedMM.apply(a, b, bias, groups, route, destination, number)


def explain(
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor | GroupPlan,
    *,
    recipe: Recipe | str | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    group_alignment: int = 1,
    kernel_preference: Preference = KernelPreference.AUTO,
) -> Explanation:
    """What `grouped_mm` would do with the same arguments, and why. Runs no GEMM. Passes follow ``requires_grad``.

    Returns:
        An `Explanation`: print it, or use its ``to_dict()``. It also covers calls that no backend can run.

    Raises:
        TypeError, ValueError: as `grouped_mm`.
    """
    plan = None
    if isinstance(offs, GroupPlan):
        plan, offs = offs, offs.offs
        group_alignment = plan.alignment(group_alignment)
    a, b, ends, bias = dtensor.local(a=a, b=b, offs=offs, bias=bias)
    a, b, bias = autocast(a, b, bias)
    a, _, _, _, spec = describe(a, b, ends, bias, recipe, out_dtype, group_alignment, kernel_preference)
    if plan is not None:
        plan.check_rows(a.shape[0])
    picks = is_fastest(recipe) and spec.weights is None  # weights that are quantized already keep their recipe
    if picks:
        spec = in_fastest_recipe(spec)
    return Explanation(decision_of(spec), a.shape[0], times_of(spec), picks)


def quantize_weights(
    b: Tensor,
    recipe: Recipe | str,
    *,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    dgrad: bool = False,
    kernel_preference: Preference = KernelPreference.AUTO,
) -> QuantizedWeights:
    """Quantizes weights once for many calls of `grouped_mm`, or takes over the fp8 weights of a checkpoint.

    Weights that were quantized beforehand get no gradient.

    Args:
        b: (E, K, N), usually (E, N, K) weights seen through ``transpose(1, 2)``: bfloat16, float16 or float32, or a
            checkpoint's float8_e4m3fn with ``scale``.
        recipe: a `Recipe` that scales, or its name.
        scale: a checkpoint's dequantization factors (``value = data * scale``), with the axes of ``b``: rowwise
            (E, 1, N), blockwise (E, ceil(K/128), ceil(N/128)), MXFP8 (E, ceil(K/32), N); or one for each expert, (E,),
            (E, 1) or (E, 1, 1). float32, bfloat16, float16 or float8_e8m0fnu, all converted exactly; MXFP8:
            float8_e8m0fnu, or its bits in uint8. Pass parts that were quantized separately, such as gate and up, in
            separate calls (docs/layouts.md).
        dtype: dtype of the activations in later calls; None: the dtype of ``b``, or bfloat16 with ``scale``.
        dgrad: whether gradients will flow to the activations. Most backends then write a second layout.
        kernel_preference: the backend whose layouts are written, as in `grouped_mm`. Only that backend reads them.

    Returns:
        Weights that `grouped_mm` takes as ``b``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it, what was expected and what was found. Under
            GROUPED_GEMM_VALIDATE=1 also if the recipe requires powers of two and a scale is not one.
        NoBackendError: no backend, or not the requested one, can run the recipe.
    """
    check_bool("dgrad", dgrad)
    recipe = Recipe.parse(recipe)
    if not recipe.is_scaled:
        checks.fail("recipe", "a recipe that quantizes", recipe.value)
    b, scale = dtensor.local(b=b, scale=scale)
    checks.check_weights(b, scale, dtype)
    if scale is not None:
        scale = materialized(checks.as_scale(scale, b, recipe))
    b, b_contiguous = dense_weights(b.detach())
    if dtype is None:
        dtype = b.dtype if scale is None else torch.bfloat16
    route = route_of(describe_weights(b, b_contiguous, recipe, dtype, dgrad, kernel_preference))
    if scale is None:
        forward, backward = weights_for(b, recipe, route.forward, route.dgrad)
    else:
        data, scale = reference.convert_fp8(b, scale, reference.weight_blocks(recipe, 1), fp8_dtype_of(b.device))
        forward, backward = layouts(
            route.forward,
            route.dgrad,
            lambda backend, one, other: backend.adopt_weights(data, scale, recipe, forward=one, dgrad=other),
        )
    assert forward is not None and route.forward is not None, "the forward layout is always requested"
    return QuantizedWeights(b.shape, dtype, forward, backward, route.forward, route.dgrad)
