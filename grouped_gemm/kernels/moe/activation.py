"""The kernels of the activation between the two GEMMs of an expert, and of its gradient. Their twins are in `moe`.

They read and write what `moe.activation` describes, in fp32, and round once. Every kernel that calls `value_of` and
`gradient_of`, but that of `decode`, is launched with `OPTIONS`: without fused multiply-adds, which a compiler forms in
one kernel and not in another, a value has the same bits in all of them.

M, T, k: routed rows, tokens, slots of a token. D, P: intermediate features, features of pre-activations: D, or 2 D with
a gate.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.core.machine import machine_of
from grouped_gemm.kernels.common.groups import MOST_AT_ONCE, at_once
from grouped_gemm.kernels.common.launch import cdiv, launch, next_power_of_2, on_device

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_FUNCTIONS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
_TILE = 2048  # values of h
_BACKWARD_TILE = 1024  # values of dh: 8 for each thread, which reads them at once


def constants_of(activation: str, pre_MP: Tensor, features: int, interleaved: bool) -> dict[str, Any]:
    """The constants of kernels: the function of the gate, where gate and up are in ``pre``, the vendor."""
    layout = "plain" if pre_MP.shape[1] == features else "interleaved" if interleaved else "halves"
    vendor = machine_of(pre_MP.device).vendor
    return {"ACT": _FUNCTIONS.get(activation, activation), "LAYOUT": layout, "NVIDIA": vendor == "nvidia"}


def activate(pre_MP: Tensor, activation: str, interleaved: bool, h_MD: Tensor) -> None:
    """Writes h.

    Args:
        pre_MP: last axis contiguous; bfloat16, float16 or float32.
        activation: a name in `moe.activation.ACTIVATIONS`.
        interleaved: whether gate and up columns alternate. Otherwise all gate columns come first.
        h_MD: the output, contiguous.
    """
    num_rows, features = h_MD.shape
    if h_MD.numel() == 0:
        return
    width = min(next_power_of_2(features), 256)
    height = _TILE // width
    constants = constants_of(activation, pre_MP, features, interleaved) | {"ROWS": height, "WIDTH": width}
    with on_device(pre_MP):
        launch(
            _activate, (cdiv(num_rows, height), cdiv(features, width)),
            pre_MP, h_MD, num_rows, features, pre_MP.stride(0), constants=constants, **OPTIONS,
        )  # fmt: skip


def activate_backward(
    dh_MD: Tensor, pre_MP: Tensor, weights: Weights | None, activation: str, interleaved: bool,
    offs: Tensor | None, dpre_MP: Tensor, h_MD: Tensor | None,
) -> None:  # fmt: skip
    """Writes the gradient of ``pre``, h times the weights of rows, and the gradients of the weights, in a fixed order.

    Args:
        dh_MD: last axis contiguous.
        pre_MP: as in `activate`.
        weights: factors of ``dh`` and ``h``; None: all are 1.
        activation: as in `activate`.
        interleaved: as in `activate`.
        offs: (E,) int32, contiguous: rows past the last group are not written. None: all rows are in groups.
        dpre_MP: contiguous, columns as in ``pre``.
        h_MD: contiguous; None: not wanted.
    """
    num_rows, features = dh_MD.shape
    if num_rows == 0:
        return
    num_groups = 0 if offs is None else offs.shape[0]
    width = min(next_power_of_2(features), _BACKWARD_TILE)
    height = _BACKWARD_TILE // width
    constants = constants_of(activation, pre_MP, features, interleaved)
    constants |= {"ROWS": height, "WIDTH": width, "E_AT_ONCE": at_once(num_groups)}
    slots, constants["K_POWER"] = arguments_of(weights)
    with on_device(pre_MP):
        launch(
            _activate_backward, (cdiv(num_rows, height),),
            dh_MD, pre_MP, *slots, offs, dpre_MP, h_MD,
            num_rows, num_groups, features, dh_MD.stride(0), pre_MP.stride(0), constants=constants, **OPTIONS,
        )  # fmt: skip


class Weights(NamedTuple):
    """The weights of routed rows, each that of a slot, and where the gradients of slots go. All are contiguous.

    Attributes:
        values: (T, k).
        source: (M,) int32, the token of each row; negative: none.
        places: (T, k) int32, the row of each slot; -1: the slot was dropped.
        gradients: (T, k), filled with <dh, h> of each slot's row, 0 for dropped slots.
    """

    values: Tensor
    source: Tensor
    places: Tensor
    gradients: Tensor


def arguments_of(weights: Weights | None) -> tuple[tuple[Tensor | int | None, ...], int]:
    """The arguments ``weights, source, places, dweights, K`` of a kernel, and its constant K_POWER."""
    if weights is None:
        return (None, None, None, None, 0), 1
    top_k = weights.places.shape[1]
    return (*weights, top_k), next_power_of_2(top_k)


@triton.jit
def _sigmoid(x, NVIDIA: tl.constexpr):
    """In four instructions on NVIDIA GPUs. Triton's own code has more, for denormals, which do not matter here."""
    if NVIDIA:
        result = tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        result = 1.0 / (1.0 + tl.exp(-x))
    return result


