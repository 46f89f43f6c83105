"""The steps between the grouped GEMMs of a fused MoE layer, as ops: activations, their gradients, and quantizers.

Each is one or two kernels where this package's kernels run. Elsewhere it is plain torch without host syncs.
Those that quantize are for recipes in blocks of 128. Their results have the layouts of `kernels.quantize.layouts`, and
equal, bit for bit, what the quantizers make of the same tensor if it is stored first.

T, k, M, E: tokens, slots of a token, routed rows, experts. I, D: intermediate features, features. P: features of
pre-activations ``pre``: I, or 2 I with a gate; gate columns come before up columns, or alternate if ``interleaved``.
B: blocks of 128 rows that start anew with each expert. ``blocks`` (B, 4) is from `kernels.quantize.blocks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm import reference
from grouped_gemm.backends import runs_kernels
from grouped_gemm.core.dense import dense_rows
from grouped_gemm.core.library import Size, Steps, define_op
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.quantize import layouts
from grouped_gemm.moe.activation import ACTIVATIONS, features_of, gradients, value

if TYPE_CHECKING:
    from grouped_gemm.kernels.moe.activation import Weights


@define_op(replays=True)
def _moe_activate_backward(
    dh_MI: Tensor, pre_MP: Tensor, topk_weights: Tensor | None, source: Tensor, places: Tensor | None, activation: str,
    interleaved: bool, offs: Tensor,
) -> Steps[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Gradients of an activation whose rows are weighted, with w the weight of a row, 1 without ``topk_weights``.

    Args:
        topk_weights: (T, k) with ``places``, or None.
        source: (M,) int32, the token of each row; negative: none.
        places: (T, k) int32, the row of each slot; -1: the slot was dropped.

    Returns:
        dpre (M, P): the gradient of ``pre`` for w * dh; h (M, I): w * value(pre); both in the dtype of ``pre``, and not
        specified at and past the last row of ``offs``. dweights, as ``topk_weights``: <dh, value(pre)> of each slot's
        row, summed in fp32 in an order that depends on I alone, 0 for dropped slots; of the shape (0,) without weights.
    """
    dpre_MP, h_MI = pre_MP.new_empty(pre_MP.shape), pre_MP.new_empty(dh_MI.shape)
    dweights = _empty_like(topk_weights, pre_MP)
    yield dpre_MP, h_MI, dweights
    if runs_kernels(pre_MP.device):
        from grouped_gemm.kernels.moe import activation as kernel

        weights = _weights_of_rows(topk_weights, source, places, dweights)
        kernel.activate_backward(
            dense_rows(dh_MI), dense_rows(pre_MP), weights, activation, interleaved, offs.contiguous(), dpre_MP, h_MI
        )
    else:
        results = _activate_backward(dh_MI, pre_MP, topk_weights, places, activation, interleaved, offs)
        for out, result in zip((dpre_MP, h_MI, dweights), results):
            out.copy_(result)


@define_op(replays=True)
def _moe_activate_quantize(
    pre_MP: Tensor, blocks: Tensor, recipe: str, activation: str, interleaved: bool, num_groups: Size
) -> Steps[tuple[Tensor, Tensor]]:
    """h, rounded to the dtype of ``pre`` and quantized by rows.

    Returns:
        data (M, I) fp8 and scales (ceil(I/128), S). Those of rows past the last group are not specified.
    """
    like_h = pre_MP[:, : features_of(pre_MP, activation)]
    data_MI, scale, _, _ = layouts.activations(like_h, num_groups, Recipe(recipe), rows=True, columns=False)
    yield data_MI, scale
    if runs_kernels(pre_MP.device):
        from grouped_gemm.kernels.moe import quantize as kernel

        pre_MP, blocks = dense_rows(pre_MP), blocks.contiguous()
        kernel.activate_quantize(pre_MP, blocks, Recipe(recipe), activation, interleaved, data_MI, scale)
    else:
        h_MI = value(ACTIVATIONS[activation], interleaved, pre_MP)
        _quantize_rows(h_MI, blocks, Recipe(recipe), data_MI, scale)


