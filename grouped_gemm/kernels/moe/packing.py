"""The kernels of expert parallelism: which tokens go to which rank, and the rows that are sent.

`moe.packing` has what a row looks like, and the twins in plain torch.

T, k, H: tokens, slots of a token, features. W, E: ranks, experts of all. S: rows that are sent.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.common.launch import cdiv, launch, next_power_of_2, on_device
from grouped_gemm.kernels.common.scaling import inverse_of, magnitude, scale_of, to_fp8
from grouped_gemm.kernels.quantize.fp8 import scaling_constants
from grouped_gemm.kernels.quantize.layouts import TOKEN_BLOCK

_IDS = 2048  # of a program
_TILE = 4096  # tokens times features of a program


def find_ranks(topk_ids: Tensor, num_experts: int, digest: int, ranks: Tensor, numbers: Tensor) -> None:
    """Finds the ranks that have any of a token's experts. Ids outside [0, E) are on no rank.

    Args:
        topk_ids: (T, k) int32 or int64, contiguous.
        num_experts: E, a multiple of W.
        digest: an int32, which is told to all ranks.
        ranks: (T, W) int32, contiguous: w where rank w has any, else -1.
        numbers: (W, 3) int32, contiguous, zeros: how many tokens have experts on each rank, how many slots, and
            ``digest``.
    """
    (num_tokens, top_k), num_ranks = topk_ids.shape, numbers.shape[0]
    slots = next_power_of_2(max(top_k, 1))
    constants = {"TOKENS": max(_IDS // slots, 1), "SLOTS": slots}
    with on_device(topk_ids):
        launch(
            _find_ranks, (max(cdiv(num_tokens, constants["TOKENS"]), 1), num_ranks),
            topk_ids, ranks, numbers, num_tokens, top_k, num_experts // num_ranks, num_ranks, digest,
            constants=constants, num_warps=4,
        )  # fmt: skip


def limit(places: Tensor, numbers: Tensor, capacity: int, limited: Tensor, lost: Tensor, told: Tensor) -> None:
    """Places for ``capacity`` rows of each rank, as `moe_limit_rows` returns them.

    Args:
        places: (T, W) int32, contiguous, of rows in the order of ranks.
        numbers: (W, 3) int32, contiguous, from `find_ranks`.
        capacity: the most rows of a rank.
        limited: (T, W) int32, contiguous: new places.
        lost: (T,) uint8.
        told: (W, 2) int32, contiguous.
    """
    num_tokens, num_ranks = places.shape
    ranks = next_power_of_2(num_ranks)
    constants = {"TOKENS": max(_IDS // ranks, 1), "RANKS": ranks}
    with on_device(places):
        launch(
            _limit, (max(cdiv(num_tokens, constants["TOKENS"]), 1),),
            places, numbers, limited, lost, told, num_tokens, num_ranks, capacity, constants=constants, num_warps=4,
        )  # fmt: skip


def local_ids(ids: Tensor, told: Tensor, first: int, local: Tensor, any_lost: Tensor) -> None:
    """Ids of local experts in rows that have arrived, as `moe_local_ids` returns them.

    Args:
        ids: (W * capacity, k) int32, last axis contiguous.
        told: (W, 2) int32, last axis contiguous.
        first: the first local expert.
        local: (W * capacity, k) int32, contiguous.
        any_lost: () uint8.
    """
    (num_rows, top_k), num_ranks = ids.shape, told.shape[0]
    slots = next_power_of_2(max(top_k, 1))
    constants = {"ROWS": max(_IDS // slots, 1), "SLOTS": slots, "RANKS": next_power_of_2(num_ranks)}
    with on_device(ids):
        launch(
            _local_ids, (cdiv(num_rows, constants["ROWS"]),),
            ids, told, local, any_lost, num_rows, num_rows // num_ranks, top_k, num_ranks, first, ids.stride(0),
            told.stride(0), constants=constants, num_warps=4,
        )  # fmt: skip


def pack(
    x_TH: Tensor, topk_ids: Tensor | None, topk_weights: Tensor | None, places: Tensor, recipe: Recipe,
    data: Tensor, scale: Tensor | None, ids: Tensor | None, weights: Tensor | None,
    shifts: Tensor | None = None, told: Tensor | None = None, header: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes each token to its rows, quantized if there are scales, with its slots if there are any.

    With ``shifts``, rows for rank w are that many bytes away from those in ``data``, ``scale``, ``ids``, ``weights``.

    Args:
        x_TH: last axis contiguous; bfloat16, float16 or float32.
        topk_ids: (T, k) int32 or int64, last axis contiguous.
        topk_weights: (T, k), any float dtype, last axis contiguous.
        places: (T, W) int32, contiguous: the row of each token for each rank; -1: none.
        recipe: blockwise, or none without scales.
        data: (S, H) of a row: fp8, or the dtype of ``x``.
        scale: (S, ceil(H/128)) fp32 of the same rows, or None.
        ids: (S, k) int32 of the same rows, or None. Ids that are no int32 become -1.
        weights: (S, k) fp32 of the same rows, or None.
        shifts: (2, W) int64, contiguous, multiples of 16: of rows, and of ``header``.
        told: (W, 2) int32, contiguous, or None: what each rank gets into its ``header``, (2,) int32, also if T = 0.
    """
    (num_tokens, features), num_ranks = x_TH.shape, places.shape[1]
    if num_tokens == 0 and told is None:
        return
    width = max(min(next_power_of_2(features), 1024), TOKEN_BLOCK)
    top_k = 0 if topk_ids is None else topk_ids.shape[1]
    constants = scaling_constants(x_TH, recipe, data.dtype) if scale is not None else _UNSCALED
    constants = constants | {
        "BLOCK": TOKEN_BLOCK, "ROWS": _TILE // width, "WIDTH": width, "SLOTS": next_power_of_2(max(top_k, 1)),
    }  # fmt: skip
    strides = [0 if x is None else x.stride(0) for x in (x_TH, topk_ids, topk_weights, data, scale, ids, weights)]
    with on_device(x_TH):
        launch(
            _pack, (max(cdiv(num_tokens, _TILE // width), 1), cdiv(features, width)),
            x_TH, topk_ids, topk_weights, places, data, scale, ids, weights, shifts, told, header,
            num_tokens, features, top_k, num_ranks, *strides, constants=constants, num_warps=4,
        )  # fmt: skip


_UNSCALED = {"LIMIT": 0.0, "POWER_OF_TWO": False, "NVIDIA": False}


@triton.jit(do_not_specialize=["T", "digest"])
def _find_ranks(topk_ids, ranks, numbers, T, K, local, W, digest, TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    """The tokens of one rank, which has ``local`` experts, among TOKENS tokens."""
    rank = tl.program_id(1)
    t, slots = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, SLOTS)
    mask = (t < T)[:, None] & (slots < K)[None, :]
    ids = tl.load(topk_ids + t.to(tl.int64)[:, None] * K + slots[None, :], mask=mask, other=-1)
    counts = tl.sum(((ids >= rank * local) & (ids < rank * local + local)).to(tl.int32), 1)
    goes = counts > 0
    tl.store(ranks + t.to(tl.int64) * W + rank, tl.where(goes, rank, -1), mask=t < T)
    tl.atomic_add(numbers + 3 * rank, tl.sum(goes.to(tl.int32)))
    tl.atomic_add(numbers + 3 * rank + 1, tl.sum(counts))
    tl.store(numbers + 3 * rank + 2, digest)


@triton.jit(do_not_specialize=["T", "capacity"])
def _limit(places, numbers, limited, lost, told, T, W, capacity, TOKENS: tl.constexpr, RANKS: tl.constexpr):
    """TOKENS tokens. The first program also tells the ranks."""
    ranks = tl.arange(0, RANKS)
    counts = tl.load(numbers + 3 * ranks, mask=ranks < W, other=0)
    first = tl.cumsum(counts, 0) - counts
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = t.to(tl.int64)[:, None] * W + ranks[None, :]
    mask = (t < T)[:, None] & (ranks < W)[None, :]
    place = tl.load(places + at, mask=mask, other=-1)
    order = place - first[None, :]
    fits = (place >= 0) & (order < capacity)
    tl.store(limited + at, tl.where(fits, ranks[None, :] * capacity + order, -1), mask=mask)
    is_lost = (place >= 0) & (order >= capacity)
    tl.store(lost + t, tl.max(is_lost.to(tl.int32), 1).to(tl.uint8), mask=t < T)
    is_first = ranks < tl.where(tl.program_id(0) == 0, W, 0)
    tl.store(told + 2 * ranks, counts, mask=is_first)
    any_lost = tl.max(counts, 0) > capacity
    tl.store(told + 2 * ranks + 1, tl.zeros_like(counts) + any_lost.to(tl.int32), mask=is_first)


@triton.jit(do_not_specialize=["first"])
def _local_ids(
    ids, told, local, any_lost, R, capacity, K, W, first, ids_stride, told_stride,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """ROWS rows. The first program also asks whether any rank has lost a token."""
    row, slots = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SLOTS)
    count = tl.load(told + row // capacity * told_stride, mask=row < R, other=0)
    mask = (row < R)[:, None] & (slots < K)[None, :]
    is_used = (row % capacity < count)[:, None] & mask
    at = row.to(tl.int64)[:, None]
    expert = tl.load(ids + at * ids_stride + slots[None, :], mask=is_used, other=0)
    tl.store(local + at * K + slots[None, :], tl.where(is_used, expert - first, -1), mask=mask)
    if tl.program_id(0) == 0:
        ranks = tl.arange(0, RANKS)
        is_lost = tl.load(told + ranks * told_stride + 1, mask=ranks < W, other=0)
        tl.store(any_lost, tl.max(is_lost, 0).to(tl.uint8))


@triton.jit(do_not_specialize=["T"])
def _pack(
    x, topk_ids, topk_weights, places, data, scales, ids, weights, shifts, told, header, T, H, K, W,
    x_stride, topk_ids_stride, topk_weights_stride, data_stride, scale_stride, ids_stride, weights_stride,
    LIMIT: tl.constexpr, POWER_OF_TWO: tl.constexpr, NVIDIA: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens by WIDTH features, a multiple of BLOCK. A token is read once, however many ranks it goes to."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token, at = (t < T)[:, None], t.to(tl.int64)[:, None]
    first = tl.program_id(1) * WIDTH
    columns = first + tl.arange(0, WIDTH)[None, :]
    values = tl.load(x + at * x_stride + columns, mask=is_token & (columns < H), other=0)
    if scales is not None:
        values = values.reshape(ROWS, WIDTH // BLOCK, BLOCK)
        scale = scale_of(tl.max(magnitude(values), 2), LIMIT, POWER_OF_TWO)
        inverse = inverse_of(scale)[:, :, None]
        values = to_fp8(values, inverse, LIMIT, data.dtype.element_ty, NVIDIA).reshape(ROWS, WIDTH)
        blocks = first // BLOCK + tl.arange(0, WIDTH // BLOCK)[None, :]
    if ids is not None:
        slots = tl.arange(0, SLOTS)[None, :]
        has_slots = slots < tl.where(tl.program_id(1) == 0, K, 0)
        expert = tl.load(topk_ids + at * topk_ids_stride + slots, mask=is_token & has_slots, other=-1)
        expert = tl.where((expert >= 0) & (expert <= 0x7FFFFFFF), expert, -1).to(tl.int32)
        weight = tl.load(topk_weights + at * topk_weights_stride + slots, mask=is_token & has_slots, other=0)
    for w in range(W):
        # Loaded before it gets a second axis: so a thread loads each place once.
        place = tl.load(places + t.to(tl.int64) * W + w, mask=t < T, other=-1).to(tl.int64)[:, None]
        shift = 0
        if shifts is not None:
            shift = tl.multiple_of(tl.load(shifts + w), 16)
        row = data + shift // (data.dtype.element_ty.primitive_bitwidth // 8) + place * data_stride
        tl.store(row + columns, values, mask=(place >= 0) & (columns < H))
        if scales is not None:
            has_blocks = (place >= 0) & (blocks < tl.cdiv(H, BLOCK))
            tl.store(scales + shift // 4 + place * scale_stride + blocks, scale, mask=has_blocks)
        if ids is not None:
            has = (place >= 0) & has_slots
            tl.store(ids + shift // 4 + place * ids_stride + slots, expert, mask=has)
            tl.store(weights + shift // 4 + place * weights_stride + slots, weight.to(tl.float32), mask=has)
        if told is not None:
            part = tl.arange(0, 2)
            is_first = part < tl.where(tl.program_id(0) + tl.program_id(1) == 0, 2, 0)
            tl.store(header + tl.load(shifts + W + w) // 4 + part, tl.load(told + 2 * w + part), mask=is_first)
