"""`torch.func.vmap` and batched gradients: a grouped GEMM has no batch axis, so samples run one by one.

There are two kinds of batched tensors. `torch.func.vmap` makes functorch's: `each_sample` loops over whole calls, so
that autograd sees the call of each sample. ``torch.autograd.grad(is_grads_batched=True)``, which
`torch.autograd.functional.jacobian(vectorize=True)` uses, makes those of an older vmap. For these, the dispatcher runs
each op in a loop, so `batched_gradient` sends ops through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.overrides import BaseTorchFunctionMode

is_transformed = torch._C._are_functorch_transforms_active
_NOTHING = nullcontext()


def is_batched(x: Tensor) -> bool:
    """Whether either kind of vmap has batched ``x``."""
    functorch = torch._C._functorch
    return bool(functorch.is_legacy_batchedtensor(x) or functorch.is_batchedtensor(x))


def batched_gradient(dy: Tensor) -> AbstractContextManager[Any]:
    """A context in which ops accept ``dy`` from ``is_grads_batched``. For any other ``dy`` it does nothing.

    Raises:
        RuntimeError: ``dy`` is batched and ``create_graph`` is True.
    """
    if torch.compiler.is_compiling() or not torch._C._functorch.is_legacy_batchedtensor(dy):
        return _NOTHING
    if torch.is_grad_enabled():  # torch would drop the history together with the batch
        raise RuntimeError(
            "grouped_mm: expected create_graph=False with batched gradients (is_grads_batched, vectorize=True); "
            "found True; for second derivatives, compute the gradients one by one"
        )
    return BaseTorchFunctionMode()  # while a mode is on, ops do not skip the dispatcher


def each_sample(function: Callable[..., Any], *operands: Any) -> Any:
    """``function(*operands)``, run for each sample if `torch.func.vmap` has batched some operands.

    Args:
        function: takes the operands, and returns a tensor, or a tuple of tensors and None.
        operands: tensors or anything else.

    Raises:
        RuntimeError: operands are batched, but inside another transform such as `torch.func.grad`.
    """
    if not is_transformed():
        return function(*operands)
    functorch = torch._C._functorch
    is_batched = any(isinstance(x, Tensor) and functorch.is_batchedtensor(x) for x in operands)
    if functorch.peek_interpreter_stack().key() != functorch.TransformType.Vmap:
        if is_batched:
            raise RuntimeError(_NOT_DIFFERENTIABLE)
        return function(*operands)
    if is_batched:
        return _EachSample.apply(function, *operands)
    with retrieve_current_functorch_interpreter().lower():  # this vmap batches other tensors
        return each_sample(function, *operands)


_NOT_DIFFERENTIABLE = (
    "grouped_mm: expected no torch.func transform except vmap around a call that needs gradients; found "
    "torch.func.grad or another transform; use torch.autograd.grad, with is_grads_batched for several gradients"
)


def check_differentiable() -> None:
    """Checks that the call is not inside `torch.func.grad` or a similar transform.

    Raises:
        RuntimeError: it is.
    """
    if not torch.compiler.is_compiling() and is_transformed():
        raise RuntimeError(_NOT_DIFFERENTIABLE)


def check_no_transform(name: str) -> None:
    """Checks that the call of the function ``name`` is not inside any transform, such as vmap or grad.

    Raises:
        RuntimeError: it is.
    """
    if not torch.compiler.is_compiling() and is_transformed():
        raise RuntimeError(
            f"{name}: expected no torch.func transform; found vmap, grad or another one; use torch.autograd.grad, with "
            "is_grads_batched for several gradients"
        )


class _EachSample(torch.autograd.Function):
    """Only for its vmap rule, which calls the function one level below, where autograd records it."""

    @staticmethod
    def forward(function: Callable[..., Any], *operands: Any) -> Any:
        """Never reached: `each_sample` uses the Function only for batched operands."""
        return function(*operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Does nothing; torch requires it under a transform."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], function: Callable[..., Any], *operands: Any) -> Any:
        """Runs each sample and stacks the results along the first axis.

        Raises:
            ValueError: there are no samples.
        """
        if info.batch_size == 0:
            raise ValueError("grouped_mm: expected at least one sample under vmap; found none")
        by_operand = [[x] * info.batch_size if dim is None else x.unbind(dim) for x, dim in zip(operands, in_dims[1:])]
        results = [each_sample(function, *sample) for sample in zip(*by_operand)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*results))
        return stacked, tuple(None if x is None else 0 for x in stacked)
