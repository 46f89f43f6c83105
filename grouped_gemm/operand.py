"""Quantized operands: data and scales that never part, with the name of the layout they are in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from grouped_gemm.preference import KernelPreference
from grouped_gemm.recipes import Recipe


@dataclass(eq=False)  # not frozen, which costs half a microsecond for each
class Quantized:
    """One operand as one kernel reads it.

    Attributes:
        data: the values, in the recipe's data type; the operand itself where the recipe is NONE.
        scale: dequantization factors (``value = data * scale``); None where the recipe is NONE.
        recipe: how it was quantized.
        axis: the axis of the logical operand that the GEMM sums over, along which scales run.
        layout: names the physical form. A kernel reads the layouts that its backend writes, no other.
    """

    data: Tensor
    scale: Tensor | None
    recipe: Recipe
    axis: int
    layout: str

    @property
    def form(self) -> tuple[Recipe, int, str]:
        """All but the tensors: ``Quantized(data, scale, *form)`` is the operand again."""
        return self.recipe, self.axis, self.layout


Layouts = tuple[Quantized | None, Quantized | None]  # of one operand, for forward and dgrad or for rows and columns


@dataclass(frozen=True, eq=False)
class QuantizedWeights:
    """Weights quantized once, by `quantize_weights`, in the layouts of one backend. Goes into `grouped_mm` as ``b``.

    Attributes:
        shape: (E, K, N) of the weights.
        dtype: dtype that the weights had, and the one that ``a`` must have.
        forward: the operand of the forward pass.
        dgrad: the operand of dgrad; None: no gradient can flow to ``a``.
        forward_backend: whose layout ``forward`` is in.
        dgrad_backend: whose layout ``dgrad`` is in.
    """

    shape: torch.Size
    dtype: torch.dtype
    forward: Quantized
    dgrad: Quantized | None
    forward_backend: KernelPreference
    dgrad_backend: KernelPreference | None

    @property
    def recipe(self) -> Recipe:
        """How the weights were quantized."""
        return self.forward.recipe

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.forward.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of all data and scales; what forward and dgrad share counts once."""
        return nbytes((self.forward, self.dgrad))


def nbytes(operands: Iterable[Quantized | None]) -> int:
    """Bytes of all data and scales; what operands share counts once."""
    storages = {}
    for operand in operands:
        for tensor in (operand.data, operand.scale) if operand is not None else ():
            if tensor is not None:
                storages[tensor.data_ptr()] = tensor.nbytes
    return sum(storages.values())
