"""The activations between the two GEMMs of an expert, with their derivatives.

Pre-activations are computed by the first GEMM in its output dtype. An activation reads them as fp32, computes in fp32,
and rounds once. Backward keeps the pre-activations only, and computes everything else again.

M, I: routed rows, intermediate features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


def activate(activation: Activation, *pre: Tensor) -> Tensor:
    """h (M, I) in the dtype of ``pre``: the gate and up projections, or one projection alone, (M, I) each."""
    result: Tensor = _Activate.apply(activation.name, *pre)
    return result


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, *pre: Tensor) -> Tensor:
        ctx.save_for_backward(*pre)
        ctx.name = name
        h = ACTIVATIONS[name].value(*(x.float() for x in pre))
        # No cast that would return h itself: see torch.compile in docs/design.md.
        return h if h.dtype == pre[0].dtype else h.to(pre[0].dtype)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        pre = ctx.saved_tensors
        gradients = ACTIVATIONS[ctx.name].gradient(*(x.float() for x in pre), dh.float())
        return None, *(gradient.to(x.dtype) for gradient, x in zip(gradients, pre))
