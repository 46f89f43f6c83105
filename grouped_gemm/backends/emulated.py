"""Emulated: dequantizes, multiplies and accumulates in fp32, group by group. It runs everywhere and is slow.

Layouts are those of `reference`: data in the operand's own strides, one scale per block. The ends of the groups are
read to the host once per forward call and shared by all passes. On a GPU, torch's fp32 GEMM uses TF32 where
`torch.set_float32_matmul_precision` allows it.

M, E, K, N: rows, groups, in and out features. D: K or N.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grouped_gemm import reference
from grouped_gemm.backends.base import (
    OffsetPlan,
    _GroupedMMBackend,
    requires_dtype,
    requires_host_sync,
    requires_recipe,
)
from grouped_gemm.core.library import Steps, define_op, ops
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.quantized import Quantized
from grouped_gemm.core.recipes import Recipe

# The layout names. They say along which axis an operand is scaled; the contraction may run along another one.
_ROWS = "reference rows"  # activations, scaled along D
_COLUMNS = "reference columns"  # activations, scaled along the rows of each group
_ALONG_K = "reference weights along K"
_ALONG_N = "reference weights along N"


class Backend(_GroupedMMBackend):
    """Plain torch, in fp32."""

    kind = BackendKind.EMULATED
    summary = "Plain torch in fp32, group by group, after dequantizing: runs everywhere, and is slow."
    requirements = (
        requires_recipe(Recipe),
        requires_dtype((torch.bfloat16, torch.float16, torch.float32)),
        requires_host_sync(),
    )
    host_syncs = "offs is read once per forward call"
    compiles = False

    def plan(self, offs: Tensor, num_rows: int, group_alignment: int = 1, *, blocks: bool = False) -> OffsetPlan:
        return OffsetPlan(offs, num_rows, (ops.emulated_host_offs(offs),))

    def quantize_activations(
        self, x_MD: Tensor, plan: OffsetPlan, recipe: Recipe, *, rows: bool, columns: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        by_rows = by_columns = None
        data, scale = x_MD, None
        if rows:
            if recipe.is_scaled:
                data, scale = ops.emulated_quantize_rows(x_MD, recipe.value)
            by_rows = Quantized(data, scale, recipe, 1, _ROWS)
        if columns:
            if recipe.is_scaled:
                (host_offs,) = plan.derived
                data, scale = ops.emulated_quantize_columns(x_MD, host_offs, recipe.value)
            by_columns = Quantized(data, scale, recipe, 0, _COLUMNS)
        return by_rows, by_columns

    def quantize_weights(
        self, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        if not recipe.is_scaled:
            return self._for_both(b_EKN, None, recipe, forward=forward, dgrad=dgrad)
        if recipe.block == recipe.weight_lines:  # square blocks serve both passes
            data, scale = ops.emulated_quantize_weights(b_EKN, recipe.value, 1)
            return self._for_both(data, scale, recipe, forward=forward, dgrad=dgrad)
        along_k = along_n = None
        if forward:
            data, scale = ops.emulated_quantize_weights(b_EKN, recipe.value, 1)
            along_k = Quantized(data, scale, recipe, 1, _ALONG_K)
        if dgrad:
            data, scale = ops.emulated_quantize_weights(b_EKN, recipe.value, 2)
            along_n = Quantized(data, scale, recipe, 2, _ALONG_N)
        return along_k, along_n

    def adopt_weights(
        self, data_EKN: Tensor, scale: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        return self._for_both(data_EKN, scale, recipe, forward=forward, dgrad=dgrad)

    @staticmethod
    def _for_both(
        data_EKN: Tensor, scale: Tensor | None, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        """The same data and scales for both passes. Dequantized values can be summed along either axis."""
        return (
            Quantized(data_EKN, scale, recipe, 1, _ALONG_K) if forward else None,
            Quantized(data_EKN, scale, recipe, 2, _ALONG_K) if dgrad else None,
        )

    def grouped_mm(
        self, lhs: Quantized, rhs: Quantized, plan: OffsetPlan, out_dtype: torch.dtype, bias_EN: Tensor | None = None
    ) -> Tensor:
        (host_offs,) = plan.derived
        return ops.emulated_grouped_mm(
            lhs.data,
            lhs.scale,
            rhs.data,
            rhs.scale,
            bias_EN,
            host_offs,
            lhs.recipe.value,
            rhs.axis,
            1 if rhs.layout == _ALONG_K else 2,
            out_dtype,
        )

    def _wgrad(self, first: Quantized, second: Quantized, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        (host_offs,) = plan.derived
        operands = first.data, first.scale, second.data, second.scale
        return ops.emulated_wgrad(*operands, host_offs, first.recipe.value, out_dtype)

    def bias_grad(self, dy_MN: Tensor, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        (host_offs,) = plan.derived
        return ops.emulated_group_sums(dy_MN, host_offs, out_dtype)


def _op(op: Callable[..., Steps[Any]]) -> None:
    """Defines an op that ignores autocast, and that a CUDA graph must not contain."""

    @functools.wraps(op)
    def in_named_dtypes(first: Tensor, *rest: Any) -> Steps[Any]:
        steps = op(first, *rest)
        yield next(steps)
        with torch.autocast(first.device.type, enabled=False):
            yield from steps

    define_op(tags=(torch.Tag.cudagraph_unsafe,))(in_named_dtypes)


def _part(scale: Tensor | None, index: int | slice) -> Tensor | None:
    return None if scale is None else scale[index]


def _dequantize(data: Tensor, scale: Tensor | None, blocks: reference.Blocks) -> Tensor:
    """`reference.dequantize` of a matrix, bit for bit, without expanding the scales. Returns a new tensor.

    A new tensor always starts at the same alignment, and a group's rows may start anywhere. The rounding of MKL's GEMM
    depends on the alignment of its operands.
    """
    if scale is None:
        return data.to(torch.float32, copy=True)
    values, power = _to_fp32(data)
    scale = scale.float()
    if power != 1 and (scale.abs() >= 2.0**120).any():  # scale * 256 would be Inf
        values *= power
    else:
        scale = scale * power
    axis = 0 if blocks[0] is not None and blocks[0] > 1 else 1
    side = blocks[axis]
    if side is None or side == 1:
        return values.mul_(scale)
    across = tuple(None if i == axis else other for i, other in enumerate(blocks))
    scale = reference.spread(scale, across, values.shape).movedim(axis, 0).contiguous()
    lines = values.movedim(axis, 0)
    full = lines.shape[0] // side
    lines[: full * side].unflatten(0, (full, side)).mul_(scale[:full, None])
    lines[full * side :].mul_(scale[full:])  # the short block at the end
    return values


def _to_fp32(data: Tensor) -> tuple[Tensor, float]:
    """fp32 values and a power of two whose product is ``data.float()``, for fp8 data.

    On a CPU, torch converts fp8 one value at a time; this is eight times as fast. The bits of an e4m3fn, shifted into
    an fp16, represent its value times 2^-8. The exception is NaN, which would become 480.
    """
    is_e4m3fn_on_cpu = data.dtype == torch.float8_e4m3fn and data.device.type == "cpu"
    if not is_e4m3fn_on_cpu or (data.view(torch.uint8) & 0x7F).amax() == 0x7F:
        return data.float(), 1.0
    bits = data.view(torch.int8).to(torch.int16)  # the sign fills the upper byte
    bits <<= 7
    bits &= ~0x4000
    return bits.view(torch.float16).float(), 256.0


def _empty_quantized(x: Tensor, blocks: reference.Blocks, recipe: Recipe) -> tuple[Tensor, Tensor]:
    scale_shape = [1 if side is None else -(-size // side) for size, side in zip(x.shape, blocks)]
    return (
        torch.empty_like(x, dtype=machine_of(x.device).fp8_dtype),
        x.new_empty(scale_shape, dtype=recipe.scale_dtype),
    )


@_op
def _emulated_host_offs(offs: Tensor) -> Steps[Tensor]:
    yield lambda: torch.empty_like(offs, device="cpu")
    yield offs.to("cpu", copy=True)


@_op
def _emulated_quantize_rows(x_MD: Tensor, recipe: str) -> Steps[tuple[Tensor, Tensor]]:
    blocks = reference.row_blocks(Recipe(recipe))
    yield lambda: _empty_quantized(x_MD, blocks, Recipe(recipe))
    yield reference.quantize(x_MD, blocks, Recipe(recipe), machine_of(x_MD.device).fp8_dtype)


@_op
def _emulated_quantize_columns(x_MD: Tensor, host_offs: Tensor, recipe: str) -> Steps[tuple[Tensor, Tensor]]:
    num_rows, features = x_MD.shape
    fp8_dtype = machine_of(x_MD.device).fp8_dtype
    scale_rows = reference.column_scale_rows(num_rows, host_offs.shape[0], Recipe(recipe))
    yield lambda: (
        x_MD.new_empty(num_rows, features, dtype=fp8_dtype),
        x_MD.new_empty(scale_rows, features, dtype=Recipe(recipe).scale_dtype),
    )
    ends = reference.group_ends(host_offs, num_rows)
    yield reference.quantize_columns(x_MD, ends, Recipe(recipe), fp8_dtype)


@_op
def _emulated_quantize_weights(b_EKN: Tensor, recipe: str, axis: int) -> Steps[tuple[Tensor, Tensor]]:
    blocks = reference.weight_blocks(Recipe(recipe), axis)
    yield lambda: _empty_quantized(b_EKN, blocks, Recipe(recipe))
    yield reference.quantize(b_EKN, blocks, Recipe(recipe), machine_of(b_EKN.device).fp8_dtype)


@_op
def _emulated_grouped_mm(
    lhs: Tensor, lhs_scale: Tensor | None, rhs: Tensor, rhs_scale: Tensor | None, bias: Tensor | None,
    host_offs: Tensor, recipe: str, axis: int, scaled_along: int, out_dtype: torch.dtype,
) -> Steps[Tensor]:  # fmt: skip
    out = lhs.new_empty(lhs.shape[0], rhs.shape[3 - axis], dtype=out_dtype)
    yield out
    lhs_blocks = reference.row_blocks(Recipe(recipe))
    rhs_blocks = reference.weight_blocks(Recipe(recipe), scaled_along)[1:]
    ends = reference.group_ends(host_offs, lhs.shape[0])
    # All rows in one call: for small groups, the overhead of the ops of _dequantize exceeds their work.
    lhs_values = lhs if lhs_scale is None or lhs.numel() == 0 else _dequantize(lhs, lhs_scale, lhs_blocks)
    for e, rows in enumerate(reference.group_slices(ends)):
        if rows.start == rows.stop:
            continue
        left = lhs_values[rows].to(torch.float32, copy=True)  # copied for its alignment: see _dequantize
        right = _dequantize(rhs[e], _part(rhs_scale, e), rhs_blocks)
        result = left @ (right if axis == 1 else right.t())
        out[rows] = result if bias is None else result + bias[e].float()
    out[ends[-1] :] = 0


@_op
def _emulated_wgrad(
    lhs: Tensor, lhs_scale: Tensor | None, rhs: Tensor, rhs_scale: Tensor | None, host_offs: Tensor, recipe: str,
    out_dtype: torch.dtype,
) -> Steps[Tensor]:  # fmt: skip
    out = lhs.new_empty(host_offs.shape[0], lhs.shape[1], rhs.shape[1], dtype=out_dtype)
    yield out
    ends = reference.group_ends(host_offs, lhs.shape[0])
    blocks = reference.column_blocks(Recipe(recipe))
    scale_rows = reference.column_scale_slices(ends, Recipe(recipe))
    for e, rows in enumerate(reference.group_slices(ends)):
        if rows.start == rows.stop:
            out[e] = 0
            continue
        left = _dequantize(lhs[rows], _part(lhs_scale, scale_rows[e]), blocks)
        right = _dequantize(rhs[rows], _part(rhs_scale, scale_rows[e]), blocks)
        out[e] = left.t() @ right


@_op
def _emulated_group_sums(x_MN: Tensor, host_offs: Tensor, out_dtype: torch.dtype) -> Steps[Tensor]:
    yield lambda: x_MN.new_empty(host_offs.shape[0], x_MN.shape[1], dtype=out_dtype)
    ends = reference.group_ends(host_offs, x_MN.shape[0])
    yield reference.group_sums(x_MN, ends, torch.float32).to(out_dtype)
