"""Kernels of an MoE layer that quantize what they compute or gather, for recipes that quantize in blocks.

They write what `quantize.fp8.quantize_activations` would write of the tensor that is never stored, bit for bit: that
tensor's values are rounded to its dtype first. Twins are in `moe.steps`.

T, M, D: tokens, routed rows, features: of tokens, or those between the GEMMs. P: features of pre-activations, D, or 2 D
with a gate.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.groups import at_once
from grouped_gemm.kernels.common.launch import cdiv, launch, next_power_of_2, on_device
from grouped_gemm.kernels.common.scaling import inverse_of, magnitude, scale_of, to_fp8
from grouped_gemm.kernels.moe.activation import (
    OPTIONS,
    activate_backward,
    constants_of,
    gradient_of,
    interleave,
    last_end,
    load_pre,
    value_of,
)
from grouped_gemm.kernels.quantize import packed_bf16
from grouped_gemm.kernels.quantize.fp8 import TILE, quantize_activations, scaling_constants
from grouped_gemm.kernels.quantize.layouts import SCALE_ALIGNMENT, TOKEN_BLOCK, Operands
from grouped_gemm.kernels.quantize.primitives import load_quarter, pack, store_transposed, tile_of_program

_ROWS = 32  # rows of a tile that are in registers at a time
_BACKWARD = {"ROWS": 32, "COLUMNS": 32}  # rows, and columns, that are in registers at a time
_BACKWARD_OPTIONS = OPTIONS | {"num_warps": 8}
_TOKENS_TILE = 4096
_PART = 16  # rows of a program that works on whole rows


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
        data_MD: and
        scale: from `layouts.activations` by rows.
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
    dh_MD: Tensor, pre_MP: Tensor, row_weights: Tensor | None, blocks: Tensor, offs: Tensor, recipe: Recipe,
    activation: str, interleaved: bool, dpre: Operands, h: Operands, dots: Tensor,
) -> None:  # fmt: skip
    """Writes what `activation.activate_backward` writes, quantized: dpre by rows and columns, h by columns.

    Args:
        dh_MD: last axis contiguous.
        pre_MP: last axis contiguous; bfloat16, float16 or float32.
        row_weights: (M,), contiguous; None: all are 1.
        blocks: from `quantize.fp8.find_blocks`.
        offs: (E,) int32, contiguous.
        recipe: blockwise.
        activation: a name in `moe.activation.ACTIVATIONS`.
        interleaved: whether gate and up columns alternate.
        dpre: from `layouts.activations` of ``pre``, by rows and columns.
        h: from `layouts.activations` of h, by columns.
        dots: (M,) fp32: each row's <dh, value>; 0 past the last group.
    """
    (num_rows, features), block = dh_MD.shape, TOKEN_BLOCK
    constants = constants_of(activation, pre_MP, features, interleaved)
    if constants["LAYOUT"] == "halves" and features % block != 0:
        # Along a row of dpre, up's blocks do not start where gate's start: no tile has whole blocks of both.
        dpre_MP, h_MD = pre_MP.new_empty(pre_MP.shape), pre_MP.new_empty(dh_MD.shape)
        activate_backward(dh_MD, pre_MP, row_weights, activation, interleaved, offs, dpre_MP, h_MD, dots)
        quantize_activations(dpre_MP, offs, recipe, dpre, blocks)
        quantize_activations(h_MD, offs, recipe, h, blocks)
        return
    width = block // 2 if constants["LAYOUT"] == "interleaved" else block
    chunks = cdiv(features, width)
    partial_dots = dots.new_empty(chunks, num_rows)
    (data, scale, columns, column_scale), (_, _, h_columns, h_scale) = dpre, h
    constants |= scaling_constants(pre_MP, recipe, data.dtype) | {"PACKED": _is_packed(pre_MP, features)}
    constants |= {"SCALE_ALIGNMENT": SCALE_ALIGNMENT, **TILE, **_BACKWARD, "WIDTH": width}
    with on_device(pre_MP):
        launch(
            _activate_backward_quantize, (len(blocks) * chunks,),
            dh_MD, pre_MP, row_weights, blocks, partial_dots, data, scale, columns, column_scale, h_columns, h_scale,
            num_rows, features, dh_MD.stride(0), pre_MP.stride(0), data.stride(0), scale.stride(0),
            constants=constants, **_BACKWARD_OPTIONS,
        )  # fmt: skip
        if num_rows:
            launch(
                _add_dots, (cdiv(num_rows, 128),), partial_dots, offs, dots, num_rows, offs.shape[0], chunks,
                constants={"E_AT_ONCE": at_once(offs.shape[0]), "BLOCK": 128}, num_warps=4,
            )  # fmt: skip


def activate_backward_by_rows(
    dh_MD: Tensor, pre_MP: Tensor, row_weights: Tensor | None, blocks: Tensor, offs: Tensor, recipe: Recipe,
    activation: str, interleaved: bool, dpre_MP: Tensor, h_MD: Tensor, dots: Tensor, data_MP: Tensor, scale: Tensor,
) -> None:  # fmt: skip
    """Writes what `activation.activate_backward` writes, and dpre quantized by rows. Rows past the last group are not
    written.

    Args:
        dh_MD: last axis contiguous.
        pre_MP: last axis contiguous; bfloat16, float16 or float32.
        row_weights: (M,), contiguous; None: all are 1.
        blocks: from `quantize.fp8.find_blocks`.
        offs: (E,) int32, contiguous.
        recipe: blockwise.
        activation: a name in `moe.activation.ACTIVATIONS`.
        interleaved: whether gate and up columns alternate.
        dpre_MP: contiguous, columns as in ``pre``.
        h_MD: contiguous.
        dots: (M,) fp32: each row's <dh, value>.
        data_MP: and
        scale: from `layouts.activations` of ``pre`` by rows.
    """
    features = dh_MD.shape[1]
    constants = constants_of(activation, pre_MP, features, interleaved)
    if constants["LAYOUT"] == "halves" and features % TOKEN_BLOCK != 0:
        # Along a row of dpre, up's blocks do not start where gate's start: no tile has whole blocks of both.
        activate_backward(dh_MD, pre_MP, row_weights, activation, interleaved, offs, dpre_MP, h_MD, dots)
        nothing = dpre_MP.new_empty(0)
        quantize_activations(dpre_MP, offs, recipe, (data_MP, scale, nothing, nothing), blocks)
        return
    constants |= scaling_constants(pre_MP, recipe, data_MP.dtype) | {"SCALE_ALIGNMENT": SCALE_ALIGNMENT}
    width = TOKEN_BLOCK // 2 if constants["LAYOUT"] == "interleaved" else TOKEN_BLOCK
    constants |= {"BLOCK": TOKEN_BLOCK, "ROWS": _PART, "WIDTH": width}
    with on_device(pre_MP):
        launch(
            _activate_backward_by_rows, (len(blocks) * (TOKEN_BLOCK // _PART),),
            dh_MD, pre_MP, row_weights, blocks, dpre_MP, h_MD, dots, data_MP, scale,
            features, dh_MD.stride(0), pre_MP.stride(0), data_MP.stride(0), scale.stride(0),
            constants=constants, **OPTIONS,
        )  # fmt: skip


def _is_packed(pre_MP: Tensor, features: int) -> bool:
    """Whether values are quantized as `packed_bf16` does it: two in a register."""
    return pre_MP.dtype == torch.bfloat16 and machine_of(pre_MP.device).traits.packed_max and features % 8 == 0


def quantize_tokens(x_TD: Tensor, recipe: Recipe, data_TD: Tensor, scale: Tensor) -> None:
    """Quantizes rows without groups.

    Args:
        x_TD: last axis contiguous; bfloat16, float16 or float32.
        recipe: blockwise.
        data_TD: fp8, last axis contiguous.
        scale: (T, ceil(D/128)) fp32, contiguous.
    """
    num_tokens, features = x_TD.shape
    if num_tokens == 0:
        return
    width = max(min(next_power_of_2(features), 1024), TOKEN_BLOCK)
    height = _TOKENS_TILE // width
    constants = scaling_constants(x_TD, recipe, data_TD.dtype) | {"BLOCK": TOKEN_BLOCK, "ROWS": height, "WIDTH": width}
    with on_device(x_TD):
        launch(
            _quantize_tokens, (cdiv(num_tokens, height), cdiv(features, width)),
            x_TD, data_TD, scale, num_tokens, features, x_TD.stride(0), data_TD.stride(0),
            constants=constants, num_warps=4,
        )  # fmt: skip


def gather_columns(x_TD: Tensor, source: Tensor, blocks: Tensor, recipe: Recipe, data: Tensor, scale: Tensor) -> None:
    """Quantizes by columns the rows of ``x`` that ``source`` names.

    Args:
        x_TD: last axis contiguous; bfloat16, float16 or float32.
        source: (M,) int32, contiguous: the row of ``x``; -1: zeros.
        blocks: from `quantize.fp8.find_blocks`.
        recipe: blockwise.
        data: and
        scale: from `layouts.activations` by columns.
    """
    features = x_TD.shape[1]
    with on_device(x_TD):
        launch(
            _gather_columns_packed if packed_bf16.can_run(x_TD) else _gather_columns,
            (len(blocks) * cdiv(features, TOKEN_BLOCK),),
            x_TD, source, blocks, data, scale, features, x_TD.stride(0),
            constants=scaling_constants(x_TD, recipe, data.dtype) | TILE, num_warps=4,
        )  # fmt: skip


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, PACKED: tl.constexpr):
    """fp32 values in DTYPE; or, if PACKED, two adjacent ones in each word, as `packed_bf16` has them."""
    if PACKED:
        low, high = x.reshape(x.shape[0], x.shape[1] // 2, 2).split()
        result = packed_bf16.word(low, high)
    else:
        result = x.to(DTYPE)
    return result


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


@triton.jit
def _quantize_columns(
    v0, v1, v2, v3, target, scales, rows_left, columns_left,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Quantizes and stores the transpose of some columns of a tile.

    Its four quarters, see `quantize.primitives`, are `_rounded`.
    """
    COLUMNS: tl.constexpr = 2 * v0.shape[1] if PACKED else v0.shape[1]
    if PACKED:
        tile = v0, v1, v2, v3
        m0, m1, m2, m3 = packed_bf16.magnitudes_of(tile)
        pairs = packed_bf16.larger(packed_bf16.larger(m0, m1), packed_bf16.larger(m2, m3))
        # By `packed_bf16.column_amax_of`, low and high halves would be two reductions, each with its own barriers.
        largest = tl.join(pairs << 16, pairs & 0x7FFF0000).reshape(v0.shape[0], COLUMNS)
        amax = tl.max(largest, 0)
    else:
        largest = tl.maximum(tl.maximum(magnitude(v0), magnitude(v1)), tl.maximum(magnitude(v2), magnitude(v3)))
        amax = tl.max(largest, 0)
    scale = tl.where(rows_left > 0, scale_of(amax, LIMIT, POWER_OF_TWO), 1.0)
    columns = tl.arange(0, COLUMNS)
    tl.store(scales + columns, scale, mask=columns < columns_left)
    inverse = inverse_of(scale)
    BLOCK: tl.constexpr = 4 * v0.shape[0]
    if PACKED:
        halves = packed_bf16.by_half(inverse)
        packed_bf16.store_transposed(target, BLOCK, BLOCK, columns_left // 2, tile, halves, BLOCK)
    else:
        words = pack(v0, v1, v2, v3, inverse[None, :], LIMIT, target.dtype.element_ty, NVIDIA)
        targets = target.to(tl.pointer_type(tl.uint32)) + columns[None, :] * (BLOCK // 4)
        quads = tl.arange(0, BLOCK // 4)
        tl.store(targets + quads[:, None], words, mask=(columns < columns_left)[None, :])


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


@triton.jit
def _gradients(
    dh, pre, weights, rows, is_row, first, D, dh_stride, pre_stride,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, NVIDIA: tl.constexpr, PACKED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of some rows by WIDTH features: the gradients of gate and up, h times weights, each row's <dh, value>.

    The first three are `_rounded`. Interleaved, the first has the gradients of gate and up in turn.
    """
    columns = first + tl.arange(0, WIDTH)[None, :]
    at = rows.to(tl.int64)[:, None]
    is_in = is_row[:, None]
    slope = tl.load(dh + at * dh_stride + columns, mask=is_in & (columns < D), other=0).to(tl.float32)
    gate, up = load_pre(pre + at * pre_stride, is_in, first, D, WIDTH, LAYOUT)
    h = value_of(gate, up, ACT, LAYOUT, NVIDIA)
    dots = tl.sum(slope * h, 1)
    if weights is not None:
        weight = tl.load(weights + rows, mask=is_row, other=0).to(tl.float32)[:, None]
        slope *= weight
        h *= weight
    dgate, dup = gradient_of(gate, up, slope, ACT, LAYOUT, NVIDIA)
    DTYPE: tl.constexpr = pre.dtype.element_ty
    if LAYOUT == "interleaved":
        dgate = packed_bf16.word(dgate, dup) if PACKED else interleave(dgate, dup).to(DTYPE)
        dup = dgate
    else:
        dgate = _rounded(dgate, DTYPE, PACKED)
        dup = _rounded(dup, DTYPE, PACKED)
    return dgate, dup, _rounded(h, DTYPE, PACKED), dots


@triton.jit(do_not_specialize=["M", "row_scale_stride"])
def _activate_backward_quantize(
    dh, pre, weights, blocks, partial_dots, by_row, row_scales, by_column, column_scales, h_by_column, h_scales,
    M, D, dh_stride, pre_stride, row_stride, row_scale_stride,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, NVIDIA: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    PACKED: tl.constexpr, SCALE_ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one group by WIDTH features, and their gradients in BLOCK columns of dpre, or twice BLOCK.

    Scales of rows need whole rows of a tile, and those of columns whole columns. So a tile is computed twice, by rows
    and by columns, the second time from L1 or L2. All of it at once would not fit in registers. With PACKED, columns
    are quantized as in `packed_bf16`; for rows that takes more instructions, not fewer.
    """
    block, chunk = tile_of_program(D, WIDTH, GROUP_M)
    row = tl.load(blocks + 4 * block + 1)
    rows_left = tl.load(blocks + 4 * block + 2)
    first = chunk * WIDTH
    P = D if LAYOUT == "plain" else 2 * D
    p = 2 * first if LAYOUT == "interleaved" else first
    left = 2 * (D - first) if LAYOUT == "interleaved" else D - first
    target = by_row + row.to(tl.int64) * row_stride + p
    scales = row_scales + (p // BLOCK).to(tl.int64) * row_scale_stride + tl.load(blocks + 4 * block + 3)
    for r in range(0, tl.minimum(rows_left, BLOCK), ROWS):
        rows = r + tl.arange(0, ROWS)
        is_row = rows < rows_left
        dgate, dup, _, dots = _gradients(
            dh, pre, weights, row + rows, is_row, first, D, dh_stride, pre_stride, ACT, LAYOUT, NVIDIA, False, WIDTH
        )
        tl.store(partial_dots + chunk.to(tl.int64) * M + row + rows, dots, mask=is_row)
        _quantize_rows(
            dgate, target, row_stride, scales, rows, rows_left, left,
            LIMIT, POWER_OF_TWO, NVIDIA, SCALE_ALIGNMENT,
        )  # fmt: skip
        if LAYOUT == "halves":
            _quantize_rows(
                dup, target + D, row_stride, scales + (D // BLOCK).to(tl.int64) * row_scale_stride, rows, rows_left,
                D - first, LIMIT, POWER_OF_TWO, NVIDIA, SCALE_ALIGNMENT,
            )  # fmt: skip
    quads = row + 4 * tl.arange(0, BLOCK // 4)
    end = row + rows_left
    for c in range(0, WIDTH, COLUMNS):
        i = first + c
        g0, u0, h0, _ = _gradients(
            dh, pre, weights, quads, quads < end, i, D, dh_stride, pre_stride,
            ACT, LAYOUT, NVIDIA, PACKED, COLUMNS,
        )  # fmt: skip
        g1, u1, h1, _ = _gradients(
            dh, pre, weights, quads + 1, quads + 1 < end, i, D, dh_stride, pre_stride,
            ACT, LAYOUT, NVIDIA, PACKED, COLUMNS,
        )  # fmt: skip
        g2, u2, h2, _ = _gradients(
            dh, pre, weights, quads + 2, quads + 2 < end, i, D, dh_stride, pre_stride,
            ACT, LAYOUT, NVIDIA, PACKED, COLUMNS,
        )  # fmt: skip
        g3, u3, h3, _ = _gradients(
            dh, pre, weights, quads + 3, quads + 3 < end, i, D, dh_stride, pre_stride,
            ACT, LAYOUT, NVIDIA, PACKED, COLUMNS,
        )  # fmt: skip
        line = block.to(tl.int64) * D + i
        _quantize_columns(
            h0, h1, h2, h3, h_by_column + line * BLOCK, h_scales + line, rows_left, D - i,
            LIMIT, POWER_OF_TWO, NVIDIA, PACKED,
        )  # fmt: skip
        p = 2 * i if LAYOUT == "interleaved" else i
        left = 2 * (D - i) if LAYOUT == "interleaved" else D - i
        line = block.to(tl.int64) * P + p
        _quantize_columns(
            g0, g1, g2, g3, by_column + line * BLOCK, column_scales + line, rows_left, left,
            LIMIT, POWER_OF_TWO, NVIDIA, PACKED,
        )  # fmt: skip
        if LAYOUT == "halves":
            line += D
            _quantize_columns(
                u0, u1, u2, u3, by_column + line * BLOCK, column_scales + line, rows_left, left,
                LIMIT, POWER_OF_TWO, NVIDIA, PACKED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["row_scale_stride"])
def _activate_backward_by_rows(
    dh, pre, weights, blocks, dpre, h, dots, by_row, row_scales,
    D, dh_stride, pre_stride, row_stride, row_scale_stride,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, NVIDIA: tl.constexpr, LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    SCALE_ALIGNMENT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows of one group, WIDTH features at a time."""
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
            weight = tl.load(weights + row + steps, mask=steps < rows_left, other=0).to(tl.float32)[:, None]
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for first in range(0, D, WIDTH):
            columns = first + tl.arange(0, WIDTH)[None, :]
            mask = is_row & (columns < D)
            slope = tl.load(dh + at * dh_stride + columns, mask=mask, other=0).to(tl.float32)
            gate, up = load_pre(pre + at * pre_stride, is_row, first, D, WIDTH, LAYOUT)
            value = value_of(gate, up, ACT, LAYOUT, NVIDIA)
            total += slope * value
            if weights is not None:
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
        tl.store(dots + row + steps, tl.sum(total, 1), mask=steps < rows_left)


@triton.jit(do_not_specialize=["M", "E", "N"])
def _add_dots(partial_dots, offs, dots, M, E, N, E_AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the N partial sums of each row, in their order. Rows past the last group get 0."""
    end = last_end(offs, M, E, E_AT_ONCE)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in range(0, N):
        total += tl.load(partial_dots + tl.cast(n, tl.int64) * M + rows, mask=rows < end, other=0)
    tl.store(dots + rows, total, mask=rows < M)


@triton.jit(do_not_specialize=["T"])
def _quantize_tokens(
    x, data, scales, T, D, x_stride, data_stride,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows by WIDTH features, a multiple of BLOCK."""
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


@triton.jit
def _gather_columns(
    x, source, blocks, by_column, column_scales, D, x_stride,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of one group by BLOCK features."""
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    ds = d + tl.arange(0, BLOCK)
    rows_left = tl.load(blocks + 4 * block + 2)
    index = source + tl.load(blocks + 4 * block + 1)
    largest = tl.zeros((BLOCK // 4, BLOCK), tl.int32)
    for i in tl.static_range(4):
        largest = tl.maximum(largest, magnitude(load_quarter(x + d, x_stride, i, rows_left, D - d, BLOCK, index)))
    scale = tl.where(rows_left > 0, scale_of(tl.max(largest, 0), LIMIT, POWER_OF_TWO), 1.0)
    tl.store(column_scales + block.to(tl.int64) * D + ds, scale, mask=ds < D)
    store_transposed(
        x + d, x_stride, by_column + (block.to(tl.int64) * D + d) * BLOCK, BLOCK, inverse_of(scale),
        rows_left, BLOCK, D - d, LIMIT, by_column.dtype.element_ty, NVIDIA, BLOCK, index,
    )  # fmt: skip


@triton.jit
def _gather_columns_packed(
    x, source, blocks, by_column, column_scales, D, x_stride,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """As `_gather_columns`, for what `packed_bf16.can_run` allows."""
    block, d_block = tile_of_program(D, BLOCK, GROUP_M)
    d = d_block * BLOCK
    ds = d + tl.arange(0, BLOCK)
    rows_left = tl.load(blocks + 4 * block + 2)
    index = source + tl.load(blocks + 4 * block + 1)
    words = (x + d).to(tl.pointer_type(tl.int32))
    words_left = (D - d) // 2
    tile = packed_bf16.load_tile(words, x_stride // 2, rows_left, words_left, BLOCK, index)
    amax = packed_bf16.column_amax_of(packed_bf16.magnitudes_of(tile), BLOCK)
    scale = tl.where(rows_left > 0, scale_of(amax, LIMIT, POWER_OF_TWO), 1.0)
    tl.store(column_scales + block.to(tl.int64) * D + ds, scale, mask=ds < D)
    tile = packed_bf16.load_tile(words, x_stride // 2, rows_left, words_left, BLOCK, index)
    target = by_column + (block.to(tl.int64) * D + d) * BLOCK
    inverse = packed_bf16.by_half(inverse_of(scale))
    packed_bf16.store_transposed(target, BLOCK, BLOCK, words_left, tile, inverse, BLOCK)
