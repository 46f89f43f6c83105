"""How ops of ``torch.library`` are defined: opaque to torch.compile, visible by name to checkpointing policies."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Annotated, Any, TypeAlias, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

_library = torch.library.Library("grouped_gemm", "FRAGMENT")
NAMES: list[str] = []

# Each op by its name, for backends to call. Where nothing watches ops it is the implementation itself: the way through
# the dispatcher takes 4 to 10 microseconds, a tenth of what the host takes for a call.
ops = SimpleNamespace()

_Result = TypeVar("_Result")
Steps: TypeAlias = Iterator[_Result | Callable[[], _Result]]  # what an op yields: see `define_op`
Size: TypeAlias = Annotated[int, "SymInt"]  # an argument that torch.compile may not know; other ints are constants

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Size: "SymInt",
    int: "int",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}
_SHAPE = re.compile("_[A-Z]+$")


def define_op(*, tags: Sequence[torch.Tag] = ()) -> Callable[[Callable[..., Steps[Any]]], Callable[..., Any]]:
    """Decorator: makes a generator function the op ``torch.ops.grouped_gemm.<name>``: its own, less a leading "_".

    The function yields its result twice over, so that one signature serves for schema, fake and op:

    - First it yields the result with shapes, strides and dtypes as they will be. The fake stops here. So up to this
      point it looks at no values and launches nothing.
    - Then it fills what it has yielded. Or it yields another result, which takes the place of the first one. In that
      case it should first yield a function that makes the fake's result, so that an op that runs allocates nothing in
      vain.

    >>> @define_op()
    ... def _triton_group_sums(x_MN: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Steps[Tensor]:
    ...     out = x_MN.new_empty(offs.shape[0], x_MN.shape[1], dtype=out_dtype)
    ...     yield out
    ...     from grouped_gemm.kernels.gemm import k_grouped  # imports Triton
    ...     k_grouped.group_sums(x_MN, offs, out)

    An op must not return or change its arguments. Its schema follows from the annotations: an ``int`` is a constant of
    a graph and a `Size` is not; a shape suffix, as in ``x_MN``, is not part of an argument's name. Give an argument
    that is added to an op the default None, so that programs exported without it still run.

    `torch.library.custom_op` would add an autograd layer and alias checks of about ten microseconds a call; here
    gradients are the business of `functional`, and tests run ``torch.library.opcheck`` on every op.

    Args:
        tags: further tags of the op.

    Returns:
        A decorator that returns a plain function, which runs the op without the dispatcher.
    """

    def register(op: Callable[..., Steps[Any]]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            for result in op(*args):  # noqa: B007
                pass
            return result

        def fake(*args: Any) -> Any:
            result = next(op(*args))
            return result() if callable(result) else result

        schema = schema_of(op)
        name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"grouped_gemm::{name}", fake, lib=_library)
        NAMES.append(name)
        setattr(ops, name, _shortcut(getattr(torch.ops.grouped_gemm, name).default, run))
        return run

    return register


def schema_of(op: Callable[..., Steps[Any]]) -> str:
    """The schema that the annotations of ``op`` say: "name(Tensor x, str recipe) -> Tensor"."""
    hints = get_type_hints(op, include_extras=True)
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
_function_modes = torch._C._len_torch_function_stack  # which an op's implementation is called without
_transform = torch._C._functorch.peek_interpreter_stack
_jit_trace = torch._C._get_tracing_state


def _shortcut(op: Any, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``op``, without the dispatcher where that would do nothing but find ``implementation``."""

    def call(*args: Any) -> Any:
        if (
            _is_compiling()
            or _modes()
            or _function_modes()
            or _transform() is not None
            or _jit_trace() is not None
            or torch.autograd.profiler._is_profiler_enabled
            or not _PLAIN.issuperset(map(type, args))
            or args[0].is_meta  # an op's first argument is a tensor; without values, its fake runs
        ):
            return op(*args)
        return implementation(*args)

    return call