@triton.jit
def _tanh_gelu_argument(x):
    """Twice the argument of tanh: 0.5 * (1 + tanh(u)) is sigmoid(2 u), which cancels nothing."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def _act(x, ACT: tl.constexpr, NVIDIA: tl.constexpr):
    if ACT == "silu":
        result = x * _sigmoid(x, NVIDIA)
    elif ACT == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        result = x * _sigmoid(_tanh_gelu_argument(x), NVIDIA)
    else:
        tl.static_assert(ACT == "relu")
        result = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return result


@triton.jit
def _derivative(x, ACT: tl.constexpr, NVIDIA: tl.constexpr):
    if ACT == "silu":
        sigmoid = _sigmoid(x, NVIDIA)
        result = sigmoid * tl.fma(x, 1.0 - sigmoid, 1.0)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        result = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "gelu_tanh":
        sigmoid = _sigmoid(_tanh_gelu_argument(x), NVIDIA)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        result = sigmoid + x * sigmoid * (1.0 - sigmoid) * slope
    else:
        tl.static_assert(ACT == "relu")
        result = tl.where(x > 0, 1.0, 0.0)
    return result


@triton.jit
def value_of(gate, up, ACT: tl.constexpr, LAYOUT: tl.constexpr, NVIDIA: tl.constexpr):
    """`moe.activation.Activation.value` in fp32; 0 where both operands are 0. ``up`` is not used without a gate."""
    if ACT == "swiglu_clamped":
        gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL)
        result = gate * _sigmoid(1.702 * gate, NVIDIA) * (up + 1.0)
    else:
        result = _act(gate, ACT, NVIDIA)
        if LAYOUT != "plain":
            result = result * up
    return result


@triton.jit
def gradient_of(gate, up, dh, ACT: tl.constexpr, LAYOUT: tl.constexpr, NVIDIA: tl.constexpr):
    """`moe.activation.Activation.gradient` in fp32: those of gate and up. Without a gate, both are that of ``gate``."""
    if ACT == "swiglu_clamped":
        inside_gate = tl.where(gate <= 7.0, 1.0, 0.0)
        inside_up = tl.where((up >= -7.0) & (up <= 7.0), 1.0, 0.0)
        gate = tl.minimum(gate, 7.0, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -7.0, 7.0, propagate_nan=tl.PropagateNan.ALL)
        sigmoid = _sigmoid(1.702 * gate, NVIDIA)
        dgate = dh * (up + 1.0) * sigmoid * tl.fma(1.702 * gate, 1.0 - sigmoid, 1.0) * inside_gate
        dup = dh * gate * sigmoid * inside_up
    elif LAYOUT == "plain":
        dgate = dh * _derivative(gate, ACT, NVIDIA)
        dup = dgate
    else:
        dgate = dh * up * _derivative(gate, ACT, NVIDIA)
        dup = dh * _act(gate, ACT, NVIDIA)
    return dgate, dup


@triton.jit
def load_pre(lines, is_row, first, D, WIDTH: tl.constexpr, LAYOUT: tl.constexpr):
    """Gate and up in fp32, (rows, WIDTH) each, from feature ``first`` on, zero where there is nothing.

    Args:
        lines: (rows, 1) pointers to rows of pre-activations.
        is_row: (rows, 1): which rows exist.
    """
    if LAYOUT == "interleaved":
        columns = 2 * first + tl.arange(0, 2 * WIDTH)[None, :]
        pairs = tl.load(lines + columns, mask=is_row & (columns < 2 * D), other=0.0)
        gate, up = pairs.reshape(lines.shape[0], WIDTH, 2).split()
    else:
        columns = first + tl.arange(0, WIDTH)[None, :]
        gate = tl.load(lines + columns, mask=is_row & (columns < D), other=0.0)
        up = gate
        if LAYOUT == "halves":
            up = tl.load(lines + D + columns, mask=is_row & (columns < D), other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


@triton.jit
def interleave(gate, up):
    """(rows, 2 * width): columns of ``gate`` and ``up`` in turn."""
    return tl.join(gate, up).reshape(gate.shape[0], 2 * gate.shape[1])


@triton.jit
def _last_end(offs, M, E, E_AT_ONCE: tl.constexpr):
    """The row past the last group's."""
    end = 0
    for first in range(0, E_AT_ONCE if E_AT_ONCE < MOST_AT_ONCE else E, E_AT_ONCE):
        e = first + tl.arange(0, E_AT_ONCE)
        end = tl.maximum(end, tl.max(tl.load(offs + e, mask=e < E, other=0)))
    return tl.minimum(end, M)


