"""The experts of a MoE layer for few tokens, bound by reading the weights of the active experts once.

Two GEMMs and a sum are one kernel each; if rows are in fp8, a quantizer comes before each GEMM. A program multiplies a
tile of an expert's weights by all rows of that expert, so the operands are swapped: weights are the first one, whose
side has to be long, and rows the second. Programs find their rows by themselves in the ids of the slots, so there is no
kernel that routes.

The contraction of the second GEMM is split where there would be too few programs for the GPU. The parts are sums in
fp32, which the last kernel adds up, always in the same order. How it is split depends on the number of tokens, never on
their experts.

On Hopper, a kernel may start before the one before it has ended (programmatic dependent launch). Then it waits before
it reads anything but ids and weights, which no kernel of this chain writes. All programs of all kernels wait, so
whatever a kernel reads has been written, by the kernel before it or by one before that.

T, k, M = T * k, E: tokens, slots of a token, slots, experts. H, I: hidden and intermediate features. In a GEMM, C is
the contraction and N are the rows of an expert's weights that become columns of the result.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.launch import (
    can_use_tma,
    cdiv,
    launch,
    next_power_of_2,
    num_processors,
    on_device,
)
from grouped_gemm.kernels.moe.activation import constants_of, value_of
from grouped_gemm.kernels.moe.combine import unrolled
from grouped_gemm.kernels.moe.quantize import quantize_tokens
from grouped_gemm.kernels.quantize import layouts


class Tile(NamedTuple):
    """How a GEMM is split into programs.

    Attributes:
        block_n: rows of weights: half of them gate rows and half up rows, if there is a gate.
        block_m: rows of an expert that are multiplied at a time; the weights are read again for more, from L2.
        block_c: of the contraction; 128 with scales.
        num_stages: tiles that are loaded ahead.
        num_warps: of a program.
        programs: of each processor, at least, while the contraction of "down" can be split.
        unroll: steps of block_c that are loaded together.
    """

    block_n: int
    block_m: int
    block_c: int
    num_stages: int
    num_warps: int
    programs: int = 0
    unroll: int = 1


# H100, triton 3.6.0, 2026-11-26.
TILES = {
    ("gate_up", "16 bit"): Tile(64, 16, 128, 4, 4),
    ("gate_up", "blockwise"): Tile(64, 16, 128, 4, 4, unroll=2),
    ("gate_up", "weight only"): Tile(64, 16, 128, 3, 4),
    ("down", "16 bit"): Tile(64, 16, 128, 4, 4, programs=2),
    ("down", "blockwise"): Tile(128, 16, 128, 4, 4, programs=2),
    ("down", "weight only"): Tile(64, 16, 128, 3, 4, programs=2),
}
_PREFETCHED = 512  # bytes of each row of weights that L2 loads while a kernel waits for the one before it


class Projection(NamedTuple):
    """The weights of one GEMM, for all experts.

    Attributes:
        weight: (E, N, C) in any strides; N counts gate and up rows if they are in one tensor.
        scale: fp32 (E, ceil(N/128), ceil(C/128)) in any strides; None: not quantized.
        bias: (E, N), contiguous, or None.
    """

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


def splits_of(num_programs: int, c: int, tile: Tile, processors: int) -> tuple[int, int]:
    """Into how many parts a contraction of C is split, and how many blocks are in a part."""
    blocks = cdiv(c, tile.block_c * tile.unroll)
    wanted = max(1, processors * tile.programs // num_programs)
    per_split = cdiv(blocks, min(wanted, blocks))
    return cdiv(blocks, per_split), per_split * tile.unroll


def decode(
    x_TH: Tensor, ids: Tensor, weights: Tensor, first: Projection, up: Projection | None, down: Projection,
    kind: str, recipe: Recipe, activation: str, interleaved: bool, y_TH: Tensor,
) -> None:  # fmt: skip
    """Writes the result of the layer.

    Args:
        x_TH: last axis contiguous; bfloat16 or float16.
        ids: (T, k), contiguous, int32 or int64. Slots with an id outside [0, E) add nothing.
        weights: (T, k), last axis contiguous.
        first: gate and up in one, gate alone with ``up``, or a projection without a gate.
        up: up in a tensor of its own; None: there is none.
        down: (E, H, I).
        kind: "16 bit"; "blockwise": weights and rows are in fp8; "weight only": weights are.
        recipe: how rows are quantized.
        activation: a name in `moe.activation.ACTIVATIONS`.
        interleaved: whether gate and up rows alternate in ``first``.
        y_TH: the output, contiguous.
    """
    (num_tokens, top_k), (num_experts, hidden, inner) = ids.shape, down.weight.shape
    slots = num_tokens * top_k
    if slots == 0 or hidden == 0:
        y_TH.zero_()
        return
    is_gated = up is not None or first.weight.shape[1] == 2 * inner
    processors, most_experts = num_processors(x_TH.device), min(slots, num_experts)
    tile, down_tile = TILES["gate_up", kind], TILES["down", kind]
    splits, blocks = splits_of(most_experts * cdiv(hidden, down_tile.block_n), inner, down_tile, processors)
    h = x_TH.new_empty(slots, inner)
    rows = x_TH.new_empty(splits, slots, hidden, dtype=x_TH.dtype if splits == 1 else torch.float32)
    constants = constants_of(activation, first.weight[0], first.weight.shape[1], False)
    constants |= {
        "LAYOUT": "halves" if is_gated else "plain", "KIND": kind, "BY_SLOT": slots <= num_experts,
        "SLOTS": next_power_of_2(slots), "PDL": can_overlap(x_TH.device),
    }  # fmt: skip
    overlaps, fp8 = constants["PDL"], first.weight.dtype if kind == "blockwise" else None
    with on_device(x_TH):
        # Each kernel but the first may start before the one before it has ended: then it waits.
        x, x_scale = _quantized(x_TH, recipe, fp8, overlaps, False)
        _multiply(
            x, x_scale, top_k, ids, first, up, interleaved, h, 1, cdiv(hidden, tile.block_c), tile, constants,
            overlaps and x is not x_TH,
        )  # fmt: skip
        h, h_scale = _quantized(h, recipe, fp8, overlaps, overlaps)
        constants |= {"ACT": None, "LAYOUT": "plain"}
        _multiply(h, h_scale, 1, ids, down, None, False, rows, splits, blocks, down_tile, constants, overlaps)
        block_h = min(next_power_of_2(hidden), 1024 if num_tokens > 8 else 256)
        launch(
            _sum, (num_tokens, cdiv(hidden, block_h)),
            rows, ids, weights, y_TH, slots, num_experts, hidden, weights.stride(0),
            constants={
                "TOP_K": top_k, "UNROLLED": unrolled(top_k), "PARTS": splits, "BLOCK_H": block_h, "PDL": overlaps,
            },
            num_warps=max(1, block_h // 256), launch_pdl=overlaps,
        )  # fmt: skip


def can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one before it has ended (programmatic dependent launch)."""
    machine = machine_of(device)
    return machine.vendor == "nvidia" and machine.traits.tma


