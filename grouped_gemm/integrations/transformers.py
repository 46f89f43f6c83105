"""The experts of transformers' models on this package, by name: ``experts_implementation="grouped_gemm"``.

T, k, H, I: tokens, experts per token, hidden and intermediate features. E, M: experts, routed rows; M = T * k.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from packaging.version import Version
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Module, Parameter

from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.machine import is_capturing
from grouped_gemm.core.preference import VALIDATE, KernelPreference, Preference, resolve, surrounding
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.functional import grouped_mm, quantize_weights
from grouped_gemm.group_plan import GroupPlan
from grouped_gemm.moe.activation import ACTIVATIONS, Activation
from grouped_gemm.moe.composed import Weights, as_b, shape_of
from grouped_gemm.moe.experts import experts_forward
from grouped_gemm.moe.routing import route
from grouped_gemm.moe.rows import combine, gather
from grouped_gemm.selection import checks

_OURS: set[str] = set()  # names that `register` has added
_TRACES_MODULES = Version(torch.__version__) >= Version("2.13")


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

    The experts of an FP8 model (float8_e4m3fn, a scale for each 128x128 block or each matrix) take the recipe
    fp8_blockwise with the weights and scales of the checkpoint. They are taken over once per module, and again when a
    parameter has a new version or storage. What changes them otherwise, such as ``p.data.copy_``, is not noticed;
    GROUPED_GEMM_VALIDATE=1 then raises `RuntimeError`. Another format raises `ValueError` in the forward pass.

    Args:
        recipe: how the operands of the GEMMs are quantized, as in `grouped_gemm.grouped_mm`. None: not at all. An FP8
            model has its own.
        name: the name. With several names, models in one process may have several recipes.
        kernel_preference: as in `grouped_gemm.grouped_mm`.
        keep: as in `grouped_gemm.moe.experts_forward`.

    Raises:
        ImportError: transformers is not installed, or has no registries of experts.
        ValueError: an option is not valid, or transformers itself uses ``name``.
    """
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "grouped_gemm.integrations.transformers: expected transformers >= 5.17; found none, or one without "
            "registries of experts. Install it: pip install 'grouped-gemm-dispatch[transformers]'"
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

    def fp8_experts(self: Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _run_fp8(self, hidden_states, top_k_index, top_k_weights, options)

    ALL_EXPERTS_FUNCTIONS.register(name, experts)
    ALL_FP8_EXPERTS_FUNCTIONS.register(name, fp8_experts)
    _OURS.add(name)


@dataclass(frozen=True)
class _Options:
    """What `register` was called with, checked."""

    recipe: Recipe | None
    kernel_preference: KernelPreference
    keep: str


def _run(module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, options: _Options) -> Tensor:
    """y (T, H) in the dtype of ``hidden`` (T, H). ``module`` has the attributes of transformers' experts."""
    first, down = (module.gate_up_proj if module.has_gate else module.up_proj), module.down_proj
    first_bias = "gate_up_proj_bias" if module.has_gate else "up_proj_bias"
    if module.is_transposed:
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    biases = (getattr(module, first_bias), module.down_proj_bias) if module.has_bias else (None, None)
    # As transformers: norms may return float32 where weights are bfloat16. Under autocast, the GEMMs cast.
    is_cast = torch.is_autocast_enabled(hidden.device.type) or hidden.dtype == down.dtype
    x = hidden if is_cast else hidden.to(down.dtype)
    y = _run_weights(module, x, topk_ids, topk_weights, first, down, biases, options.recipe, options)
    return y if y.dtype == hidden.dtype else y.to(hidden.dtype)


def _run_weights(
    module: Any,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    first: Weights | tuple[Weights, Weights],
    down: Weights,
    biases: tuple[Tensor | None, Tensor | None],
    recipe: Recipe | None,
    options: _Options,
) -> Tensor:
    """The experts with these weights, (E, out, in), and the activation of ``module``."""
    # An older Dynamo calls no function with a module while it traces: there, the module's own gate is traced.
    activation = _known_activation(module) if _TRACES_MODULES or not torch.compiler.is_compiling() else None
    if activation is not None:
        return experts_forward(
            x,
            topk_ids,
            topk_weights,
            first,
            down,
            recipe=recipe,
            activation=activation,
            interleaved=module.has_gate and not module.is_concatenated,
            gate_up_bias=biases[0],
            down_bias=biases[1],
            kernel_preference=options.kernel_preference,
            keep=options.keep,
        )
    offs, source, places = route(topk_ids, shape_of(down)[0])
    plan = GroupPlan(offs, source.shape[0])

    def multiply(rows: Tensor, w: Weights, bias: Tensor | None) -> Tensor:
        return grouped_mm(rows, as_b(w), plan, recipe=recipe, bias=bias, kernel_preference=options.kernel_preference)

    rows = gather(x, source, places)
    if isinstance(first, tuple):
        pre = torch.cat([multiply(rows, w, None) for w in first], 1)
    else:
        pre = multiply(rows, first, biases[0])
    h = module._apply_gate(pre) if module.has_gate else module.act_fn(pre)
    return combine(multiply(h, down, biases[1]), topk_weights, source, places)


# Models with FP8 experts. Their weights are those of a checkpoint, and are taken over with their scales.


def _run_fp8(module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, options: _Options) -> Tensor:
    """As `_run`, for transformers' FP8Experts.

    Raises:
        ValueError: the weights have another format.
    """
    if module.down_proj.element_size() > 1:  # these experts were left in the dtype of the model
        return _run(module, hidden, topk_ids, topk_weights, options)
    _check_format(module)
    device = hidden.device.type
    x = hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden
    dgrad = torch.is_grad_enabled() and x.requires_grad
    first, down = _adopted(module, x.dtype, dgrad, options.kernel_preference)
    y = _run_weights(module, x, topk_ids, topk_weights, first, down, (None, None), Recipe.FP8_BLOCKWISE, options)
    return y if y.dtype == hidden.dtype else y.to(hidden.dtype)


def _check_format(module: Any) -> None:
    """Raises ValueError if the experts have another format than blocks of 128x128 or one scale per matrix."""
    found = None
    if module.down_proj.dtype != torch.float8_e4m3fn:
        found = f"weights in {dtype_name(module.down_proj.dtype)}"
    elif module.block_size is not None and tuple(module.block_size) != (128, 128):
        found = f"blocks of {tuple(module.block_size)}"
    elif module.activation_scheme != "dynamic":
        found = f"activations with {module.activation_scheme} scales"
    if found is not None:
        raise ValueError(
            "grouped_gemm: expected FP8 experts in float8_e4m3fn, with a scale for each 128x128 block or each matrix, "
            f"and activations with dynamic scales; found {found}. Use "
            'model.set_experts_implementation("eager") for this model.'
        )


_First: TypeAlias = QuantizedWeights | tuple[QuantizedWeights, QuantizedWeights]
_kept: WeakKeyDictionary[Module, tuple[tuple[object, ...], _First, QuantizedWeights]] = WeakKeyDictionary()
_WRONG = (
    "grouped_gemm: expected the FP8 experts of {name} to have the values that they had when they were taken over; "
    "found others, but no version counter has changed: they were changed through p.data, a collective or similar. "
    "Change them with in-place ops or load_state_dict."
)


def _adopted(
    module: Any, dtype: torch.dtype, dgrad: bool, preference: KernelPreference
) -> tuple[_First, QuantizedWeights]:
    """The weights as `quantize_weights` takes them over, kept until a parameter changes.

    Compiled code takes them over in each call, which moves scales only.

    Raises:
        RuntimeError: under GROUPED_GEMM_VALIDATE=1, a parameter has changed without a new version.
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    tensors = (
        getattr(module, name),
        getattr(module, f"{name}_scale_inv"),
        module.down_proj,
        module.down_proj_scale_inv,
    )
    options = dtype, dgrad, preference
    if (
        torch.compiler.is_compiling()
        or is_capturing(tensors[0])  # what a graph writes has no values yet
        or any([t.is_inference() or type(t) not in (Tensor, Parameter) for t in tensors])  # no version counters
    ):
        return _adopt(tensors, module.has_gate, *options)
    # A storage is known by a weak reference, so that no other one can get its address. And no other stream waits for
    # the kernels that convert scales.
    stream = torch.cuda.current_stream(tensors[0].device).cuda_stream if tensors[0].is_cuda else None
    versions = [(t._version, StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.shape) for t in tensors]
    state = dtype, dgrad, resolve(preference, surrounding.kernel_preference), stream, *versions
    kept = _kept.get(module)
    if kept is None or kept[0] != state:
        kept = _kept[module] = state, *_adopt(tensors, module.has_gate, *options)
    elif VALIDATE.is_on():
        fresh = _adopt(tensors, module.has_gate, *options)
        if any(not _same(one, other) for one, other in zip(_flat(kept[1:]), _flat(fresh))):
            raise RuntimeError(_WRONG.format(name=type(module).__name__))
    return kept[1], kept[2]


def _adopt(
    tensors: tuple[Tensor, ...], has_gate: bool, dtype: torch.dtype, dgrad: bool, preference: KernelPreference
) -> tuple[_First, QuantizedWeights]:
    first, first_scale, down, down_scale = [t.detach() for t in tensors]

    def adopt(w: Tensor, scale: Tensor) -> QuantizedWeights:
        return quantize_weights(
            w.transpose(1, 2),
            Recipe.FP8_BLOCKWISE,
            scale=scale.transpose(1, 2),
            dtype=dtype,
            dgrad=dgrad,
            kernel_preference=preference,
        )

    rows, lines = first.shape[1], first_scale.shape[1]
    blocks = -(-(rows // 2) // 128)  # along the rows of gate, and of up
    if has_gate and lines == 2 and first_scale.shape[2] == 1:  # one scale for the gate's matrix, one for up's
        first_scale = first_scale.float().repeat_interleave(blocks, 1).expand(-1, -1, -(-first.shape[2] // 128))
        lines = 2 * blocks
    if not has_gate or rows % 256 == 0 or lines != 2 * blocks:
        return adopt(first, first_scale), adopt(down, down_scale)
    # Gate and up were quantized before they were stacked: the blocks of up begin at row I.
    gate, up = (adopt(w, scale) for w, scale in zip(first.chunk(2, 1), first_scale.chunk(2, 1)))
    return (gate, up), adopt(down, down_scale)


def _flat(weights: tuple[Any, ...]) -> Iterator[QuantizedWeights]:
    for w in weights:
        yield from w if isinstance(w, tuple) else (w,)


def _same(one: QuantizedWeights, other: QuantizedWeights) -> bool:
    """Whether both have the same bits. Synchronizes the host."""
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(one.tensors.values(), other.tensors.values())
    )


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
