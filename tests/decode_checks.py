"""Checks of the decode kernels of a MoE layer: `experts_forward` with implementation="decode".

They run on the torch twin, on interpreted kernels and on a GPU, and compare with a loop over slots in fp64, which
quantizes what the kernels quantize and rounds h as they do.

Magnitudes differ by up to 16 from one block of 128x128 to another, so that a scale of the wrong block is far off.

T, k, M = T * k, E: tokens, slots of a token, slots, experts. H, I: hidden and intermediate features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from kernel_checks import assert_same_bits
from torch import Tensor

from grouped_gemm import Recipe, quantize_weights, reference
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.moe import experts_forward
from grouped_gemm.moe.activation import ACTIVATIONS
from grouped_gemm.moe.arguments import parse_recipe
from grouped_gemm.testing import poisoned_memory, relative_error, worst_row_error

RECIPES = (None, "fp8_blockwise", "fp8_blockwise_pow2", "fp8_weight_only")
FORMS = ("halves", "interleaved", "pair")  # of gate and up


class Sizes(NamedTuple):
    """No size is a multiple of a block. With a recipe, up starts inside a block of scales."""

    num_tokens: int = 3
    top_k: int = 3
    num_experts: int = 4
    hidden: int = 264
    inner: int = 160


BY_SLOT = Sizes(num_tokens=1, num_experts=7)  # M < E: programs are for slots; else for experts


class Call(NamedTuple):
    """One call of the layer, by what may differ."""

    recipe: str | None = None
    activation: str = "swiglu"
    form: str = "halves"
    dtype: torch.dtype = torch.bfloat16
    biases: bool = False
    sizes: Sizes = Sizes()

    def __str__(self) -> str:
        dtype, biases = str(self.dtype).removeprefix("torch."), "-biases" if self.biases else ""
        return f"{self.recipe}-{self.activation}-{self.form}-{dtype}{biases}-{'-'.join(map(str, self.sizes))}"


def each_activation(recipe: str | None) -> list[Call]:
    """A call for each activation, in turn with each form, dtype and with biases or without."""
    calls = []
    for i, (name, kind) in enumerate(ACTIVATIONS.items()):
        form = FORMS[i % 3] if kind.is_gated else "halves"
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        calls.append(Call(recipe, name, form, dtype, biases=i % 4 < 2))
    return calls


def magnitudes(*shape: int) -> Tensor:
    """Powers of two from 1/4 to 4, one for each 128x128 values of the last two axes."""
    blocks = *shape[:-2], *(-(-size // 128) for size in shape[-2:])
    spread = torch.exp2(torch.randint(-2, 3, blocks).float())
    return spread.repeat_interleave(128, -2).repeat_interleave(128, -1)[..., : shape[-2], : shape[-1]]


class Layer:
    """Operands of a call. A token names an expert twice; one of its slots, and all of the last token, are dropped.

    Attributes:
        first: gate and up, or the only projection, as dense tensors.
    """

    def __init__(self, call: Call, device: torch.device | str, ids: Tensor | None = None) -> None:
        self.call, (num_tokens, top_k, num_experts, hidden, inner) = call, call.sizes
        self.kind = ACTIVATIONS[call.activation]

        def tensor(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape) * magnitudes(*shape)).to(device, call.dtype)

        width, count = inner, 1
        if self.kind.is_gated:
            width, count = (inner, 2) if call.form == "pair" else (2 * inner, 1)
        self.x = tensor(num_tokens, hidden)
        self.first = [tensor(num_experts, width, hidden, scale=hidden**-0.5) for _ in range(count)]
        self.down = tensor(num_experts, hidden, inner, scale=inner**-0.5)
        self.first_biases = [tensor(num_experts, width) if call.biases else None for _ in range(count)]
        self.down_bias = tensor(num_experts, hidden) if call.biases else None
        self.weights = (0.1 + torch.rand(num_tokens, top_k)).to(device)
        self.ids = random_ids(call.sizes).to(device) if ids is None else ids.to(device)

    def arguments(self, first: Any = None, down: Any = None) -> tuple[Any, ...]:
        first = self.first if first is None else first
        return self.x, self.ids, self.weights, tuple(first) if len(first) == 2 else first[0], down or self.down

    def options(self, **options: Any) -> dict[str, Any]:
        biases = tuple(self.first_biases) if len(self.first) == 2 else self.first_biases[0]
        given: dict[str, Any] = {
            "recipe": self.call.recipe, "activation": self.call.activation, "implementation": "decode",
            "interleaved": self.call.form == "interleaved" and self.kind.is_gated,
            "gate_up_bias": biases if self.call.biases else None, "down_bias": self.down_bias,
        }  # fmt: skip
        return given | options

    def run(self, **options: Any) -> Tensor:
        """The call. With a recipe, weights are quantized once, as for serving."""
        recipe, _ = parse_recipe(self.call.recipe)
        if recipe is None:
            return self.run_dense(**options)
        first, down = [quantize(w, recipe) for w in self.first], quantize(self.down, recipe)
        return experts_forward(*self.arguments(first, down), **self.options(**options))

    def run_dense(self, **options: Any) -> Tensor:
        """The call with dense weights, which it quantizes itself."""
        return experts_forward(*self.arguments(), **self.options(**options))

    def truth(self) -> Tensor:
        """(T, H) in fp64."""
        recipe, weight_only = parse_recipe(self.call.recipe)
        of_rows = None if weight_only else recipe
        first, down = [values_of_weights(w, recipe) for w in self.first], values_of_weights(self.down, recipe)
        x, y = values_of_rows(self.x, of_rows), self.x.new_zeros(self.x.shape, dtype=torch.float64)
        weights = self.weights.double()
        for t, experts in enumerate(self.ids.tolist()):
            for j, e in enumerate(experts):
                if not 0 <= e < len(down):
                    continue
                pre = [w[e] @ x[t] for w in first]
                pre = [p if b is None else p + b[e].double() for p, b in zip(pre, self.first_biases)]
                if self.kind.is_gated and len(pre) == 1:
                    pre = [pre[0][0::2], pre[0][1::2]] if self.options()["interleaved"] else list(pre[0].chunk(2))
                h = values_of_rows(self.kind.value(*pre).to(self.x.dtype)[None], of_rows)[0]
                row = down[e] @ h
                y[t] += weights[t, j] * (row if self.down_bias is None else row + self.down_bias[e].double())
        return y


def quantize(w: Tensor, recipe: Recipe) -> QuantizedWeights:
    """Weights (E, out, in) in the layout of the Triton backend. On a CPU by `reference`, which writes the same bits."""
    preference = "triton" if w.is_cuda else "emulated"
    quantized = quantize_weights(w.transpose(1, 2), recipe, kernel_preference=preference)
    return replace(quantized, forward_backend=BackendKind.TRITON)


def random_ids(sizes: Sizes) -> Tensor:
    """(T, k) int64. Token 0 names one expert twice and has a slot that is dropped; a last token has no other slots."""
    ids = torch.randint(sizes.num_experts, sizes[:2])
    if ids.numel():
        ids[0, :2] = sizes.num_experts - 1
        ids[0, 2:3] = -1
    if len(ids) > 2:
        ids[-1] = sizes.num_experts
    return ids


def values_of_weights(w: Tensor, recipe: Recipe | None) -> Tensor:
    if recipe is None:
        return w.double()
    blocks = (1, 128, 128)
    return reference.dequantize(*reference.quantize(w, blocks, recipe, fp8_of(w)), blocks).double()


def values_of_rows(x: Tensor, recipe: Recipe | None) -> Tensor:
    if recipe is None:
        return x.double()
    blocks = reference.row_blocks(recipe)
    return reference.dequantize(*reference.quantize(x, blocks, recipe, fp8_of(x)), blocks).double()


def fp8_of(x: Tensor) -> torch.dtype:
    return machine_of(x.device).fp8_dtype


def tolerances(call: Call) -> tuple[float, float]:
    """Of all rows together, and of the worst one.

    Three roundings in a row: of h, which may go to the other neighbor, of a slot's row and of y. With rows in fp8,
    2^-6 of the values of h may go to the other neighbor, which is up to 2^-3 of the value away: 2^-3 * 2^-3. In a row,
    one value may outweigh all others, and go there.
    """
    rounds_rows = call.recipe is not None and call.recipe != "fp8_weight_only"
    rounding = 3 * torch.finfo(call.dtype).eps / 2
    return rounding + (2.0**-6 if rounds_rows else 0), rounding + (2.0**-4 if rounds_rows else 0)


def assert_right(layer: Layer, y: Tensor) -> None:
    """``y`` is the truth, zero where all slots of a token were dropped."""
    assert (y.shape, y.dtype, y.is_contiguous()) == (layer.x.shape, layer.x.dtype, True)
    truth, (limit, worst) = layer.truth(), tolerances(layer.call)
    for name, error, allowed in (("all", relative_error(y, truth), limit), ("worst", worst_row_error(y, truth), worst)):
        assert error <= allowed, f"{layer.call}, {name}: error {error:.3g}, expected at most {allowed:.3g}"


def check_call(call: Call, device: torch.device | str, ids: Tensor | None = None) -> None:
    """Values, and that bits repeat, in memory that was NaN too: of a dropped slot, h and its scales are not written."""
    layer = Layer(call, device, ids)
    y = layer.run()
    assert_right(layer, y)
    with poisoned_memory():
        assert_same_bits(layer.run(), y, "in memory that was NaN")


SMALL = Sizes(hidden=72, inner=64)
ROUTINGS: dict[str, tuple[Sizes, Tensor]] = {
    "one expert has more rows than a tile": (SMALL._replace(num_tokens=7), torch.full((7, 3), 2)),
    "all slots dropped": (SMALL, torch.tensor([[-1, 4, -7]] * 3)),
    "ids that 32 bits would change": (SMALL, torch.tensor([[2**32, 0, 2**31], [-(2**32), 1, 2**63 - 1], [3, 2, 0]])),
    "the same by slot": (SMALL._replace(num_tokens=1, num_experts=5), torch.tensor([[2**32 + 1, 1, -(2**31)]])),
    "int32": (SMALL, torch.tensor([[3, 0, 1], [-1, 2, 2], [4, 0, 3]], dtype=torch.int32)),
    "int32 by slot": (SMALL._replace(num_tokens=1, num_experts=5), torch.tensor([[3, 5, 3]], dtype=torch.int32)),
    "k = 1": (SMALL._replace(num_tokens=2, top_k=1), torch.tensor([[3], [0]])),
    "M = E": (SMALL._replace(num_tokens=2, top_k=2), torch.tensor([[1, 0], [3, 1]])),
    "one slot": (SMALL._replace(num_tokens=1, top_k=1), torch.tensor([[1]])),
    "one expert": (SMALL._replace(num_tokens=2, num_experts=1), torch.tensor([[0, 0, 0], [0, -1, 0]])),
    "k = 17": (SMALL._replace(num_tokens=1, top_k=17, num_experts=3), torch.arange(17)[None] % 4),
    "no token": (SMALL._replace(num_tokens=0), torch.zeros(0, 3, dtype=torch.int64)),
    "k = 0": (SMALL._replace(top_k=0), torch.zeros(3, 0, dtype=torch.int64)),
    "H and I of 1": (SMALL._replace(hidden=1, inner=1), torch.tensor([[0, 3, 1]] * 3)),
}


def widened(x: Tensor, extra: int = 3) -> Tensor:
    """A slice of wider rows, which start at no multiple of 16 bytes."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + extra), torch.nan).to(x)
    wide[..., 1 : 1 + x.shape[-1]] = x
    return wide[..., 1 : 1 + x.shape[-1]]


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


