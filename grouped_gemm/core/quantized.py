"""Quantized operands: data together with their scales and the name of their layout."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.recipes import Recipe


@dataclass(eq=False)  # not frozen, which would cost half a microsecond per object
class Quantized:
    """One operand in the layout that a kernel reads.

    Attributes:
        data: the values, in the recipe's data type; the operand itself if the recipe is NONE.
        scale: dequantization factors (``value = data * scale``); None if the recipe is NONE.
        recipe: how it was quantized.
        axis: the axis of the logical operand that the GEMM contracts; scales run along it.
        layout: the name of the physical layout. A kernel reads only layouts that its backend writes.
    """

    data: Tensor
    scale: Tensor | None
    recipe: Recipe
    axis: int
    layout: str

    @property
    def form(self) -> tuple[Recipe, int, str]:
        """Everything except the tensors: ``Quantized(data, scale, *form)`` gives the operand back."""
        return self.recipe, self.axis, self.layout


Layouts = tuple[Quantized | None, Quantized | None]  # of one operand: for forward and dgrad, or rows and columns


# The version of all layouts, saved with `QuantizedWeights`. Increase it when a layout changes but keeps its name.
LAYOUT_VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeights:
    """Weights quantized once, by `quantize_weights`, in one backend's layouts. Pass them to `grouped_mm` as ``b``.

    ``weights[1:3]`` selects experts. ``torch.save`` works, and so does ``torch.load`` with ``weights_only=True`` after
    `grouped_gemm` was imported. Loading weights that were saved with other layouts raises `ValueError`.
    `QuantizedGroupedLinear` holds weights in a module.

    Attributes:
        shape: (E, K, N) of the weights.
        dtype: the original dtype of the weights, and the required dtype of ``a``.
        forward: the operand of the forward pass.
        dgrad: the operand of dgrad; None: no gradient can flow to ``a``.
        forward_backend: the backend of the layout of ``forward``.
        dgrad_backend: the backend of the layout of ``dgrad``.
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
        """The device of the weights."""
        return self.forward.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of all data and scales; tensors that forward and dgrad share count once."""
        return nbytes((self.forward, self.dgrad))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Data and scales by name: forward_data, forward_scale, and the same of dgrad unless shared with forward."""
        tensors = {"forward_data": self.forward.data, "forward_scale": self.forward.scale}
        if self.dgrad is not None:
            if self.dgrad.data is not self.forward.data:
                tensors["dgrad_data"] = self.dgrad.data
            if self.dgrad.scale is not self.forward.scale:
                tensors["dgrad_scale"] = self.dgrad.scale
        return {name: x for name, x in tensors.items() if x is not None}

    @property
    def form(self) -> dict[str, Any]:
        """Everything except the tensors, as plain data. `weights_of` combines both."""
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
        """The same weights on ``device``, in the same layouts. Tensors that are already there are not copied.

        Raises:
            TypeError: ``device`` is not a device, but for example a dtype: quantized weights keep their dtypes.
        """
        if not isinstance(device, (torch.device, str, int)):
            raise TypeError(
                f"device: expected a torch.device, its name or its index; found {device!r}; quantized weights keep "
                "their dtypes: if a has another dtype, pass it to quantize_weights as dtype"
            )
        return self._with(lambda x: with_strides(x.to(device, non_blocking=non_blocking), x.stride()), self.shape[0])

    def __getitem__(self, experts: int | slice) -> QuantizedWeights:
        """The weights of a slice of the experts, or of one expert, (1, K, N): views, in the same layouts.

        Raises:
            IndexError: there is no such expert.
            TypeError: ``experts`` is neither an index nor a slice.
            ValueError: the slice is empty or has a step; or the experts are not the first axis of a layout.
        """
        num_groups = self.shape[0]
        if isinstance(experts, slice):
            start, stop, step = experts.indices(num_groups)
            if step != 1 or stop <= start:
                raise ValueError(
                    f"experts: expected a slice with at least one of {num_groups} experts and step 1; found {experts}"
                )
        else:
            try:
                index = operator.index(experts)
            except TypeError:
                raise TypeError(f"experts: expected an index or a slice; found {type(experts).__name__}") from None
            if not -num_groups <= index < num_groups:
                raise IndexError(f"experts: expected an index into {num_groups} experts; found {index}")
            start = index % num_groups
            stop = start + 1
        for name, x in self.tensors.items():
            if x.shape[0] != num_groups:
                layout = (self.forward if name.startswith("forward") else self.dgrad or self.forward).layout
                raise ValueError(
                    f"experts: expected layouts with experts as the first axis; found {layout}, whose {name} has shape "
                    f"{tuple(x.shape)}; slice the weights before quantizing them"
                )
        return self._with(lambda x: x[start:stop], stop - start)

    def _with(self, change: Callable[[Tensor], Tensor], num_groups: int) -> QuantizedWeights:
        """These weights after ``change`` of each tensor; a shared tensor is changed once."""
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
    """Makes `QuantizedWeights` from their ``form`` and ``tensors``.

    Saved files name this function as ``grouped_gemm.weights_of``, so that name must stay.

    Raises:
        ValueError: the weights were saved with another version of the layouts, or the tensors do not match ``form``.
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
    """Checks that data have the shape of the weights and that each block has a scale, since kernels rely on it.

    Raises:
        ValueError: a tensor is missing, or has the wrong shape or dtype.
    """
    num_groups, k, n = shape
    for name in dict.fromkeys(("forward_data", "forward_scale", *tensors)):
        x, is_data = tensors.get(name), name.endswith("data")
        contraction, lines = (k, n) if name.startswith("forward") else (n, k)
        blocks = num_groups * -(-contraction // (recipe.block or contraction)) * -(-lines // recipe.weight_lines)
        dtype = data_dtype if is_data else recipe.scale_dtype
        if x is None or x.dtype != dtype or (x.shape != shape if is_data else x.numel() < blocks):
            size = f"shape {tuple(shape)}" if is_data else f"at least {blocks} values"
            found = "none" if x is None else f"shape {tuple(x.shape)} in {x.dtype}"
            raise ValueError(
                f"quantized weights: expected {name} of {size} in {dtype}; found {found}; the file is damaged: "
                "quantize the original weights again"
            )


weights_of.__module__ = "grouped_gemm"
# For torch.load(weights_only=True), which works after `import grouped_gemm` since it imports nothing itself.
torch.serialization.add_safe_globals([weights_of])


def other_version(found: object) -> str:
    """The error message for weights with another layout version."""
    return f"quantized weights: expected layout version {LAYOUT_VERSION}; found {found!r}; quantize the weights again"


def with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` with these strides, copied if it has others: torch's own copies lose the padding of lines."""
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def compact(x: Tensor) -> Tensor:
    """``x``, copied if its storage is larger, which would be saved as a whole. The padding of lines stays."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
    if x.untyped_storage().nbytes() - span * x.element_size() < 16:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def nbytes(operands: Iterable[Quantized | None]) -> int:
    """Bytes of all data and scales; tensors that operands share count once."""
    storages = {}
    for operand in operands:
        for tensor in (operand.data, operand.scale) if operand is not None else ():
            if tensor is not None:
                storages[tensor.data_ptr()] = tensor.nbytes
    return sum(storages.values())
