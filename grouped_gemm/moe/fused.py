"""The experts of a MoE layer as fused kernels: gathers, gates and quantizers inside or right between the GEMMs.

Forward: gate-up with gathered rows and the gate at its end, down, combine. With a recipe, tokens are quantized once,
before they are gathered. Backward: dgrad of down with gathered rows of dY; the gradient of the gate, which computes h
again; both wgrads, which gather their rows while they load them; dgrad of gate-up; combine.

With a recipe, wgrads stay in bf16. In fp8 they would need operands that are transposed and quantized along an expert's
rows; that takes longer than the faster GEMMs save (docs/performance.md).

Kept for backward: x, the weights or their dgrad layout, pre-activations, and the integers of the routing. With
``keep="recipe"``, x and pre-activations are kept in fp8; gradients are those of the rounded values. The rows of dY
enter dgrad unweighted. The kernel of the gate's gradient applies the weights of rows and computes their gradient,
dS = <dh, h>.

T, k, M, E: tokens, slots of a token, routed rows, experts. H, I: hidden and intermediate features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from grouped_gemm import weight_cache, weight_gradients
from grouped_gemm.backends import get_backend
from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.dense import dense_rows, dense_weights
from grouped_gemm.core.library import ops, replayed_call
from grouped_gemm.core.preference import BackendKind, KernelPreference, resolve, surrounding
from grouped_gemm.core.quantized import Layouts, Quantized, QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.core.vmap import batched_gradient
from grouped_gemm.group_plan import GroupPlan
from grouped_gemm.kernels.quantize.blocks import token_blocks
from grouped_gemm.moe import gemms, steps  # noqa: F401  (steps defines ops)
from grouped_gemm.moe.activation import ACTIVATIONS
from grouped_gemm.moe.composed import ExpertWeights, Weights, dense, grouped, run_composed
from grouped_gemm.moe.routing import Routing
from grouped_gemm.moe.tokens import QuantizedTokens
from grouped_gemm.selection.spec import needs_gradient
from grouped_gemm.weight_gradients import Compute, WgradDestination, check_backward, deliver_wgrad, destination_of

_RECIPES = (Recipe.NONE, Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2)
_GATE_BLOCK = 128  # columns of h in a tile of the GEMM of gate and up, and values of a block of scales
PLAIN = (Tensor, torch.nn.Parameter)


def can_run(x: Tensor, topk_weights: Tensor | None, experts: ExpertWeights) -> bool:
    """Whether these kernels run ``experts`` on ``x`` (T, H), with weights of slots or without."""
    return refusal(x, topk_weights, experts) is None


def refusal(x: Tensor, topk_weights: Tensor | None, experts: ExpertWeights) -> str | None:
    """Why these kernels do not run a call of `can_run`, as "expected ...; found ..."; None: they do."""
    gate_up, down, recipe = experts.first[0], experts.down, recipe_of(experts)
    if not runs_fused(x.device):
        return f"expected a Hopper GPU where Triton works; found {x.device}"
    found = refusal_of_options(experts)
    if found is not None:
        return found
    if not experts.activation.is_gated:
        return f"expected a gated activation; found {experts.activation.name}"
    if len(experts.first) > 1:
        return "expected gate and up in one tensor; found two"
    if experts.first_biases[0] is not None or experts.down_bias is not None:
        return "expected no biases; found some"
    if type(x) not in PLAIN or x.dtype != torch.bfloat16:
        return f"expected x in bfloat16; found {type(x).__name__} in {dtype_name(x.dtype)}"
    for name, w in (("gate_up", gate_up), ("down", down)):
        if not _is_readable(w):
            return f"expected {name} contiguous in bfloat16, or quantized for Triton; found {_form(w)}"
    found = refusal_of_quantized(x, experts)
    if found is not None:
        return found
    quantized = [w for w in (gate_up, down) if isinstance(w, QuantizedWeights)]
    if any([w.dgrad is None for w in quantized]) and needs_gradients(x, topk_weights, gate_up, down):
        return "expected quantized weights with a layout for dgrad, or torch.no_grad(); found neither"
    hidden, inner = x.shape[1], down.shape[1] if isinstance(down, QuantizedWeights) else down.shape[2]
    # TMA reads rows at multiples of 16 bytes. In bf16, dgrad of down contracts H in whole steps of 64.
    h_unit, i_unit = (16, 16) if recipe.is_scaled else (64, 8)
    if hidden % h_unit or inner % i_unit:
        return f"expected H a multiple of {h_unit} and I of {i_unit}; found {hidden} and {inner}"
    return None


def refusal_of_options(experts: ExpertWeights) -> str | None:
    """Why Triton's kernels of a layer do not run with this kernel preference or recipe; None: they do."""
    preference, _ = resolve(KernelPreference.parse(experts.kernel_preference), surrounding.kernel_preference)
    if preference is not KernelPreference.AUTO and preference is not KernelPreference.TRITON:
        return f"expected kernel_preference auto or triton; found {preference.value}"
    recipe = recipe_of(experts)
    if recipe not in _RECIPES:
        return f"expected recipe {', '.join([recipe.value for recipe in _RECIPES])}; found {recipe.value}"
    return None


