"""The public calls: `grouped_mm`, `explain`, `quantize_weights`, and how a call becomes facts and a decision.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import functools
import operator
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from grouped_gemm import reference
from grouped_gemm.autograd import (
    Contraction,
    GroupedMM,
    Route,
    dense_rows,
    dense_weights,
    layouts,
    materialized,
    run_forward,
    weights_for,
)
from grouped_gemm.backends import candidates
from grouped_gemm.core import tracing, vmap
from grouped_gemm.core.machine import is_capturing as _is_capturing
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import (
    AUTOTUNE,
    LOG,
    STRICT,
    VALIDATE,
    BackendKind,
    KernelPreference,
    Preference,
    check_bool,
    environment,
    is_current,
    resolve,
    surrounding,
)
from grouped_gemm.core.problem import Pass, Problem, RowClass, row_class
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.selection import checks, dtensor
from grouped_gemm.selection.explanation import Explanation
from grouped_gemm.selection.rules import Decision, NoBackendError, decide


def grouped_mm(
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor,
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
        recipe: how operands are quantized on the fly, a `Recipe` or its name. None: not at all, or as ``b`` is.
        bias: (E, N), added to each row of its group.
        out_dtype: bfloat16, float16 or float32; None: the dtype of ``a``.
        group_alignment: a promise that every group's size is a multiple of it; backends that pad then need not.
        kernel_preference: a backend or its name. AUTO defers to `prefer`, then GROUPED_GEMM_BACKEND, then picks.

    Returns:
        (M, N), or (E, M, N) where ``b`` has 2 dimensions.

    Raises:
        TypeError: an argument that should be a tensor or a number is not.
        ValueError: shapes, dtypes or devices do not fit each other; the message names argument, expected and found.
        NoBackendError: no backend, or not the one that was asked for, runs the call with all its gradients.
    """
    options = (recipe, out_dtype, group_alignment, kernel_preference)
    if not torch.compiler.is_compiling() and vmap.is_transformed():
        return vmap.each_sample(functools.partial(_grouped_mm, options), a, b, offs, bias)
    return _grouped_mm(options, a, b, offs, bias)


def _grouped_mm(
    options: tuple[Any, ...], a: Tensor, b: Tensor | QuantizedWeights, offs: Tensor, bias: Tensor | None
) -> Tensor:
    """`grouped_mm`, outside of vmap. ``options`` are recipe, out_dtype, group_alignment and kernel_preference."""
    a, b, bias = _cast(a, b, bias)
    key, route = _recall(a, b, offs, bias, options)
    if route is None and any(map(dtensor.is_dtensor, (a, b, offs, bias))):
        a, b, offs, bias = dtensor.local(a=a, b=b, offs=offs, bias=bias)
        key, route = _recall(a, b, offs, bias, options)
    if route is None:
        call = _prepare(a, b, offs, bias, *options)
        route = _route(call.facts)
        if key is not None and call.took_as_is(a, b, offs, bias) and not call.facts["captured"]:
            _remember(key, route)
        a, b, offs, bias = call.a, call.b, call.offs, call.bias
    if isinstance(b, Tensor) and b.dim() == 2:
        vmap.check_differentiable()
        return Contraction.apply(a, b, offs, route)
    if route.dgrad is None and route.wgrad is None and (bias is None or not _needs_grad(bias)):
        return run_forward(a, b, bias, offs, route)[0]
    vmap.check_differentiable()
    return GroupedMM.apply(a, b, bias, offs, route)