def check_operands_of_any_strides(call: Call, device: torch.device | str) -> None:
    """Operands in other strides give the same bits."""
    layer = Layer(call, device)
    y = layer.run()

    changes: dict[str, dict[str, Any]] = {
        "x in wider rows": {"x": widened(layer.x)},
        "x transposed": {"x": transposed(layer.x)},
        "x negated": {"x": negated(layer.x)},
        "ids transposed": {"ids": transposed(layer.ids)},
        "weights transposed": {"weights": transposed(layer.weights)},
        "weights in fp64": {"weights": layer.weights.double()},
    }
    if call.recipe is None:
        changes |= {
            "first transposed": {"first": [transposed(w) for w in layer.first]},
            "first in wider rows": {"first": [widened(w) for w in layer.first]},
            "down transposed": {"down": transposed(layer.down)},
            "neither axis of down contiguous": {"down": every_other(layer.down)},
        }
    if call.biases:
        changes["biases in wider rows"] = {"first_biases": [widened(b) for b in layer.first_biases]}
        if len(layer.first) == 2:
            changes["bias of up in wider rows"] = {
                "first_biases": [layer.first_biases[0], widened(layer.first_biases[1])]
            }
        changes["bias negated"] = {"down_bias": negated(layer.down_bias)}
    for name, change in changes.items():
        before = {attribute: getattr(layer, attribute) for attribute in change}
        for attribute, value in change.items():
            setattr(layer, attribute, value)
        assert_same_bits(layer.run(), y, name)
        for attribute, value in before.items():
            setattr(layer, attribute, value)


def check_nan_stays_in_its_token(call: Call, device: torch.device | str) -> None:
    layer = Layer(call, device, torch.tensor([[0, 2, 2], [2, 0, -1], [2, 1, 0]]))
    layer.weights[1, 2] = torch.nan  # of a slot that is dropped
    y = layer.run()
    assert y.isfinite().all()
    layer.x[1, 130] = torch.nan
    found = layer.run()
    assert found[1].isnan().all()
    assert_same_bits(found[::2], y[::2], "other tokens")


def check_dense_weights(call: Call, device: torch.device | str) -> None:
    """Weights that the call quantizes give the bits of those from `quantize_weights`, whatever their strides are."""
    layer = Layer(call, device)
    y = layer.run()
    assert_same_bits(layer.run_dense(), y, "dense weights")
    if call.recipe != "fp8_weight_only":
        assert_same_bits(layer.run(recipe=None), y, "the recipe of the weights")
    layer.first, layer.down = [transposed(w) for w in layer.first], every_other(layer.down)
    assert_same_bits(layer.run_dense(), y, "dense weights in other strides")
