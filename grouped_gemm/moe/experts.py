"""The experts of a MoE layer: `experts_forward` from unsorted tokens, `sorted_experts` from rows in expert order.

T, k, H, I: tokens, experts per token, hidden and intermediate features. E, M: experts, routed rows; M = T * k.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.library import is_intercepted, ops, replayed_call
from grouped_gemm.core.machine import is_capturing
from grouped_gemm.core.preference import (
    VALIDATE,
    KernelPreference,
    Preference,
    environment,
    surrounding,
)
from grouped_gemm.core.quantized import Quantized, QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.core.vmap import check_no_transform
from grouped_gemm.group_plan import GroupPlan
from grouped_gemm.moe import decode, fused, implementations
from grouped_gemm.moe.arguments import cast_operands, check_gradients, check_slots, checked, parse_recipe, prepared
from grouped_gemm.moe.composed import ExpertWeights, Weights, grouped, shape_of
from grouped_gemm.moe.routing import Routing
from grouped_gemm.selection import checks, dtensor
from grouped_gemm.selection.route import epoch
from grouped_gemm.selection.spec import facts_of

if TYPE_CHECKING:
    from grouped_gemm.moe import expert_parallel


def experts_forward(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Weights | tuple[Weights, Weights],
    down: Weights,
    *,
    recipe: Recipe | str | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    gate_up_bias: Tensor | tuple[Tensor, Tensor] | None = None,
    down_bias: Tensor | None = None,
    implementation: str = "auto",
    kernel_preference: Preference = KernelPreference.AUTO,
    keep: str = "full",
    accumulate_main_grad: bool = False,
    batch_invariant: bool = False,
    mesh: Any = None,
) -> Tensor:
    """The experts of a MoE layer: y[t] = sum over j of topk_weights[t, j] * expert(topk_ids[t, j], x[t]).

    An expert is down(act(gate(x)) * up(x)), with biases if there are any. Differentiable in ``x``, ``topk_weights``,
    the weights and the biases. Weighted rows are summed in fp32, in the order of a token's slots, so bits repeat. No
    host sync, except with the implementations "eager" and "eager_fused", with ``mesh`` unless it has a capacity, and
    where `explain` announces one.

    Args:
        x: (T, H); bfloat16, float16 or float32.
        topk_ids: (T, k) int32 or int64: the experts of each token. Ids outside [0, E) are dropped: they add nothing.
        topk_weights: (T, k), any float dtype.
        gate_up: (E, 2I, H), gate rows before up rows; or the pair (gate, up), (E, I, H) each, which is never copied
            into one; or (E, I, H) for an activation without a gate. Or such weights from `quantize_weights`, which
            takes them transposed: ``quantize_weights(gate_up.transpose(1, 2), recipe)``.
        down: (E, H, I), or quantized in the same way.
        recipe: how the operands of the GEMMs are quantized, as in `grouped_mm`. Or "fp8_weight_only", for inference:
            weights in blocks of 128x128 as in fp8_blockwise, or such weights from `quantize_weights`, while GEMMs
            compute in the dtype of ``x``. It pays for few tokens. For many, each call makes dense copies of weights.
        activation: "swiglu", "geglu", "geglu_tanh", "reglu", or "swiglu_clamped", that of gpt-oss:
            gate * sigmoid(1.702 * gate) * (up + 1) with gate clamped to at most 7 and up to [-7, 7]. Without a gate:
            "silu", "gelu", "gelu_tanh", "relu".
        interleaved: whether gate and up rows alternate in ``gate_up`` and its bias.
        gate_up_bias: (E, 2I), a pair of (E, I), or (E, I), as ``gate_up``.
        down_bias: (E, H).
        implementation: "grouped_mm" sorts the tokens by expert and runs grouped GEMMs. "decode" reads the weights of
            each active expert once: for few tokens on a Hopper GPU, without gradients. "batched_mm" gathers each routed
            row's weights: for a few rows; with a recipe, an exported program of it holds for one T. "eager" loops over
            experts in plain torch, as a reference; "eager_fused" is the same loop with gate and up in one matmul and
            one host sync. "auto" picks one of the first three.
        kernel_preference: as in `grouped_mm`.
        keep: what is kept for backward where kernels are fused: "full" keeps x and the pre-activations of the gate in
            their dtype; "recipe" keeps both in fp8 if the recipe is blockwise, which halves the memory, and gradients
            are those of the rounded values (docs/numerics.md). Elsewhere it makes no difference.
        accumulate_main_grad: as in `grouped_mm`, for ``gate_up`` and ``down``. It needs the implementation
            "grouped_mm", which "auto" then picks.
        batch_invariant: whether a token has the same result, bit for bit, whatever other tokens are in the call: in
            decode as in prefill, with gradients or without. It takes the fused kernels for any T, which is slower than
            "decode" for few tokens, and raises where they do not run. On a CPU it multiplies row by row.
        mesh: for expert parallelism, the ranks that share the experts: a `DeviceMesh` of one dimension, a process
            group, or a dispatcher, such as `grouped_gemm.moe.expert_parallel.AllToAll`. Weights and biases are then
            those of this rank's experts, the same number on each rank, or DTensors that are sharded over experts, and
            ``topk_ids`` count all experts. Every rank must make the call and run its backward, with gradients of the
            same operands, or the others wait. The host reads how many tokens go where, unless a dispatcher has a
            capacity.

    Returns:
        (T, H) in the dtype of ``x``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it, what was expected and what was found.
        RuntimeError: the call is inside a torch.func transform, such as vmap or grad.
        NoBackendError: no backend can run the GEMMs.
    """
    check_no_transform("experts_forward")
    if mesh is not None:
        named = {
            "recipe": recipe, "activation": activation, "interleaved": interleaved, "implementation": implementation,
            "kernel_preference": kernel_preference, "keep": keep, "accumulate_main_grad": accumulate_main_grad,
            "batch_invariant": batch_invariant,
        }  # fmt: skip
        return _across_ranks(mesh, x, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias, named)
    options = implementation, kernel_preference, keep, accumulate_main_grad, batch_invariant
    of_weights = recipe, activation, interleaved
    if _can_replay(x, topk_ids, topk_weights, gate_up, down, gate_up_bias, down_bias, recipe):
        types = tuple(map(type, (*options, interleaved)))  # 0 equals False, but is an error
        settings = environment(), surrounding.kernel_preference, surrounding.host_sync, types
        y: Tensor = _run_parts(
            x, topk_ids, topk_weights, *_parts_of(gate_up), *_parts_of(down), gate_up_bias, down_bias, of_weights,
            options, settings,
        )  # fmt: skip
        return y
    if gate_up_bias is None and down_bias is None and isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return _run_known(x, topk_ids, topk_weights, gate_up, down, of_weights, options)
    return _run(x, topk_ids, topk_weights, gate_up, down, *of_weights, gate_up_bias, down_bias, options)


_known: dict[tuple[Any, ...], tuple[Any, ...]] = {}  # options of the experts of calls on fused kernels
_MOST_KNOWN = 4096


def _run_known(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, of_weights: tuple[Any, ...],
    options: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """`_run` without biases. Calls that ran on fused kernels are checked once: that takes a fifth of a step."""
    given = x, topk_ids, topk_weights, gate_up, down
    key, known = _key_of(given, (*of_weights, *options)), None
    try:
        known = None if key is None else _known.get(key)
    except TypeError:  # an option cannot be hashed; the checks will name it
        key = None
    if known is not None:
        experts = ExpertWeights((gate_up,), (None,), down, None, *known)
        return fused.run(x, topk_weights, experts, Routing(*ops.moe_route(topk_ids, experts.num_experts, 1)))
    recipe, activation, interleaved = of_weights
    x, experts = prepared(*given, recipe, activation, interleaved, None, None, *options)
    y = implementations.run(options[0], x, topk_ids, topk_weights, experts)
    if key is not None and implementations.is_fused(options[0], x, topk_ids, topk_weights, experts):
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = (
            experts.activation, experts.interleaved, experts.recipe, experts.kernel_preference, experts.keep,
            experts.accumulate_main_grad, experts.batch_invariant,
        )  # fmt: skip
    return y


def _key_of(operands: tuple[Tensor, ...], options: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Everything that decides how a call runs; None: such a call is checked each time."""
    x = operands[0]
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or not all([type(t) in fused.PLAIN for t in operands])
        or x.is_meta
        or torch.is_autocast_enabled(x.device.type)
        or is_intercepted()
        or is_capturing(x)
    ):
        return None
    try:
        facts = [facts_of(t) for t in operands]
    except RuntimeError:  # compressed sparse tensors have no strides, nested ones no shape; the checks will name them
        return None
    return (
        *facts, options, tuple(map(type, options)), torch.is_grad_enabled(), environment(),
        surrounding.kernel_preference, surrounding.host_sync, epoch(),
    )  # fmt: skip


