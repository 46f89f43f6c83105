"""`override_torch`: runs a model's calls of torch's grouped GEMM through `grouped_mm`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.nn import Module, Parameter
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, get_overridable_functions
from torch.utils import checkpoint as checkpointing
from torch.utils._contextlib import context_decorator

from grouped_gemm.core import tracing
from grouped_gemm.core.preference import KernelPreference, Preference
from grouped_gemm.core.recipes import Recipe, is_fastest
from grouped_gemm.functional import grouped_mm
from grouped_gemm.selection import checks

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NAMES = {"input", "self", "weight", "mat2", "offs", "bias", "out_dtype"}

# Tensor classes that are treated as plain tensors: those used for tracing, and the result of an asynchronous
# collective, which waits when an op uses it.
_PLAIN = ("FakeTensor", "FunctionalTensor", "AsyncCollectiveTensor")

# Dynamo's higher-order ops, with the positions of the functions that they call. Dynamo traces these functions while the
# mode is off, so they are wrapped to turn it on again. Dynamo refuses wrapped functions of the ops in _CLOSED_CALLERS.
_CALLERS = {"tag_activation_checkpoint": "0", "cond": "12", "while_loop": "01"}
_CLOSED_CALLERS = ("scan", "map", "map_impl", "invoke_subgraph")  # the last one is nested_compile_region


class override_torch(TorchFunctionMode):
    """Runs a model's calls of `torch.nn.functional.grouped_mm` inside the block through this package.

    It is a context manager and a decorator. It also catches ``torch._grouped_mm``, which implements the public
    function, its op, and the op that transformers falls back to. It covers calls with one matrix per group, and calls
    with two 2-dimensional operands that ``offs`` splits. Other calls run in torch, with one warning per reason: no
    ``offs``, other dtypes, a bias, tensor subclasses such as DTensor.

    Gradients use the settings of the forward pass, wherever backward is called. So does `torch.utils.checkpoint`: a
    function that was checkpointed inside the block is recomputed inside it. Other code that recomputes the forward pass
    needs its own block: decorate the function that it calls. Under torch.compile and torch.export, the block may be
    around the compiled function or inside it. Blocks nest, and the innermost wins. A block applies to its own thread.

    Args:
        recipe: how operands are quantized, a `Recipe` or its name. None: not at all.
        group_alignment: the caller guarantees it for every group of every call inside, as in `grouped_mm`.
        kernel_preference: a backend or its name, as in `grouped_mm`.

    Raises:
        ValueError: `grouped_mm` would not accept an argument.
    """

    def __init__(
        self,
        recipe: Recipe | str | None = None,
        *,
        group_alignment: int = 1,
        kernel_preference: Preference = KernelPreference.AUTO,
    ) -> None:
        super().__init__()
        self.recipe = recipe if recipe is None or is_fastest(recipe) else Recipe.parse(recipe)
        self.kernel_preference = KernelPreference.parse(kernel_preference)
        checks.check_options(None, group_alignment)
        self.group_alignment = group_alignment
        op = torch.ops.aten._grouped_mm
        self.gemms: tuple[Callable[..., Any], ...] = (torch._grouped_mm, op, op.default)
        loop = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # if transformers was imported
        if loop is not None:
            self.gemms += (loop, loop.default)
        _prepare_torch()
        if torch.compiler.is_dynamo_compiling():
            _allow_push()

    def __call__(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """Wraps ``function`` to run inside the block.

        The body of a generator or coroutine runs inside the block; the code that it yields to does not.

        Raises:
            TypeError: ``function`` is a class, a module, an asynchronous generator function, or not callable. The
                wrapper raises it if the result has not run yet, such as that of `contextlib.contextmanager`.
        """
        if isinstance(function, (staticmethod, classmethod)):
            return type(function)(self(function.__func__))
        _check_decorated(function)
        if _is_kind(inspect.iscoroutinefunction, function):
            inside = _awaited_inside(self, function)
        elif _is_kind(inspect.isgeneratorfunction, function):
            inside = _resumed_inside(self, function)
        else:
            inside = _inside(self, function)
            if any(is_kind(inspect.unwrap(function)) for is_kind in _SUSPENDED):
                inside = _finished(inside)
        return functools.wraps(function)(inside)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Inside this method, the mode is off.
        kwargs = kwargs or {}
        if func not in self.gemms:
            if torch.compiler.is_dynamo_compiling() and isinstance(func, HigherOrderOperator):
                called = _called(func)
                args = tuple(_inside(self, x) if str(i) in called else x for i, x in enumerate(args))
            return func(*args, **kwargs)
        if not kwargs.keys() <= _NAMES:
            return func(*args, **kwargs)
        a, b, offs, bias, out_dtype = _bind(*args, **kwargs)
        if isinstance(offs, Tensor) and tracing.holds(offs.numel() == 0):
            return func(*args, **kwargs)  # `grouped_mm` refuses calls without groups
        refused, found = _refusal(a, b, offs, bias, out_dtype)
        if refused:
            result = func(*args, **kwargs)
            _warn_once(refused, found)  # only if torch has not raised
            return result
        # Autocast does not cast for torch's GEMM: turn it off. If it is off already, add no region: torch.export.load
        # refuses one in a program that was traced in strict mode with gradients.
        is_casting = torch.is_autocast_enabled(a.device.type)
        with torch.autocast(a.device.type, enabled=False) if is_casting else contextlib.nullcontext():
            return grouped_mm(
                a,
                b,
                offs,
                recipe=self.recipe,
                out_dtype=out_dtype,
                group_alignment=self.group_alignment,
                kernel_preference=self.kernel_preference,
            )


def _inside(block: override_torch, function: Callable[_P, _R]) -> Callable[_P, _R]:
    def inside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_dynamo_compiling():
            _allow_push()
        with block:
            return function(*args, **kwargs)

    return inside


def _resumed_inside(block: override_torch, function: Callable[..., Any]) -> Callable[..., Any]:
    """A generator function whose body runs inside the block. While it is suspended, the block is off."""

    def steps(*args: Any, **kwargs: Any) -> Any:
        return (yield from function(*args, **kwargs))

    return context_decorator(lambda: block, steps)


def _awaited_inside(block: override_torch, function: Callable[..., Any]) -> Callable[..., Any]:
    """A coroutine function whose body runs inside the block. While it waits, the block is off."""
    steps = types.coroutine(_resumed_inside(block, lambda *args, **kwargs: function(*args, **kwargs).__await__()))

    async def inside(*args: Any, **kwargs: Any) -> Any:
        return await steps(*args, **kwargs)

    return inside


_SUSPENDED = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
_UNFINISHED = (Generator, Coroutine, AsyncGenerator, contextlib._GeneratorContextManagerBase)


def _finished(inside: Callable[_P, _R]) -> Callable[_P, _R]:
    """For a generator or coroutine function inside another decorator: checks that a call of it runs to the end.

    Raises:
        TypeError: when called, if the result has not run yet.
    """

    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        result = inside(*args, **kwargs)
        if isinstance(result, _UNFINISHED):
            raise TypeError(
                f"override_torch: expected a function that runs when it is called; found one that returns a "
                f"{type(result).__name__}, which runs after the block. Put @override_torch(...) below the other "
                "decorator."
            )
        return result

    return checked


def _is_kind(is_kind: Callable[[Any], bool], function: Any) -> bool:
    """Whether ``is_kind`` is true for a function, or for the ``__call__`` of a callable object."""
    return is_kind(function) or is_kind(type(function).__call__)


def _check_decorated(function: Any) -> None:
    if isinstance(function, type):
        found, remedy = f"the class {function.__name__}", "Decorate its methods that call grouped_mm, such as forward"
    elif isinstance(function, Module):
        found = f"the module {type(function).__name__}, which would become a function without parameters"
        remedy = "Decorate forward in its class, or call the module in a block: with override_torch(...)"
    elif not callable(function):
        found, remedy = type(function).__name__, "Put @override_torch(...) above a function"
    elif _is_kind(inspect.isasyncgenfunction, function):
        found, remedy = "an asynchronous generator function", "Decorate the functions that it calls"
    else:
        return
    raise TypeError(f"override_torch: expected a function to decorate; found {found}. {remedy}.")


def _bind(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """``a``, ``b``, ``offs``, ``bias`` and ``out_dtype`` under any of their names; None for those not given."""
    given = (
        kwargs.get("input", kwargs.get("self")),
        kwargs.get("mat2", kwargs.get("weight")),
        kwargs.get("offs"),
        kwargs.get("bias"),
        kwargs.get("out_dtype"),
    )
    return args + given[len(args) :]


def _refusal(a: Any, b: Any, offs: Any, bias: Any, out_dtype: Any) -> tuple[str, Any]:
    """The key in `_REASONS` of why `grouped_mm` cannot take over the call, and what was found. "" if it can."""
    if offs is None:
        return "offs", None
    for x in (a, b, offs):
        if type(x) is not Tensor and type(x) is not Parameter and type(x).__name__ not in _PLAIN:
            return "DTensor" if type(x).__name__ == "DTensor" else "class", type(x).__name__
    if a.is_meta:
        return "meta", None
    if a.dim() != 2 or b.dim() not in (2, 3):
        return "rank", None
    if a.dtype != b.dtype or a.dtype not in checks.DTYPES:
        return "dtype", a.dtype
    if out_dtype is not None and out_dtype not in checks.DTYPES:
        return "out_dtype", out_dtype
    if offs.dtype != torch.int32:
        return "offs.dtype", offs.dtype
    return "" if bias is None else "bias", None


def _called(op: HigherOrderOperator) -> str:
    """The positions of the functions that ``op`` calls and that may be wrapped."""
    if op.__name__ in _CLOSED_CALLERS:
        _warn_once("body", op.__name__)
    return _CALLERS.get(op.__name__, "")


_REASONS = {
    "offs": "it has no offs. Pass the end row of each group; for a batched GEMM, call torch.bmm",
    "class": "an argument is a {}. Pass plain tensors, such as x.as_subclass(torch.Tensor)",
    "DTensor": "an argument is a DTensor. Pass local shards, x.to_local()",
    "meta": "the operands are on the meta device. Move them to a device with memory",
    "rank": "a has 3 dimensions. Transpose: grouped_mm(b.t(), a.transpose(1, 2), offs=offs).t()",
    "dtype": "an operand is {}. Pass both in bfloat16, float16 or float32",
    "out_dtype": "out_dtype is {}. Request bfloat16, float16 or float32, and cast the result",
    "offs.dtype": "offs is {}. Pass offs.int()",
    "bias": "it has a bias. Add the bias to the result",
    "body": "it may be in a function that {} calls, which Dynamo traces without the override. Decorate that function",
}
_warned: set[str] = set()


def _warn_once(reason: str, found: Any) -> None:
    """Warns that torch runs a call itself, once for each reason."""
    text = f"override_torch leaves a call of grouped_mm to torch, without a recipe: {_REASONS[reason].format(found)}."
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=4)  # the line that calls torch.nn.functional.grouped_mm


_is_prepared = False


def _prepare_torch() -> None:
    """Patches torch once: which functions Dynamo passes to modes, and what checkpoints recompute."""
    global _is_prepared
    if not _is_prepared:
        _is_prepared = True
        _list_for_dynamo()
        _change_checkpoints()


def _list_for_dynamo() -> None:
    """Adds ``torch._grouped_mm`` to torch's overridable functions, the only ones that Dynamo passes to modes.

    Torch leaves out names that begin with an underscore.
    """
    function, listed = torch._grouped_mm, get_overridable_functions()[torch]
    listed.append(function)
    tracer = sys.modules.get("torch._dynamo.variables.torch")
    if tracer is not None:  # it has cached the set
        tracer.get_overridable_functions().add(function)


# The classes that keep a checkpoint's function for backward, with the method and the parameter that take the function.
# Methods are replaced rather than functions, which other code may have imported already.
_CHECKPOINTS = {
    "use_reentrant=False": ("_CheckpointFrame", "__init__", "recompute_fn"),
    "use_reentrant=True": ("CheckpointFunction", "forward", "run_function"),
}


def _change_checkpoints() -> None:
    """Makes eager checkpoints recompute inside the block: backward runs after it, or with modes turned off."""
    unknown = []
    for option, (name, method, parameter) in _CHECKPOINTS.items():
        keeper = getattr(checkpointing, name, None)
        original = getattr(keeper, method, None)
        if original is None or list(inspect.signature(original).parameters)[1:2] != [parameter]:
            unknown.append(option)
            continue
        changed = _keeping_blocks(original)
        is_static = isinstance(inspect.getattr_static(keeper, method), staticmethod)
        setattr(keeper, method, staticmethod(changed) if is_static else changed)
    if unknown:
        warnings.warn(
            f"override_torch does not apply when torch {torch.__version__} recomputes a checkpoint with "
            f"{' or '.join(unknown)}: expected {'.'.join(_CHECKPOINTS[unknown[0]][:2])} in torch.utils.checkpoint as "
            "in torch 2.13; found another form. Decorate the checkpointed function with override_torch.",
            stacklevel=4,  # the line that creates the block
        )


def _keeping_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def changed(keeper: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return original(keeper, _in_current_blocks(function), *args, **kwargs)

    return changed


def _in_current_blocks(function: Callable[_P, _R]) -> Callable[_P, _R]:
    for mode in reversed(_get_current_function_mode_stack()):  # the innermost is the last
        if isinstance(mode, override_torch):
            function = _inside(mode, function)
    return function


def _allow_push() -> None:
    """Registers the stack of modes as changed, so that Dynamo lets a traced checkpoint enter a block.

    Dynamo calls this while tracing. Entering a block is a side effect, which Dynamo otherwise refuses in the body of a
    checkpoint, even though the block ends there.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator
        from torch._dynamo.variables.torch_function import TorchFunctionModeStackVariable

        tx = InstructionTranslator.current_tx()
        tracer = tx.output.current_tracer
        before = tracer.unsafe_allow_externally_visible_side_effects
    except (ImportError, AttributeError):  # another version of torch: Dynamo raises its own error
        return
    tracer.unsafe_allow_externally_visible_side_effects = True
    try:
        TorchFunctionModeStackVariable.register_mutation(tx)
    finally:
        tracer.unsafe_allow_externally_visible_side_effects = before


# Dynamo runs these while tracing and treats their results as constants; see `route._decided`.
_called._dynamo_marked_constant = True  # type: ignore[attr-defined]
_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]
_prepare_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]
_allow_push._dynamo_marked_constant = True  # type: ignore[attr-defined]
