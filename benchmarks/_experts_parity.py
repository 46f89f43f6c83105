"""Parity of the implementations of `experts_forward`: each result against an interval that must contain it.

Every implementation computes the same layer and rounds to bf16 in the same places: the pre-activations, h, the output
of the second GEMM, the sum over slots. In between it computes in fp32, and only the order of its sums is its own. There
is one exception: a kernel that applies the gate at the end of the first GEMM does not round the pre-activations. So a
result is compared in two ways.

"exact" operands. x and the weights are -1, 0 or 1, topk_weights are multiples of 1/8, and the activation is reglu. All
terms of a sum are then multiples of one unit, and their magnitudes add up to less than 2^24 units, which `bounds`
checks. Such a sum is exact in fp32 in any order, and pre-activations, integers of at most 256 = H, are exact in bf16
too. So the arithmetic of all implementations is the same: the difference must be zero.

"random" operands, swiglu. `bounds` propagates an interval [lo, hi] through the layer in fp64, element by element:

- A sum of n terms, whose magnitudes add up to S, lies within n * 2^-22 * S of the exact sum, in any order and any
  blocking. Proof: an fp32 addition loses less than 2^-23 of its result even if it truncates. Tensor cores align the
  addends of a block, of at least 4 products and the running sum, to the largest one, and truncate each (Fasi et al.
  2021, doi:10.7717/peerj-cs.330): at most (n + n / 4) times 2^-23 * S, plus n / 4 for the sums themselves. That is
  1.5 * n * 2^-23 * S; terms of second order, at most n * 2^-23 of it, fit below 2 * n * 2^-23 * S. So does 2^-24 * S
  for products that are rounded first, as in the sum over slots. Products of bf16 are exact in fp32.
- The operands of the second GEMM are intervals of middle c and radius r: the sum of |w| * r is added to the radius, and
  S is the sum of |w| * (|c| + r).
- An activation takes an interval to the interval of its values, widened by 2^-16 of their magnitude. That is far more
  than an fp32 sigmoid and two products lose: some units of 2^-24, and |x| * 2^-23 in the argument of the exponential
  function, with |x| < 64.
- Rounding to bf16 is monotonic, so it takes [lo, hi] to [round(lo), round(hi)]. Unless a value is close to where
  rounding changes, both ends are the same. That makes the interval narrow: one unit in the last place of bf16 for many
  elements, where a bound that adds half a unit for each rounding would have a tenth of the element itself.

Each result must lie in its interval, that with pre-activations in bf16 or that with pre-activations in fp32. So results
of one kind differ by at most hi - lo, and those of both kinds by at most the greatest hi less the least lo: that is the
bound that is printed. It holds for bf16 without a recipe. `rows_of` turns off
`torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction`, since cuBLAS may otherwise add up parts of a sum in
bf16.

T, k, E, H, I: tokens, slots of a token, experts, hidden and intermediate features. R: the routed rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grouped_gemm.moe import experts_forward

CASES = ((1, 64, 2), (1, 1, 2), (1, 7, 1), (1, 4, 8), (4, 64, 2))  # batch, tokens, k
IMPLEMENTATIONS = ("eager", "eager_fused", "batched_mm", "grouped_mm")
OPERANDS = ("exact", "random")
E, H, I = 8, 256, 512  # noqa: E741
_SUM = 2.0**-22  # error of a sum, over terms and magnitude
_ACTIVATION = 2.0**-16  # error of an activation in fp32, relative
_SILU_MIN_AT, _SILU_MIN = -1.2784645427610738, -0.2784645427610738


class Inputs(NamedTuple):
    """Operands of a layer in bf16. ``exact``: as the docstring of the module says."""

    x: Tensor  # (T, H)
    ids: Tensor  # (T, k)
    weights: Tensor  # (T, k), fp32
    gate_up: Tensor  # (E, 2I, H)
    down: Tensor  # (E, H, I)
    exact: bool


class Interval(NamedTuple):
    """What a correct result lies in: fp64 tensors of one shape."""

    lo: Tensor
    hi: Tensor


PRE = ("bf16", "fp32")  # what the activation reads
Run = Callable[[Inputs, str], Tensor]


def make_inputs(batch: int, tokens: int, k: int, operands: str, device: str) -> Inputs:
    """Inputs of batch * tokens tokens. They are drawn on the CPU, so that every machine has the same."""
    generator = torch.Generator().manual_seed(0)
    exact = operands == "exact"

    def values(*shape: int, scale: float) -> Tensor:
        if exact:
            return torch.randint(-1, 2, shape, generator=generator).to(device, torch.bfloat16)
        return (scale * torch.randn(shape, generator=generator)).to(device, torch.bfloat16)

    num_tokens = batch * tokens
    x, gate_up, down = (
        values(num_tokens, H, scale=1.0),
        values(E, 2 * I, H, scale=H**-0.5),
        values(E, H, I, scale=I**-0.5),
    )
    ids = torch.rand(num_tokens, E, generator=generator).topk(k, dim=-1).indices
    if exact:
        weights = torch.randint(1, 9, (num_tokens, k), generator=generator) / 8
    else:
        weights = torch.rand(num_tokens, k, generator=generator).softmax(-1)
    return Inputs(x, ids.to(device), weights.to(device), gate_up, down, exact)


def layer(inputs: Inputs, implementation: str) -> Tensor:
    """The layer of this package, (T, H)."""
    activation = "reglu" if inputs.exact else "swiglu"
    options: dict[str, Any] = {"implementation": implementation, "activation": activation}
    with torch.no_grad():
        return experts_forward(inputs.x, inputs.ids, inputs.weights, inputs.gate_up, inputs.down, **options)


def bounds(inputs: Inputs, pre: str) -> Interval:
    """The interval of each output, (T, H), of an implementation whose activation reads ``pre``, out of `PRE`.

    Raises:
        ValueError: the operands are called exact, but a sum of theirs need not be exact in fp32.
    """
    num_tokens, k = inputs.ids.shape
    lo = torch.empty(num_tokens, k, inputs.x.shape[1], dtype=torch.float64, device=inputs.x.device)
    hi = torch.empty_like(lo)
    for e in range(len(inputs.down)):
        tokens, slots = torch.where(inputs.ids == e)
        rows, gate_up, down = (x.double() for x in (inputs.x[tokens], inputs.gate_up[e], inputs.down[e]))
        lo[tokens, slots], hi[tokens, slots] = _expert(rows, gate_up, down, inputs.exact, pre)
    weights = inputs.weights.double()[:, None, :]  # (T, 1, k)
    y = _rounded(_product(weights, Interval(lo, hi), inputs.exact, unit=2.0**-3))
    return Interval(y.lo.squeeze(1), y.hi.squeeze(1))


def _expert(x: Tensor, gate_up: Tensor, down: Tensor, exact: bool, pre: str) -> Interval:
    """The rows of one expert, (R, H), from x (R, H), all in fp64."""
    both = _product(x, Interval(gate_up.t(), gate_up.t()), exact)
    both = _rounded(both) if pre == "bf16" else both
    gate, up = (Interval(*ends) for ends in zip(*(end.chunk(2, dim=1) for end in both)))
    act = Interval(gate.lo.clamp(min=0), gate.hi.clamp(min=0)) if exact else _silu(gate)
    corners = torch.stack([a * b for a in act for b in up])
    lo, hi = corners.amin(0), corners.amax(0)
    slack = 0.0 if exact else _ACTIVATION
    h = _rounded(Interval(lo - slack * lo.abs(), hi + slack * hi.abs()))
    y = _rounded(_product(down, Interval(h.lo.t(), h.hi.t()), exact))  # transposed: `_product` takes it on the right
    return Interval(y.lo.t(), y.hi.t())


def _product(a: Tensor, b: Interval, exact: bool, unit: float = 1.0) -> Interval:
    """The product a @ b in fp32; ``unit`` is the unit of the terms of exact operands."""
    middle, radius = (b.hi + b.lo) / 2, (b.hi - b.lo) / 2
    total = a.abs() @ (middle.abs() + radius)
    if exact:
        if total.numel() and total.max() >= 2**24 * unit:
            raise ValueError(f"exact operands: expected sums of magnitudes below 2^24 units; found {total.max():.3g}")
        error = torch.zeros_like(total)
    else:
        error = a.abs() @ radius + a.shape[-1] * _SUM * total
    y = a @ middle
    return Interval(y - error, y + error)


def _silu(x: Interval) -> Interval:
    ends = torch.stack([torch.nn.functional.silu(end) for end in x])
    has_minimum = (x.lo <= _SILU_MIN_AT) & (x.hi >= _SILU_MIN_AT)
    return Interval(torch.where(has_minimum, _SILU_MIN, ends.amin(0)), ends.amax(0))


def _rounded(x: Interval) -> Interval:
    return Interval(*(end.to(torch.float32).to(torch.bfloat16).double() for end in x))


def compare(found: Tensor, eager: Tensor, intervals: Mapping[str, Interval]) -> dict[str, Any]:
    """How far a result is from that of eager, and how many of its elements lie outside of their intervals.

    Args:
        found: the result.
        eager: that of eager, which rounds pre-activations to bf16.
        intervals: by what the activation reads; all of the result must lie in one of them.

    Returns:
        max, mean: of the absolute difference from eager. bound_max, bound_mean: what it may be. pre: the
        interval with most elements, the first if there are two. outside: how many are not in it; NaN is outside.
    """
    found = found.double()
    outside = {pre: int((~((found >= x.lo) & (found <= x.hi))).sum()) for pre, x in intervals.items()}
    pre = min(outside, key=outside.__getitem__)
    difference, mine, other = (found - eager.double()).abs(), intervals[pre], intervals["bf16"]
    width = torch.maximum(mine.hi, other.hi) - torch.minimum(mine.lo, other.lo)
    return {
        "max": difference.max().item(),
        "mean": difference.mean().item(),
        "bound_max": width.max().item(),
        "bound_mean": width.mean().item(),
        "pre": pre,
        "outside": outside[pre],
    }


def rows_of(case: tuple[int, int, int], operands: str, device: str, run: Run = layer) -> Iterator[dict[str, Any]]:
    """A row for each implementation: how its result compares with eager's and with the bound."""
    batch, tokens, k = case
    inputs = make_inputs(batch, tokens, k, operands, device)
    with _sums_in_fp32():
        intervals, eager = {pre: bounds(inputs, pre) for pre in PRE}, run(inputs, "eager")
        for name in IMPLEMENTATIONS:
            row = {"part": "parity", "batch": batch, "tokens": tokens, "k": k, "operands": operands, "name": name}
            yield row | compare(run(inputs, name), eager, intervals)


@contextmanager
def _sums_in_fp32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
