"""`override_torch`: the grouped products that a model asks torch for run through `grouped_mm` instead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, get_overridable_functions

from grouped_gemm import arguments
from grouped_gemm.functional import grouped_mm
from grouped_gemm.preference import KernelPreference
from grouped_gemm.recipes import Recipe

_NAMES = {"input", "self", "weight", "mat2", "offs", "bias", "out_dtype"}


@contextmanager
def override_torch(
    recipe: Recipe | str | None = None,
    *,
    group_alignment: int = 1,
    kernel_preference: KernelPreference | str = KernelPreference.AUTO,
) -> Iterator[None]:
    """Runs what a model multiplies with `torch.nn.functional.grouped_mm` inside the block through this package.

    A context manager and a decorator. It catches ``torch._grouped_mm`` as well, on which the public function is built,
    its op, and the op that transformers calls where it does not trust torch's. With a matrix for each group, and with
    two 2-dimensional operands that ``offs`` splits; whatever else torch is asked for goes to torch: products without
    ``offs``, other dtypes, a bias, tensors of another class than Tensor and Parameter, such as DTensor.

    Gradients follow the forward pass, wherever backward is called. Activation checkpointing runs the forward pass again
    in backward, where no block reaches: decorate what is checkpointed. Under torch.compile the block may be around the
    compiled function or inside it. Blocks nest, the innermost wins, and a block holds for its own thread.

    Args:
        recipe: how operands are quantized, a `Recipe` or its name. None: not at all.
        group_alignment: a promise about every group of every call inside, as in `grouped_mm`.
        kernel_preference: a backend or its name, as in `grouped_mm`.

    Raises:
        ValueError: an argument is none that `grouped_mm` takes.
    """
    if recipe is not None:
        recipe = Recipe.parse(recipe)
    kernel_preference = KernelPreference.parse(kernel_preference)
    arguments.check_options(None, group_alignment)
    _show_to_dynamo()
    with _Override(recipe, group_alignment, kernel_preference):
        yield


class _Override(TorchFunctionMode):
    """Sends calls of torch's product to `grouped_mm`. While it handles one, torch keeps the mode out of the way."""

    def __init__(self, recipe: Recipe | None, group_alignment: int, kernel_preference: KernelPreference) -> None:
        super().__init__()
        self.recipe = recipe
        self.group_alignment = group_alignment
        self.kernel_preference = kernel_preference
        op = torch.ops.aten._grouped_mm
        self.products: tuple[Callable[..., Any], ...] = (torch._grouped_mm, op, op.default)
        loop = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # where transformers has been imported
        if loop is not None:
            self.products += (loop, loop.default)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.products or not kwargs.keys() <= _NAMES:
            return func(*args, **kwargs)
        a, b, offs, bias, out_dtype = _bind(*args, **kwargs)
        if not _takes(a, b, offs, bias, out_dtype):
            return func(*args, **kwargs)
        with torch.autocast(a.device.type, enabled=False):  # which torch's product does not know
            return grouped_mm(
                a,
                b,
                offs,
                recipe=self.recipe,
                out_dtype=out_dtype,
                group_alignment=self.group_alignment,
                kernel_preference=self.kernel_preference,
            )


def _bind(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """``a``, ``b``, ``offs``, ``bias`` and ``out_dtype``, None where it is not given, whatever a product calls them."""
    given = (
        kwargs.get("input", kwargs.get("self")),
        kwargs.get("mat2", kwargs.get("weight")),
        kwargs.get("offs"),
        kwargs.get("bias"),
        kwargs.get("out_dtype"),
    )
    return args + given[len(args) :]


def _takes(a: Any, b: Any, offs: Any, bias: Any, out_dtype: Any) -> bool:
    """Whether `grouped_mm` means the same by these arguments."""
    tensors = (a, b, offs)
    return (
        all(type(x) is Tensor or type(x) is torch.nn.Parameter for x in tensors)
        and not a.is_meta
        and a.dim() == 2
        and b.dim() in (2, 3)
        and a.dtype == b.dtype
        and a.dtype in arguments.DTYPES
        and (out_dtype is None or out_dtype in arguments.DTYPES)
        and offs.dtype == torch.int32
        and bias is None
    )


def _show_to_dynamo() -> None:
    """Makes Dynamo ask modes about ``torch._grouped_mm``, as eager calls do.

    It asks about what torch lists as overridable, where names that begin with an underscore are left out.
    """
    function, listed = torch._grouped_mm, get_overridable_functions()[torch]
    if function not in listed:
        listed.append(function)
        tracer = sys.modules.get("torch._dynamo.variables.torch")
        if tracer is not None:  # which keeps a set of what was listed
            tracer.get_overridable_functions().add(function)


# Dynamo runs it while tracing, so that it concerns what is traced next; see `functional._chosen`.
_show_to_dynamo._dynamo_marked_constant = True  # type: ignore[attr-defined]