@define_op(replays=True)
def _moe_activate_backward_quantize(
    dh_MI: Tensor, pre_MP: Tensor, topk_weights: Tensor | None, source: Tensor, places: Tensor | None, blocks: Tensor,
    offs: Tensor, recipe: str, activation: str, interleaved: bool, pre_scale: Tensor | None = None,
) -> Steps[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """What `moe_activate_backward` returns, and dpre quantized by rows.

    Args:
        pre_scale: (M, ceil(P/128)); None: ``pre`` is not quantized.

    Returns:
        dpre (M, P), h (M, I), dweights (T, k); data (M, P) fp8 and scales (ceil(P/128), S) of dpre. The last bits of
        dweights may differ from those of `moe_activate_backward`.
    """
    dpre_MP, h_MI = dh_MI.new_empty(pre_MP.shape), dh_MI.new_empty(dh_MI.shape)
    dweights = _empty_like(topk_weights, dh_MI)
    data, scale, _, _ = layouts.activations(pre_MP, offs.shape[0], Recipe(recipe), rows=True, columns=False)
    yield dpre_MP, h_MI, dweights, data, scale
    if runs_kernels(pre_MP.device):
        from grouped_gemm.kernels.moe import quantize as kernel

        kernel.activate_backward_quantize(
            dense_rows(dh_MI), dense_rows(pre_MP), _weights_of_rows(topk_weights, source, places, dweights),
            blocks.contiguous(), offs.contiguous(), Recipe(recipe), activation, interleaved, dpre_MP, h_MI, data, scale,
            pre_scale,
        )  # fmt: skip
    else:
        if pre_scale is not None:
            pre_MP = reference.dequantize(pre_MP, pre_scale, (1, layouts.TOKEN_BLOCK)).to(dh_MI.dtype)
        results = _activate_backward(dh_MI, pre_MP, topk_weights, places, activation, interleaved, offs)
        for out, result in zip((dpre_MP, h_MI, dweights), results):
            out.copy_(result)
        _quantize_rows(dpre_MP, blocks, Recipe(recipe), data, scale)


def _empty_like(topk_weights: Tensor | None, x: Tensor) -> Tensor:
    """Contiguous, in the dtype and shape of weights, or of the shape (0,) without them."""
    return x.new_empty(0) if topk_weights is None else topk_weights.new_empty(topk_weights.shape)


def _weights_of_rows(
    topk_weights: Tensor | None, source: Tensor, places: Tensor | None, dweights: Tensor
) -> Weights | None:
    from grouped_gemm.kernels.moe.activation import Weights  # imports Triton

    if topk_weights is None or places is None:
        return None
    if source.shape[0] < places.numel():  # the kernels look for dropped slots among the first M
        dweights.zero_()
    return Weights(topk_weights.contiguous(), source.contiguous(), places.contiguous(), dweights)


@define_op(replays=True)
def _moe_quantize_tokens(x_TD: Tensor, recipe: str) -> Steps[tuple[Tensor, Tensor]]:
    """Tokens quantized in blocks of 128 features, without groups, to be read by their number.

    Returns:
        data (T, D) fp8 with rows that start at multiples of 16 bytes, and scales (T, ceil(D/128)) fp32, contiguous.
    """
    num_tokens, features = x_TD.shape
    data_TD = layouts.empty_fp8(x_TD, (num_tokens, features))
    scale = x_TD.new_empty(num_tokens, -(-features // layouts.TOKEN_BLOCK), dtype=torch.float32)
    yield data_TD, scale
    if runs_kernels(x_TD.device):
        from grouped_gemm.kernels.moe import quantize as kernel

        kernel.quantize_tokens(dense_rows(x_TD), Recipe(recipe), data_TD, scale)
    else:
        data, scales = reference.quantize(x_TD, reference.row_blocks(Recipe(recipe)), Recipe(recipe), data_TD.dtype)
        data_TD.copy_(data)
        scale.copy_(scales)


@define_op(replays=True)
def _moe_dequantize_tokens(data_TD: Tensor, scale: Tensor, dtype: torch.dtype) -> Steps[Tensor]:
    """The values (T, D) in ``dtype`` of what `moe_quantize_tokens` returns."""
    x_TD = torch.empty(data_TD.shape, dtype=dtype, device=data_TD.device)
    yield x_TD
    if runs_kernels(data_TD.device):
        from grouped_gemm.kernels.moe import quantize as kernel

        kernel.dequantize_tokens(data_TD, scale, x_TD)
    else:
        x_TD.copy_(reference.dequantize(data_TD, scale, (1, layouts.TOKEN_BLOCK)))


# The same in plain torch, without host syncs.


def _activate_backward(
    dh_MI: Tensor, pre_MP: Tensor, topk_weights: Tensor | None, places: Tensor | None, activation: str,
    interleaved: bool, offs: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kind, num_rows, dh = ACTIVATIONS[activation], len(dh_MI), dh_MI.float()
    h = value(kind, interleaved, pre_MP.float())
    dweights = h.new_empty(0)
    if topk_weights is not None:
        assert places is not None, "weights are those of slots"
        # Dropped slots go to one more row, and read it.
        rows = torch.where(places < 0, num_rows, places).long()
        dweights = F.pad((dh * h).sum(1), (0, 1))[rows]
        weights = h.new_zeros(num_rows + 1).index_copy_(0, rows.flatten(), topk_weights.float().flatten())
        dh, h = weights[:-1, None] * dh, weights[:-1, None] * h
    return gradients(kind, interleaved, dh, pre_MP)[0], h.to(pre_MP.dtype), dweights


def _rows_of_blocks(blocks: Tensor, num_rows: int) -> Tensor:
    """(B, 128) int64: the rows of each block; ``num_rows`` where it has no more."""
    steps = torch.arange(layouts.TOKEN_BLOCK, device=blocks.device)
    return torch.where(steps < blocks[:, 2:3], blocks[:, 1:2] + steps, num_rows)


def _quantize_rows(x_MD: Tensor, blocks: Tensor, recipe: Recipe, data_MD: Tensor, scale: Tensor) -> None:
    """Fills data and scales by rows, from `layouts.activations`."""
    data, row_scale = reference.quantize(x_MD, reference.row_blocks(recipe), recipe, data_MD.dtype)
    data_MD.copy_(data)
    least = reference.scales(row_scale.new_zeros(1, row_scale.shape[1]), recipe, data_MD.dtype)  # of rows of padding
    steps = torch.arange(layouts.TOKEN_BLOCK, device=blocks.device)
    length = -(-blocks[:, 2:3] // layouts.SCALE_ALIGNMENT) * layouts.SCALE_ALIGNMENT
    targets = torch.where(steps < length, blocks[:, 3:4] + steps, scale.shape[1]).flatten().long()
    values = torch.cat([row_scale, least])[_rows_of_blocks(blocks, len(x_MD)).flatten()]
    padded = scale.new_ones(scale.shape[0], scale.shape[1] + 1)  # what is not a row's goes to the last place
    scale.copy_(padded.index_copy_(1, targets, values.t())[:, :-1])