def _run(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Weights | tuple[Weights, Weights], down: Weights,
    recipe: Recipe | str | None, activation: str, interleaved: bool, gate_up_bias: Any, down_bias: Tensor | None,
    options: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """`experts_forward` with the experts of one rank. Arguments as of `prepared`."""
    x, experts = prepared(
        x, topk_ids, topk_weights, gate_up, down, recipe, activation, interleaved, gate_up_bias, down_bias, *options
    )
    return implementations.run(options[0], x, topk_ids, topk_weights, experts)


def _can_replay(x: Any, topk_ids: Any, topk_weights: Any, gate_up: Any, down: Any, *biases_and_recipe: Any) -> bool:
    """Whether a call may be replayed as a whole, checks included: one for inference that quantizes no weights."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
        return False
    if forward_ad._current_level >= 0:  # tangents are refused, or lost
        return False
    *biases, recipe = biases_and_recipe
    plain = [x, topk_ids, topk_weights, *(b for b in biases if b is not None)]
    for w in (gate_up, down):
        if not isinstance(w, QuantizedWeights):
            plain.append(w)
            if recipe is not None:
                return False
    return all([type(t) in fused.PLAIN and t.layout is torch.strided and not t.is_neg() for t in plain])


_Parts: TypeAlias = tuple[Tensor, Tensor | None, tuple[Any, ...] | None]


def _parts_of(w: Any) -> _Parts:
    """The tensors of weights for forward, and the rest as constants; None of weights that are not quantized."""
    if isinstance(w, QuantizedWeights):
        return w.forward.data, w.forward.scale, (w.shape, w.dtype, w.forward.form, w.forward_backend)
    return w, None, None


def _of_parts(data: Tensor, scale: Tensor | None, form: tuple[Any, ...] | None) -> Weights:
    if form is None:
        return data
    shape, dtype, of_forward, backend = form
    return QuantizedWeights(shape, dtype, Quantized(data, scale, *of_forward), None, backend, None)


@replayed_call
def _run_parts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, gate_up_scale: Tensor | None,
    gate_up_form: tuple[Any, ...] | None, down: Tensor, down_scale: Tensor | None, down_form: tuple[Any, ...] | None,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, of_weights: tuple[Any, str, bool],
    options: tuple[Any, ...], settings: tuple[Any, ...],
) -> Tensor:  # fmt: skip
    """`_run`. ``settings`` are what else it reads."""
    experts = _of_parts(gate_up, gate_up_scale, gate_up_form), _of_parts(down, down_scale, down_form), *of_weights
    return _run(x, topk_ids, topk_weights, *experts, gate_up_bias, down_bias, options)


def _across_ranks(
    mesh: Any, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Any, down: Any, gate_up_bias: Any,
    down_bias: Any, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """`experts_forward` with the experts of several ranks."""
    from grouped_gemm.moe import expert_parallel  # imports torch.distributed

    checks.check_tensor("x", x, (2,), checks.DTYPES)
    check_slots(x, topk_ids, topk_weights)
    gate_up, down, gate_up_bias, down_bias = _local(mesh, gate_up, down, gate_up_bias, down_bias)
    if not isinstance(down, QuantizedWeights):  # which has the number of experts
        checks.check_tensor("down", down, (3,), checks.DTYPES)
    dispatcher = _dispatcher(mesh, down, options["recipe"])
    if torch.is_autocast_enabled(x.device.type):  # tokens travel in the dtype of the GEMMs
        x = x.to(torch.get_autocast_dtype(x.device.type))
    arrived = dispatcher.dispatch(x, topk_ids, topk_weights)
    options |= {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    if isinstance(arrived, expert_parallel.SortedRows):
        plan = GroupPlan(arrived.offs, arrived.rows.shape[0], group_alignment=arrived.group_alignment)
        y = sorted_experts(arrived.rows, plan, gate_up, down, row_weights=arrived.row_weights, **options)
    else:
        x, experts = prepared(arrived.x, arrived.topk_ids, arrived.topk_weights, gate_up, down, **options)
        y = implementations.run(
            options["implementation"], x, arrived.topk_ids, arrived.topk_weights, experts, arrived.num_slots,
            arrived.quantized,
        )  # fmt: skip
    return dispatcher.combine(y, arrived.handle)


def _local(mesh: Any, *weights: Any) -> list[Any]:
    """The experts of this rank, of DTensors that are sharded over the ranks of ``mesh``. Other weights stay."""
    return [[_shard(mesh, w) for w in p] if isinstance(p, (tuple, list)) else _shard(mesh, p) for p in weights]


def _shard(mesh: Any, w: Any) -> Any:
    if not dtensor.is_dtensor(w):
        return w
    from grouped_gemm.moe import expert_parallel

    if not all(p.is_shard(0) for p in w.placements):
        checks.fail("weights", "DTensors that are Shard(0), with mesh", w.placements)
    if w.shape[0] % w.device_mesh.size():
        checks.fail("weights", f"experts that {w.device_mesh.size()} ranks share evenly", w.shape[0])
    expert_parallel.check_ranks(mesh, w.device_mesh)
    return w.to_local()


def explain_experts(*args: Any, **options: Any) -> str:
    """What `experts_forward` would run for the same arguments, and what of it is fused. Runs no GEMM.

    With ``mesh``, also how tokens travel. What runs is then judged as if this rank's tokens were those that arrive.

    Raises:
        TypeError, ValueError: as `experts_forward`.
    """
    call = inspect.signature(experts_forward).bind(*args, **options)
    call.apply_defaults()
    mesh, travels = call.arguments.pop("mesh"), ""
    if mesh is not None:
        from grouped_gemm.moe import expert_parallel  # imports torch.distributed

        weights = "gate_up", "down", "gate_up_bias", "down_bias"
        call.arguments.update(zip(weights, _local(mesh, *(call.arguments[name] for name in weights))))
        travels = f"\n{expert_parallel.explain(_dispatcher(mesh, call.arguments['down'], call.arguments['recipe']))}"
    x, experts = prepared(**call.arguments)
    name, ids, weights = (call.arguments[argument] for argument in ("implementation", "topk_ids", "topk_weights"))
    return implementations.explain(name, x, ids, weights, experts) + travels


def _dispatcher(mesh: Any, down: Weights, recipe: Recipe | str | None) -> expert_parallel.Dispatcher:
    """The dispatcher that ``mesh`` is or stands for, with local experts ``down``."""
    from grouped_gemm.moe import expert_parallel

    parsed, weight_only = parse_recipe(recipe)
    return expert_parallel.dispatcher_of(mesh, shape_of(down)[0], None if weight_only else parsed)


def sorted_experts(
    rows: Tensor,
    offs: Tensor | GroupPlan,
    gate_up: Weights | tuple[Weights, Weights],
    down: Weights,
    *,
    row_weights: Tensor | None = None,
    recipe: Recipe | str | None = None,
    activation: str = "swiglu",
    interleaved: bool = False,
    gate_up_bias: Tensor | tuple[Tensor, Tensor] | None = None,
    down_bias: Tensor | None = None,
    implementation: str = "auto",
    kernel_preference: Preference = KernelPreference.AUTO,
    keep: str = "full",
    accumulate_main_grad: bool = False,
    batch_invariant: bool = False,
) -> Tensor:
    """The experts on rows that are in expert order already, for trainers and expert parallelism.

    Args:
        rows: (M, H); bfloat16, float16 or float32.
        offs: (E,) int32, the end row of each expert, as in `grouped_mm`; or a `GroupPlan`.
        gate_up: as in `experts_forward`.
        down: as in `experts_forward`.
        row_weights: (M,), any float dtype: what each row of the result is multiplied by, in fp32.
        recipe: as in `experts_forward`.
        activation: as in `experts_forward`.
        interleaved: as in `experts_forward`.
        gate_up_bias: as in `experts_forward`.
        down_bias: as in `experts_forward`.
        implementation: as in `experts_forward`; "auto" is "grouped_mm".
        kernel_preference: as in `experts_forward`.
        keep: as in `experts_forward`.
        accumulate_main_grad: as in `experts_forward`.
        batch_invariant: as in `experts_forward`.

    Returns:
        (M, H) in the dtype of ``rows``, zero at and past ``offs[-1]``.

    Raises:
        TypeError, ValueError, RuntimeError, NoBackendError: as `experts_forward`.
    """
    check_no_transform("sorted_experts")
    experts = checked(
        "rows", rows, gate_up, down, gate_up_bias, down_bias, activation, interleaved, recipe, kernel_preference,
        implementation, keep, accumulate_main_grad, batch_invariant,
    )  # fmt: skip
    if row_weights is not None:
        if not isinstance(row_weights, Tensor):
            raise TypeError(f"row_weights: expected a torch.Tensor; found {type(row_weights).__name__}")
        if not row_weights.dtype.is_floating_point:
            checks.fail("row_weights.dtype", "a float dtype", dtype_name(row_weights.dtype))
        checks.check_device("row_weights", row_weights, "rows", rows.device)
        if row_weights.shape != rows.shape[:1]:
            checks.fail("row_weights.shape", f"({rows.shape[0]},), the rows of rows", tuple(row_weights.shape))
    check_gradients(experts, rows, row_weights)
    rows, experts = cast_operands("rows", rows, experts)
    plan = offs if isinstance(offs, GroupPlan) else GroupPlan(offs, rows.shape[0])
    plan.check_rows(rows.shape[0])
    checks.check_offs(plan.offs, experts.num_experts, rows.device)
    by_slots = implementation not in ("auto", "grouped_mm")
    if not by_slots:
        experts = decode.without_quantized(experts, rows.dtype)
        by_slots = batch_invariant and not fused.can_run(rows, row_weights, experts)
    is_composed = not by_slots and not fused.can_run(rows, row_weights, experts)
    ends = plan.offs
    if VALIDATE.is_on() and not is_composed:  # `grouped_mm` checks them itself
        ends = torch.ops.grouped_gemm.checked_offs(ends, rows.shape[0], plan.group_alignment)
    if by_slots:
        order = torch.arange(rows.shape[0], device=rows.device)
        ids = torch.searchsorted(ends.cummax(0).values, order, right=True).unsqueeze(1)  # E past the last group
        weights = torch.ones_like(order, dtype=torch.float32) if row_weights is None else row_weights
        return implementations.run(implementation, rows, ids, weights.unsqueeze(1), experts)
    if not is_composed:
        return fused.run_sorted(rows, row_weights, experts, ends)
    y = experts.run(grouped(experts, plan), rows)
    if row_weights is None:
        return y
    is_row = torch.arange(rows.shape[0], device=rows.device) < plan.offs.amax()
    weights = torch.where(is_row, row_weights.float(), 0).unsqueeze(1)  # whatever is past the last group's rows
    return (y.float() * weights).to(y.dtype)
