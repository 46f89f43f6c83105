"""Recipes: what is scaled, and how finely.

A scale is a dequantization factor: ``value = data * scale``. `reference` has the arithmetic.
"""

from __future__ import annotations

from enum import Enum

import torch


class Recipe(Enum):
    """How the operands of a grouped GEMM are quantized.

    Scales of the operands:

    | recipe | a row of ``a`` | ``b`` | operands of wgrad |
    | --- | --- | --- | --- |
    | ``NONE`` | none | none | none |
    | ``FP8_ROWWISE`` | one | one per column | one per column of a group |
    | ``FP8_BLOCKWISE`` | one per 128 values of K | one per 128x128 block | one per 128 rows of a group |
    | ``MXFP8`` | one per 32 values of K | one per 32 values of K, in dgrad of N | one per 32 rows of a group |

    Data are 8-bit floats with 4 exponent and 3 mantissa bits (``Machine.fp8_dtype``). Scales are fp32. The ``_POW2``
    recipes round them up to a power of two. ``MXFP8`` stores powers of two as E8M0 (OCP Microscaling Formats v1.0,
    section 5.4).
    """

    NONE = "none"
    FP8_ROWWISE = "fp8_rowwise"
    FP8_ROWWISE_POW2 = "fp8_rowwise_pow2"
    FP8_BLOCKWISE = "fp8_blockwise"
    FP8_BLOCKWISE_POW2 = "fp8_blockwise_pow2"
    MXFP8 = "mxfp8"

    @property
    def is_scaled(self) -> bool:
        """Whether operands are quantized at all."""
        return self is not Recipe.NONE

    @property
    def block(self) -> int | None:
        """The number of values along the contraction that share a scale; None: all of them."""
        return _BLOCK[self]

    @property
    def weight_lines(self) -> int:
        """The number of lines of ``b`` that share a scale: the size of a block across the contraction."""
        return 128 if self in (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2) else 1

    @property
    def power_of_two_scales(self) -> bool:
        """Whether every scale is a power of two."""
        return self in (Recipe.FP8_ROWWISE_POW2, Recipe.FP8_BLOCKWISE_POW2, Recipe.MXFP8)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of stored scales: float32, or float8_e8m0fnu for MXFP8."""
        return torch.float8_e8m0fnu if self is Recipe.MXFP8 else torch.float32

    @classmethod
    def parse(cls, value: Recipe | str) -> Recipe:
        """Converts ``value``: a `Recipe`, or its name in upper or lower case.

        Raises:
            ValueError: no recipe has this name.
        """
        if isinstance(value, Recipe):
            return value
        if isinstance(value, str) and value.lower() in _BY_NAME:
            return _BY_NAME[value.lower()]
        raise ValueError(f"recipe: expected a Recipe or one of {', '.join(_BY_NAME)}; found {value!r}")


FASTEST = "fp8"  # in place of a recipe: the fastest of `OF_FASTEST`, see `selection.rules.fastest_recipe`
OF_FASTEST = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE)


def is_fastest(value: object) -> bool:
    """Whether ``value`` asks for the fastest recipe."""
    return isinstance(value, str) and value.lower() == FASTEST


_BY_NAME = {recipe.value: recipe for recipe in Recipe}
_BLOCK = {
    Recipe.NONE: None,
    Recipe.FP8_ROWWISE: None,
    Recipe.FP8_ROWWISE_POW2: None,
    Recipe.FP8_BLOCKWISE: 128,
    Recipe.FP8_BLOCKWISE_POW2: 128,
    Recipe.MXFP8: 32,
}
