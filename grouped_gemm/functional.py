"""`grouped_mm`, its gradients, and the way a call takes to its backends.

A call checks its arguments, decides (`select`), and asks the chosen backends to plan, quantize and multiply. Each
backend's quantizer writes what its own kernel reads; nothing but tensors in the caller's dtype crosses between two.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grouped_gemm import arguments, reference
from grouped_gemm.backends import candidates, get_backend
from grouped_gemm.backends.base import OffsetPlan, _GroupedMMBackend
from grouped_gemm.device import machine_of
from grouped_gemm.operand import Quantized, QuantizedWeights
from grouped_gemm.preference import LOG, STRICT, VALIDATE, KernelPreference, resolve, surrounding
from grouped_gemm.problem import Pass, Problem, RowClass, row_class
from grouped_gemm.recipes import Recipe
from grouped_gemm.report import Explanation
from grouped_gemm.select import Decision, decide


def grouped_mm(
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor,
    *,
    recipe: Recipe | str | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    group_alignment: int = 1,
    kernel_preference: KernelPreference | str = KernelPreference.AUTO,
) -> Tensor:
    """Multiplies each group of rows by its own matrix; differentiable in ``a``, ``b`` and ``bias``.

    Rows ``offs[e-1]`` to ``offs[e]`` of ``a`` are multiplied by ``b[e]``, as `torch.nn.functional.grouped_mm` does;
    rows at and past ``offs[-1]`` give zeros, whatever they hold. Where ``b`` has 2 dimensions, ``offs`` splits the
    contraction instead: ``out[e] = a[:, group] @ b[group]``. The host never waits for the device unless `explain`
    says so.

    Args:
        a: (M, K); bfloat16, float16 or float32. Columns (M, M') of a weight gradient where ``b`` has 2 dimensions.
        b: (E, K, N) in the dtype of ``a``, usually (E, N, K) weights seen through ``transpose(1, 2)``, or such weights
            from `quantize_weights`; or (M', N).
        offs: (E,) int32, the end row of each group, on the operands' device. Groups may be empty; ``offs[-1] <= M``.
            Values out of order or range give wrong rows, never a wrong address.
        recipe: how operands are quantized on the fly, a `Recipe` or its name. None: not at all, or as ``b`` is.
        bias: (E, N), added to each row of its group.
        out_dtype: bfloat16, float16 or float32; None: the dtype of ``a``.
        group_alignment: a promise that every group's size is a multiple of it, which saves backends that pad the work.
        kernel_preference: a backend or its name. AUTO defers to `prefer`, then GROUPED_GEMM_BACKEND, then picks.

    Returns:
        (M, N), or (E, M, N) where ``b`` has 2 dimensions.

    Raises:
        TypeError: an argument that should be a tensor or a number is not.
        ValueError: shapes, dtypes or devices do not fit each other; the message names argument, expected and found.
        NoBackendError: no backend, or not the one that was asked for, runs the call with all its gradients.
    """
    call = _prepare(a, b, offs, recipe, bias, out_dtype, group_alignment, kernel_preference)
    route = _route(call.facts)
    if isinstance(b, Tensor) and b.dim() == 2:
        return _Contraction.apply(call.a, call.b, call.offs, route)
    if route.dgrad is None and route.wgrad is None and (bias is None or not _needs_grad(bias)):
        return _forward(call.a, call.b, call.bias, call.offs, route)[0]
    return _GroupedMM.apply(call.a, call.b, call.bias, call.offs, route)


def explain(
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor,
    *,
    recipe: Recipe | str | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    group_alignment: int = 1,
    kernel_preference: KernelPreference | str = KernelPreference.AUTO,
) -> Explanation:
    """What `grouped_mm` would do with the same arguments, and why; it runs nothing. The passes follow ``requires_grad``.

    Returns:
        An `Explanation`: print it, or take its ``to_dict()``. It says so where no backend runs the call.

    Raises:
        TypeError, ValueError: as `grouped_mm`.
    """
    call = _prepare(a, b, offs, recipe, bias, out_dtype, group_alignment, kernel_preference)
    return Explanation(_decision(**call.facts), call.a.shape[0])


def quantize_weights(
    b: Tensor,
    recipe: Recipe | str,
    *,
    scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    dgrad: bool = False,
    kernel_preference: KernelPreference | str = KernelPreference.AUTO,
) -> QuantizedWeights:
    """Quantizes weights once, for many calls of `grouped_mm`, or takes over a checkpoint's.

    No gradient flows to weights that were quantized beforehand.

    Args:
        b: (E, K, N), usually (E, N, K) weights seen through ``transpose(1, 2)``: bfloat16, float16 or float32, or a
            checkpoint's float8_e4m3fn with ``scale``.
        recipe: a `Recipe` that scales, or its name.
        scale: a checkpoint's dequantization factors (``value = data * scale``), its axes in the order of those of ``b``.
            Rowwise (E, 1, N), blockwise (E, ceil(K/128), ceil(N/128)), MXFP8 (E, ceil(K/32), N) as float8_e8m0fnu.
        dtype: for a checkpoint's weights, the dtype of the activations that will meet them.
        dgrad: whether gradients will flow to the activations, which takes a second layout on most backends.
        kernel_preference: the backend whose layouts are written, as in `grouped_mm`. Only that backend reads them.

    Returns:
        What `grouped_mm` takes as ``b``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and found.
        NoBackendError: no backend, or not the one that was asked for, runs the recipe.
    """
    recipe = Recipe.parse(recipe)
    if not recipe.is_scaled:
        arguments.fail("recipe", "one that scales", recipe.value)
    arguments.check_weights(b, scale, recipe, dtype)
    b, b_contiguous = _dense_weights(b)
    dtype = b.dtype if scale is None else dtype
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
    owners = route.forward, route.dgrad
    if scale is None:
        forward, backward = _weights_for(b, recipe, *owners)
    else:
        data, scale = reference.convert_fp8(b, scale, machine_of(b.device).fp8_dtype)
        forward, backward = _layouts(
            *owners,
            lambda backend, one, other: backend.adopt_weights(data, scale, recipe, forward=one, dgrad=other),
        )
    assert forward is not None
    return QuantizedWeights(b.shape, dtype, forward, backward, *owners)


@dataclass(frozen=True)
class _Call:
    """A checked call: operands as the passes take them, and who runs them."""

    a: Tensor  # (M, K), rows contiguous
    b: Tensor | QuantizedWeights  # (E, K, N), K or N contiguous; (M, N), rows contiguous, where it is a contraction
    bias: Tensor | None
    offs: Tensor
    facts: dict[str, Any]  # arguments of _decision


class _Route(NamedTuple):
    """Who runs which pass, and what the passes need to know. Plain constants, which Dynamo can hold."""

    forward: KernelPreference | None
    dgrad: KernelPreference | None
    wgrad: KernelPreference | None
    recipe: Recipe
    dtype: torch.dtype
    out_dtype: torch.dtype
    b_contiguous: str

    @property
    def backends(self) -> list[KernelPreference]:
        """Every backend that runs a pass, once."""
        kinds: list[KernelPreference] = []
        for kind in (self.forward, self.dgrad, self.wgrad):
            if kind is not None and kind not in kinds:
                kinds.append(kind)
        return kinds


def _prepare(
    a: Tensor,
    b: Tensor | QuantizedWeights,
    offs: Tensor,
    recipe: Recipe | str | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    group_alignment: int,
    kernel_preference: KernelPreference | str,
) -> _Call:
    preference = KernelPreference.parse(kernel_preference)
    arguments.check_options(out_dtype, group_alignment)
    arguments.check_tensor("a", a, (2,), arguments.DTYPES)
    if torch.is_autocast_enabled(a.device.type):
        dtype = torch.get_autocast_dtype(a.device.type)
        a, b, bias = (x.to(dtype) if isinstance(x, Tensor) else x for x in (a, b, bias))
    is_contraction = isinstance(b, Tensor) and b.dim() == 2
    weights = None
    if is_contraction:
        arguments.check_contraction(a, b, offs, bias)
        a, b = _dense_rows(a.t()), _dense_rows(b)  # columns of a become rows: what is summed over comes first
        shape, b_contiguous = (offs.shape[0], a.shape[1], b.shape[1]), "n"
        needs_grad = ((Pass.WGRAD, True), (Pass.DGRAD, _needs_grad(a)), (Pass.FORWARD, _needs_grad(b)))
    else:
        arguments.check_operands(a, b, offs, bias)
        a = _dense_rows(a)
        shape = tuple(b.shape)
        if isinstance(b, QuantizedWeights):
            b_contiguous, b_needs_grad = "k", False
            weights = b.forward_backend, b.dgrad_backend
            recipe = b.recipe if recipe is None else recipe
        else:
            b, b_contiguous = _dense_weights(b)
            b_needs_grad = _needs_grad(b)
        needs_grad = ((Pass.FORWARD, True), (Pass.DGRAD, _needs_grad(a)), (Pass.WGRAD, b_needs_grad))
    recipe = Recipe.NONE if recipe is None else Recipe.parse(recipe)
    if isinstance(b, QuantizedWeights) and recipe is not b.recipe:
        arguments.fail("recipe", f"{b.recipe.value}, as the weights were quantized", recipe.value)
    if VALIDATE.is_on():
        offs = torch.ops.grouped_gemm.checked_offs(offs, a.shape[0], group_alignment)
    facts = {
        "device": a.device,
        "shape": shape,
        "rows": row_class(a.shape[0], shape[0]),
        "recipe": recipe,
        "dtype": a.dtype,
        "out_dtype": a.dtype if out_dtype is None else out_dtype,
        "passes": tuple(pass_ for pass_, needed in needs_grad if needed),
        "b_contiguous": b_contiguous,
        "has_bias": bias is not None,
        "group_alignment": group_alignment,
        "is_aligned": _is_aligned(a) and (isinstance(b, QuantizedWeights) or _is_aligned(b)),
        "host_sync": surrounding.host_sync and not _is_capturing(a),
        "weights": weights,
        "preference": preference,
        "context": surrounding.kernel_preference,
    }
    return _Call(a, b, bias, offs.contiguous(), facts)


def _needs_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _dense_rows(x: Tensor) -> Tensor:
    """``x`` with contiguous rows: itself, unless it is a transpose or an expanded gradient."""
    return x if x.stride(1) == 1 else x.contiguous()


def _dense_weights(b_EKN: Tensor) -> tuple[Tensor, str]:
    """``b`` with K or N contiguous, and which: itself, unless it is a slice across both."""
    if b_EKN.stride(2) == 1:
        return b_EKN, "n"
    return (b_EKN, "k") if b_EKN.stride(1) == 1 else (b_EKN.contiguous(), "n")


def _is_aligned(x: Tensor) -> bool:
    """Whether all strides but that of the contiguous axis are multiples of 16 bytes."""
    return all(stride == 1 or stride * x.element_size() % 16 == 0 for stride in x.stride())


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def _route(facts: dict[str, Any]) -> _Route:
    """The route of a call, decided once for equal facts.

    Raises:
        NoBackendError: a pass has no backend.
    """
    forward, dgrad, wgrad = [KernelPreference.parse(name) if name else None for name in _chosen(**facts).split(",")]
    return _Route(
        forward, dgrad, wgrad, facts["recipe"], facts["dtype"], facts["out_dtype"], facts["b_contiguous"]
    )


@torch.compiler.assume_constant_result
def _chosen(**facts: Any) -> str:
    """The backends of forward, dgrad and wgrad as "triton,,torch"; text, because Dynamo, which evaluates this while
    tracing, takes the result for a constant."""
    decision = _decision(**facts)
    decision.check()
    if decision.falls_back:
        _warn_once(decision)
    kinds = (decision.backend(pass_) for pass_ in (Pass.FORWARD, Pass.DGRAD, Pass.WGRAD))
    return ",".join("" if kind is None else kind.value for kind in kinds)


def _decision(
    *, device: torch.device, preference: KernelPreference, context: KernelPreference | None, **facts: Any
) -> Decision:
    """The decision, complete or not, under the switches of now."""
    preference, asked_by = resolve(preference, context)
    return _decide_once(device, preference, asked_by, STRICT.is_on(), **facts)


@functools.lru_cache(maxsize=4096)
def _decide_once(
    device: torch.device,
    preference: KernelPreference,
    asked_by: str,
    strict: bool,
    shape: tuple[int, int, int],
    **facts: Any,
) -> Decision:
    num_groups, k, n = shape
    problem = Problem(machine_of(device), num_groups, k, n, **facts)
    decision = decide(problem, preference, candidates(device), asked_by=asked_by, strict=strict)
    if LOG.is_on():
        print(Explanation(decision), file=sys.stderr)
    return decision


_warned: set[str] = set()


def _warn_once(decision: Decision) -> None:
    """Warns that AUTO fell back to Emulated, once for each set of reasons."""
    head = f"{decision.problem.recipe.value} runs on the Emulated backend, which is slow; no other one runs it:"
    tail = f"{STRICT.name}=1 makes this an error, KernelPreference.EMULATED silences it."
    text = "\n".join([head, *(f"  {line}" for line in decision.refusal_lines()), tail])
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)


_Layouts = tuple[Quantized | None, Quantized | None]
_Plans = dict[KernelPreference, OffsetPlan]


def _layouts(
    first: KernelPreference | None,
    second: KernelPreference | None,
    quantize: Callable[[_GroupedMMBackend, bool, bool], _Layouts],
) -> _Layouts:
    """Two layouts of one operand, each by the backend that reads it: from one read where that is the same one.

    Args:
        first: whose kernel reads the first layout; None: nobody does.
        second: likewise.
        quantize: writes the layouts that are asked for with a backend.
    """
    if first is second:
        return (None, None) if first is None else quantize(get_backend(first), True, True)
    return (
        None if first is None else quantize(get_backend(first), True, False)[0],
        None if second is None else quantize(get_backend(second), False, True)[1],
    )


def _activations_for(
    x_MD: Tensor, recipe: Recipe, plans: _Plans, rows: KernelPreference | None, columns: KernelPreference | None
) -> _Layouts:
    return _layouts(
        rows, columns, lambda b, one, two: b.quantize_activations(x_MD, plans[b.kind], recipe, rows=one, columns=two)
    )


def _weights_for(
    b_EKN: Tensor, recipe: Recipe, forward: KernelPreference | None, dgrad: KernelPreference | None
) -> _Layouts:
    return _layouts(forward, dgrad, lambda b, one, two: b.quantize_weights(b_EKN, recipe, forward=one, dgrad=two))


def _plan(route: _Route, offs: Tensor, num_rows: int) -> _Plans:
    """The plan of each backend that runs a pass."""
    return {kind: get_backend(kind).plan(offs, num_rows) for kind in route.backends}


def _save(ctx: Any, route: _Route, plans: _Plans, *operands: Quantized | None) -> None:
    """Keeps plans and operands for backward: tensors where autograd and checkpointing can see them."""
    tensors: list[Tensor | None] = []
    for operand in operands:
        tensors += (None, None) if operand is None else (operand.data, operand.scale)
    for plan in plans.values():
        tensors += (plan.offs, *plan.derived)
    ctx.save_for_backward(*tensors)
    ctx.route = route
    ctx.forms = [None if operand is None else operand.form for operand in operands]
    ctx.plan_sizes = [1 + len(plan.derived) for plan in plans.values()]


def _load(ctx: Any, num_rows: int) -> tuple[_Route, _Plans, list[Quantized | None]]:
    """What `_save` kept."""
    tensors = list(ctx.saved_tensors)
    operands = []
    for form in ctx.forms:
        operands.append(None if form is None else Quantized(tensors[0], tensors[1], *form))
        tensors = tensors[2:]
    plans = {}
    for kind, size in zip(ctx.route.backends, ctx.plan_sizes):
        plans[kind] = OffsetPlan(tensors[0], num_rows, tuple(tensors[1:size]))
        tensors = tensors[size:]
    return ctx.route, plans, operands


def _forward(
    a: Tensor, b: Tensor | QuantizedWeights, bias: Tensor | None, offs: Tensor, route: _Route
) -> tuple[Tensor, _Plans, Quantized | None, Quantized | None]:
    """The output, and what backward needs: plans, ``a`` for wgrad, ``b`` for dgrad."""
    plans = _plan(route, offs, a.shape[0])
    a_rows, a_columns = _activations_for(a, route.recipe, plans, route.forward, route.wgrad)
    if isinstance(b, QuantizedWeights):
        b_forward, b_dgrad = b.forward, b.dgrad
    else:
        b_forward, b_dgrad = _weights_for(b, route.recipe, route.forward, route.dgrad)
    y = get_backend(route.forward).grouped_mm(a_rows, b_forward, plans[route.forward], route.out_dtype, bias)
    return y, plans, a_columns, b_dgrad


class _GroupedMM(torch.autograd.Function):
    """Y = A B per group of rows."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor | QuantizedWeights, bias: Tensor | None, offs: Tensor, route: _Route
    ) -> Tensor:
        y, plans, a_columns, b_dgrad = _forward(a, b, bias, offs, route)
        _save(ctx, route, plans, a_columns, b_dgrad)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        route, plans, (a_columns, b_dgrad) = _load(ctx, dy.shape[0])
        dy = _dense_rows(dy.to(route.dtype))
        dy_rows, dy_columns = _activations_for(dy, route.recipe, plans, route.dgrad, route.wgrad)
        da = db = dbias = None
        if route.dgrad is not None:
            da = get_backend(route.dgrad).grouped_mm(dy_rows, b_dgrad, plans[route.dgrad], route.dtype)
        if route.wgrad is not None:
            db = get_backend(route.wgrad).wgrad(
                a_columns, dy_columns, plans[route.wgrad], route.dtype, contiguous=route.b_contiguous
            )
        if ctx.needs_input_grad[2]:
            dbias = get_backend(route.forward).bias_grad(dy, plans[route.forward], ctx.bias_dtype)
        return da, db, dbias, None, None


class _Contraction(torch.autograd.Function):
    """C = X^T G per group of rows: wgrad as a call of its own. Its gradients are dgrad and forward with dC as weights."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, g_MN: Tensor, offs: Tensor, route: _Route) -> Tensor:
        plans = _plan(route, offs, x_MK.shape[0])
        x_rows, x_columns = _activations_for(x_MK, route.recipe, plans, route.forward, route.wgrad)
        g_rows, g_columns = _activations_for(g_MN, route.recipe, plans, route.dgrad, route.wgrad)
        _save(ctx, route, plans, x_rows, g_rows)
        ctx.num_rows = x_MK.shape[0]
        return get_backend(route.wgrad).wgrad(
            x_columns, g_columns, plans[route.wgrad], route.out_dtype, contiguous=route.b_contiguous
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dc_EKN: Tensor) -> tuple[Tensor | None, ...]:
        route, plans, (x_rows, g_rows) = _load(ctx, ctx.num_rows)
        dc, _ = _dense_weights(dc_EKN.to(route.dtype))
        dc_forward, dc_dgrad = _weights_for(dc, route.recipe, route.forward, route.dgrad)
        dx = dg = None
        if route.dgrad is not None:
            dx = get_backend(route.dgrad).grouped_mm(g_rows, dc_dgrad, plans[route.dgrad], route.dtype)
        if route.forward is not None:
            dg = get_backend(route.forward).grouped_mm(x_rows, dc_forward, plans[route.forward], route.dtype)
        return dx, dg, None, None
