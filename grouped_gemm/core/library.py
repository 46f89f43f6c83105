"""Defines ops of ``torch.library``, which are opaque to torch.compile and visible by name to checkpointing policies."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, TypeAlias, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from grouped_gemm.core.replay import implementations, replayed

_library = torch.library.Library("grouped_gemm", "FRAGMENT")
NAMES: list[str] = []

# Each op by its name, for backends to call. If nothing intercepts ops, this calls the implementation directly: the
# dispatcher takes 4 to 10 microseconds, a tenth of the host time of a call.
ops = SimpleNamespace()

_Result = TypeVar("_Result")
Steps: TypeAlias = Iterator[_Result | Callable[[], _Result]]  # what an op yields, see `define_op`
Size: TypeAlias = Annotated[int, "SymInt"]  # an argument that may be symbolic while tracing; other ints are constants
Changed: TypeAlias = Annotated[Tensor, "Tensor(a!)"]  # an argument that the op writes to; at most one

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Size: "SymInt",
    Changed: "Tensor(a!)",
    type(None): "()",  # the result of an op that only writes to an argument
    int: "int",
    int | None: "int?",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}
_SHAPE = re.compile("_[A-Z]+$")


def define_op(
    *, tags: Sequence[torch.Tag] = (), replays: bool = False
) -> Callable[[Callable[..., Steps[Any]]], Callable[..., Any]]:
    """Decorator: registers a generator function as ``torch.ops.grouped_gemm.<name>``, its name less a leading "_".

    One function serves as schema, fake and op, in two steps:

    - First it yields the result with its final shapes, strides and dtypes. The fake stops here, so up to this point the
      function must not read values or launch kernels.
    - Then it fills that result. Or it yields a second result, which replaces the first one. In that case, it should
      first yield a function that allocates the fake's result, so that the op itself does not allocate it for nothing.

    >>> @define_op(replays=True)
    ... def _triton_group_sums(x_MN: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Steps[Tensor]:
    ...     out = x_MN.new_empty(offs.shape[0], x_MN.shape[1], dtype=out_dtype)
    ...     yield out
    ...     from grouped_gemm.kernels.gemm import k_grouped  # imports Triton
    ...     k_grouped.group_sums(x_MN, offs, out)

    An op must not return its arguments. It may change one, which is annotated as `Changed`, and whose version counter
    its caller raises; if it returns nothing else, it yields None. The schema follows from the annotations: an ``int``
    is a constant of a graph, a `Size` is not. A shape suffix, as in ``x_MN``, is not part of an argument's name. A new
    argument of an existing op needs the default None, so that programs exported without it still run.

    `torch.library.custom_op` would add an autograd layer and alias checks, about ten microseconds per call. Here,
    `autograd` computes the gradients, and tests run ``torch.library.opcheck`` on every op.

    Args:
        tags: additional tags of the op.
        replays: whether calls may be replayed on a GPU, see `core.replay`: besides allocating, filling and viewing
            tensors, the op only launches kernels, by `kernels.common.launch`. What a library launches is not recorded.

    Returns:
        A decorator. It returns a plain function that runs the op without the dispatcher.
    """

    def register(op: Callable[..., Steps[Any]]) -> Callable[..., Any]:
        def execute(*args: Any) -> Any:
            for result in op(*args):  # noqa: B007
                pass
            return result

        def fake(*args: Any) -> Any:
            result = next(op(*args))
            return result() if callable(result) else result

        schema = schema_of(op)
        name = schema.partition("(")[0]
        run = replayed(name, execute) if replays else execute
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"grouped_gemm::{name}", fake, lib=_library)
        NAMES.append(name)
        overload = getattr(torch.ops.grouped_gemm, name).default
        if replays:
            implementations[overload] = execute
        setattr(ops, name, _shortcut(overload, run))
        return run

    return register


def schema_of(op: Callable[..., Steps[Any]]) -> str:
    """The schema of ``op``, from its annotations: "name(Tensor x, str recipe) -> Tensor"."""
    hints = get_type_hints(op, include_extras=True)
    for name, parameter in inspect.signature(op).parameters.items():
        if hints.get(name) not in _TYPES or parameter.default not in (inspect.Parameter.empty, None):
            raise TypeError(f"{op.__name__}: expected one of {list(_TYPES)} and no default but None; found {parameter}")
    result, _ = get_args(get_args(hints.pop("return"))[0])
    results = ", ".join(_TYPES[part] for part in get_args(result)) if get_args(result) else _TYPES[result]
    defaults = {name: "=None" for name, p in inspect.signature(op).parameters.items() if p.default is None}
    arguments = ", ".join(
        f"{_TYPES[hint]} {_SHAPE.sub('', name)}{defaults.get(name, '')}" for name, hint in hints.items()
    )
    return f"{op.__name__.removeprefix('_')}({arguments}) -> {f'({results})' if get_args(result) else results}"


_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, torch.dtype, str, int, bool, type(None)))
_is_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack  # fake tensors, tracing, selective checkpointing
_function_modes = torch._C._len_torch_function_stack  # the dispatcher turns these off around an implementation
_transform = torch._C._functorch.peek_interpreter_stack
_jit_trace = torch._C._get_tracing_state


def is_intercepted() -> bool:
    """Whether a compiler, a tracer, a transform or a dispatch mode sees the ops that are called now.

    Selective checkpointing replays the ops that it saw, and a tracer's tensors mean nothing outside of it. So nothing
    that an op returns now may be kept for later calls.
    """
    return bool(_is_compiling() or _modes() or _transform() is not None or _jit_trace() is not None)


def _is_seen() -> bool:
    """Whether anything, a profiler included, sees the ops that are called now."""
    return bool(is_intercepted() or _function_modes() or torch.autograd.profiler._is_profiler_enabled)


def _shortcut(op: Any, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, which skips the dispatcher where all it would do is call ``implementation``."""

    def call(*args: Any) -> Any:
        # An op's first argument is a tensor. On the meta device, the fake runs.
        if _is_seen() or not _PLAIN.issuperset(map(type, args)) or args[0].is_meta:
            return op(*args)
        return implementation(*args)

    return call


def replayed_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which calls ops, replayed as a whole where nothing sees them. `replayed` says what it may take."""
    replays = replayed(f"{function.__module__}.{function.__qualname__}", function)

    @functools.wraps(function)
    def call(*args: Any, number: int | None = None) -> Any:
        return function(*args) if _is_seen() else replays(*args, number=number)

    return call
