"""The activations between the two GEMMs of an expert, with their derivatives.

Pre-activations are computed by the first GEMM in its output dtype. An activation reads them as fp32, computes in fp32,
and rounds once. Backward keeps the pre-activations only, and computes everything else again.

On a GPU where the Triton backend runs, and on a CPU under Triton's interpreter, each pass is one kernel. Elsewhere, and
in gradients of gradients, it is plain torch.

M, I, P: routed rows, intermediate features, features of pre-activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm.backends import runs_kernels
from grouped_gemm.core.dense import dense_rows
from grouped_gemm.core.library import Steps, define_op, ops
from grouped_gemm.core.vmap import batched_gradient

_ALPHA, _LIMIT = 1.702, 7.0  # of gpt-oss


@dataclass(frozen=True)
class Activation:
    """One activation, in fp32.

    Attributes:
        name: as callers write it.
        is_gated: whether it takes a gate and an up projection, or one projection alone.
        value: h from the gate and, if gated, up; all (M, I).
        gradient: from the same operands and dh: the gradient of each operand.
    """

    name: str
    is_gated: bool
    value: Callable[..., Tensor]
    gradient: Callable[..., tuple[Tensor, ...]]


def _silu_derivative(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def _gelu_derivative(x: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return cdf + x * torch.exp(-0.5 * x * x) * (0.5 * math.sqrt(2 / math.pi))


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _tanh_gelu_derivative(x: Tensor) -> Tensor:
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (x + 0.044715 * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * scale * (1 + 3 * 0.044715 * x * x)


def _relu_derivative(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _gated(name: str, act: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]) -> Activation:
    """act(gate) * up."""
    return Activation(
        name,
        True,
        lambda gate, up: act(gate) * up,
        lambda gate, up, dh: (dh * up * derivative(gate), dh * act(gate)),
    )


def _plain(name: str, act: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor]) -> Activation:
    return Activation(name, False, act, lambda x, dh: (dh * derivative(x),))


def _clamped_value(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
    return gate * torch.sigmoid(_ALPHA * gate) * (up + 1)


def _clamped_gradient(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    inside_gate, inside_up = gate <= _LIMIT, (up >= -_LIMIT) & (up <= _LIMIT)
    gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
    sigmoid = torch.sigmoid(_ALPHA * gate)
    dgate = dh * (up + 1) * sigmoid * (1 + _ALPHA * gate * (1 - sigmoid))
    return dgate * inside_gate, dh * gate * sigmoid * inside_up


_KINDS = (
    _gated("swiglu", F.silu, _silu_derivative),
    _gated("geglu", F.gelu, _gelu_derivative),
    _gated("geglu_tanh", _tanh_gelu, _tanh_gelu_derivative),
    _gated("reglu", F.relu, _relu_derivative),
    Activation("swiglu_clamped", True, _clamped_value, _clamped_gradient),
    _plain("silu", F.silu, _silu_derivative),
    _plain("gelu", F.gelu, _gelu_derivative),
    _plain("gelu_tanh", _tanh_gelu, _tanh_gelu_derivative),
    _plain("relu", F.relu, _relu_derivative),
)
ACTIVATIONS = {kind.name: kind for kind in _KINDS}


def activate(activation: Activation, *pre: Tensor, interleaved: bool = False) -> Tensor:
    """h (M, I) in the dtype of ``pre``. Differentiable any number of times.

    Args:
        activation: which one.
        pre: gate and up in one tensor, (M, 2 I); or as two, (M, I) each; or the one operand of an activation without a
            gate. One tensor goes through one kernel, where this package's kernels run.
        interleaved: whether gate and up columns alternate in one tensor. Otherwise all gate columns come first.
    """
    first, up = pre if len(pre) == 2 else (*pre, None)
    result: Tensor = _Activate.apply(activation.name, interleaved, first, up)
    return result


class _Activate(torch.autograd.Function):
    # No variable arguments: Dynamo takes ctx for one of them where nothing needs a gradient.
    @staticmethod
    def forward(ctx: Any, name: str, interleaved: bool, first: Tensor, up: Tensor | None) -> Tensor:
        ctx.save_for_backward(first, up)
        ctx.name, ctx.interleaved = name, interleaved
        if up is None:
            h: Tensor = ops.moe_activate(dense_rows(first), name, interleaved)
            return h
        return value(ACTIVATIONS[name], interleaved, first, up)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        first, up = ctx.saved_tensors
        if up is not None:
            return None, None, *gradients(ACTIVATIONS[ctx.name], ctx.interleaved, dh, first, up)
        if torch.is_grad_enabled():
            return None, None, *gradients(ACTIVATIONS[ctx.name], ctx.interleaved, dh, first), None
        with batched_gradient(dh):
            dfirst = ops.moe_activate_gradient(dense_rows(dh), dense_rows(first), ctx.name, ctx.interleaved)
        return None, None, dfirst, None


@define_op(replays=True)
def _moe_activate(pre_MP: Tensor, activation: str, interleaved: bool) -> Steps[Tensor]:
    """h (M, I)."""
    h_MI = pre_MP.new_empty(pre_MP.shape[0], features_of(pre_MP, activation))
    yield h_MI
    if runs_kernels(pre_MP.device):
        from grouped_gemm.kernels.moe import activation as kernel

        kernel.activate(dense_rows(pre_MP), activation, interleaved, h_MI)
    else:
        h_MI.copy_(value(ACTIVATIONS[activation], interleaved, pre_MP))


@define_op(replays=True)
def _moe_activate_gradient(dh_MI: Tensor, pre_MP: Tensor, activation: str, interleaved: bool) -> Steps[Tensor]:
    """The gradient of ``pre``, without what else `steps` computes with it."""
    dpre_MP = pre_MP.new_empty(pre_MP.shape)
    yield dpre_MP
    if runs_kernels(pre_MP.device):
        from grouped_gemm.kernels.moe import activation as kernel

        dh_MI, pre_MP = dense_rows(dh_MI), dense_rows(pre_MP)
        kernel.activate_backward(dh_MI, pre_MP, None, activation, interleaved, None, dpre_MP, None)
    else:
        dpre_MP.copy_(gradients(ACTIVATIONS[activation], interleaved, dh_MI, pre_MP)[0])


def features_of(pre_MP: Tensor, activation: str) -> int:
    """I."""
    return pre_MP.shape[1] // 2 if ACTIVATIONS[activation].is_gated else pre_MP.shape[1]


def value(activation: Activation, interleaved: bool, *pre: Tensor) -> Tensor:
    """What `activate` returns, in plain torch."""
    h = activation.value(*(x.float() for x in _apart(activation, interleaved, pre)))
    # No cast that would return h itself: see torch.compile in docs/design.md.
    return h if h.dtype == pre[0].dtype else h.to(pre[0].dtype)


def gradients(activation: Activation, interleaved: bool, dh: Tensor, *pre: Tensor) -> tuple[Tensor, ...]:
    """The gradient of each tensor of ``pre``, laid out as that tensor, in plain torch."""
    apart = _apart(activation, interleaved, pre)
    results = [g.to(pre[0].dtype) for g in activation.gradient(*(x.float() for x in apart), dh.float())]
    if len(results) == len(pre):
        return tuple(results)
    return (torch.stack(results, 2).flatten(1) if interleaved else torch.cat(results, 1),)


def _apart(activation: Activation, interleaved: bool, pre: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gate and up, (M, I) each, which are views if they are in one tensor; or what has no gate, unchanged."""
    if len(pre) == 2 or not activation.is_gated:
        return pre
    return (pre[0][:, 0::2], pre[0][:, 1::2]) if interleaved else pre[0].chunk(2, dim=1)
