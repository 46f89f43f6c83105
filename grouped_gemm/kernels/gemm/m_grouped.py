"""The M-grouped GEMM of forward and dgrad: each group of rows times its own matrix.

The kernel is persistent. Its programs walk over the groups, which they find from ``offs``, and share the tiles of each
group. A group may end anywhere: its last tile also reads rows of the next group, but does not store them. Rows past the
last group are stored as zeros.

M, E: rows, groups. C: the contraction, K in forward and N in dgrad. O: columns of the result, N in forward and K in
dgrad; kernels call them N. A tile is BLOCK_M by BLOCK_N, and a step covers BLOCK_K of C.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grouped_gemm.core.call_spec import RowClass, row_class
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import AUTOTUNE
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.groups import group_end, tile_position
from grouped_gemm.kernels.common.launch import (
    can_use_tma,
    cdiv,
    describe,
    kind_of,
    launcher,
    num_processors,
    on_device,
    packed,
)
from grouped_gemm.kernels.gemm.mx import ONES, add_mx_dot
from grouped_gemm.kernels.gemm.tile_search import gemm_tile
from grouped_gemm.kernels.gemm.tiles import Tile
from grouped_gemm.kernels.quantize.layouts import SCALE_ALIGNMENT

if TYPE_CHECKING:
    from grouped_gemm.kernels.gemm import m_grouped_hopper


def grouped_mm(
    lhs_MC: Tensor,
    lhs_scale: Tensor | None,
    rhs_ECO: Tensor,
    rhs_scale: Tensor | None,
    bias_EO: Tensor | None,
    offs: Tensor,
    recipe: Recipe,
    out_MO: Tensor,
) -> None:
    """Multiplies each group of rows by its own matrix, with fp32 accumulation.

    Args:
        lhs_MC: (M, C), contiguous C; bfloat16, float16, float32 or fp8.
        lhs_scale: fp32 scales of fp8: rowwise (M,); blockwise (ceil(C/128), S), contiguous S, so that a step reads
            adjacent scales for the rows of a tile, S as in `layouts.activations`.
            MX: (ceil(C/128), M, 4) E8M0, contiguous.
        rhs_ECO: (E, C, O) in the dtype of ``lhs_MC``, C or O contiguous. fp8 on Hopper needs contiguous C.
        rhs_scale: rowwise (E, O), contiguous; blockwise (E, ceil(C/128), ceil(O/128)), any strides; MX
            (E, ceil(C/128), O, 4) E8M0, contiguous.
        bias_EO: (E, O), contiguous, or None.
        offs: (E,) int32, contiguous: the end row of each group. Any values are safe.
        recipe: any.
        out_MO: what is filled, (M, O), contiguous; bfloat16, float16 or float32. Zero at and past ``offs[-1]``.
    """
    num_rows, rhs_shape, out_dtype = lhs_MC.shape[0], rhs_ECO.shape, out_MO.dtype
    if num_rows == 0:
        return
    rows = row_class(num_rows, rhs_shape[0])
    places = (lhs_MC.data_ptr() | rhs_ECO.data_ptr()) & 15
    strides = lhs_MC.stride(0), rhs_ECO.stride()
    key = (lhs_MC.dtype, strides, rhs_shape, recipe, out_dtype, rows, lhs_MC.device, places)
    if AUTOTUNE.is_on_now():  # found tiles and tiles on trial must not be cached for calls without the switch
        gemm = _gemm_for(lhs_MC, rhs_ECO, recipe, out_dtype, rows)
    else:
        found = _gemms.get(key)
        gemm = found or _gemms.setdefault(key, _gemm_for(lhs_MC, rhs_ECO, recipe, out_dtype, rows))
    if recipe is Recipe.MXFP8:
        lhs_scale, rhs_scale = packed(lhs_scale), packed(rhs_scale)
    with on_device(lhs_MC):
        gemm.run(lhs_MC, lhs_scale, rhs_ECO, rhs_scale, bias_EO, offs, out_MO)


class _Gemm:
    """How to launch the kernel below for calls that differ only in M within a row class."""

    def __init__(self, lhs_MC: Tensor, rhs_ECO: Tensor, kind: str, tma: bool, tile: Tile) -> None:
        self.tile = tile
        self._tma = tma
        self._shape = rhs_ECO.shape
        self._c_contiguous = rhs_ECO.stride(1) == 1
        self._rhs_box = [1, tile.block_n, tile.block_k] if self._c_contiguous else [1, tile.block_k, tile.block_n]
        self._processors = num_processors(lhs_MC.device)
        self._launch = launcher(
            _grouped_mm,
            {
                "KIND": kind,
                "C_CONTIGUOUS": self._c_contiguous,
                "TMA": tma,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
                "BLOCK_K": tile.block_k,
                "GROUP_M": tile.group_m,
                "SCALE_ALIGNMENT": SCALE_ALIGNMENT,
            },
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def run(
        self,
        lhs_MC: Tensor,
        lhs_scale: Tensor | None,
        rhs_ECO: Tensor,
        rhs_scale: Tensor | None,
        bias_EO: Tensor | None,
        offs: Tensor,
        out_MO: Tensor,
    ) -> None:
        """Fills ``out_MO``; arguments as of `grouped_mm`."""
        num_rows, (num_groups, c, columns) = lhs_MC.shape[0], self._shape
        rhs = rhs_ECO.transpose(1, 2) if self._c_contiguous else rhs_ECO  # as it lies in memory
        rhs_strides = rhs.stride()
        lhs_arg, rhs_arg = lhs_MC, rhs
        if self._tma:
            box = [self.tile.block_m, self.tile.block_k]
            lhs_arg = describe(TensorDescriptor, lhs_MC, lhs_MC.shape, lhs_MC.stride(), box)
            rhs_arg = describe(TensorDescriptor, rhs, rhs.shape, rhs_strides, self._rhs_box)
        most_tiles = (cdiv(num_rows, self.tile.block_m) + num_groups) * cdiv(columns, self.tile.block_n)
        self._launch(
            (min(most_tiles, self._processors),),
            lhs_arg,
            lhs_scale,
            rhs_arg,
            rhs_scale,
            bias_EO,
            offs,
            out_MO,
            num_rows,
            num_groups,
            c,
            columns,
            lhs_MC.stride(0),
            lhs_scale.stride(0) if lhs_scale is not None and lhs_scale.dim() == 2 else 0,
            rhs_strides[0],
            rhs_strides[1],
            *(rhs_scale.stride() if rhs_scale is not None and rhs_scale.dim() == 3 else (0, 0, 0)),
        )


_gemms: dict[tuple[Any, ...], _Gemm | m_grouped_hopper.Gemm] = {}  # by everything that `_gemm_for` reads


def _gemm_for(
    lhs_MC: Tensor, rhs_ECO: Tensor, recipe: Recipe, out_dtype: torch.dtype, rows: RowClass
) -> _Gemm | m_grouped_hopper.Gemm:
    machine = machine_of(lhs_MC.device)
    kind = kind_of(lhs_MC, recipe)
    c_contiguous = rhs_ECO.stride(1) == 1
    tma = can_use_tma(lhs_MC, rhs_ECO.transpose(1, 2) if c_contiguous else rhs_ECO)
    if tma and machine.traits.kernels == "hopper":
        from grouped_gemm.kernels.gemm import m_grouped_hopper

        if m_grouped_hopper.can_run(lhs_MC, rhs_ECO, out_dtype, kind, rows):
            return m_grouped_hopper.Gemm(lhs_MC, rhs_ECO, out_dtype, kind)
    _, c, columns = rhs_ECO.shape
    return _Gemm(lhs_MC, rhs_ECO, kind, tma, gemm_tile(machine, kind, rows, c, columns, c_contiguous, tma))


@triton.jit(do_not_specialize=["M", "E", "lhs_scale_stride"])
def _grouped_mm(
    lhs,
    lhs_scale,
    rhs,
    rhs_scale,
    bias,
    offs,
    out,
    M,
    E,
    C,
    N,
    lhs_stride,
    lhs_scale_stride,
    rhs_stride_e,
    rhs_stride,
    rhs_scale_stride_e,
    rhs_scale_stride_c,
    rhs_scale_stride_o,
    KIND: tl.constexpr,
    C_CONTIGUOUS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SCALE_ALIGNMENT: tl.constexpr,
):
    tile_columns = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first_tile = 0
    start = 0
    scale_start = 0
    for e in range(E):
        end = group_end(offs, e, start, M)
        tile_rows = tl.cdiv(end - start, BLOCK_M)
        last_tile = first_tile + tile_rows * tile_columns
        while tile < last_tile:
            tile_row, tile_column = tile_position(tile - first_tile, tile_rows, tile_columns, GROUP_M)
            row = start + tile_row * BLOCK_M
            column = tile_column * BLOCK_N
            rows = row + tl.arange(0, BLOCK_M)
            columns = column + tl.arange(0, BLOCK_N)
            acc = _multiply_tile(
                lhs,
                lhs_scale,
                rhs,
                rhs_scale,
                row,
                row - start + scale_start,
                end,
                e,
                column,
                C,
                N,
                lhs_stride,
                lhs_scale_stride,
                rhs_stride_e,
                rhs_stride,
                rhs_scale_stride_e,
                rhs_scale_stride_c,
                rhs_scale_stride_o,
                KIND,
                C_CONTIGUOUS,
                TMA,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            e64 = tl.cast(e, tl.int64)
            if KIND == "rowwise":
                row_scales = tl.load(lhs_scale + rows, mask=rows < end, other=0)
                column_scales = tl.load(rhs_scale + e64 * N + columns, mask=columns < N, other=0)
                acc = acc * row_scales[:, None] * column_scales[None, :]
            if bias is not None:
                biases = tl.load(bias + e64 * N + columns, mask=columns < N, other=0)
                acc += biases.to(tl.float32)[None, :]
            target = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
            tl.store(target, acc.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (columns < N)[None, :])
            tile += tl.num_programs(0)
        first_tile = last_tile
        scale_start += tl.cdiv(end - start, SCALE_ALIGNMENT) * SCALE_ALIGNMENT
        start = end
    last_tile = first_tile + tl.cdiv(M - start, BLOCK_M) * tile_columns
    while tile < last_tile:
        rows = start + (tile - first_tile) // tile_columns * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = (tile - first_tile) % tile_columns * BLOCK_N + tl.arange(0, BLOCK_N)
        target = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
        zeros = tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty)
        tl.store(target, zeros, mask=(rows < M)[:, None] & (columns < N)[None, :])
        tile += tl.num_programs(0)


@triton.jit
def _multiply_tile(
    lhs,
    lhs_scale,
    rhs,
    rhs_scale,
    row,
    scale_row,
    end,
    e,
    column,
    C,
    N,
    lhs_stride,
    lhs_scale_stride,
    rhs_stride_e,
    rhs_stride,
    rhs_scale_stride_e,
    rhs_scale_stride_c,
    rhs_scale_stride_o,
    KIND: tl.constexpr,
    C_CONTIGUOUS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The fp32 result of the tile at ``row`` and ``column``, over all of C, with scales of blocks applied."""
    BLOCKWISE: tl.constexpr = KIND == "blockwise"
    MX: tl.constexpr = KIND == "mx" or KIND == "mx upcast"
    tl.static_assert(not BLOCKWISE or (BLOCK_K == 128 and 128 % BLOCK_N == 0), "a step has one scale of rhs")
    tl.static_assert(not MX or BLOCK_K == 128, "a step has four scales of each line")
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    cs = tl.arange(0, BLOCK_K)
    e64 = tl.cast(e, tl.int64)
    if not TMA:
        lhs_tiles = lhs + rows.to(tl.int64)[:, None] * lhs_stride + cs[None, :]
        rhs_base = rhs + e64 * rhs_stride_e
        if C_CONTIGUOUS:
            rhs_tiles = rhs_base + columns.to(tl.int64)[None, :] * rhs_stride + cs[:, None]
        else:
            rhs_tiles = rhs_base + cs.to(tl.int64)[:, None] * rhs_stride + columns[None, :]
    if BLOCKWISE:
        lhs_scales = lhs_scale + scale_row + tl.arange(0, BLOCK_M)
        rhs_scales = rhs_scale + e64 * rhs_scale_stride_e + column // 128 * rhs_scale_stride_o
    if MX:
        lhs_scales = lhs_scale + rows
        rhs_scales = rhs_scale + e64 * rhs_scale_stride_e + columns
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c in range(0, C, BLOCK_K):
        if BLOCKWISE:
            row_scales = tl.load(lhs_scales, mask=rows < end, other=0)
            block_scale = tl.load(rhs_scales)
            lhs_scales += lhs_scale_stride
            rhs_scales += rhs_scale_stride_c
        if MX:
            row_scales = tl.load(lhs_scales, mask=rows < end, other=ONES)
            column_scales = tl.load(rhs_scales, mask=columns < N, other=ONES)
            lhs_scales += lhs_scale_stride
            rhs_scales += N
        if TMA:
            lhs_tile = lhs.load([row, c])
            if C_CONTIGUOUS:
                rhs_tile = rhs.load([e, column, c]).reshape(BLOCK_N, BLOCK_K).T
            else:
                rhs_tile = rhs.load([e, c, column]).reshape(BLOCK_K, BLOCK_N)
        else:
            in_c = cs < C - c
            lhs_tile = tl.load(lhs_tiles, mask=(rows < end)[:, None] & in_c[None, :], other=0.0)
            rhs_tile = tl.load(rhs_tiles, mask=in_c[:, None] & (columns < N)[None, :], other=0.0)
            lhs_tiles += BLOCK_K
            rhs_tiles += BLOCK_K if C_CONTIGUOUS else BLOCK_K * tl.cast(rhs_stride, tl.int64)
        if BLOCKWISE:
            # Tensor cores add up a block of 128 values; blocks are scaled and added up in fp32 registers.
            acc += tl.dot(lhs_tile, rhs_tile) * (row_scales * block_scale)[:, None]
        elif MX:
            acc = add_mx_dot(lhs_tile, row_scales, rhs_tile, column_scales, acc, KIND == "mx")
        else:
            acc = tl.dot(lhs_tile, rhs_tile, acc, input_precision="ieee")
    return acc
