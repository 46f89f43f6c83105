"""Kernels of an MoE layer that quantize by rows what they load or compute, for recipes that quantize in blocks.

They write what `quantize.fp8.quantize_activations` would write of the same tensor, bit for bit: values are rounded to
its dtype first, even if the tensor is never stored. Twins are in `moe.steps`.

T, k, M, D: tokens, slots of a token, routed rows, features: of tokens, or those between the GEMMs. P: features of
pre-activations, D, or 2 D with a gate.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.launch import cdiv, launch, next_power_of_2, on_device
from grouped_gemm.kernels.common.scaling import inverse_of, magnitude, scale_of, to_fp8
from grouped_gemm.kernels.moe.activation import (
    OPTIONS,
    Weights,
    activate_backward,
    arguments_of,
    constants_of,
    gradient_of,
    interleave,
    load_pre,
    slots_of,
    store_dropped,
    value_of,
)
from grouped_gemm.kernels.quantize.fp8 import TILE, quantize_activations, scaling_constants
from grouped_gemm.kernels.quantize.layouts import SCALE_ALIGNMENT, TOKEN_BLOCK
from grouped_gemm.kernels.quantize.primitives import tile_of_program

_ROWS = 32  # rows of a tile that are in registers at a time
_BACKWARD_ROWS = 16  # rows of a program that works on whole rows
_TOKENS_TILE = 4096


def activate_quantize(
    pre_MP: Tensor, blocks: Tensor, recipe: Recipe, activation: str, interleaved: bool, data_MD: Tensor, scale: Tensor
) -> None:
    """Writes h, quantized by rows. Rows past the last group are not written.

    Args:
        pre_MP: last axis contiguous; bfloat16, float16 or float32.
        blocks: from `quantize.fp8.find_blocks`.
        recipe: blockwise.
        activation: a name in `moe.activation.ACTIVATIONS`.
        interleaved: whether gate and up columns alternate.
        data_MD: fp8, from `layouts.activations` by rows.
        scale: its scales, from the same call.
    """
    features = data_MD.shape[1]
    constants = constants_of(activation, pre_MP, features, interleaved)
    constants |= scaling_constants(pre_MP, recipe, data_MD.dtype)
    constants |= {"SCALE_ALIGNMENT": SCALE_ALIGNMENT, **TILE, "ROWS": _ROWS}
    with on_device(pre_MP):
        launch(
            _activate_quantize, (len(blocks) * cdiv(features, TOKEN_BLOCK),),
            pre_MP, blocks, data_MD, scale, features, pre_MP.stride(0), data_MD.stride(0), scale.stride(0),
            constants=constants, **OPTIONS,
        )  # fmt: skip


def activate_backward_quantize(
    dh_MD: Tensor, pre_MP: Tensor, weights: Weights | None, blocks: Tensor, offs: Tensor, recipe: Recipe,
    activation: str, interleaved: bool, dpre_MP: Tensor, h_MD: Tensor, data_MP: Tensor, scale: Tensor,
    pre_scale: Tensor | None,
) -> None:  # fmt: skip
    """Writes what `activation.activate_backward` writes, and dpre quantized by rows.

    Rows past the last group are not written.

    Args:
        dh_MD: last axis contiguous.
        pre_MP: last axis contiguous; bfloat16, float16 or float32, or fp8 with ``pre_scale``.
        weights: those of rows; None: all are 1. Their gradients are summed in another order than in
            `activate_backward`.
        blocks: from `quantize.fp8.find_blocks`.
        offs: (E,) int32, contiguous.
        recipe: blockwise.
        activation: a name in `moe.activation.ACTIVATIONS`.
        interleaved: whether gate and up columns alternate.
        dpre_MP: contiguous, columns as in ``pre``.
        h_MD: contiguous.
        data_MP: fp8, from `layouts.activations` of ``pre`` by rows.
        scale: its scales, from the same call.
        pre_scale: (M, ceil(P/128)) fp32, contiguous; None: ``pre`` is not quantized.
    """
    features = dh_MD.shape[1]
    constants = constants_of(activation, pre_MP, features, interleaved)
    if constants["LAYOUT"] == "halves" and features % TOKEN_BLOCK != 0:
        # Along a row of dpre, up's blocks do not start where gate's start: no tile has whole blocks of both.
        if pre_scale is not None:
            fp8, pre_MP = pre_MP, dh_MD.new_empty(pre_MP.shape)
            dequantize_tokens(fp8, pre_scale, pre_MP)
        activate_backward(dh_MD, pre_MP, weights, activation, interleaved, offs, dpre_MP, h_MD)
        nothing = dpre_MP.new_empty(0)
        quantize_activations(dpre_MP, offs, recipe, (data_MP, scale, nothing, nothing), blocks)
        return
    constants |= scaling_constants(dh_MD, recipe, data_MP.dtype) | {"SCALE_ALIGNMENT": SCALE_ALIGNMENT}
    width = TOKEN_BLOCK // 2 if constants["LAYOUT"] == "interleaved" else TOKEN_BLOCK
    constants |= {"BLOCK": TOKEN_BLOCK, "ROWS": _BACKWARD_ROWS, "WIDTH": width}
    slots, constants["K_POWER"] = arguments_of(weights)
    with on_device(pre_MP):
        launch(
            _activate_backward_quantize, (len(blocks) * (TOKEN_BLOCK // _BACKWARD_ROWS),),
            dh_MD, pre_MP, pre_scale, *slots, blocks, dpre_MP, h_MD, data_MP, scale,
            dh_MD.shape[0], features, dh_MD.stride(0), pre_MP.stride(0), data_MP.stride(0), scale.stride(0),
            constants=constants, **OPTIONS,
        )  # fmt: skip


def quantize_tokens(
    x_TD: Tensor, recipe: Recipe, data_TD: Tensor, scale: Tensor, signals: bool = False, overlaps: bool = False
) -> None:
    """Quantizes rows without groups.

    Args:
        x_TD: last axis contiguous; bfloat16, float16 or float32.
        recipe: blockwise.
        data_TD: fp8, last axis contiguous.
        scale: (T, ceil(D/128)) fp32, contiguous.
        signals: whether the next kernel may start before this one has ended.
        overlaps: whether this kernel may start before the one that writes ``x`` has ended, which signals it.
    """
    num_tokens, features = x_TD.shape
    if num_tokens == 0:
        return
    width = max(min(next_power_of_2(features), 1024), TOKEN_BLOCK)
    height = _TOKENS_TILE // width
    sizes = {"BLOCK": TOKEN_BLOCK, "ROWS": height, "WIDTH": width, "PDL": signals}
    constants = scaling_constants(x_TD, recipe, data_TD.dtype) | sizes
    options = {"launch_pdl": True} if overlaps else {}  # AMD's compiler does not know this option
    with on_device(x_TD):
        launch(
            _quantize_tokens, (cdiv(num_tokens, height), cdiv(features, width)),
            x_TD, data_TD, scale, num_tokens, features, x_TD.stride(0), data_TD.stride(0),
            constants=constants, num_warps=4, **options,
        )  # fmt: skip


def dequantize_tokens(data_TD: Tensor, scale: Tensor, x_TD: Tensor) -> None:
    """Writes the values of what `quantize_tokens` has written.

    Args:
        data_TD: fp8, last axis contiguous.
        scale: (T, ceil(D/128)) fp32, contiguous.
        x_TD: contiguous; bfloat16, float16 or float32.
    """
    num_tokens, features = x_TD.shape
    if num_tokens == 0:
        return
    width = max(min(next_power_of_2(features), 1024), TOKEN_BLOCK)
    height = _TOKENS_TILE // width
    with on_device(x_TD):
        launch(
            _dequantize_tokens, (cdiv(num_tokens, height), cdiv(features, width)),
            data_TD, scale, x_TD, num_tokens, features, data_TD.stride(0),
            constants={"BLOCK": TOKEN_BLOCK, "ROWS": height, "WIDTH": width}, num_warps=4,
        )  # fmt: skip


@triton.jit
def _quantize_rows(
    values, target, stride, scales, rows, rows_left, columns_left,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr, SCALE_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Quantizes and stores some rows of a tile, each with a scale of its own.

    Args:
        values: (rows, BLOCK).
        rows: their numbers in the tile.
    """
    scale = scale_of(tl.max(magnitude(values), 1), LIMIT, POWER_OF_TWO)
    data = to_fp8(values, inverse_of(scale)[:, None], LIMIT, target.dtype.element_ty, NVIDIA)
    columns = tl.arange(0, values.shape[1])
    mask = (rows < rows_left)[:, None] & (columns < columns_left)[None, :]
    tl.store(target + rows.to(tl.int64)[:, None] * stride + columns[None, :], data, mask=mask)
    tl.store(scales + rows, scale, mask=rows < tl.cdiv(rows_left, SCALE_ALIGNMENT) * SCALE_ALIGNMENT)


