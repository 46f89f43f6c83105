"""The experts of transformers' models on this package, by name: ``experts_implementation="grouped_gemm"``.

T, k, H, I: tokens, experts per token, hidden and intermediate features. E, M: experts, routed rows; M = T * k.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn import Module, Parameter

from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.machine import is_capturing
from grouped_gemm.core.preference import VALIDATE, KernelPreference, Preference, resolve, surrounding
from grouped_gemm.core.quantized import Quantized, QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.functional import grouped_mm, quantize_weights
from grouped_gemm.group_plan import GroupPlan
from grouped_gemm.moe.activation import ACTIVATIONS, Activation
from grouped_gemm.moe.arguments import WEIGHT_ONLY, check_forward_only, check_options
from grouped_gemm.moe.composed import Weights, as_b, shape_of
from grouped_gemm.moe.decode import dequantized
from grouped_gemm.moe.experts import experts_forward
from grouped_gemm.moe.fused import runs_fused
from grouped_gemm.moe.routing import route
from grouped_gemm.moe.rows import combine, gather
from grouped_gemm.selection import checks

_OURS: set[str] = set()  # names that `register` has added
_ARGUMENTS = {  # of transformers' decorator for experts: what this module knows that classes differ in
    *("experts_class", "experts_interface", "is_concatenated", "is_transposed"),
    *("has_bias", "has_gate", "has_post_expert_norm"),
}
_unknown: dict[str, object] = {}  # others that the installed version has, and their defaults
_TRACES_MODULES = Version(torch.__version__) >= Version("2.13")
_FOUND = "_grouped_gemm_activation"  # an attribute of modules before torch 2.13, for compiled code


def register(
    recipe: Recipe | str | None = None,
    *,
    name: str = "grouped_gemm",
    kernel_preference: Preference = KernelPreference.AUTO,
    keep: str = "full",
    batch_invariant: bool = False,
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
    fp8_blockwise with the weights and scales of the checkpoint. Activations always get dynamic scales, also where the
    checkpoint has static ones. Weights are taken over once per module, and again when a parameter has a new version or
    storage. What changes them otherwise, such as ``p.data.copy_``, is not noticed; GROUPED_GEMM_VALIDATE=1 then raises
    `RuntimeError`. Another format raises `ValueError` in the forward pass.

    Args:
        recipe: how the operands of the GEMMs are quantized, as in `grouped_gemm.moe.experts_forward`. None: not at all.
            An FP8 model has its own, but with "fp8_weight_only" its activations are not quantized.
        name: the name. With several names, models in one process may have several recipes.
        kernel_preference: as in `grouped_gemm.grouped_mm`.
        keep: as in `grouped_gemm.moe.experts_forward`.
        batch_invariant: as in `grouped_gemm.moe.experts_forward`.

    Raises:
        ImportError: transformers is not installed, or has no registries of experts.
        ValueError: an option is not valid, or transformers itself uses ``name``.
    """
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
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
    parsed, weight_only = check_options(
        "swiglu", False, recipe, "auto", kernel_preference, keep, False, batch_invariant
    )
    options = _Options(parsed, weight_only, KernelPreference.parse(kernel_preference), keep, batch_invariant)

    def experts(self: Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _run(self, hidden_states, top_k_index, top_k_weights, options)

    def fp8_experts(self: Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _run_fp8(self, hidden_states, top_k_index, top_k_weights, options)

    arguments = inspect.signature(use_experts_implementation).parameters.items()
    _unknown.update({argument: value.default for argument, value in arguments if argument not in _ARGUMENTS})
    ALL_EXPERTS_FUNCTIONS.register(name, experts)
    ALL_FP8_EXPERTS_FUNCTIONS.register(name, fp8_experts)
    _OURS.add(name)


@dataclass(frozen=True)
class _Options:
    """What `register` was called with, checked."""

    recipe: Recipe | None
    weight_only: bool
    kernel_preference: KernelPreference
    keep: str
    batch_invariant: bool


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
    """The experts with these weights, (E, out, in), and the activation of ``module``.

    If only some of them are quantized, ``recipe`` is theirs, and the others are multiplied as they are.

    Raises:
        ValueError: the class of ``module`` does something that only a later transformers has, or the result would
            depend on the batch although it must not.
    """
    for argument, default in _unknown.items():
        if getattr(module, argument, default) != default:
            raise ValueError(
                "grouped_gemm: expected experts without options that a later transformers has added; found "
                f"{argument}={getattr(module, argument)} in {type(module).__name__}. Use "
                'model.set_experts_implementation("grouped_mm") for this model.'
            )
    quantized = [isinstance(w, QuantizedWeights) for w in (*(first if isinstance(first, tuple) else (first,)), down)]
    is_mixed = any(quantized) and not all(quantized)
    if _TRACES_MODULES or not torch.compiler.is_compiling():
        activation = _known_activation(module)
    else:  # an older Dynamo calls no function with a module while it traces: it reads what an eager call has found
        activation = getattr(module, _FOUND, None)
    norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    if activation is not None and not is_mixed and norm is None:
        return experts_forward(
            x,
            topk_ids,
            topk_weights,
            first,
            down,
            recipe=WEIGHT_ONLY if options.weight_only else recipe,
            activation=activation,
            interleaved=module.has_gate and not module.is_concatenated,
            gate_up_bias=biases[0],
            down_bias=biases[1],
            kernel_preference=options.kernel_preference,
            keep=options.keep,
            batch_invariant=options.batch_invariant,
        )
    if options.batch_invariant:
        if torch.compiler.is_compiling() and not _TRACES_MODULES:
            raise ValueError(
                "grouped_gemm: batch_invariant: expected experts that have run in eager mode before they are compiled, "
                f"or torch >= 2.13, which finds out their activation while it compiles; found torch {torch.__version__}"
            )
        raise ValueError(
            "grouped_gemm: batch_invariant: expected experts with an activation that this package knows, all quantized "
            f"or none, and without a norm; found {type(module).__name__}. Register without it for this model."
        )
    if options.weight_only:
        check_forward_only(False, x, topk_weights, *(first if isinstance(first, tuple) else (first,)), down, *biases)
    offs, source, places = route(topk_ids, shape_of(down)[0])
    plan = GroupPlan(offs, source.shape[0])

    def multiply(rows: Tensor, w: Weights, bias: Tensor | None) -> Tensor:
        if options.weight_only and (isinstance(w, QuantizedWeights) or not is_mixed):
            w, own = dequantized(w, Recipe.FP8_BLOCKWISE, x.dtype), None
        else:
            own = None if is_mixed and isinstance(w, Tensor) else recipe
        return grouped_mm(rows, as_b(w), plan, recipe=own, bias=bias, kernel_preference=options.kernel_preference)

    rows = gather(x, source, places)
    if isinstance(first, tuple):
        pre = torch.cat([multiply(rows, w, None) for w in first], 1)
    else:
        pre = multiply(rows, first, biases[0])
    h = module._apply_gate(pre) if module.has_gate else module.act_fn(pre)
    y = multiply(h, down, biases[1])
    return combine(y if norm is None else norm(y), topk_weights, source, places)


# Models with FP8 experts. Their weights are those of a checkpoint, and are taken over with their scales.


def _run_fp8(module: Any, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, options: _Options) -> Tensor:
    """As `_run`, for transformers' FP8Experts.

    Raises:
        ValueError: the weights have another format.
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    first, down = getattr(module, name), module.down_proj
    # A model that is quantized while it is loaded keeps weights in its dtype whose sizes are no multiples of a block.
    names = [n for n, w in ((name, first), ("down_proj", down)) if w.element_size() == 1]
    if not names:
        return _run(module, hidden, topk_ids, topk_weights, options)
    _check_format(module, names)
    device = hidden.device.type
    x = hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden
    dgrad = torch.is_grad_enabled() and x.requires_grad
    adopted = dict(zip(names, _adopted(module, names, x.dtype, dgrad, options.kernel_preference)))
    weights = adopted.get(name, first), adopted.get("down_proj", down)
    y = _run_weights(module, x, topk_ids, topk_weights, *weights, (None, None), Recipe.FP8_BLOCKWISE, options)
    return y if y.dtype == hidden.dtype else y.to(hidden.dtype)


def _check_format(module: Any, names: list[str]) -> None:
    """Raises ValueError if these weights have another format than blocks of 128x128 or one scale per matrix."""
    found = None
    dtypes = [w.dtype for w in [getattr(module, name) for name in names] if w.dtype != torch.float8_e4m3fn]
    if dtypes:
        found = f"weights in {dtype_name(dtypes[0])}"
    elif module.block_size is not None and tuple(module.block_size) != (128, 128):
        found = f"blocks of {tuple(module.block_size)}"
    if found is not None:
        raise ValueError(
            "grouped_gemm: expected FP8 experts in float8_e4m3fn, with a scale for each 128x128 block or each matrix; "
            f'found {found}. Use model.set_experts_implementation("eager") for this model.'
        )


_Adopted: TypeAlias = QuantizedWeights | tuple[QuantizedWeights, QuantizedWeights]  # one parameter


class _Kept(NamedTuple):
    """Weights that were taken over. They own no storage of a parameter, so moving a parameter frees its memory.

    Attributes:
        state: of the parameters when they were taken over, and the options.
        weights: with a `_View` in place of each tensor that is a view of a parameter.
        watched: weak references that drop the entry, and the copies in it, when a parameter's storage is freed.
    """

    state: tuple[object, ...]
    weights: list[_Adopted]
    watched: list[weakref.ref[Any]]


class _View(NamedTuple):
    """A view of one of the parameters."""

    owner: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


_kept: WeakKeyDictionary[Module, _Kept] = WeakKeyDictionary()
_gathered: WeakSet[Module] = WeakSet()  # modules whose parameters FSDP2 gathers
_WRONG = (
    "grouped_gemm: expected the FP8 experts of {name} to have the values that they had when they were taken over; "
    "found others, but no version counter has changed: they were changed through p.data, a collective or similar. "
    "Change them with in-place ops or load_state_dict."
)


def _adopted(
    module: Any, names: list[str], dtype: torch.dtype, dgrad: bool, preference: KernelPreference
) -> list[_Adopted]:
    """The weights with these names as `quantize_weights` takes them over, kept until a parameter changes.

    Compiled code takes them over in each call, which moves scales only. So do modules under FSDP2, which refills
    parameters in place without a new version.

    Raises:
        RuntimeError: under GROUPED_GEMM_VALIDATE=1, a parameter has changed without a new version.
    """
    tensors = [getattr(module, name + suffix) for name in names for suffix in ("", "_scale_inv")]

    def adopt() -> list[_Adopted]:
        pairs = zip(names, tensors[0::2], tensors[1::2])
        return [_adopt(w, scale, name == "gate_up_proj", dtype, dgrad, preference) for name, w, scale in pairs]

    if (
        torch.compiler.is_compiling()
        or is_capturing(tensors[0])  # what a graph writes has no values yet
        or any([t.is_inference() or type(t) not in (Tensor, Parameter) for t in tensors])  # no version counters
        or module in _gathered
    ):
        return adopt()
    # An entry ends with its storages, so no other one can have their addresses. And no other stream waits for the
    # kernels that convert scales.
    stream = torch.cuda.current_stream(tensors[0].device).cuda_stream if tensors[0].is_cuda else None
    versions = [(t._version, t.data_ptr(), t.shape, t.stride()) for t in tensors]
    state = names, dtype, dgrad, resolve(preference, surrounding.kernel_preference), stream, *versions
    kept = _kept.get(module)
    if kept is None or kept.state != state:
        weights = adopt()
        if not _is_gathered(module):
            released = [_changed(w, lambda x: _released(x, tensors)) for w in weights]
            _kept[module] = _Kept(state, released, _watch(module, tensors))
        return weights
    owners = [t.detach() for t in tensors]
    weights = [_changed(w, lambda x: owners[x[0]].as_strided(*x[1:]) if type(x) is _View else x) for w in kept.weights]
    if VALIDATE.is_on() and any(not _same(*pair) for pair in zip(_flat(weights), _flat(adopt()), strict=True)):
        raise RuntimeError(_WRONG.format(name=type(module).__name__))
    return weights


def _adopt(
    w: Tensor, scale: Tensor, is_stacked: bool, dtype: torch.dtype, dgrad: bool, preference: KernelPreference
) -> _Adopted:
    """The weights of one parameter; ``is_stacked``: gate rows before up rows."""
    # With AUTO, in the layout that fused kernels read.
    asked, _ = resolve(preference, surrounding.kernel_preference)
    if asked is KernelPreference.AUTO and runs_fused(w.device):
        preference = KernelPreference.TRITON

    def adopt(w: Tensor, scale: Tensor) -> QuantizedWeights:
        return quantize_weights(
            w.transpose(1, 2),
            Recipe.FP8_BLOCKWISE,
            scale=scale.transpose(1, 2),
            dtype=dtype,
            dgrad=dgrad,
            kernel_preference=preference,
        )

    w, scale = w.detach(), scale.detach()
    columns = -(-w.shape[2] // 128)
    if scale.dim() == 2 and scale.shape[1] % columns == 0:  # transformers 5.17 saves an expert's without axes of 1
        scale = scale.unflatten(1, (-1, columns))
    if scale.dim() != 3:
        expected, found = "(E, rows / 128, columns / 128), or (E, 1, 1) for each matrix", tuple(scale.shape)
        raise ValueError(f"grouped_gemm: expected scales of FP8 experts of the shape {expected}; found {found}")
    rows, lines = w.shape[1], scale.shape[1]
    blocks = -(-(rows // 2) // 128)  # along the rows of gate, and of up
    if is_stacked and lines == 2 and scale.shape[2] == 1:  # one scale for the gate's matrix, one for up's
        scale = scale.float().repeat_interleave(blocks, 1).expand(-1, -1, columns)
        lines = 2 * blocks
    if not is_stacked or rows % 256 == 0 or lines != 2 * blocks:
        return adopt(w, scale)
    # Gate and up were quantized before they were stacked: the blocks of up begin at row I.
    gate, up = zip(w.chunk(2, 1), scale.chunk(2, 1))
    return adopt(*gate), adopt(*up)


def _changed(weights: _Adopted, change: Callable[[Any], Any]) -> Any:
    """``weights`` after ``change`` of each tensor; a shared tensor is changed once."""
    if isinstance(weights, tuple):
        return tuple([_changed(w, change) for w in weights])
    one, other = weights.forward, weights.dgrad
    forward = Quantized(change(one.data), change(one.scale), *one.form)
    dgrad = None
    if other is not None:
        data = forward.data if other.data is one.data else change(other.data)
        scale = forward.scale if other.scale is one.scale else change(other.scale)
        dgrad = Quantized(data, scale, *other.form)
    backends = weights.forward_backend, weights.dgrad_backend
    return QuantizedWeights(weights.shape, weights.dtype, forward, dgrad, *backends)


def _released(x: Tensor, tensors: list[Tensor]) -> Tensor | _View:
    """Which view of a parameter ``x`` is; or ``x`` itself, if it has a storage of its own."""
    for owner, t in enumerate(tensors):
        if t.untyped_storage()._cdata == x.untyped_storage()._cdata and t.dtype == x.dtype:
            return _View(owner, x.size(), x.stride(), int(x.storage_offset()))
    return x


def _watch(module: Module, tensors: list[Tensor]) -> list[weakref.ref[Any]]:
    """Weak references that drop what is kept for ``module`` when one of the storages is freed."""
    owner = weakref.ref(module)

    def drop(_: Any) -> None:
        if (module := owner()) is not None:
            _kept.pop(module, None)

    return [weakref.ref(t.untyped_storage(), drop) for t in tensors]


def _is_gathered(module: Module) -> bool:
    """Whether FSDP2 gathers the parameters of ``module`` for its forward pass. Remembers those that it does."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    roots: list[Any] = [other for other in _module_state_mapping if isinstance(other, FSDPModule)]
    if any(part is module for root in roots for part in root.modules()):
        _gathered.add(module)
    return module in _gathered


def _flat(weights: list[_Adopted]) -> list[QuantizedWeights]:
    return [part for w in weights for part in (w if isinstance(w, tuple) else (w,))]


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
        if not _TRACES_MODULES:
            setattr(module, _FOUND, found[1])
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
