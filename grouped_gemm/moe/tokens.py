"""Tokens that are in fp8 already when the experts get them, as after expert parallelism.

T, H: tokens, features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grouped_gemm.core.library import ops
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.moe import steps  # noqa: F401  (defines ops)


class QuantizedTokens(NamedTuple):
    """What the op `moe_quantize_tokens` returns.

    Attributes:
        data: (T, H) fp8.
        scale: (T, ceil(H/128)) fp32, contiguous.
        recipe: the recipe.
    """

    data: Tensor
    scale: Tensor
    recipe: Recipe

    def values(self, x: Tensor) -> Tensor:
        """(T, H) in the dtype of ``x``, which has no values; their gradient is the gradient of ``x``."""
        found: Tensor = _Values.apply(x, self.data, self.scale)
        return found


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, data: Tensor, scale: Tensor) -> Tensor:
        """(T, H) in the dtype of ``x``."""
        return ops.moe_dequantize_tokens(data, scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of ``x``."""
        return dy, None, None