def _quantized(
    rows: Tensor, recipe: Recipe, fp8: torch.dtype | None, signals: bool, overlaps: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows and their scales in ``fp8``; with None, the rows themselves. The flags are those of `quantize_tokens`."""
    if fp8 is None:
        return rows, None
    data = layouts.empty_fp8(rows, (rows.shape[0], rows.shape[1]))
    scale = rows.new_empty(rows.shape[0], cdiv(rows.shape[1], layouts.TOKEN_BLOCK), dtype=torch.float32)
    quantize_tokens(rows, recipe, data, scale, signals, overlaps)
    return data, scale


def _multiply(
    rows: Tensor, row_scale: Tensor | None, slots_of_row: int, ids: Tensor, first: Projection, up: Projection | None,
    interleaved: bool, out: Tensor, splits: int, blocks: int, tile: Tile, constants: dict[str, Any], overlaps: bool,
) -> None:  # fmt: skip
    """One GEMM and, with ACT, the activation: ``out`` (M, N), or (splits, M, N). See `_mm`."""
    slots, (num_experts, _, c), n = ids.numel(), first.weight.shape, out.shape[-1]
    # Row i of gate is row step * i of its tensor, and row i of up is row step * i + up_row of its own.
    step, up_row = (2, 1) if interleaved else (1, n if up is None else 0)
    gated = constants["LAYOUT"] == "halves"
    columns = tile.block_n // 2 if gated else tile.block_n
    weights = (first.weight,) if up is None else (first.weight, up.weight)
    # A prefetch has TMA's rules for addresses, and moves multiples of 16 bytes.
    prefetches = constants["PDL"] and can_use_tma(*weights) and c * first.weight.element_size() % 16 == 0
    constants = constants | {
        "EVEN_C": c % (tile.block_c * tile.unroll) == 0, "PREFETCH": _PREFETCHED if prefetches else 0,
        "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c, "UNROLL": tile.unroll,
        "STAGES": tile.num_stages, "UNIT": _unit(weights),
    }  # fmt: skip
    names = _mm.arg_names[-len(constants) :]
    launch(
        _mm, (min(slots, num_experts), cdiv(n, columns), splits),
        rows, row_scale, ids, *first, *(up or (None, None, None)), out, slots, num_experts, c, n, slots_of_row,
        rows.stride(0), *first.weight.stride(), step, up_row,
        *((0, 0, 0) if first.scale is None else first.scale.stride()),
        0 if first.bias is None else first.bias.stride(0), blocks,
        constants={name: constants[name] for name in names}, num_warps=tile.num_warps,
        launch_pdl=overlaps,
    )  # fmt: skip


def _unit(weights: tuple[Tensor, ...]) -> int:
    """What the distance between two weights is a multiple of, in values: so vectors of that many can be loaded."""
    return 16 // weights[0].element_size() if all(w.data_ptr() % 16 == 0 for w in weights) else 1


@triton.jit
def _distance(one, other, UNIT: tl.constexpr = 1):
    """From what ``one`` points to to what ``other`` does, in values, a multiple of UNIT; 0 if there is no other."""
    distance = 0
    if other is not None:
        size: tl.constexpr = UNIT * one.dtype.element_ty.primitive_bitwidth // 8
        distance = (other.to(tl.int64) - one.to(tl.int64)) // size * UNIT  # so the compiler sees the multiple
    return distance


@triton.jit
def _expert_of(ids, p, M, E, BY_SLOT: tl.constexpr, SLOTS: tl.constexpr):
    """The expert of program ``p``, and for each slot whether it is the expert's.

    BY_SLOT: the expert of slot ``p``, if no earlier slot has it. Otherwise expert ``p``.
    """
    slots = tl.arange(0, SLOTS)
    experts = tl.load(ids + slots, mask=slots < M, other=-1)
    if BY_SLOT:
        e = tl.load(ids + p)
        is_here = (experts == e) & (e >= 0) & (e < E) & (slots < M)
        is_here = is_here & (tl.sum((is_here & (slots < p)).to(tl.int32)) == 0)
    else:
        e = p
        is_here = (experts == e) & (slots < M)
    return e.to(tl.int64), is_here


@triton.jit
def _prefetch(at, size):
    """Has L2 load ``size`` bytes, a multiple of 16, from each pointer on."""
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [at.to(tl.int64), size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _scales(left_at, right_at, block, last_block, stride, GATED: tl.constexpr):
    """The scales of gate and of up in a block of the contraction, or the last one. Without a gate, twice the same."""
    at = tl.minimum(block, last_block).to(tl.int64) * stride
    left = tl.load(left_at + at)
    right = left
    if GATED:
        right = tl.load(right_at + at)
    return left, right


@triton.jit(do_not_specialize=["M", "E", "K"])
def _mm(
    x, x_scale, ids, w, scale, bias, up_w, up_scale, up_bias, out, M, E, C, N, K, x_stride,
    w_stride_e, w_stride_n, w_stride_c, row_step, up_row, scale_stride_e, scale_stride_n, scale_stride_c, bias_stride,
    blocks,
    ACT: tl.constexpr, LAYOUT: tl.constexpr, NVIDIA: tl.constexpr, KIND: tl.constexpr,
    BY_SLOT: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr, EVEN_C: tl.constexpr,
    PREFETCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """A tile of an expert's weights, BLOCK_N rows, times all rows of this expert, over one part of the contraction.

    The row of slot i is ``x[i // K]``. With a gate, half of the tile are gate rows, the others the same rows of up.

    Args:
        row_step: rows of the tensor between one row of gate, or up, and the next.
        up_row: rows between a row of gate and that of up, if both are in one tensor.
        up_w: up, with the strides of ``w``, if it is a tensor of its own; and ``up_scale`` and ``up_bias`` likewise.
        blocks: of C in a part.
    """
    GATED: tl.constexpr = LAYOUT == "halves"
    COLUMNS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    e, is_here = _expert_of(ids, tl.program_id(0), M, E, BY_SLOT, SLOTS)
    rank = tl.cumsum(is_here.to(tl.int32), 0)
    count = tl.max(rank, 0)
    if PDL:
        gdc_launch_dependents()
    if count == 0:
        if PDL:
            gdc_wait()
        return
    part = tl.program_id(2)
    first_column = tl.program_id(1) * COLUMNS
    ns = tl.arange(0, BLOCK_N)
    # Columns past the last one read the last one's weights, and are not stored.
    lines = tl.minimum(first_column + ns % COLUMNS, N - 1) * row_step
    is_up = ns >= COLUMNS
    if GATED:
        lines += tl.where(is_up, up_row, 0)
    w_at = e * w_stride_e + lines.to(tl.int64) * w_stride_n
    if GATED:
        w_at += tl.where(is_up, _distance(w, up_w, UNIT), 0)
    w_at = (w + w_at)[:, None]
    first_c = part * blocks * BLOCK_C
    last_c = tl.minimum(first_c + blocks * BLOCK_C, C)
    if scale is not None:  # a tile has one scale in a block of C, or one for its rows of gate and one for those of up
        left_at = scale + e * scale_stride_e + first_column * row_step // 128 * scale_stride_n
        right_at = left_at
        if GATED:
            right_line = first_column * row_step + up_row
            right_at = scale + _distance(scale, up_scale) + e * scale_stride_e + right_line // 128 * scale_stride_n
    last_block = (C - 1) // BLOCK_C
    if PREFETCH > 0:
        size = tl.minimum((last_c - first_c) * (w.dtype.element_ty.primitive_bitwidth // 8), PREFETCH)
        _prefetch(w_at + first_c, size)
    if PDL:
        gdc_wait()
    for first in range(0, count, BLOCK_M):
        order = first + tl.arange(0, BLOCK_M)
        # The slot of a row is the number of slots before it. Ranks rise, so it needs no other vector of all slots.
        slot = tl.sum((rank[:, None] <= order[None, :]).to(tl.int32), 0)
        slot = tl.where(order < count, slot, 0).to(tl.int64)
        is_row = (order < count)[None, :]
        row_at = (x + slot // K * x_stride)[None, :]
        if KIND == "blockwise":
            row_scale_at = x_scale + slot // K * (last_block + 1)
            next_row_scale = tl.load(row_scale_at + first_c // BLOCK_C)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if scale is not None:  # a step ahead, since nothing else hides the latency of these loads
            next_left, next_right = _scales(left_at, right_at, first_c // BLOCK_C, last_block, scale_stride_c, GATED)
        for start in tl.range(first_c, last_c, UNROLL * BLOCK_C, num_stages=STAGES):
            for i in tl.static_range(UNROLL):
                c = start + i * BLOCK_C
                cs = c + tl.arange(0, BLOCK_C)
                if EVEN_C:
                    weights = tl.load(w_at + cs[None, :] * w_stride_c)
                    rows = tl.load(row_at + cs[:, None], mask=is_row, other=0.0)
                else:
                    weights = tl.load(w_at + cs[None, :] * w_stride_c, mask=(cs < C)[None, :], other=0.0)
                    rows = tl.load(row_at + cs[:, None], mask=is_row & (cs < C)[:, None], other=0.0)
                if KIND == "16 bit":
                    acc = tl.dot(weights, rows, acc)
                else:
                    left, right = next_left, next_right
                    next_left, next_right = _scales(
                        left_at, right_at, c // BLOCK_C + 1, last_block, scale_stride_c, GATED
                    )
                    w_scale = (tl.where(is_up, right, left) if GATED else tl.full((BLOCK_N,), left, tl.float32))[
                        :, None
                    ]
                    if KIND == "blockwise":
                        row_scale = next_row_scale
                        next_row_scale = tl.load(row_scale_at + tl.minimum(c // BLOCK_C + 1, last_block))
                        acc += tl.dot(weights, rows) * (w_scale * row_scale[None, :])
                    else:
                        acc += tl.dot(weights.to(rows.dtype), rows) * w_scale
        if bias is not None:
            bias_at = e * bias_stride + lines
            if GATED:
                bias_at += tl.where(is_up, _distance(bias, up_bias), 0)
            if part == 0:
                acc += tl.load(bias + bias_at).to(tl.float32)[:, None]
        if GATED:
            gate, up = acc.reshape(2, COLUMNS, BLOCK_M).permute(1, 2, 0).split()
        else:
            gate = acc
            up = acc
        if ACT is not None:
            gate = value_of(gate, up, ACT, LAYOUT, NVIDIA)
        columns = first_column + tl.arange(0, COLUMNS)
        at = out + (part.to(tl.int64) * M + slot)[None, :] * N + columns[:, None]
        tl.store(at, gate.to(out.dtype.element_ty), mask=(columns < N)[:, None] & is_row)


@triton.jit(do_not_specialize=["M", "E"])
def _sum(
    rows, ids, weights, y, M, E, H, weights_stride,
    TOP_K: tl.constexpr, UNROLLED: tl.constexpr, PARTS: tl.constexpr, BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_H features of one token: its slots' rows, each the sum of PARTS parts, times their weights."""
    if PDL:
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)
    hs = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for first in range(0, TOP_K, UNROLLED):
        for i in tl.static_range(UNROLLED):
            slot = t * TOP_K + first + i
            e = tl.load(ids + slot)
            is_used = (e >= 0) & (e < E)
            row = tl.zeros((BLOCK_H,), tl.float32)
            for part in tl.static_range(PARTS):
                at = rows + (part * M + slot) * H + hs
                row += tl.load(at, mask=hs < tl.where(is_used, H, 0), other=0).to(tl.float32)
            weight = tl.load(weights + t * weights_stride + first + i, mask=is_used, other=0)
            total += row * weight.to(tl.float32)
    tl.store(y + t * H + hs, total.to(y.dtype.element_ty), mask=hs < H)