def explain(
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor,
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
    a, b, offs, bias = dtensor.local(a=a, b=b, offs=offs, bias=bias)
    a, b, bias = _cast(a, b, bias)
    call = _prepare(a, b, offs, bias, recipe, out_dtype, group_alignment, kernel_preference)
    return Explanation(_decision(**call.facts), call.a.shape[0])


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
    facts = {
        "device": b.device,
        "shape": tuple(b.shape),
        "rows": RowClass.LARGE,
        "recipe": recipe,
        "dtype": dtype,
        "out_dtype": dtype,
        "passes": (Pass.FORWARD, Pass.DGRAD) if dgrad else (Pass.FORWARD,),
        "b_contiguous": b_contiguous,
        "preference": KernelPreference.parse(kernel_preference),
        "context": surrounding.kernel_preference,
    }
    route = _route(facts)
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


@dataclass(frozen=True)
class _Call:
    """A checked call: operands as the passes take them, and the facts that decide who runs them."""

    a: Tensor  # (M, K), rows contiguous
    b: Tensor | QuantizedWeights  # (E, K, N), K or N contiguous; (M, N), rows contiguous, where it is a contraction
    offs: Tensor
    bias: Tensor | None
    facts: dict[str, Any]  # arguments of _decision

    def took_as_is(self, a: Tensor, b: Tensor | QuantizedWeights, offs: Tensor, bias: Tensor | None) -> bool:
        """Whether these operands were not copied or transposed, nor would others with their strides be, for any M."""
        return self.a is a and a.stride(1) == 1 and self.b is b and self.offs is offs and self.bias is bias


_MANY_GROUPS = 1024  # what selection takes E for where only the device knows it: a backend with a limit on E refuses

_Key = tuple[Any, ...]
_routes: dict[_Key, Route] = {}  # of eager calls, by what `_recall` looks at
_MAX_ROUTES = 4096
_epoch = 0  # how often `forget` was called: what it overtakes is kept for an epoch that is over


def _recall(
    a: Tensor, b: Tensor | QuantizedWeights, offs: Tensor, bias: Tensor | None, options: tuple[Any, ...]
) -> tuple[_Key | None, Route | None]:
    """The key of a call, and the route of an earlier one with an equal key: it passed every check, this one would.

    The key has all that `_prepare` and `_route` look at, as the caller gave it: to hash it takes a fifth of the time
    that it takes to check it. Of M it has the class, and no check of operands that are remembered looks at more.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:  # Dynamo guards what it traces; see _prepare
        return None, None
    try:
        num_rows, k = a.shape
        num_groups, _, _ = b.shape
        if isinstance(b, QuantizedWeights):
            b_facts = (b.shape, b.dtype, b.device, b.recipe, b.forward_backend, b.dgrad_backend)
        else:
            b_facts = _facts(b)
        key = (
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
            _is_capturing(a),
            _epoch,
            environment(),
        )
        return key, _routes.get(key)
    except Exception:  # two 2-dimensional operands, whose checks look at M, or something that the checks will name
        return None, None


def _facts(x: Tensor) -> tuple[Any, ...]:
    return type(x), x.shape, x.stride(), x.dtype, x.device, x.layout, x.requires_grad, x.is_neg()


def _remember(key: _Key, route: Route) -> None:
    """Keeps the route that was found for ``key``, unless another thread has changed the environment meanwhile."""
    if is_current(key[-1]):
        if len(_routes) >= _MAX_ROUTES:
            _routes.clear()
        _routes[key] = route


def _cast(
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


def _prepare(
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor,
    bias: Tensor | None,
    recipe: Recipe | str | None,
    out_dtype: torch.dtype | None,
    group_alignment: int,
    kernel_preference: Preference,
) -> _Call:
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        checks.check_tangents(a=a, b=b, bias=bias)
    preference = KernelPreference.parse(kernel_preference)
    checks.check_options(out_dtype, group_alignment)
    weights = None
    if isinstance(b, Tensor) and b.dim() == 2:
        checks.check_contraction(a, b, offs, bias)
        a, b = dense_rows(a.t()), dense_rows(b)  # columns of a become rows: what is summed over comes first
        if tracing.is_data_dependent(a.shape[0]) or tracing.is_data_dependent(b.shape[0]):
            torch._check(a.shape[0] == b.shape[0])
        num_groups = offs.shape[0]
        if tracing.is_data_dependent(num_groups):
            torch._check(num_groups >= 1)
            num_groups = _MANY_GROUPS
        shape, b_contiguous = (num_groups, a.shape[1], b.shape[1]), "n"
        needs_grad = ((Pass.WGRAD, True), (Pass.DGRAD, _needs_grad(a)), (Pass.FORWARD, _needs_grad(b)))
    else:
        checks.check_operands(a, b, offs, bias)
        a = dense_rows(a)
        if isinstance(b, Tensor):
            b, b_contiguous = dense_weights(b)
            b_needs_grad = _needs_grad(b)
        else:
            b_contiguous, b_needs_grad = "k", False
            weights = b.forward_backend, b.dgrad_backend
            recipe = b.recipe if recipe is None else recipe
        num_groups, k, n = b.shape
        if tracing.is_data_dependent(offs.shape[0]) or tracing.is_data_dependent(num_groups):
            offs = torch.ops.grouped_gemm.counted_offs(offs, num_groups)
        if tracing.is_data_dependent(num_groups):
            num_groups = _MANY_GROUPS
        shape = (num_groups, k, n)
        needs_grad = ((Pass.FORWARD, True), (Pass.DGRAD, _needs_grad(a)), (Pass.WGRAD, b_needs_grad))
    offs = materialized(offs).contiguous()
    bias = None if bias is None else materialized(bias)
    recipe = Recipe.NONE if recipe is None else Recipe.parse(recipe)
    if isinstance(b, QuantizedWeights) and recipe is not b.recipe:
        checks.fail("recipe", f"{b.recipe.value}, as the weights were quantized", recipe.value)
    if VALIDATE.is_on():
        offs = torch.ops.grouped_gemm.checked_offs(offs, a.shape[0], group_alignment)
    is_captured = _is_capturing(a)
    facts = {
        "device": a.device,
        "shape": tuple(map(operator.index, shape)),  # under Dynamo, constants of the graph; M stays symbolic
        "rows": tracing.row_class_of(a.shape[0], shape[0]),
        "recipe": recipe,
        "dtype": a.dtype,
        "out_dtype": a.dtype if out_dtype is None else out_dtype,
        "passes": tuple(pass_ for pass_, needed in needs_grad if needed),
        "b_contiguous": b_contiguous,
        "has_bias": bias is not None,
        "group_alignment": group_alignment,
        "is_aligned": _is_aligned(a) and (isinstance(b, QuantizedWeights) or _is_aligned(b)),
        "host_sync": surrounding.host_sync and not is_captured,
        "captured": is_captured,
        "weights": weights,
        "preference": preference,
        "context": surrounding.kernel_preference,
    }
    return _Call(a, b, offs, bias, facts)


def _needs_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _is_aligned(x: Tensor) -> bool:
    """Whether all strides but that of the contiguous axis are multiples of 16 bytes."""
    return all(stride == 1 or stride * x.element_size() % 16 == 0 for stride in x.stride())


def _route(facts: dict[str, Any]) -> Route:
    """The route of a call, decided once for equal facts.

    Raises:
        NoBackendError: a pass has no backend.
    """
    chosen = _chosen(**facts)
    name, _, text = chosen.partition(": ")
    if name in _ERRORS:
        raise _ERRORS[name](text)
    forward, dgrad, wgrad = [BackendKind(name) if name else None for name in chosen.split(",")]
    backends: tuple[BackendKind, ...] = ()
    for kind in (forward, dgrad, wgrad):
        if kind is not None and kind not in backends:
            backends += (kind,)
    recipe, dtype, out_dtype, b_contiguous = (facts[f] for f in ("recipe", "dtype", "out_dtype", "b_contiguous"))
    group_alignment = facts.get("group_alignment", 1)
    return Route(forward, dgrad, wgrad, recipe, dtype, out_dtype, b_contiguous, backends, group_alignment)


_ERRORS: dict[str, type[Exception]] = {"NoBackendError": NoBackendError, "ValueError": ValueError}


def _chosen(**facts: Any) -> str:
    """What `_choose` returns, or an error as "ValueError: its text".

    Dynamo evaluates this while tracing, and would take an exception in here for an internal error of its own. `_route`,
    which Dynamo traces, raises it.
    """
    try:
        return _choose(**facts)
    except NoBackendError as error:
        return f"NoBackendError: {error}"
    except ValueError as error:  # of a switch in the environment
        return f"ValueError: {error}"


# What torch.compiler.assume_constant_result does, which would import all of Dynamo with this package.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(**facts: Any) -> str:
    """The backends of forward, dgrad and wgrad as "triton,,torch": text, which Dynamo takes for a constant.

    Raises:
        NoBackendError: a pass has no backend.
        ValueError: a switch in the environment has an unknown value.
    """
    decision = _decision(**facts)
    if LOG.is_on() and decision not in _logged:
        _logged.add(decision)
        print(Explanation(decision), file=sys.stderr)
    decision.check()
    if decision.falls_back:
        _warn_once(decision)
    kinds = (decision.backend(pass_) for pass_ in (Pass.FORWARD, Pass.DGRAD, Pass.WGRAD))
    return ",".join("" if kind is None else kind.value for kind in kinds)


def forget() -> None:
    """Forgets what was decided, and what other threads are just deciding: what decisions rest on has changed."""
    global _epoch
    _epoch += 1
    _routes.clear()
    _decide_once.cache_clear()


def _decision(
    *, device: torch.device, preference: KernelPreference, context: KernelPreference | None, **facts: Any
) -> Decision:
    """The decision, complete or not, under the switches of now."""
    preference, asked_by = resolve(preference, context)
    # In a capture, health may be taken for granted: what is decided then holds for then.
    decide_now = _decide_once.__wrapped__ if facts.get("captured") else _decide_once
    return decide_now(_epoch, device, preference, asked_by, STRICT.is_on(), AUTOTUNE.is_on(), **facts)


@functools.lru_cache(maxsize=4096)
def _decide_once(
    epoch: int,
    device: torch.device,
    preference: KernelPreference,
    asked_by: str,
    strict: bool,
    tunes: bool,
    shape: tuple[int, int, int],
    **facts: Any,
) -> Decision:
    from grouped_gemm.autotune import profile  # what is needed to decide, importing this package need not wait for

    num_groups, k, n = shape
    problem = Problem(machine_of(device), num_groups, k, n, **facts)
    tables = profile.tables(problem.machine, tunes)
    return decide(problem, preference, candidates(device), asked_by=asked_by, strict=strict, tables=tables)


_logged: set[Decision] = set()
_warned: set[str] = set()


def _warn_once(decision: Decision) -> None:
    """Warns that AUTO fell back to Emulated, once for each set of reasons."""
    head = f"{decision.problem.recipe.value} runs on the Emulated backend, which is slow; no other one runs it:"
    tail = f"{STRICT.name}=1 makes this an error, KernelPreference.EMULATED silences it."
    text = "\n".join([head, *(f"  {line}" for line in decision.refusal_lines()), tail])
    if text not in _warned:
        _warned.add(text)
        frame, level = sys._getframe(), 1
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("grouped_gemm."):
            frame, level = frame.f_back, level + 1
        warnings.warn(text, stacklevel=level)  # the line that calls this package