@triton.jit(do_not_specialize=["M"])
def _activate(
    pre, h, M, D, pre_stride,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, NVIDIA: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows by WIDTH features."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    is_row = rows < M
    first = tl.program_id(1) * WIDTH
    columns = first + tl.arange(0, WIDTH)[None, :]
    gate, up = load_pre(pre + rows.to(tl.int64) * pre_stride, is_row, first, D, WIDTH, LAYOUT)
    value = value_of(gate, up, ACT, LAYOUT, NVIDIA).to(h.dtype.element_ty)
    tl.store(h + rows.to(tl.int64) * D + columns, value, mask=is_row & (columns < D))


@triton.jit
def slots_of(source, places, rows, is_row, K, K_POWER: tl.constexpr):
    """The slots of the tokens of rows, (rows, K_POWER), as offsets in (T, k), and which of them is the row's."""
    token = tl.load(source + rows, mask=is_row, other=-1)[:, None]
    steps = tl.arange(0, K_POWER)[None, :]
    slots = token.to(tl.int64) * K + steps
    place = tl.load(places + slots, mask=(token >= 0) & (steps < K), other=-1)
    return slots, place == rows[:, None]


@triton.jit
def store_dropped(places, dweights, part, M, ROWS: tl.constexpr):
    """Zeros the gradients of dropped slots, ROWS slots in each part, of the first M slots: as many as routed rows."""
    slots = part * ROWS + tl.arange(0, ROWS)
    is_dropped = tl.load(places + slots, mask=slots < M, other=0) < 0
    tl.store(dweights + slots, tl.zeros((ROWS,), dweights.dtype.element_ty), mask=is_dropped)


@triton.jit(do_not_specialize=["M", "E", "K"])
def _activate_backward(
    dh, pre, weights, source, places, dweights, K, offs, dpre, h, M, E, D, dh_stride, pre_stride,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, NVIDIA: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, E_AT_ONCE: tl.constexpr, K_POWER: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows, WIDTH features at a time."""
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    end = M
    if offs is not None:
        end = _last_end(offs, M, E, E_AT_ONCE)
    is_row = (rows < end)[:, None]
    at = rows.to(tl.int64)[:, None]
    if weights is not None:
        store_dropped(places, dweights, tl.program_id(0), M, ROWS)
        slots, is_slot = slots_of(source, places, rows, rows < end, K, K_POWER)
        weight = tl.sum(tl.load(weights + slots, mask=is_slot, other=0).to(tl.float32), 1)[:, None]
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    P = D if LAYOUT == "plain" else 2 * D
    for first in range(0, tl.where(first_row < end, D, 0), WIDTH):
        columns = first + tl.arange(0, WIDTH)[None, :]
        mask = is_row & (columns < D)
        slope = tl.load(dh + at * dh_stride + columns, mask=mask, other=0).to(tl.float32)
        gate, up = load_pre(pre + at * pre_stride, is_row, first, D, WIDTH, LAYOUT)
        if h is not None:
            value = value_of(gate, up, ACT, LAYOUT, NVIDIA)
            if weights is not None:
                total += slope * value
                slope *= weight
                value *= weight
            tl.store(h + at * D + columns, value.to(h.dtype.element_ty), mask=mask)
        dgate, dup = gradient_of(gate, up, slope, ACT, LAYOUT, NVIDIA)
        dgate = dgate.to(dpre.dtype.element_ty)
        dup = dup.to(dpre.dtype.element_ty)
        line = dpre + at * P
        if LAYOUT == "interleaved":
            both = 2 * first + tl.arange(0, 2 * WIDTH)[None, :]
            tl.store(line + both, interleave(dgate, dup), mask=is_row & (both < P))
        else:
            tl.store(line + columns, dgate, mask=mask)
            if LAYOUT == "halves":
                tl.store(line + D + columns, dup, mask=mask)
    if weights is not None:
        dots = tl.sum(total, 1)[:, None].to(dweights.dtype.element_ty)
        tl.store(dweights + slots, tl.broadcast_to(dots, slots.shape), mask=is_slot)