@triton.jit(do_not_specialize=["row_scale_stride"])
def _activate_quantize(
    pre, blocks, by_row, row_scales, D, pre_stride, row_stride, row_scale_stride,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, NVIDIA: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    SCALE_ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, GROUP_M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one group by BLOCK features."""
    block, chunk = tile_of_program(D, BLOCK, GROUP_M)
    row = tl.load(blocks + 4 * block + 1).to(tl.int64)
    rows_left = tl.load(blocks + 4 * block + 2)
    first = chunk * BLOCK
    target = by_row + row * row_stride + first
    scales = row_scales + chunk.to(tl.int64) * row_scale_stride + tl.load(blocks + 4 * block + 3)
    for r in range(0, tl.minimum(rows_left, BLOCK), ROWS):
        rows = r + tl.arange(0, ROWS)
        gate, up = load_pre(
            pre + (row + rows)[:, None] * pre_stride, (rows < rows_left)[:, None], first, D, BLOCK, LAYOUT
        )
        h = value_of(gate, up, ACT, LAYOUT, NVIDIA).to(pre.dtype.element_ty)
        _quantize_rows(
            h, target, row_stride, scales, rows, rows_left, D - first, LIMIT, POWER_OF_TWO, NVIDIA, SCALE_ALIGNMENT
        )


@triton.jit(do_not_specialize=["M", "K", "row_scale_stride"])
def _activate_backward_quantize(
    dh, pre, pre_scales, weights, source, places, dweights, K, blocks, dpre, h, by_row, row_scales,
    M, D, dh_stride, pre_stride, row_stride, row_scale_stride,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, NVIDIA: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    SCALE_ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    K_POWER: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows of one group, WIDTH features at a time."""
    if weights is not None:
        store_dropped(places, dweights, tl.program_id(0), M, ROWS)
    block = tl.program_id(0) // (BLOCK // ROWS)
    part = tl.program_id(0) % (BLOCK // ROWS) * ROWS
    rows_left = tl.load(blocks + 4 * block + 2) - part
    if rows_left > 0:
        steps = tl.arange(0, ROWS)
        row = (tl.load(blocks + 4 * block + 1) + part).to(tl.int64)
        scales = row_scales + tl.load(blocks + 4 * block + 3) + part
        is_row = (steps < rows_left)[:, None]
        at = (row + steps)[:, None]
        P = D if LAYOUT == "plain" else 2 * D
        if weights is not None:
            slots, is_slot = slots_of(source, places, (row + steps).to(tl.int32), steps < rows_left, K, K_POWER)
            weight = tl.sum(tl.load(weights + slots, mask=is_slot, other=0).to(tl.float32), 1)[:, None]
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for first in range(0, D, WIDTH):
            columns = first + tl.arange(0, WIDTH)[None, :]
            mask = is_row & (columns < D)
            slope = tl.load(dh + at * dh_stride + columns, mask=mask, other=0).to(tl.float32)
            gate, up = load_pre(pre + at * pre_stride, is_row, first, D, WIDTH, LAYOUT)
            if pre_scales is not None:
                lines = pre_scales + at * tl.cdiv(P, BLOCK)
                gate *= tl.load(
                    lines + (2 * first if LAYOUT == "interleaved" else first) // BLOCK, mask=is_row, other=0
                )
                up *= tl.load(
                    lines + (2 * first if LAYOUT == "interleaved" else P - D + first) // BLOCK, mask=is_row, other=0
                )
            value = value_of(gate, up, ACT, LAYOUT, NVIDIA)
            if weights is not None:
                total += slope * value
                slope *= weight
                value *= weight
            tl.store(h + at * D + columns, value.to(h.dtype.element_ty), mask=mask)
            dgate, dup = gradient_of(gate, up, slope, ACT, LAYOUT, NVIDIA)
            p = first
            if LAYOUT == "interleaved":
                p = 2 * first
                dgate = interleave(dgate, dup)
            dgate = dgate.to(dpre.dtype.element_ty)
            wide = p + tl.arange(0, dgate.shape[1])[None, :]
            tl.store(dpre + at * P + wide, dgate, mask=is_row & (wide < (D if LAYOUT == "halves" else P)))
            target = by_row + row * row_stride + p
            _quantize_rows(
                dgate, target, row_stride, scales + (p // BLOCK).to(tl.int64) * row_scale_stride, steps, rows_left,
                (D if LAYOUT == "halves" else P) - p, LIMIT, POWER_OF_TWO, NVIDIA, SCALE_ALIGNMENT,
            )  # fmt: skip
            if LAYOUT == "halves":
                dup = dup.to(dpre.dtype.element_ty)
                tl.store(dpre + at * P + D + columns, dup, mask=mask)
                _quantize_rows(
                    dup, target + D, row_stride, scales + ((D + p) // BLOCK).to(tl.int64) * row_scale_stride, steps,
                    rows_left, D - p, LIMIT, POWER_OF_TWO, NVIDIA, SCALE_ALIGNMENT,
                )  # fmt: skip
        if weights is not None:
            dots = tl.sum(total, 1)[:, None].to(dweights.dtype.element_ty)
            tl.store(dweights + slots, tl.broadcast_to(dots, slots.shape), mask=is_slot)


@triton.jit(do_not_specialize=["T"])
def _quantize_tokens(
    x, data, scales, T, D, x_stride, data_stride,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows by WIDTH features, a multiple of BLOCK."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    first = tl.program_id(1) * WIDTH
    columns = first + tl.arange(0, WIDTH)[None, :]
    mask = (rows < T) & (columns < D)
    values = tl.load(x + rows.to(tl.int64) * x_stride + columns, mask=mask, other=0)
    values = values.reshape(ROWS, WIDTH // BLOCK, BLOCK)
    scale = scale_of(tl.max(magnitude(values), 2), LIMIT, POWER_OF_TWO)
    fp8 = to_fp8(values, inverse_of(scale)[:, :, None], LIMIT, data.dtype.element_ty, NVIDIA).reshape(ROWS, WIDTH)
    tl.store(data + rows.to(tl.int64) * data_stride + columns, fp8, mask=mask)
    blocks = first // BLOCK + tl.arange(0, WIDTH // BLOCK)[None, :]
    num_blocks = tl.cdiv(D, BLOCK)
    tl.store(scales + rows.to(tl.int64) * num_blocks + blocks, scale, mask=(rows < T) & (blocks < num_blocks))


@triton.jit(do_not_specialize=["T"])
def _dequantize_tokens(
    data, scales, x, T, D, data_stride, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """ROWS rows by WIDTH features."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = (rows < T) & (columns < D)
    values = tl.load(data + rows * data_stride + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scales + rows * tl.cdiv(D, BLOCK) + columns // BLOCK, mask=mask, other=0)
    tl.store(x + rows * D + columns, (values * scale).to(x.dtype.element_ty), mask=mask)
