"""The grouped GEMMs of a fused MoE layer, as ops: rows gathered while they are loaded, and a gate at the end.

On Hopper each is one kernel. Elsewhere it is plain torch, for tests: a host sync, and gathered copies.

T, k, M, E: tokens, slots of a token, routed rows, experts. C: the contraction, N: columns. H, I: hidden and
intermediate features. ``source`` (M,) int32 is the token of each routed row; rows at and past ``offs[-1]`` are not
specified in any result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grouped_gemm import reference
from grouped_gemm.backends import runs_kernels
from grouped_gemm.core.library import Changed, Steps, define_op
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.quantize import layouts
from grouped_gemm.moe.activation import ACTIVATIONS, value


def runs_hopper_kernels(device: torch.device) -> bool:
    """Whether the Gluon kernels for Hopper run on ``device``."""
    return runs_kernels(device) and machine_of(device).traits.kernels == "hopper"


@define_op(replays=True)
def _moe_gathered_mm(
    x_TC: Tensor, x_scale: Tensor | None, source: Tensor, w_ECN: Tensor, w_scale: Tensor | None, offs: Tensor,
    dtype: torch.dtype,
) -> Steps[Tensor]:  # fmt: skip
    """``x[source] @ w``, expert by expert.

    Args:
        x_TC: (T, C) in ``dtype``, or fp8 with ``x_scale`` (T, ceil(C/128)), both from `moe_quantize_tokens`.
        w_ECN: (E, C, N); fp8 with ``w_scale`` (E, ceil(C/128), ceil(N/128)), as the Triton backend quantizes weights.
        dtype: of the result (M, N).
    """
    out_MN = torch.empty(source.shape[0], w_ECN.shape[2], dtype=dtype, device=x_TC.device)
    yield out_MN
    if runs_hopper_kernels(x_TC.device):
        from grouped_gemm.kernels.moe import gathered_mm as kernel

        kernel.gathered_mm(_aligned(x_TC), x_scale, source, _aligned(w_ECN), w_scale, offs, out_MN)
    else:
        out_MN.copy_(_gathered_mm(x_TC, x_scale, source, w_ECN, w_scale, offs))


@define_op(replays=True)
def _moe_gated_mm(
    x_TC: Tensor, x_scale: Tensor | None, source: Tensor, gate_up_ECN: Tensor, w_scale: Tensor | None, offs: Tensor,
    recipe: str, dtype: torch.dtype, activation: str, interleaved: bool, keep: str,
) -> Steps[tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """h = act(gate) * up, where gate and up are the halves of ``pre = x[source] @ gate_up``.

    Args:
        keep: what is returned of pre: "nothing"; "full": pre in ``dtype``; "recipe": pre in fp8.

    Returns:
        h (M, I) in ``dtype``, or in fp8 with its scales (ceil(I/128), S) as `layouts.activations` has them; pre (M, 2I)
        and its scales (M, 2I/128). Tensors that do not exist have the shape (0,).
    """
    num_rows, (num_groups, _, columns) = source.shape[0], gate_up_ECN.shape
    parsed, inner = Recipe(recipe), columns // 2
    like_h = x_TC.new_empty(1, 1, dtype=dtype).expand(num_rows, inner)  # only its shape, dtype and device are looked at
    if parsed.is_scaled:
        h_MI, h_scale, _, _ = layouts.activations(like_h, num_groups, parsed, rows=True, columns=False)
    else:
        h_MI, h_scale = x_TC.new_empty(num_rows, inner), x_TC.new_empty(0)
    pre_MN = torch.empty(0 if keep == "nothing" else (num_rows, columns), dtype=dtype, device=x_TC.device)
    pre_scale = x_TC.new_empty(0, dtype=torch.float32)
    if keep == "recipe":
        pre_MN = layouts.empty_fp8(like_h, (num_rows, columns))
        pre_scale = x_TC.new_empty(num_rows, columns // layouts.TOKEN_BLOCK, dtype=torch.float32)
    yield h_MI, h_scale, pre_MN, pre_scale
    if runs_hopper_kernels(x_TC.device):
        from grouped_gemm.kernels.moe import gathered_mm as kernel

        kernel.gated_mm(
            _aligned(x_TC), x_scale, source, _aligned(gate_up_ECN), w_scale, offs, activation, interleaved, h_MI,
            h_scale if parsed.is_scaled else None, None if keep == "nothing" else pre_MN,
            pre_scale if keep == "recipe" else None, parsed.power_of_two_scales,
        )  # fmt: skip
        return
    pre = _gathered_mm(x_TC, x_scale, source, gate_up_ECN, w_scale, offs)
    if keep == "full":
        pre_MN.copy_(pre)
    if keep == "recipe":
        data, scale = reference.quantize(pre.to(dtype), reference.row_blocks(parsed), parsed, pre_MN.dtype)
        pre_MN.copy_(data)
        pre_scale.copy_(scale)
    h = value(ACTIVATIONS[activation], interleaved, pre).to(dtype)
    if not parsed.is_scaled:
        h_MI.copy_(h)
        return
    data, scale = reference.quantize(h, reference.row_blocks(parsed), parsed, h_MI.dtype)
    h_MI.copy_(data)
    h_scale.fill_(1)
    at = start = 0  # scales of each group start at a multiple of the alignment
    for end in reference.group_ends(offs, num_rows):
        h_scale[:, at : at + end - start] = scale[start:end].t()
        at += -(-(end - start) // layouts.SCALE_ALIGNMENT) * layouts.SCALE_ALIGNMENT
        start = end


@define_op(replays=True)
def _moe_gathered_wgrad(
    lhs: Tensor, rhs: Tensor, source: Tensor, gathers_lhs: bool, offs: Tensor, dtype: torch.dtype
) -> Steps[Tensor]:
    """``lhs.T @ rhs`` over the rows of each expert, (E, P, Q), where one operand is gathered by ``source``.

    Args:
        lhs: (T, P) if ``gathers_lhs``, else (M, P).
        rhs: (M, Q) if ``gathers_lhs``, else (T, Q).
        dtype: of the result.
    """
    out_EPQ = torch.empty(offs.shape[0], lhs.shape[1], rhs.shape[1], dtype=dtype, device=lhs.device)
    yield out_EPQ
    if runs_hopper_kernels(lhs.device):
        from grouped_gemm.kernels.moe import gathered_wgrad as kernel

        kernel.wgrad(_aligned(lhs), _aligned(rhs), source, gathers_lhs, offs, out_EPQ)
        return
    out_EPQ.copy_(_gathered_wgrad(lhs, rhs, source, gathers_lhs, offs))


@define_op(replays=True)
def _moe_gathered_wgrad_add(
    sum_EPQ: Changed, lhs: Tensor, rhs: Tensor, source: Tensor, gathers_lhs: bool, offs: Tensor
) -> Steps[None]:
    """Adds `moe_gathered_wgrad` to ``sum_EPQ`` (E, P, Q), float32, contiguous."""
    yield None
    if runs_hopper_kernels(lhs.device):
        from grouped_gemm.kernels.moe import gathered_wgrad as kernel

        kernel.wgrad(_aligned(lhs), _aligned(rhs), source, gathers_lhs, offs, sum_EPQ, accumulate=True)
        return
    sum_EPQ.add_(_gathered_wgrad(lhs, rhs, source, gathers_lhs, offs))


def _aligned(x: Tensor) -> Tensor:
    """``x`` at a multiple of 16 bytes, as its rows, which TMA requires. It copies an operand that is not."""
    size = x.element_size()
    is_aligned = x.data_ptr() % 16 == 0 and all(stride == 1 or stride * size % 16 == 0 for stride in x.stride())
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def _gathered_mm(
    x: Tensor, x_scale: Tensor | None, source: Tensor, w: Tensor, w_scale: Tensor | None, offs: Tensor
) -> Tensor:
    """The product (M, N) in fp64."""
    if x_scale is not None and w_scale is not None:
        x = reference.dequantize(x, x_scale, (1, layouts.TOKEN_BLOCK))
        w = reference.dequantize(w, w_scale, (1, layouts.TOKEN_BLOCK, layouts.TOKEN_BLOCK))
    rows = x.index_select(0, source.clamp(min=0))
    return reference.grouped_mm(rows, w, reference.group_ends(offs, source.shape[0]), dtype=torch.float64)


def _gathered_wgrad(lhs: Tensor, rhs: Tensor, source: Tensor, gathers_lhs: bool, offs: Tensor) -> Tensor:
    """The gradient (E, P, Q) in fp64."""
    rows = (lhs if gathers_lhs else rhs).index_select(0, source.clamp(min=0))
    lhs, rhs = (rows, rhs) if gathers_lhs else (lhs, rows)
    return reference.wgrad(lhs, rhs, reference.group_ends(offs, source.shape[0]))
