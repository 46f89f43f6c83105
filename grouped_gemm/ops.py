"""How ops of ``torch.library`` are defined: opaque to torch.compile, visible by name to checkpointing policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_library = torch.library.Library("grouped_gemm", "FRAGMENT")
NAMES: list[str] = []


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
        return implementation

    return register
