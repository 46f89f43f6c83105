"""What travels between ranks: a row for each token and rank, with all that belongs to it.

The bytes of a row, for k slots and H features:

| features | scales, if the features are in fp8 | ids of experts | weights |
| --- | --- | --- | --- |
| H in their dtype, padded to 16 bytes | ceil(H/128) fp32 | k int32 | k fp32, padded to 64 bytes |

So one collective moves it, and its parts are views. The kernels of GEMMs read them where they are.

T, k, H: tokens, slots of a token, features. W, E: ranks, experts of all. S: rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm import reference
from grouped_gemm.backends import runs_kernels
from grouped_gemm.core.dense import dense_rows
from grouped_gemm.core.library import Changed, Size, Steps, define_op
from grouped_gemm.core.machine import fp8_dtype_of
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.quantize.layouts import TOKEN_BLOCK


class Packed(NamedTuple):
    """The parts of packed rows, which are views.

    Attributes:
        data: (S, H), in fp8 or in the dtype of the tokens.
        scale: (S, ceil(H/128)) fp32, if ``data`` is in fp8.
        ids: (S, k) int32.
        weights: (S, k) fp32.
    """

    data: Tensor
    scale: Tensor | None
    ids: Tensor
    weights: Tensor


def unpack(packed: Tensor, features: int, top_k: int, dtype: torch.dtype, recipe: Recipe) -> Packed:
    """The parts of rows from `moe_pack`, of tokens in ``dtype``."""
    scale_at, ids_at, weights_at, _ = _offsets(features, top_k, dtype, recipe)
    of_data = fp8_dtype_of(packed.device) if recipe.is_scaled else dtype
    data = packed[:, : features * of_data.itemsize].view(of_data)
    scale = packed[:, scale_at:ids_at].view(torch.float32) if recipe.is_scaled else None
    ids = packed[:, ids_at:weights_at].view(torch.int32)
    return Packed(data, scale, ids, packed[:, weights_at : weights_at + 4 * top_k].view(torch.float32))


def row_bytes(x_TH: Tensor, top_k: int, recipe: Recipe) -> int:
    """The bytes of a row from `moe_pack` of such tokens."""
    return _offsets(x_TH.shape[1], top_k, x_TH.dtype, recipe)[-1]


def _offsets(features: int, top_k: int, dtype: torch.dtype, recipe: Recipe) -> tuple[int, int, int, int]:
    """Where scales, ids and weights begin in a row, and its size, in bytes."""
    scale_at = -(-features * (1 if recipe.is_scaled else dtype.itemsize) // 16) * 16
    ids_at = scale_at + (4 * -(-features // TOKEN_BLOCK) if recipe.is_scaled else 0)
    weights_at = ids_at + 4 * top_k
    return scale_at, ids_at, weights_at, -(-(weights_at + 4 * top_k) // 64) * 64


@define_op(replays=True)
def _moe_find_ranks(topk_ids: Tensor, num_experts: Size, num_ranks: Size, digest: Size) -> Steps[tuple[Tensor, Tensor]]:
    """Which tokens go to which rank: to each that has any of their experts. Rank w has those from w * E / W on.

    Args:
        topk_ids: (T, k) int32 or int64. Ids outside [0, E) are on no rank.
        digest: an int32 of what all ranks must have in common.

    Returns:
        numbers (W, 3) int32: how many tokens go to each rank, how many of their slots are there, and ``digest``, which
        ranks compare; and places (T, W) int32: the row of each token among those that are sent, which are in the order
        of ranks and of tokens; -1: it does not go there.
    """
    numbers = topk_ids.new_zeros(num_ranks, 3, dtype=torch.int32)
    places = topk_ids.new_empty(topk_ids.shape[0], num_ranks, dtype=torch.int32)
    yield numbers, places
    if runs_kernels(topk_ids.device):
        from grouped_gemm.kernels.moe import packing as kernel
        from grouped_gemm.kernels.moe import routing

        ranks = torch.empty_like(places)
        kernel.find_ranks(topk_ids.contiguous(), num_experts, digest, ranks, numbers)
        routing.route(ranks, numbers.new_empty(num_ranks), None, places)
    else:
        ranks = torch.arange(num_ranks, device=topk_ids.device)
        owns = (topk_ids // (num_experts // num_ranks)).unsqueeze(2) == ranks  # (T, k, W)
        goes = owns.any(1)
        numbers.copy_(torch.stack((goes.sum(0), owns.sum((0, 1)), torch.full_like(ranks, digest)), 1))
        places.copy_(reference.route(torch.where(goes, ranks, -1), num_ranks)[2])


@define_op(replays=True)
def _moe_limit_rows(places: Tensor, numbers: Tensor, capacity: int) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    """Where rows go if each rank has ``capacity`` of them, from what `moe_find_ranks` returns.

    Returns:
        places (T, W) int32: row ``w * capacity + i`` is the i-th token for rank w; -1: it does not go there, or does
        not fit; lost (T,) bool: tokens that do not fit somewhere; and told (W, 2) int32, what ranks tell each other:
        how many tokens go there, and whether this rank has lost any.
    """
    limited, told = places.new_empty(places.shape), numbers.new_empty(len(numbers), 2)
    lost = places.new_empty(len(places), dtype=torch.bool)
    yield limited, lost, told
    if runs_kernels(places.device):
        from grouped_gemm.kernels.moe import packing as kernel

        kernel.limit(places.contiguous(), numbers.contiguous(), capacity, limited, lost.view(torch.uint8), told)
        return
    counts = numbers[:, 0]
    order = places - (counts.cumsum(0) - counts)
    is_lost = order >= capacity  # not where places are -1
    first = capacity * torch.arange(len(numbers), device=places.device)
    limited.copy_(torch.where(is_lost | (places < 0), -1, order + first))
    lost.copy_(is_lost.any(1))
    told.copy_(torch.stack((counts, (counts > capacity).any().expand_as(counts)), 1))


@define_op(replays=True)
def _moe_local_ids(ids: Tensor, told: Tensor, first: Size) -> Steps[tuple[Tensor, Tensor]]:
    """What has arrived of ``capacity`` rows of each rank.

    Args:
        ids: (W * capacity, k) int32.
        told: (W, 2) int32, by the ranks that they came from, as in `moe_limit_rows`.
        first: this rank's first expert.

    Returns:
        (W * capacity, k) int32, ``ids`` less ``first``, and -1 in rows that no token fills; and () bool: whether any
        rank has lost a token.
    """
    local, any_lost = ids.new_empty(ids.shape), ids.new_empty((), dtype=torch.bool)
    yield local, any_lost
    if runs_kernels(ids.device):
        from grouped_gemm.kernels.moe import packing as kernel

        kernel.local_ids(dense_rows(ids), told, first, local, any_lost.view(torch.uint8))
        return
    is_used = torch.arange(len(ids) // len(told), device=ids.device) < told[:, :1]
    local.copy_(torch.where(is_used.view(-1, 1), ids - first, -1))
    any_lost.copy_(told[:, 1].any())


@define_op(replays=True)
def _moe_pack(
    x_TH: Tensor, topk_ids: Tensor | None, topk_weights: Tensor | None, places: Tensor, num_rows: Size, recipe: str
) -> Steps[Tensor]:
    """(S, bytes) uint8: tokens in rows as this module has them, quantized if the recipe is blockwise.

    Args:
        topk_ids: (T, k) int32 or int64, and ``topk_weights`` (T, k), or None for k = 0.
        places: (T, W) int32, the rows of a token; -1: none.
        num_rows: S. Rows that are no token's are not specified.
    """
    parsed, top_k = Recipe(recipe), 0 if topk_ids is None else topk_ids.shape[1]
    packed = x_TH.new_empty(num_rows, row_bytes(x_TH, top_k, parsed), dtype=torch.uint8)
    yield packed
    _write(packed, x_TH, topk_ids, topk_weights, places, parsed)


@define_op(replays=True)
def _moe_pack_for_peers(
    buffer: Changed, x_TH: Tensor, topk_ids: Tensor | None, topk_weights: Tensor | None, places: Tensor,
    told: Tensor | None, shifts: Tensor, rank: int, num_rows: Size, recipe: str,
) -> Steps[None]:  # fmt: skip
    """Writes what `moe_pack` returns into the buffers of all ranks, which lie as `in_buffer` has them.

    Args:
        buffer: this rank's, (bytes,) uint8. Without kernels, nothing but it is written: there are no peers.
        places: (T, W), as in `moe_pack`.
        told: (W, 2) int32, what each rank reads in its header from this one; None: headers stay.
        shifts: (2, W) int64, multiples of 16: how many bytes from its place in ``buffer`` a row for rank w is written,
            and its header.
        rank: of this process.
    """
    yield None
    parsed, top_k = Recipe(recipe), 0 if topk_ids is None else topk_ids.shape[1]
    headers, rows = in_buffer(buffer, places.shape[1], num_rows, row_bytes(x_TH, top_k, parsed))
    _write(rows, x_TH, topk_ids, topk_weights, places, parsed, shifts, told, headers[rank])


_HEADER = 16  # bytes of a rank's


def in_buffer(buffer: Tensor, num_ranks: int, num_rows: int, num_bytes: int) -> tuple[Tensor, Tensor]:
    """The headers of all ranks, (W, 2) int32, and the rows, (S, bytes) uint8, in a buffer that peers write to."""
    rows_at = buffer_bytes(num_ranks, 0)
    headers = buffer[: _HEADER * num_ranks].view(torch.int32).view(num_ranks, -1)[:, :2]
    return headers, buffer[rows_at : rows_at + num_rows * num_bytes].view(num_rows, num_bytes)


def buffer_bytes(num_ranks: int, of_rows: int) -> int:
    """How large such a buffer is."""
    return -(-_HEADER * num_ranks // 128) * 128 + of_rows


def _write(
    packed: Tensor, x_TH: Tensor, topk_ids: Tensor | None, topk_weights: Tensor | None, places: Tensor, recipe: Recipe,
    shifts: Tensor | None = None, told: Tensor | None = None, header: Tensor | None = None,
) -> None:  # fmt: skip
    """Fills rows; with ``shifts`` and ``told`` also those of other ranks and their headers, by kernels alone."""
    top_k = 0 if topk_ids is None else topk_ids.shape[1]
    if runs_kernels(x_TH.device):
        from grouped_gemm.kernels.moe import packing as kernel

        parts = unpack(packed, x_TH.shape[1], top_k, x_TH.dtype, recipe)
        ids, weights = (None if s is None else dense_rows(s) for s in (topk_ids, topk_weights))
        to_ids, to_weights = (None, None) if ids is None else (parts.ids, parts.weights)
        kernel.pack(
            dense_rows(x_TH), ids, weights, places.contiguous(), recipe, parts.data, parts.scale, to_ids, to_weights,
            shifts, told, None if told is None else header,
        )  # fmt: skip
        return
    if told is not None and header is not None:
        header.copy_(told[-1])
    tokens = torch.arange(len(places), device=places.device).unsqueeze(1).expand(places.shape)
    source = places.new_full((len(packed) + 1,), -1, dtype=torch.int64)
    source.scatter_(0, torch.where(places < 0, len(packed), places).flatten().long(), tokens.flatten())
    source = source[:-1]  # -1 takes the row of zeros at the end
    written = torch.zeros_like(packed)
    parts = unpack(written, x_TH.shape[1], top_k, x_TH.dtype, recipe)
    rows = F.pad(x_TH, (0, 0, 0, 1))[source]
    if parts.scale is not None:
        data, scale = reference.quantize(rows, reference.row_blocks(recipe), recipe, parts.data.dtype)
        parts.data.copy_(data)
        parts.scale.copy_(scale)
    else:
        parts.data.copy_(rows)
    if topk_ids is not None and topk_weights is not None:
        ids = torch.where((topk_ids >= 0) & (topk_ids <= 0x7FFFFFFF), topk_ids, -1)
        parts.ids.copy_(F.pad(ids, (0, 0, 0, 1))[source])
        parts.weights.copy_(F.pad(topk_weights, (0, 0, 0, 1))[source])
    packed.copy_(torch.where(source.unsqueeze(1) < 0, packed, written))
