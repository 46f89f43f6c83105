"""The public calls: `grouped_mm`, `explain`, `quantize_weights`.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from grouped_gemm import reference
from grouped_gemm.autograd import Contraction, GroupedMM, layouts, run_forward, weights_for
from grouped_gemm.core import vmap
from grouped_gemm.core.dense import dense_weights, materialized
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import KernelPreference, Preference, check_bool
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.group_plan import GroupPlan, Plans
from grouped_gemm.selection import checks, dtensor
from grouped_gemm.selection.explanation import Explanation
from grouped_gemm.selection.route import decision_of, recall, remember, route_of
from grouped_gemm.selection.spec import autocast, describe, describe_weights, needs_gradient


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
) -> Tensor:
    """Multiplies each group of rows by its own matrix; differentiable in ``a``, ``b`` and ``bias``.

    Rows ``offs[e-1]`` to ``offs[e]`` of ``a`` are multiplied by ``b[e]``, as `torch.nn.functional.grouped_mm` does;
    rows at and past ``offs[-1]`` give zeros, whatever they hold. Where ``b`` has 2 dimensions, ``offs`` splits the
    contraction instead: ``out[e] = a[:, group] @ b[group]``. Torch's two forms with a 3-dimensional ``a`` are not
    here. The host never waits for the device unless `explain` says so. A DTensor stands for its local shard
    (docs/training.md), and the result is a plain tensor.

    Args:
        a: (M, K); bfloat16, float16 or float32. Columns (M, M') of a weight gradient where ``b`` has 2 dimensions.
        b: (E, K, N) in the dtype of ``a``, usually (E, N, K) weights seen through ``transpose(1, 2)``, or such weights
            from `quantize_weights`; or (M', N).
        offs: (E,) int32, the end row of each group, on the operands' device. Groups may be empty; ``offs[-1] <= M``.
            Group sizes are another thing: pass ``sizes.cumsum(0, dtype=torch.int32)``.
            Values out of order or range give wrong rows, never a wrong address.
            Or a `GroupPlan`, which several calls with the same groups share.
        recipe: how operands are quantized on the fly, a `Recipe` or its name. None: not at all, or as ``b`` is.
        bias: (E, N), added to each row of its group.
        out_dtype: bfloat16, float16 or float32; None: the dtype of ``a``.
        group_alignment: a guarantee that every group's size is a multiple of it; backends that pad then need not.
        kernel_preference: a backend or its name. AUTO defers to `prefer`, then GROUPED_GEMM_BACKEND, then picks.

    Returns:
        (M, N), or (E, M, N) where ``b`` has 2 dimensions.

    Raises:
        TypeError: an argument that should be a tensor or a number is not.
        ValueError: shapes, dtypes or devices do not fit each other; the message names argument, expected and found.
        NoBackendError: no backend, or not the one that was asked for, runs the call with all its gradients.
    """
    plan = None
    if isinstance(offs, GroupPlan):
        plan, offs = offs, offs.offs
        group_alignment = plan.alignment(group_alignment)
    options = (recipe, out_dtype, group_alignment, kernel_preference)
    if not torch.compiler.is_compiling() and vmap.is_transformed():
        return vmap.each_sample(functools.partial(_grouped_mm, options), a, b, offs, bias)
    return _grouped_mm(options, a, b, offs, bias, plan)


def _grouped_mm(
    options: tuple[Any, ...],
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor,
    bias: Tensor | None,
    plan: GroupPlan | None = None,
) -> Tensor:
    """`grouped_mm`, outside of vmap.

    ``options`` are recipe, out_dtype, group_alignment and kernel_preference. ``plan`` is the one of these ``offs``.
    """
    a, b, bias = autocast(a, b, bias)
    key, route = recall(a, b, offs, bias, options)
    if route is None and any(map(dtensor.is_dtensor, (a, b, offs, bias))):
        a, b, offs, bias = dtensor.local(a=a, b=b, offs=offs, bias=bias)
        key, route = recall(a, b, offs, bias, options)
    if route is None:
        given = a, b, offs, bias
        a, b, offs, bias, spec = describe(a, b, offs, bias, *options)
        route = route_of(spec)
        # What was copied or transposed has to be so for each call, and in a capture health is taken for granted.
        took_as_is = a.stride(1) == 1 and all(x is y for x, y in zip((a, b, offs, bias), given))
        if key is not None and took_as_is and not spec.captured:
            remember(key, route)
    groups: Tensor | Plans = offs
    if plan is not None:
        plan.check_rows(a.shape[0])
        groups = plan.plans(route, offs)
    if isinstance(b, Tensor) and b.dim() == 2:
        vmap.check_differentiable()
        return Contraction.apply(a, b, groups, route)
    if route.dgrad is None and route.wgrad is None and (bias is None or not needs_gradient(bias)):
        return run_forward(a, b, bias, groups, route)[0]
    vmap.check_differentiable()
    return GroupedMM.apply(a, b, bias, groups, route)


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
    """What `grouped_mm` would do with the same arguments, and why; multiplies nothing. Passes follow ``requires_grad``.

    Returns:
        An `Explanation`: print it, or take its ``to_dict()``. It says so where no backend runs the call.

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
    return Explanation(decision_of(spec), a.shape[0])


def quantize_weights(
    b: Tensor,
    recipe: Recipe | str,
    *,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    dgrad: bool = False,
    kernel_preference: Preference = KernelPreference.AUTO,
) -> QuantizedWeights:
    """Quantizes weights once, for many calls of `grouped_mm`, or takes over a checkpoint's.

    No gradient flows to weights that were quantized beforehand.

    Args:
        b: (E, K, N), usually (E, N, K) weights seen through ``transpose(1, 2)``: bfloat16, float16 or float32, or a
            checkpoint's float8_e4m3fn with ``scale``.
        recipe: a `Recipe` that scales, or its name.
        scale: a checkpoint's dequantization factors (``value = data * scale``), with the axes of ``b``: rowwise
            (E, 1, N), blockwise (E, ceil(K/128), ceil(N/128)), MXFP8 (E, ceil(K/32), N); or one for each expert, (E,),
            (E, 1) or (E, 1, 1). float32, bfloat16, float16 or float8_e8m0fnu, all of them exact; MXFP8: float8_e8m0fnu,
            or its codes in uint8. Parts that were quantized apart, such as gate and up, are passed apart
            (docs/layouts.md).
        dtype: dtype of the activations that will meet the weights; None: that of ``b``, or bfloat16 for a checkpoint's.
        dgrad: whether gradients will flow to the activations, which takes a second layout on most backends.
        kernel_preference: the backend whose layouts are written, as in `grouped_mm`. Only that backend reads them.

    Returns:
        What `grouped_mm` takes as ``b``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and found. Under
            GROUPED_GEMM_VALIDATE=1 also where a recipe wants powers of two and a scale is none.
        NoBackendError: no backend, or not the one that was asked for, runs the recipe.
    """
    check_bool("dgrad", dgrad)
    recipe = Recipe.parse(recipe)
    if not recipe.is_scaled:
        checks.fail("recipe", "one that scales", recipe.value)
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
        blocks, fp8_dtype = reference.weight_blocks(recipe, 1), machine_of(b.device).fp8_dtype
        data, scale = reference.convert_fp8(b, scale, blocks, fp8_dtype)
        forward, backward = layouts(
            route.forward,
            route.dgrad,
            lambda backend, one, other: backend.adopt_weights(data, scale, recipe, forward=one, dgrad=other),
        )
    assert forward is not None and route.forward is not None, "the forward pass is always asked for"
    return QuantizedWeights(b.shape, dtype, forward, backward, route.forward, route.dgrad)
