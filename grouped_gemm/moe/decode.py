"""The experts of a MoE layer for few tokens, forward only: kernels that read each active expert's weights once.

Results differ from those of the other implementations in the order of sums in fp32, and because the rows of the second
GEMM may stay in fp32 until they are summed. Bits repeat. They depend on the number of tokens, which decides how a
contraction is split, but not on the experts of other tokens.

The kernels are in `kernels.moe.decode`. Where they do not run, the op is plain torch, for tests.

T, k, M, E: tokens, slots of a token, slots, experts. H, I: hidden and intermediate features.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from grouped_gemm import reference, weight_cache
from grouped_gemm.backends import get_backend, runs_kernels
from grouped_gemm.core import tracing
from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.dense import dense_rows, dense_weights
from grouped_gemm.core.library import Steps, define_op, ops
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.quantize import layouts
from grouped_gemm.moe import fused
from grouped_gemm.moe.activation import ACTIVATIONS
from grouped_gemm.moe.composed import ExpertWeights, Weights, shape_of
from grouped_gemm.moe.gemms import runs_hopper_kernels
from grouped_gemm.selection import checks

# M up to which "auto" takes these kernels; with more rows, the others are faster on an H100. Each program looks for its
# rows among all slots.
_MOST_ROWS = {"16 bit": 512, "blockwise": 128, "weight only": 128}
_ROWS_PER_EXPERT = 4  # likewise, on average
_LIMIT = 1024  # slots that the kernels take at all
_GATE_ROWS = 32  # of a tile, and as many of up: each have one scale


def is_faster(topk_ids: Tensor, experts: ExpertWeights) -> bool:
    """Whether "auto" prefers these kernels, if they can run: by M and E alone.

    Where M is dynamic, code is compiled once for either side of the limit. Exported programs do not take these kernels.
    """
    most = min(_MOST_ROWS[_kind(experts)], _ROWS_PER_EXPERT * experts.num_experts)
    return _is_measured(topk_ids.device) and tracing.is_at_most(topk_ids.numel(), most)


def _is_measured(device: torch.device) -> bool:
    return device.type == "cuda" and runs_hopper_kernels(device)


def _runs_on(device: torch.device) -> bool:
    return runs_hopper_kernels(device) or (device.type == "cpu" and runs_kernels(device))


def _runs_triton(device: torch.device) -> bool:
    return runs_kernels(device)


for _decided in (_is_measured, _runs_on, _runs_triton):
    _decided._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `selection.route._decided`


def refusal(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> str | None:
    """Why these kernels do not run a call of `run`, as "expected ...; found ..."; None: they do."""
    if not _runs_on(x.device):
        return f"expected a Hopper GPU where Triton works, or Triton's interpreter; found {x.device}"
    if tracing.holds(topk_ids.numel() > _LIMIT):
        return f"expected at most {_LIMIT} slots, T * k; found {topk_ids.numel()}"
    found = fused.refusal_of_options(experts)
    if found is not None:
        return found
    weights = *experts.first, experts.down
    biases = [b for b in (*experts.first_biases, experts.down_bias) if b is not None]
    if experts.accumulate_main_grad or fused.needs_gradients(x, topk_weights, *weights, *biases):
        return "expected no gradients, as under torch.no_grad(); found some"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"expected x in bfloat16 or float16; found {dtype_name(x.dtype)}"
    if any([isinstance(t, Tensor) and type(t) not in fused.PLAIN for t in (x, *weights, *biases)]):
        return "expected plain tensors; found a subclass"
    if any([not fused.is_for_triton(w, x.dtype) for w in weights]):
        return f"expected weights in {dtype_name(x.dtype)}, or quantized for it and Triton; found others"
    found = fused.refusal_of_quantized(x, experts)
    if found is not None:
        return found
    if any([isinstance(w, Tensor) and w.shape[2] * w.stride(2) >= 2**31 for w in weights]):  # offsets have 32 bits
        return "expected weights whose rows span less than 2^31 values; found others"
    if len(experts.first) == 2 and _strides(experts.first[0]) != _strides(experts.first[1]):
        return "expected gate and up with the same strides; found others"
    is_stacked = experts.activation.is_gated and len(experts.first) == 1 and not experts.interleaved
    inner = shape_of(experts.down)[2]
    if is_stacked and fused.recipe_of(experts).is_scaled and inner % _GATE_ROWS:
        return f"expected I a multiple of {_GATE_ROWS}, where scales of up start; found {inner}"
    return None


def _strides(w: Weights) -> tuple[object, ...]:
    if isinstance(w, Tensor):
        return w.stride()
    assert w.forward.scale is not None, "quantized weights have scales"
    return w.forward.data.stride(), w.forward.scale.stride()


def _kind(experts: ExpertWeights) -> str:
    if experts.weight_only:
        return "weight only"
    return "blockwise" if fused.recipe_of(experts).is_scaled else "16 bit"


def explain(experts: ExpertWeights) -> str:
    """The kernels, one to a line."""
    act, quantize = experts.activation.name, "quantize x; " if _kind(experts) == "blockwise" else ""
    return f"  forward   {quantize}gate-up applies {act}; {quantize.replace('x', 'h')}down; sum of slots"


def run(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, experts: ExpertWeights) -> Tensor:
    """The layer, (T, H), where `refusal` is None. Arguments as of `experts_forward`, checked."""
    recipe = fused.recipe_of(experts)
    first, first_scale = _operand(experts.first[0], recipe)
    up, up_scale = _operand(experts.first[1], recipe) if len(experts.first) == 2 else (None, None)
    down, down_scale = _operand(experts.down, recipe)
    biases = [  # contiguous: those of gate and up have one stride
        None if b is None else dense_rows(b.to(x.dtype)).contiguous()
        for b in (*experts.first_biases, experts.down_bias)
    ]
    up_bias = biases[1] if len(experts.first) == 2 else None
    x, topk_weights = dense_rows(x), dense_rows(topk_weights)  # a program takes values as they are in memory
    y: Tensor = ops.moe_decode(
        x, topk_ids, topk_weights, first, first_scale, biases[0], up, up_scale, up_bias, down, down_scale, biases[-1],
        _kind(experts), recipe.value, experts.activation.name, experts.interleaved,
    )  # fmt: skip
    return y


def _operand(w: Weights, recipe: Recipe) -> tuple[Tensor, Tensor | None]:
    """Weights (E, out, in) and their scales, in the same order of axes."""
    if isinstance(w, Tensor) and not recipe.is_scaled:
        return w, None
    data, scale = fused.operand(fused.layouts_of(w, recipe, False)[0])
    return data.transpose(1, 2), None if scale is None else scale.transpose(1, 2)


def without_quantized(experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """Experts whose weights alone are quantized, with dense copies of them in ``dtype``. Others unchanged."""
    if not experts.weight_only:
        return experts
    recipe = fused.recipe_of(experts)
    first = tuple(dequantized(w, recipe, dtype) for w in experts.first)
    down = dequantized(experts.down, recipe, dtype)
    return replace(experts, first=first, down=down, recipe=None, weight_only=False)


def like_dense(experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """What `without_quantized` returns, without values."""
    if not experts.weight_only:
        return experts
    first = tuple(torch.empty(shape_of(w), dtype=dtype, device="meta") for w in experts.first)
    down = torch.empty(shape_of(experts.down), dtype=dtype, device="meta")
    return replace(experts, first=first, down=down, recipe=None, weight_only=False)


def dequantized(w: Weights, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """Weights (E, out, in), in ``dtype``, of weights that are quantized, or that ``recipe`` quantizes first.

    Raises:
        ValueError: they are in the layout of another backend.
    """
    if isinstance(w, QuantizedWeights):
        if w.forward_backend not in (BackendKind.TRITON, BackendKind.EMULATED):
            checks.fail("recipe fp8_weight_only", "weights quantized for triton or emulated", w.forward_backend.value)
        quantized = w.forward
    else:
        backend = get_backend(BackendKind.TRITON if _runs_triton(w.device) else BackendKind.EMULATED)
        b, _ = dense_weights(w.transpose(1, 2))
        found, _ = weight_cache.quantize(backend, b, recipe, forward=True, dgrad=False)
        assert found is not None, "the forward layout is always requested"
        quantized = found
    assert quantized.scale is not None, "the recipe has scales"
    data, scale = quantized.data.transpose(1, 2), quantized.scale.transpose(1, 2)
    num_experts, out, inner = data.shape
    lines = scale.repeat_interleave(layouts.TOKEN_BLOCK, 1)[:, :out].reshape(num_experts * out, -1)
    values: Tensor = ops.moe_dequantize_tokens(data.reshape(num_experts * out, inner), lines.contiguous(), dtype)
    return values.view(num_experts, out, inner)


@define_op(replays=True)
def _moe_decode(
    x_TH: Tensor, topk_ids: Tensor, topk_weights: Tensor, first: Tensor, first_scale: Tensor | None,
    first_bias: Tensor | None, up: Tensor | None, up_scale: Tensor | None, up_bias: Tensor | None, down: Tensor,
    down_scale: Tensor | None, down_bias: Tensor | None, kind: str, recipe: str, activation: str, interleaved: bool,
) -> Steps[Tensor]:  # fmt: skip
    """The layer, (T, H) in the dtype of ``x``. Slots with an id outside [0, E) add nothing.

    Weights are (E, out, in); in fp8 with scales (E, ceil(out/128), ceil(in/128)), fp32. All strides are allowed.

    Args:
        first: gate and up in one, (E, 2I, H); gate alone, with ``up`` (E, I, H); or a projection without a gate.
        kind: "16 bit"; "blockwise": fp8 weights, and rows are quantized by ``recipe``; "weight only": fp8 weights.
    """
    y_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    yield y_TH
    if topk_ids.numel() > _LIMIT:  # `refusal` does not know a data-dependent T
        checks.fail("topk_ids", f"at most {_LIMIT} slots, T * k, for implementation decode", topk_ids.numel())
    x_TH = dense_rows(x_TH)
    if runs_kernels(x_TH.device):
        from grouped_gemm.kernels.moe import decode as kernel

        kernel.decode(
            x_TH, topk_ids.contiguous(), dense_rows(topk_weights), kernel.Projection(first, first_scale, first_bias),
            None if up is None else kernel.Projection(up, up_scale, up_bias),
            kernel.Projection(down, down_scale, down_bias), kind, Recipe(recipe), activation, interleaved, y_TH,
        )  # fmt: skip
        return
    if topk_ids.numel() == 0:
        y_TH.zero_()
        return
    act = ACTIVATIONS[activation]
    quantizes = Recipe(recipe) if kind == "blockwise" else None
    is_used = (topk_ids >= 0) & (topk_ids < down.shape[0])
    ids = torch.where(is_used, topk_ids, 0).flatten().long()
    rows = x_TH.repeat_interleave(topk_ids.shape[1], 0)
    pre = [_project(rows, first, first_scale, first_bias, ids, quantizes)]
    if up is not None:
        pre.append(_project(rows, up, up_scale, up_bias, ids, quantizes))
    elif act.is_gated:
        pre = [pre[0][:, 0::2], pre[0][:, 1::2]] if interleaved else list(pre[0].chunk(2, 1))
    h = act.value(*[p.float() for p in pre]).to(x_TH.dtype)
    y = _project(h, down, down_scale, down_bias, ids, quantizes).view(*topk_ids.shape, -1)
    y_TH.copy_((y * topk_weights.double().unsqueeze(2)).masked_fill(~is_used.unsqueeze(2), 0).sum(1))


def _project(
    rows: Tensor, w: Tensor, scale: Tensor | None, bias: Tensor | None, ids: Tensor, recipe: Recipe | None
) -> Tensor:
    """Rows (M, in) times the weights of their experts, (M, out) in fp64."""
    if recipe is not None:
        data, row_scale = reference.quantize(rows, reference.row_blocks(recipe), recipe, w.dtype)
        rows = reference.dequantize(data, row_scale, (1, layouts.TOKEN_BLOCK))
    w = reference.dequantize(w, scale, (1, layouts.TOKEN_BLOCK, layouts.TOKEN_BLOCK))
    y = torch.stack([row.double() @ w[e].double().t() for row, e in zip(rows, ids.tolist())])
    return y if bias is None else y + bias[ids].double()
