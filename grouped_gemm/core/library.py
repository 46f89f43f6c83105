"""How ops of ``torch.library`` are defined: opaque to torch.compile, visible by name to checkpointing policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

_library = torch.library.Library("grouped_gemm", "FRAGMENT")
NAMES: list[str] = []

# Each op by its name, for backends to call. Where nothing watches ops it is the implementation itself: the way through
# the dispatcher takes 4 to 10 microseconds, a tenth of what the host takes for a call.
ops = SimpleNamespace()


def define_op(schema: str, *, fake: Callable[..., Any], tags: Sequence[torch.Tag] = ()) -> Callable[..., Any]:
    """Decorator: makes a function the op ``torch.ops.grouped_gemm.<name>``.

    `torch.library.custom_op` would add an autograd layer and alias checks of about ten microseconds a call; here
    gradients are the business of `functional`, and tests run ``torch.library.opcheck`` on every op.

    Args:
        schema: "name(Tensor x, str recipe) -> Tensor". An op must not return or change its arguments.
        fake: computes shapes, strides and dtypes of the result only.
        tags: further tags of the op.

    Returns:
        A decorator that returns the function unchanged.
    """

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"grouped_gemm::{name}", fake, lib=_library)
        NAMES.append(name)
        setattr(ops, name, _shortcut(getattr(torch.ops.grouped_gemm, name).default, implementation))
        return implementation

    return register


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
