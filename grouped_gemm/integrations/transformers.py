"""The experts of transformers' models on this package, by name: ``experts_implementation="grouped_gemm"``.

T, k, H, I: tokens, experts per token, hidden and intermediate features. E, M: experts, routed rows; M = T * k.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from grouped_gemm.core.preference import KernelPreference, Preference
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.functional import grouped_mm
from grouped_gemm.group_plan import GroupPlan
from grouped_gemm.moe.activation import ACTIVATIONS, Activation
from grouped_gemm.moe.experts import experts_forward
from grouped_gemm.moe.routing import route
from grouped_gemm.moe.rows import combine, gather
from grouped_gemm.selection import checks

_OURS: set[str] = set()  # names that `register` has added


def register(
    recipe: Recipe | str | None = None,
    *,
    name: str = "grouped_gemm",
    kernel_preference: Preference = KernelPreference.AUTO,
    keep: str = "full",
) -> None:
    """Adds an implementation of experts to transformers, which a model then takes by its name.

    Call it before the name is used: ``from_pretrained(..., experts_implementation="grouped_gemm")``, or
    ``model.set_experts_implementation("grouped_gemm")``. One name serves training, prefill and decode. Nothing in
    transformers is replaced. A second call with the same name replaces the first one's options, also for models that
    run by this name already, unless they are compiled.

    An activation that this package knows runs as in `grouped_gemm.moe.experts_forward`. It is not recognized by its
    name: the model's own code and the known activations are compared on a few values, once per module. A model's own
    activation that equals none of them is called between the two GEMMs; a warning says so, once per class. Slots with
    an id outside [0, E), such as those of expert parallelism, add nothing.

    Args:
        recipe: how the operands of the GEMMs are quantized, as in `grouped_gemm.grouped_mm`. None: not at all.
        name: the name. With several names, models in one process may have several recipes.
        kernel_preference: as in `grouped_gemm.grouped_mm`.
        keep: as in `grouped_gemm.moe.experts_forward`.

    Raises:
        ImportError: transformers is not installed, or has no registry of experts.
        ValueError: an option is not valid, or transformers itself uses ``name``.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "grouped_gemm.integrations.transformers: expected transformers >= 5.17; found none, or one without a "
            "registry of experts. Install it: pip install 'grouped-gemm-dispatch[transformers]'"
        ) from error
    if (
        not isinstance(name, str)
        or not name
        or name == "eager"
        or (name in ALL_EXPERTS_FUNCTIONS and name not in _OURS)
    ):
        checks.fail("name", "a name that transformers does not use itself", repr(name))
    if keep not in ("full", "recipe"):
        checks.fail("keep", "full or recipe", repr(keep))
    options = _Options(
        None if recipe is None else Recipe.parse(recipe), KernelPreference.parse(kernel_preference), keep
    )

    def experts(self: Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _run(self, hidden_states, top_k_index, top_k_weights, options)

    ALL_EXPERTS_FUNCTIONS.register(name, experts)
    _OURS.add(name)


@dataclass(frozen=True)
class _Options:
    """What `register` was called with, checked."""

    recipe: Recipe | None
    kernel_preference: KernelPreference
    keep: str


def _run(module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, options: _Options) -> Tensor:
    """y (T, H) in the dtype of ``hidden`` (T, H). ``module`` has the attributes of transformers' experts."""
    first, first_bias = (
        (module.gate_up_proj, "gate_up_proj_bias") if module.has_gate else (module.up_proj, "up_proj_bias")
    )
    down = module.down_proj
    if module.is_transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    biases = (getattr(module, first_bias), module.down_proj_bias) if module.has_bias else (None, None)
    # As transformers: norms may return float32 where weights are bfloat16. Under autocast, the GEMMs cast.
    is_cast = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == down.dtype
    x = hidden if is_cast else hidden.to(down.dtype)
    activation = _known_activation(module)
    if activation is None:
        y = _run_around(module, x, topk_ids, topk_weights, (first, down), biases, options)
    else:
        y = experts_forward(
            x,
            topk_ids,
            topk_weights,
            first,
            down,
            recipe=options.recipe,
            activation=activation,
            interleaved=module.has_gate and not module.is_concatenated,
            gate_up_bias=biases[0],
            down_bias=biases[1],
            kernel_preference=options.kernel_preference,
            keep=options.keep,
        )
    return y if y.dtype == hidden.dtype else y.to(hidden.dtype)


def _run_around(
    module: Any,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    options: _Options,
) -> Tensor:
    """The experts with the module's own activation between two grouped GEMMs."""
    offs, source, places = route(topk_ids, weights[1].shape[0])
    plan = GroupPlan(offs, source.shape[0])

    def multiply(rows: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return grouped_mm(
            rows,
            w.transpose(1, 2),
            plan,
            recipe=options.recipe,
            bias=bias,
            kernel_preference=options.kernel_preference,
        )

    pre = multiply(gather(x, source, places), weights[0], biases[0])
    h = module._apply_gate(pre) if module.has_gate else module.act_fn(pre)
    return combine(multiply(h, weights[1], biases[1]), topk_weights, source, places)


# Which activation a module has. A name does not tell: a class may override `_apply_gate`, and clamp what its config
# calls silu. So the module's own code is run on a few values, and compared.

_PROBES = (0, 0.01, 0.1, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 6.5, 7, 7.5, 8, 9, 10, 15, 20, 50, 100, 1e3, 1e5)
_known: WeakKeyDictionary[Module, tuple[tuple[object, ...], str | None]] = WeakKeyDictionary()
_warned: set[type] = set()


def _known_activation(module: Any) -> str | None:
    """The name of the known activation that ``module`` computes; None: none of them. Found once per module.

    It is found again when the class has another ``_apply_gate``, or the module another ``act_fn`` or other numbers.
    """
    numbers = [(name, value) for name, value in vars(module).items() if type(value) in (int, float)]
    state = (type(module)._apply_gate, module.act_fn if hasattr(module, "act_fn") else None, *numbers)
    found = _known.get(module)
    if found is None or found[0] != state:
        # In a thread of its own, which has no modes: no autocast, no fake tensors, no inference mode, and no
        # checkpoint, which would count the tensors that are saved here.
        with ThreadPoolExecutor(1) as thread:
            found = state, thread.submit(_matching_activation, module).result()
        _known[module] = found
        if found[1] is None and type(module) not in _warned:
            _warned.add(type(module))
            own = "_apply_gate" if module.has_gate else "act_fn"
            warnings.warn(
                f"grouped_gemm: {own} of {type(module).__name__} computes none of "
                f"{', '.join(kind.name for kind in ACTIVATIONS.values() if kind.is_gated == module.has_gate)}. "
                "It runs between the two GEMMs, and is not fused into them.",
                stacklevel=2,
            )
    return found[1]


_known_activation._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `selection.route._decided`


def _matching_activation(module: Any) -> str | None:
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, Module) and any(True for _ in act_fn.parameters()):
        return None  # what it computes may change
    x = torch.tensor([*(-p for p in reversed(_PROBES[1:])), *_PROBES], dtype=torch.float64)
    if module.has_gate:
        gate, up = torch.cartesian_prod(x, x).unbind(1)
        operands = [torch.stack((p, p.flip(0)), 1) for p in (gate, up)]  # two features, so that the layout counts
        pre = torch.cat(operands, 1) if module.is_concatenated else torch.stack(operands, 2).flatten(1)
        own: Callable[[Tensor], Tensor] = module._apply_gate
    else:
        operands, pre, own = [x[:, None]], x[:, None], module.act_fn
    try:
        pre.requires_grad_()
        h = own(pre)
        (gradient,) = torch.autograd.grad(h, pre, torch.ones_like(h))
    except Exception:  # whatever the model's code does with such values: it is not known
        return None
    for kind in ACTIVATIONS.values():
        if kind.is_gated == module.has_gate and _computes(kind, operands, module, h, gradient):
            return kind.name
    return None


def _computes(kind: Activation, operands: list[Tensor], module: Any, h: Tensor, gradient: Tensor) -> bool:
    """Whether ``kind`` has these values and gradients."""
    value = kind.value(*operands)
    gradients = kind.gradient(*operands, torch.ones_like(value))
    if len(gradients) == 1 or module.is_concatenated:
        expected = torch.cat(gradients, 1)
    else:
        expected = torch.stack(gradients, 2).flatten(1)
    return (
        h.shape == value.shape
        and torch.allclose(h.detach(), value, rtol=1e-6, atol=1e-9)
        and torch.allclose(gradient, expected, rtol=1e-6, atol=1e-9)
    )