def refusal_of_quantized(x: Tensor, experts: ExpertWeights) -> str | None:
    """Why they do not run with these weights that `quantize_weights` made; None: they do, or none are."""
    weights, recipe = (*experts.first, experts.down), recipe_of(experts)
    quantized = [w for w in weights if isinstance(w, QuantizedWeights)]
    if any([w.recipe is not recipe or w.dtype != x.dtype for w in quantized]) or (
        experts.recipe is None and 0 < len(quantized) < len(weights)
    ):
        return "expected quantized weights of one recipe, that of the call, and of the dtype of x; found others"
    return None


def recipe_of(experts: ExpertWeights) -> Recipe:
    """The recipe of the call, or that of weights from `quantize_weights`."""
    gate_up = experts.first[0]
    return experts.recipe or (gate_up.recipe if isinstance(gate_up, QuantizedWeights) else Recipe.NONE)


def needs_gradients(*leaves: Weights | None) -> bool:
    """Whether the gradient of any of them is wanted."""
    return any([needs_gradient(x) for x in leaves if isinstance(x, Tensor)])


def is_for_triton(w: Weights, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels read ``w`` in forward, in any strides."""
    if isinstance(w, QuantizedWeights):
        return w.forward_backend is BackendKind.TRITON
    return w.dtype == dtype and (torch.compiler.is_compiling() or not w.is_neg())


def _is_readable(w: Weights) -> bool:
    if isinstance(w, QuantizedWeights):
        return w.forward_backend is BackendKind.TRITON and w.dgrad_backend in (None, BackendKind.TRITON)
    if type(w) not in PLAIN or not w.is_contiguous():
        return False
    if w.dtype != torch.bfloat16 and not torch.is_autocast_enabled(w.device.type):  # `_apply` casts to the dtype of x
        return False
    return torch.compiler.is_compiling() or not w.is_neg()  # compiled code goes through the dispatcher


def _form(w: Weights) -> str:
    """What `_is_readable` looks at."""
    if isinstance(w, QuantizedWeights):
        return f"weights for {' and '.join([b.value for b in (w.forward_backend, w.dgrad_backend) if b is not None])}"
    return f"{type(w).__name__} in {dtype_name(w.dtype)} with strides {tuple(w.stride())}"


def runs_fused(device: torch.device) -> bool:
    """Whether these kernels run on ``device`` at all."""
    return gemms.runs_hopper_kernels(device)


runs_fused._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `selection.route._decided`


def explain(experts: ExpertWeights) -> str:
    """What the kernels of forward and backward fuse, one to a line."""
    recipe, act = recipe_of(experts), experts.activation.name
    inner = experts.down.shape[1 if isinstance(experts.down, QuantizedWeights) else 2]
    gate = f"gate-up gathers its rows and applies {act}"
    wgrads = "wgrads gather their rows" + (" and add to main_grad" if experts.accumulate_main_grad else "")
    forward, backward = [gate], ["dgrad of down gathers rows of dY", f"gradient of {act}", wgrads]
    if recipe.is_scaled:
        gated = _can_gate(inner, recipe, experts.interleaved)
        forward = [f"{gate} and quantizes h"] if gated else ["gate-up gathers its rows", f"{act} quantizes h"]
        forward = ["quantize x once per token", *forward]
        backward = ["quantize dY once per token", backward[0], f"{backward[1]} quantizes", f"{backward[2]}, in bf16"]
    return (
        f"  forward   {'; '.join(['route', *forward, 'down', 'combine'])}\n"
        f"  backward  {'; '.join([*backward, 'dgrad of gate-up', 'combine'])}"
    )


def _can_gate(inner: int, recipe: Recipe, interleaved: bool) -> bool:
    """Whether the GEMM of gate and up can apply the gate: with a recipe, it quantizes whole blocks of h."""
    return not recipe.is_scaled or (inner % _GATE_BLOCK == 0 and not interleaved)


def run_sorted(rows: Tensor, row_weights: Tensor | None, experts: ExpertWeights, offs: Tensor) -> Tensor:
    """The experts on rows in expert order, (M, H), where `can_run`. Arguments as of `sorted_experts`, checked."""
    source = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    if row_weights is None:
        return _run(rows, None, experts, offs, source, None)
    places = torch.where(source < offs.amax(), source, -1).unsqueeze(1)  # as the kernels take ends out of order
    return _run(rows, row_weights.unsqueeze(1), experts, offs, source, places)


def run(
    x: Tensor, topk_weights: Tensor, experts: ExpertWeights, routing: Routing, quantized: QuantizedTokens | None = None
) -> Tensor:
    """The layer, (T, H), where `can_run`. Arguments as of `experts_forward`, checked.

    With ``quantized`` tokens, by the recipe of the call, ``x`` has no values, and they are what is kept for backward.
    """
    return _run(x, topk_weights, experts, *routing, quantized)


def _run(
    x: Tensor, topk_weights: Tensor | None, experts: ExpertWeights, offs: Tensor, source: Tensor, places: Tensor | None,
    quantized: QuantizedTokens | None = None,
) -> Tensor:  # fmt: skip
    """``places`` is None where each token has one row, and rows are results."""
    if weight_gradients.leaves_graphs(experts.accumulate_main_grad):
        return weight_gradients.outside_of_graphs(_apply, x, topk_weights, experts, offs, source, places, quantized)
    return _apply(x, topk_weights, experts, offs, source, places, quantized)


def _apply(
    x: Tensor, topk_weights: Tensor | None, experts: ExpertWeights, offs: Tensor, source: Tensor, places: Tensor | None,
    quantized: QuantizedTokens | None,
) -> Tensor:  # fmt: skip
    """`_run`, outside of graphs if the gradients of weights have a destination."""
    gate_up, down, recipe = experts.first[0], experts.down, recipe_of(experts)
    destinations = (
        destination_of(gate_up, experts.accumulate_main_grad, "gate_up"),
        destination_of(down, experts.accumulate_main_grad, "down"),
    )
    gate_up, down = [w.to(x.dtype) if isinstance(w, Tensor) else w for w in (gate_up, down)]  # as autocast does
    keep = "nothing"
    if needs_gradients(x, topk_weights, gate_up, down):
        keep = experts.keep if recipe.is_scaled else "full"
    settings = recipe, experts.activation.name, experts.interleaved, keep
    if topk_weights is not None:
        # Backward reads them where they are, and is not replayed where it copies.
        topk_weights = dense_rows(topk_weights)
        topk_weights = topk_weights if keep == "nothing" else topk_weights.contiguous()
    data, scale = (None, None) if quantized is None else quantized[:2]
    y: Tensor = _FusedExperts.apply(
        dense_rows(x) if data is None else x,
        topk_weights, gate_up, down, offs, source, places, settings, destinations, data, scale,
    )  # fmt: skip
    return y


def layouts_of(w: Weights, recipe: Recipe, dgrad: bool) -> Layouts:
    """Weights (E, out, in) for forward and, if wanted, for dgrad, as the Triton backend reads them."""
    if isinstance(w, QuantizedWeights):
        return w.forward, w.dgrad
    backend = get_backend(BackendKind.TRITON)
    return weight_cache.quantize(backend, dense_weights(w.transpose(1, 2))[0], recipe, forward=True, dgrad=dgrad)


def operand(w: Quantized | None) -> tuple[Tensor, Tensor | None]:
    """Data (E, C, O), C contracted, and its scales in the same order."""
    assert w is not None, "weights were quantized for this pass"
    if w.axis == 1:
        return w.data, w.scale
    return w.data.transpose(1, 2), None if w.scale is None else w.scale.transpose(1, 2)


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_weights: Tensor | None,
        gate_up: Weights,
        down: Weights,
        offs: Tensor,
        source: Tensor,
        places: Tensor | None,
        settings: tuple[Recipe, str, bool, str],
        destinations: tuple[WgradDestination | None, WgradDestination | None],
        data: Tensor | None,
        data_scale: Tensor | None,
    ) -> Tensor:
        """y (T, H).

        ``settings``: recipe, activation, interleaved, and what to keep, see `moe_gated_mm`. ``destinations``: of the
        gradients of gate_up and down. ``data`` and its scales: x in fp8, if it has no values.
        """
        recipe, _, _, keep = settings
        dgrad = keep != "nothing" and recipe.is_scaled
        given = x, data, data_scale, topk_weights
        routing = offs, source, places
        if recipe.is_scaled and isinstance(gate_up, Tensor) and isinstance(down, Tensor) and not weight_cache.is_used():
            y, tokens, scale, pre, pre_scale, *of_dgrad = _quantize_and_forward(
                *given, gate_up, down, *routing, *settings
            )
        else:
            gate_up_forward, gate_up_dgrad = layouts_of(gate_up, recipe, dgrad)
            down_forward, down_dgrad = layouts_of(down, recipe, dgrad)
            of_dgrad = [*operand(gate_up_dgrad), *operand(down_dgrad)] if dgrad else []
            of_forward = *operand(gate_up_forward), *operand(down_forward)
            y, tokens, scale, pre, pre_scale = _forward(*given, *of_forward, *routing, *settings)
        if keep != "nothing":
            weights = of_dgrad if dgrad else [dense(gate_up), None, dense(down), None]
            of_x = (tokens, scale) if keep == "recipe" or data is not None else (x, None)
            ctx.save_for_backward(
                *of_x, pre, pre_scale if keep == "recipe" else None, topk_weights, offs, source, places, *weights
            )
        ctx.settings, ctx.dtype, ctx.destinations = settings, x.dtype, destinations
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, topk_weights, gate_up and down."""
        gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        with batched_gradient(dy):
            return (*gradients(ctx, dense_rows(dy)), *[None] * 7)


@replayed_call
def _quantize_and_forward(
    x: Tensor, data: Tensor | None, data_scale: Tensor | None, topk_weights: Tensor | None, gate_up: Tensor,
    down: Tensor, offs: Tensor, source: Tensor, places: Tensor | None, recipe: Recipe, activation: str,
    interleaved: bool, keep: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What `_forward` returns, with weights that are quantized here; then those for dgrad, where it is needed."""
    dgrad = keep != "nothing"
    gate_up_forward, gate_up_dgrad = layouts_of(gate_up, recipe, dgrad)
    down_forward, down_dgrad = layouts_of(down, recipe, dgrad)
    results = _forward(
        x, data, data_scale, topk_weights, *operand(gate_up_forward), *operand(down_forward), offs, source, places,
        recipe, activation, interleaved, keep,
    )  # fmt: skip
    return (*results, *operand(gate_up_dgrad), *operand(down_dgrad)) if dgrad else results


@replayed_call
def _forward(
    x: Tensor, data: Tensor | None, data_scale: Tensor | None, topk_weights: Tensor | None, gate_up: Tensor,
    gate_up_scale: Tensor | None, down: Tensor, down_scale: Tensor | None, offs: Tensor, source: Tensor,
    places: Tensor | None, recipe: Recipe, activation: str, interleaved: bool, keep: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """y; x as the GEMM has read it, and its scales; pre-activations and their scales, where they are kept."""
    if data is not None:
        tokens, scale = data, data_scale
    else:
        tokens, scale = ops.moe_quantize_tokens(x, recipe.value) if recipe.is_scaled else (x, None)
    if _can_gate(gate_up.shape[2] // 2, recipe, interleaved):
        h, h_scale, pre, pre_scale = ops.moe_gated_mm(
            tokens, scale, source, gate_up, gate_up_scale, offs, recipe.value, x.dtype, activation, interleaved, keep
        )
    else:
        pre = ops.moe_gathered_mm(tokens, scale, source, gate_up, gate_up_scale, offs, x.dtype)
        blocks = token_blocks(offs, source.shape[0])
        h, h_scale = ops.moe_activate_quantize(pre, blocks, recipe.value, activation, interleaved, offs.shape[0])
        pre_scale = None
        if keep == "recipe":
            pre, pre_scale = ops.moe_quantize_tokens(pre, recipe.value)
    h_scale = h_scale if recipe.is_scaled else None
    y = ops.triton_grouped_mm(h, h_scale, down, down_scale, None, offs, recipe.value, x.dtype)
    return y if places is None else ops.moe_combine(y, topk_weights, places), tokens, scale, pre, pre_scale


Deliver: TypeAlias = Callable[[Compute], Tensor | None]


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    found = *ctx.settings[:3], ctx.dtype, tuple(ctx.needs_input_grad[:4]), *ctx.saved_tensors
    if ctx.destinations == (None, None):
        gradients: tuple[Tensor | None, ...] = _gradients_alone(dy, *found)
        return gradients
    gate_up, down = (functools.partial(deliver_wgrad, destination, dy) for destination in ctx.destinations)
    return _gradients_to(gate_up, down, dy, *found)


@replayed_call
def _gradients_alone(dy: Tensor, *found: Any) -> tuple[Tensor | None, ...]:
    return _gradients_to(_compute, _compute, dy, *found)


def _compute(compute: Compute) -> Tensor | None:
    return compute(None)


def _gradients_to(
    deliver_gate_up: Deliver, deliver_down: Deliver, dy: Tensor, recipe: Recipe, activation: str, interleaved: bool,
    dtype: torch.dtype, needs: tuple[bool, ...], x: Tensor, x_scale: Tensor | None, pre: Tensor,
    pre_scale: Tensor | None, topk_weights: Tensor | None, offs: Tensor, source: Tensor, places: Tensor | None,
    gate_up: Tensor, gate_up_scale: Tensor | None, down: Tensor, down_scale: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x and topk_weights, and those of gate_up and down as they are delivered."""
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    tokens, scale = ops.moe_quantize_tokens(dy, recipe.value) if recipe.is_scaled else (dy, None)
    dh = ops.moe_gathered_mm(tokens, scale, source, down, down_scale, offs, dtype)
    dpre_scale = None
    if recipe.is_scaled:
        blocks = token_blocks(offs, source.shape[0])
        dpre, h, dweights, dpre_rows, dpre_scale = ops.moe_activate_backward_quantize(
            dh, pre, topk_weights, source, places, blocks, offs, recipe.value, activation, interleaved, pre_scale
        )
    else:
        dpre, h, dweights = ops.moe_activate_backward(
            dh, pre, topk_weights, source, places, activation, interleaved, offs
        )
        dpre_rows = dpre

    def wgrad(lhs: Tensor, rhs: Tensor, gathers_lhs: bool, total: Tensor | None) -> Tensor | None:
        if total is None:
            return ops.moe_gathered_wgrad(lhs, rhs, source, gathers_lhs, offs, dtype)
        ops.moe_gathered_wgrad_add(total, lhs, rhs, source, gathers_lhs, offs)
        return None

    def gate_up_wgrad(total: Tensor | None) -> Tensor | None:
        tokens = x if x_scale is None else ops.moe_dequantize_tokens(x, x_scale, dtype)
        return wgrad(dpre, tokens, False, total)

    dx = dgate_up = ddown = None
    if needs_down:
        ddown = deliver_down(lambda total: wgrad(dy, h, True, total))
    if needs_gate_up:
        dgate_up = deliver_gate_up(gate_up_wgrad)
    if needs_x:
        rhs = gate_up, gate_up_scale
        dx_rows = ops.triton_grouped_mm(dpre_rows, dpre_scale, *rhs, None, offs, recipe.value, dtype)
        dx = dx_rows if places is None else ops.moe_combine(dx_rows, None, places)
    return dx, dweights if needs_weights else None, dgate_up, ddown


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """`_gradients` for ``create_graph=True``: those of the composed layer, which has derivatives of any order.

    Raises:
        RuntimeError: the recipe quantizes operands, or gradients of weights have a destination.
    """
    recipe, activation, interleaved, _ = ctx.settings
    if recipe.is_scaled:
        raise RuntimeError(
            f"experts_forward: expected create_graph=False with recipe {recipe.value}; found True. "
            "Rounding to fp8 has no second derivative: use recipe=None where second derivatives are needed."
        )
    if ctx.destinations != (None, None):
        check_backward(dy)
    x, _, _, _, topk_weights, offs, source, places, gate_up, _, down, _ = ctx.saved_tensors
    inputs = x, topk_weights, gate_up, down
    kind = ACTIVATIONS[activation]
    experts = ExpertWeights((gate_up,), (None,), down, None, kind, interleaved, None, KernelPreference.AUTO)
    if places is None:
        y = experts.run(grouped(experts, GroupPlan(offs, x.shape[0])), x)
    else:
        y = run_composed(x, topk_weights, experts, Routing(offs, source, places))
    wanted = [leaf for leaf, needed in zip(inputs, ctx.needs_input_grad) if needed]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:4])
