"""Quantized operands: data and scales that never part, with the name of the layout they are in."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.recipes import Recipe


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


# The version of all layouts, in what `QuantizedWeights` saves. Raise it when a layout changes and its name does not.
LAYOUT_VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeights:
    """Weights quantized once, by `quantize_weights`, in the layouts of one backend. Goes into `grouped_mm` as ``b``.

    ``weights[1:3]`` are those of some experts. ``torch.save`` takes them, and so does ``torch.load`` with
    ``weights_only=True`` once `grouped_gemm` is imported; what was saved with other layouts raises `ValueError`.
    `QuantizedGroupedLinear` holds them in a module.

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
    forward_backend: BackendKind
    dgrad_backend: BackendKind | None

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

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Data and scales by name: forward_data, forward_scale, and what dgrad does not share with forward."""
        tensors = {"forward_data": self.forward.data, "forward_scale": self.forward.scale}
        if self.dgrad is not None:
            if self.dgrad.data is not self.forward.data:
                tensors["dgrad_data"] = self.dgrad.data
            if self.dgrad.scale is not self.forward.scale:
                tensors["dgrad_scale"] = self.dgrad.scale
        return {name: x for name, x in tensors.items() if x is not None}

    @property
    def form(self) -> dict[str, Any]:
        """All but the tensors, as plain data: `weights_of` makes weights of both."""
        dgrad = None
        if self.dgrad is not None and self.dgrad_backend is not None:
            dgrad = self.dgrad_backend.value, self.dgrad.axis, self.dgrad.layout
        return {
            "layout_version": LAYOUT_VERSION,
            "shape": tuple(self.shape),
            "dtype": self.dtype,
            "recipe": self.recipe.value,
            "data_dtype": self.forward.data.dtype,
            "forward": (self.forward_backend.value, self.forward.axis, self.forward.layout),
            "dgrad": dgrad,
        }

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> QuantizedWeights:
        """The same weights on ``device``, in the same layouts; tensors that are there already are not copied.

        Raises:
            TypeError: ``device`` is no device, such as a dtype: what was quantized keeps its dtypes.
        """
        if not isinstance(device, (torch.device, str, int)):
            raise TypeError(
                f"device: expected a torch.device, its name or its index; found {device!r}; quantized weights keep "
                "their dtypes: for an a of another one, call quantize_weights with dtype"
            )
        return self._with(lambda x: with_strides(x.to(device, non_blocking=non_blocking), x.stride()), self.shape[0])

    def __getitem__(self, experts: int | slice) -> QuantizedWeights:
        """Weights of a slice of the experts, or of one, (1, K, N): views of the same memory, in the same layouts.

        Raises:
            IndexError: there is no such expert.
            TypeError: ``experts`` is neither an index nor a slice.
            ValueError: the slice is empty or has a step; or a layout does not lie expert by expert.
        """
        num_groups = self.shape[0]
        if isinstance(experts, slice):
            start, stop, step = experts.indices(num_groups)
            if step != 1 or stop <= start:
                raise ValueError(f"experts: expected a slice of at least one of {num_groups}, step 1; found {experts}")
        else:
            try:
                index = operator.index(experts)
            except TypeError:
                raise TypeError(f"experts: expected an index or a slice; found {type(experts).__name__}") from None
            if not -num_groups <= index < num_groups:
                raise IndexError(f"experts: expected an index of {num_groups} experts; found {index}")
            start = index % num_groups
            stop = start + 1
        for name, x in self.tensors.items():
            if x.shape[0] != num_groups:
                layout = (self.forward if name.startswith("forward") else self.dgrad or self.forward).layout
                raise ValueError(
                    f"experts: expected layouts that lie expert by expert; found {layout}, whose {name} has shape "
                    f"{tuple(x.shape)}; slice the weights before they are quantized"
                )
        return self._with(lambda x: x[start:stop], stop - start)

    def _with(self, change: Callable[[Tensor], Tensor], num_groups: int) -> QuantizedWeights:
        """These weights with each tensor changed, what is shared once."""
        form = self.form | {"shape": (num_groups, *self.shape[1:])}
        return weights_of(form, {name: change(x) for name, x in self.tensors.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return weights_of, (self.form, {name: compact(x) for name, x in self.tensors.items()})

    def __repr__(self) -> str:
        backends = ", ".join(
            f"{pass_}={kind.value if kind else None}"
            for pass_, kind in (("forward", self.forward_backend), ("dgrad", self.dgrad_backend))
        )
        dtype = str(self.dtype).removeprefix("torch.")
        recipe = self.recipe.value
        return f"QuantizedWeights({tuple(self.shape)}, {recipe}, dtype={dtype}, {backends}, device={self.device})"


def weights_of(form: dict[str, Any], tensors: dict[str, Tensor]) -> QuantizedWeights:
    """`QuantizedWeights` of their ``form`` and ``tensors``.

    Saved files name this function as ``grouped_gemm.weights_of``, which it stays, wherever it is defined.

    Raises:
        ValueError: they were saved with another version of the layouts, or the tensors do not have this form.
    """
    if form["layout_version"] != LAYOUT_VERSION:
        raise ValueError(other_version(form["layout_version"]))
    shape, recipe, dgrad, dgrad_backend = torch.Size(form["shape"]), Recipe.parse(form["recipe"]), None, None
    _check_tensors(tensors, shape, recipe, form["data_dtype"])
    data, scale = tensors["forward_data"], tensors["forward_scale"]
    kind, axis, layout = form["forward"]
    forward, forward_backend = Quantized(data, scale, recipe, axis, layout), BackendKind.named(kind)
    if form["dgrad"] is not None:
        kind, axis, layout = form["dgrad"]
        data, scale = tensors.get("dgrad_data", data), tensors.get("dgrad_scale", scale)
        dgrad, dgrad_backend = Quantized(data, scale, recipe, axis, layout), BackendKind.named(kind)
    return QuantizedWeights(shape, form["dtype"], forward, dgrad, forward_backend, dgrad_backend)


def _check_tensors(tensors: dict[str, Tensor], shape: torch.Size, recipe: Recipe, data_dtype: torch.dtype) -> None:
    """Data have the shape of the weights, and each block has a scale: kernels read no further."""
    num_groups, k, n = shape
    for name in dict.fromkeys(("forward_data", "forward_scale", *tensors)):
        x, is_data = tensors.get(name), name.endswith("data")
        depth, lines = (k, n) if name.startswith("forward") else (n, k)
        blocks = num_groups * -(-depth // (recipe.block or depth)) * -(-lines // recipe.weight_lines)
        dtype = data_dtype if is_data else recipe.scale_dtype
        if x is None or x.dtype != dtype or (x.shape != shape if is_data else x.numel() < blocks):
            size = f"shape {tuple(shape)}" if is_data else f"at least {blocks} values"
            found = "none" if x is None else f"shape {tuple(x.shape)} in {x.dtype}"
            raise ValueError(
                f"quantized weights: expected {name} of {size} in {dtype}; found {found}; the file is damaged: "
                "quantize the weights again"
            )


weights_of.__module__ = "grouped_gemm"
# So that torch.load(weights_only=True) makes them, after `import grouped_gemm`: it imports nothing itself.
torch.serialization.add_safe_globals([weights_of])


def other_version(found: object) -> str:
    """What an error says of layouts that are not those of this version."""
    return f"quantized weights: expected layout version {LAYOUT_VERSION}; found {found!r}; quantize the weights again"


def with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` with these strides: itself where it has them. Copies by torch lose the padding of lines."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def compact(x: Tensor) -> Tensor:
    """``x``, or a copy without the rest of a larger memory, which would be saved with it; lines may be padded."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    if x.untyped_storage().nbytes() - span * x.element_size() < 16:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def nbytes(operands: Iterable[Quantized | None]) -> int:
    """Bytes of all data and scales; what operands share counts once."""
    storages = {}
    for operand in operands:
        for tensor in (operand.data, operand.scale) if operand is not None else ():
            if tensor is not None:
                storages[tensor.data_ptr()] = tensor.nbytes
    return sum(storages.values())
