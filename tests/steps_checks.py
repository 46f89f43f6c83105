"""Checks of the ops between a MoE layer's GEMMs, those of `moe.activation` and `moe.steps`.

They run on torch twins, on interpreted kernels and on a GPU. Activations are compared with fp64, and what is quantized,
bit for bit, with `reference` on the tensor that the op does not store.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kernel_checks import assert_same
from routings import blocks_of
from torch import Tensor

import grouped_gemm.moe.steps  # noqa: F401 - defines ops
from grouped_gemm import Recipe, reference
from grouped_gemm.core.library import ops
from grouped_gemm.core.machine import machine_of
from grouped_gemm.moe.activation import ACTIVATIONS

# activation, whether gate and up are interleaved, dtype
FORMS = tuple(
    (name, interleaved, (torch.bfloat16, torch.float16, torch.float32)[i % 3])
    for i, (name, kind) in enumerate(ACTIVATIONS.items())
    for interleaved in ((False, True) if kind.is_gated else (False,))
)
SIZES = (1, 0, 127, 128, 129, 0)  # of groups: short blocks, whole ones and none
UNUSED = 7  # rows past the last group
TOP_K = 3  # slots of a token: no power of two


class Operands(NamedTuple):
    """Slices of wider ``dh`` (M, I) and ``pre`` (M, P). Rows past the last group are NaN, and so is one of row 1.

    ``weights``, ``source`` and ``places`` are of TOP_K slots for each token: rows past the last group have none.
    """

    dh: Tensor
    pre: Tensor
    weights: Tensor
    source: Tensor
    places: Tensor
    ends: list[int]
    offs: Tensor
    blocks: Tensor


def operands(
    features: int,
    activation: str,
    dtype: torch.dtype,
    device: torch.device | str,
    sizes: Sequence[int] = SIZES,
    unused: int = UNUSED,
) -> Operands:
    torch.manual_seed(0)
    ends = list(accumulate(sizes))
    num_rows = -(-(ends[-1] + unused) // TOP_K) * TOP_K
    width = features * (2 if ACTIVATIONS[activation].is_gated else 1)
    dh, pre = torch.randn(num_rows, features + 8), 4 * torch.randn(num_rows, width + 8)
    dh[ends[-1] :], pre[ends[-1] :] = torch.nan, torch.nan
    pre[1:2, 10] = torch.nan
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    dh, pre = dh.to(device, dtype)[:, 8:], pre.to(device, dtype)[:, 8:]
    source, places = slots(num_rows, ends[-1], device)
    weights = torch.rand(places.shape, device=device).to(dtype).t().contiguous().t()
    return Operands(dh, pre, weights, source, places, ends, offs, blocks_of(ends, num_rows, device))


def slots(num_rows: int, used: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """source (M,) and places (T, TOP_K), M = T * TOP_K: the first ``used`` rows have slots, in no order."""
    assert num_rows % TOP_K == 0
    order = torch.randperm(num_rows)
    places = torch.where(order < used, order, -1).int().view(-1, TOP_K)
    source = torch.where(torch.arange(num_rows) < used, order.argsort() // TOP_K, -1).int()
    return source.to(device), places.to(device)


def weights_of_rows(weights: Tensor, places: Tensor) -> Tensor:
    """(M,) fp64, 0 for rows without a slot."""
    by_row = torch.zeros(places.numel(), dtype=torch.float64, device=places.device)
    by_row[places[places >= 0].long()] = weights[places >= 0].double()
    return by_row


def apart(activation: str, interleaved: bool, pre: Tensor) -> list[Tensor]:
    """Gate and up in fp64, or what has no gate."""
    if not ACTIVATIONS[activation].is_gated:
        return [pre.double()]
    halves = (pre[:, 0::2], pre[:, 1::2]) if interleaved else pre.chunk(2, 1)
    return [half.double() for half in halves]


def assert_rounds_to(found: Tensor, truth: Tensor, what: str, rtol: float = 4e-6, atol: float = 1e-4) -> None:
    """``found`` is ``truth``, computed in fp32 within the tolerances, and rounded once."""
    rtol += torch.finfo(found.dtype).eps / 2
    torch.testing.assert_close(
        found.double(), truth, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def check_activate(
    activation: str,
    interleaved: bool,
    dtype: torch.dtype,
    features: int,
    device: torch.device | str,
    sizes: Sequence[int] = SIZES,
) -> None:
    dh, pre, weights, source, places, ends, offs, _ = operands(features, activation, dtype, device, sizes)
    kind, gate_up = ACTIVATIONS[activation], apart(activation, interleaved, pre)
    h = ops.moe_activate(pre, activation, interleaved)
    assert h.dtype == dtype
    assert_rounds_to(h, kind.value(*gate_up), "h")
    assert h[1].isnan().sum() == 1

    used = slice(ends[-1])
    for factors in (None, weights):
        w = weights_of_rows(torch.ones_like(weights) if factors is None else weights, places)
        dpre, h, dweights = ops.moe_activate_backward(dh, pre, factors, source, places, activation, interleaved, offs)
        truth = kind.gradient(*gate_up, w[:, None] * dh.double())
        for found, expected in zip(apart(activation, interleaved, dpre.float()), truth):
            assert_rounds_to(found[used].to(dtype), expected[used], "dpre")
        assert_rounds_to(h[used], (w[:, None] * kind.value(*gate_up))[used], "h times weights")
        if factors is not None:
            exact = (dh.double() * kind.value(*gate_up)).sum(1)[places.long()].where(places >= 0, 0)
            assert_rounds_to(dweights, exact, "dweights", rtol=1e-4, atol=1e-3)
            assert dweights.isnan().nonzero().tolist() == (places == 1).nonzero().tolist()
        else:
            alone = ops.moe_activate_gradient(dh, pre, activation, interleaved)
            assert_same(alone[used], dpre[used], "dpre alone")


def check_activate_quantize(activation: str, interleaved: bool, recipe: Recipe, given: Operands) -> None:
    pre, ends, offs, blocks = given.pre, given.ends, given.offs, given.blocks
    data, scale = ops.moe_activate_quantize(pre, blocks, recipe.value, activation, interleaved, len(offs))
    check_rows(data, scale, ops.moe_activate(pre, activation, interleaved), ends, recipe)


def check_activate_backward_quantize(
    activation: str, interleaved: bool, recipe: Recipe, with_weights: bool, given: Operands
) -> None:
    dh, pre, weights, source, places, ends, offs, blocks = given
    rows = dh, pre, weights if with_weights else None, source, places
    dpre, h, dweights, data, scale = ops.moe_activate_backward_quantize(
        *rows, blocks, offs, recipe.value, activation, interleaved
    )
    expected_dpre, expected_h, expected_dweights = ops.moe_activate_backward(*rows, activation, interleaved, offs)
    used = slice(ends[-1])
    assert_same(dpre[used], expected_dpre[used], "dpre")
    assert_same(h[used], expected_h[used], "h times weights")
    eps = torch.finfo(dweights.dtype).eps
    torch.testing.assert_close(dweights, expected_dweights, rtol=1e-4 + eps, atol=1e-3, equal_nan=True)
    check_rows(data, scale, dpre, ends, recipe)


def check_quantize_tokens(
    num_tokens: int, features: int, dtype: torch.dtype, recipe: Recipe, device: torch.device
) -> None:
    x = torch.randn(num_tokens, features + 8).to(device, dtype)[:, 8:]
    x[num_tokens // 2 :, 3] = torch.nan
    data, scale = ops.moe_quantize_tokens(x, recipe.value)
    expected = reference.quantize(x, reference.row_blocks(recipe), recipe, data.dtype)
    assert_same(data, expected[0], "data")
    assert_same(scale, expected[1], "scales")
    assert data.stride(0) % 16 == 0 and scale.is_contiguous()


# What the quantizers write


def check_rows(data: Tensor, scale: Tensor, x: Tensor, ends: Sequence[int], recipe: Recipe) -> None:
    """``data`` and ``scale`` are those of ``x`` (M, D) by rows, as far as they are in groups."""
    fp8 = machine_of(x.device).fp8_dtype
    assert (data.dtype, data.shape, data.stride(0) % 16) == (fp8, x.shape, 0)
    expected, by_row = reference.quantize(x[: ends[-1]], reference.row_blocks(recipe), recipe, fp8)
    assert_same(data[: ends[-1]], expected, "data by rows")
    least = reference.scales(torch.zeros((), device=x.device), recipe, fp8).item()
    groups = [by_row[group].t() for group in reference.group_slices(ends)]
    padded = torch.cat([F.pad(group, (0, -group.shape[1] % 4), value=least) for group in groups], 1)
    assert_same(scale[:, : padded.shape[1]], padded, "scales of rows")
