"""`QuantizedGroupedLinear`: quantized weights as a module.

E, K, N: groups, in and out features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grouped_gemm.core.quantized import QuantizedWeights, compact, other_version, weights_of, with_strides
from grouped_gemm.functional import grouped_mm
from grouped_gemm.group_plan import GroupPlan
from grouped_gemm.selection.checks import check_bias

_NAMES = ("forward_data", "forward_scale", "dgrad_data", "dgrad_scale")
_CODES = {1: torch.uint8, 4: torch.int32}


class QuantizedGroupedLinear(torch.nn.Module):
    """A grouped linear layer whose weights were quantized beforehand: ``grouped_mm(a, weights, offs, bias=bias)``.

    It runs forward, and also dgrad if the weights were quantized with ``dgrad=True``. Weights get no gradient.

    Data and scales are stored as their bits in integer buffers, so ``.half()`` and ``.to(torch.bfloat16)`` do not
    convert them. ``.to(device)``, ``state_dict``, ``load_state_dict`` and ``copy.deepcopy`` work as usual. The state
    also records its form: shape, recipe, backends and the version of the layouts. Loading raises an error for a state
    of another form, and for data without their form or scales, even with ``strict=False``.
    The module keeps the memory of ``weights``, and ``load_state_dict`` writes to it: give each module its own weights.
    For a shard of the experts, pass ``weights[first:last]``: the other experts are neither kept nor saved.

    Args:
        weights: from `quantize_weights`.
        bias: (E, N), added to each row of its group. A `torch.nn.Parameter` stays one; a tensor becomes a buffer.

    Raises:
        TypeError: ``weights`` is not a `QuantizedWeights`, or ``bias`` is not a tensor.
        ValueError: ``bias`` has the wrong shape or dtype.
    """

    forward_data: Tensor
    bias: Tensor | None

    def __init__(self, weights: QuantizedWeights, bias: Tensor | None = None) -> None:
        super().__init__()
        if not isinstance(weights, QuantizedWeights):
            found = type(weights).__name__
            raise TypeError(f"weights: expected QuantizedWeights, from quantize_weights; found {found}")
        if bias is not None:
            check_bias(bias, weights.shape)
        tensors = {name: compact(x) for name, x in weights.tensors.items()}
        self._form = weights.form
        self._cached: tuple[Any, QuantizedWeights] | None = None  # the addresses of the buffers, and `weights`
        self._views = {name: (x.dtype, x.stride()) for name, x in tensors.items()}
        for name in _NAMES:
            x = tensors.get(name)
            self.register_buffer(name, None if x is None else x.view(_CODES[x.element_size()]))
        if isinstance(bias, torch.nn.Parameter):
            self.bias = bias
        else:
            self.register_buffer("bias", bias)

    @property
    def weights(self) -> QuantizedWeights:
        """The weights, as views of the buffers."""
        buffers = []
        for name, (_, strides) in self._views.items():
            codes = self._buffers[name]
            assert codes is not None, "every view has a registered buffer"
            if codes.stride() != strides:
                # A copy to another device, or loading with assign=True, loses the padding of lines.
                self._buffers[name] = codes = with_strides(codes, strides)
            buffers.append(codes)
        if torch.compiler.is_compiling():
            return self._make(buffers)
        where = [(x.untyped_storage()._cdata, x.storage_offset()) for x in buffers]
        if self._cached is None or self._cached[0] != where:
            self._cached = where, self._make(buffers)  # keeps the storage alive, so its address is not reused
        return self._cached[1]

    def _make(self, buffers: list[Tensor]) -> QuantizedWeights:
        views = zip(self._views.items(), buffers)
        return weights_of(self._form, {name: x.view(dtype) for (name, (dtype, _)), x in views})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}

    def forward(self, a: Tensor, offs: Tensor | GroupPlan, *, group_alignment: int = 1) -> Tensor:
        """(M, N) from ``a`` (M, K). ``offs`` (E,) int32 has the end row of each group, as in `grouped_mm`."""
        return grouped_mm(a, self.weights, offs, bias=self.bias, group_alignment=group_alignment)

    def extra_repr(self) -> str:
        """The weights and whether there is a bias."""
        return f"{self.weights!r}, bias={self.bias is not None}"

    def get_extra_state(self) -> dict[str, Any]:
        """The form of the weights as plain data."""
        return dict(self._form)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Does nothing: `_load_from_state_dict` has already compared the form."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        error = self._mismatch(state_dict, prefix)
        if error is not None:
            error_msgs.append(error)
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _mismatch(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why a state cannot be loaded; None if its bits mean the same as this module's. Called before loading."""
        codes = {name: state_dict[prefix + name] for name in self._views if prefix + name in state_dict}
        key = f"{prefix}_extra_state"
        if key not in state_dict:
            # Without data and scales there is nothing to misread. `strict` handles missing keys.
            advice = "save the module's whole state_dict, which includes it"
            return f"{key}: expected the form of {', '.join(codes)}; found none; {advice}" if codes else None
        missing = [name for name in self._views if name not in codes]
        if codes and missing:  # data would be combined with scales of other weights
            return (
                f"{prefix}{missing[0]}: expected it together with {', '.join(codes)}; found none; load all of them or "
                "none"
            )
        saved = state_dict[key]
        if not isinstance(saved, dict):
            return f"{key}: expected a dict, as get_extra_state returns it; found {type(saved).__name__}"
        differing = [name for name in self._form if saved.get(name) != self._form[name]]
        if "layout_version" in differing:
            return other_version(saved.get("layout_version"))
        if differing:
            expected, found = ({name: form.get(name) for name in differing} for form in (self._form, saved))
            return (
                f"{prefix}weights: expected {expected}; found {found}; create the module from weights that were "
                "quantized like the saved ones: same experts, recipe, dtype, dgrad and kernel_preference"
            )
        for name, x in codes.items():
            own = self.get_buffer(name)
            if x.dtype != own.dtype:  # a copy would convert the values
                return f"{prefix}{name}: expected the bits as {own.dtype}; found {x.dtype}; use x.view({own.dtype})"
        return None
