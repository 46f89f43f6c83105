"""Where the gradients of weights go, if not to autograd: into a parameter's fp32 ``main_grad``, or into a queue.

An autograd function asks `destination_of` in forward, and hands `deliver_wgrad` a way to compute the gradient in
backward.

E, K, N: groups, in and out features.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from grouped_gemm.core import vmap
from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.preference import check_bool
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.selection import checks
from grouped_gemm.selection.spec import needs_gradient

Compute: TypeAlias = Callable[[Tensor | None], Tensor | None]
"""Computes the gradient of weights. Given a float32 tensor of their shape, it adds to it instead; what it then returns
is not used."""

_PLAIN = (Tensor, torch.nn.Parameter)


class WgradDestination:
    """Where the gradient of the weights of one call goes.

    Args:
        weights: what autograd differentiates.
        parameter: the leaf whose ``main_grad`` the gradient is added to; None: autograd gets it.
        queue: where it waits until `WgradQueue.backward_dw`; None: it is computed in backward.
        name: what error messages call the weights.
    """

    def __init__(self, weights: Tensor, parameter: Tensor | None, queue: WgradQueue | None, name: str) -> None:
        self.weights, self.parameter, self.queue, self._name = weights, parameter, queue, name

    def run(self, compute: Compute) -> Tensor | None:
        """Computes the gradient. Returns what autograd gets."""
        if self.parameter is None:
            return compute(None)
        total = _main_grad_like(self.weights, self.parameter, self._name)
        compute(total)
        torch.autograd.graph.increment_version(total)
        self.parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        # Where the parameter says so, as Megatron-Core's do: its hooks want a gradient, and add it to main_grad.
        return torch.zeros_like(self.weights) if getattr(self.parameter, "zero_out_wgrad", False) else None


class WgradQueue:
    """Weight gradients that wait until `backward_dw`, from `delay_wgrad`. ``len`` counts them."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[WgradDestination, Compute]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __reduce__(self) -> tuple[type[WgradQueue], tuple[()]]:
        """Copies and pickles as an empty queue.

        Raises:
            RuntimeError: gradients wait, which belong to the parameters of this process.
        """
        if self._waiting:
            raise RuntimeError(
                f"WgradQueue: expected no gradients that wait; found {len(self)}; call backward_dw() first"
            )
        return WgradQueue, ()

    def append(self, destination: WgradDestination, compute: Compute) -> None:
        """Adds a gradient. `deliver_wgrad` calls it."""
        self._waiting.append((destination, compute))

    def backward_dw(self) -> None:
        """Computes the gradients that wait, in the order of backward, and frees the operands of each.

        A gradient is added to ``main_grad``, or goes on to ``grad`` through autograd, which runs the hooks of the
        parameter. The kernels run on the current stream.
        """
        while self._waiting:
            destination, compute = self._waiting.popleft()
            with torch.no_grad():
                gradient = destination.run(compute)
            if gradient is not None:
                torch.autograd.backward(destination.weights, gradient)


class _Surrounding(threading.local):
    """The queue of the innermost `delay_wgrad` block around this thread's calls."""

    def __init__(self) -> None:
        self.queue: WgradQueue | None = None


_surrounding = _Surrounding()


@contextmanager
def delay_wgrad(queue: WgradQueue | None = None) -> Iterator[WgradQueue]:
    """Puts off the weight gradients of the calls inside the block, until ``queue.backward_dw()``.

    The block goes around the forward calls, in their thread. Backward then computes only the gradients of activations
    and biases, and hands them on at once. A step of the optimizer before ``backward_dw()`` misses the weight gradients.

    Until then, the queue keeps the operands: M * (K + N) values for each call, in the dtype of ``a``, or a byte each
    and their scales with an fp8 recipe. So they must not be changed in place.

    It holds for weights that are leaf parameters or views of them. Other weights, such as the result of a cast, and
    DTensors get their gradients in backward. So do calls with two 2-dimensional operands.

    >>> with delay_wgrad() as queue:
    ...     y = layer(x, offs)
    >>> y.backward(dy)
    >>> queue.backward_dw()

    Args:
        queue: the queue to use; None: a new one.

    Returns:
        A context manager that gives the queue.
    """
    queue = WgradQueue() if queue is None else queue
    before = _surrounding.queue
    _surrounding.queue = queue
    try:
        yield queue
    finally:
        _surrounding.queue = before


def is_delaying() -> bool:
    """Whether the call is inside a `delay_wgrad` block."""
    return _surrounding.queue is not None


def leaves_graphs(accumulate_main_grad: bool) -> bool:
    """Whether `outside_of_graphs` has to run this call: Dynamo traces it, and its backward sets attributes of
    parameters or fills a queue."""
    if not torch.compiler.is_compiling() or not (accumulate_main_grad or is_delaying()):
        return False
    _break_graphs()
    return True


def _run(call: Callable[..., Tensor], *args: Any) -> Tensor:
    return call(*args)


outside_of_graphs = _run  # becomes a function that Dynamo breaks the graph for


def _break_graphs() -> None:
    """Makes `outside_of_graphs` what it says. While tracing: before, it would import all of Dynamo."""
    global outside_of_graphs
    if outside_of_graphs is _run:
        reason = "a call with accumulate_main_grad or in delay_wgrad runs outside of graphs"
        outside_of_graphs = torch.compiler.disable(_run, reason=reason)


_break_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see `route._decided`


def destination_of(
    weights: Tensor | QuantizedWeights, accumulate_main_grad: bool, name: str = "b"
) -> WgradDestination | None:
    """Where the gradient of ``weights`` goes; None: to autograd, in backward, or it is not needed.

    Args:
        weights: as the caller passed them, (E, K, N) or (E, N, K).
        accumulate_main_grad: whether it is added to the parameter's ``main_grad``.
        name: what error messages call the weights.

    Raises:
        TypeError: ``accumulate_main_grad`` is not a bool.
        ValueError: ``weights`` are not all of a leaf parameter, or its ``main_grad`` does not fit.
    """
    check_bool("accumulate_main_grad", accumulate_main_grad)
    queue = _surrounding.queue
    if not accumulate_main_grad and queue is None:
        return None
    if isinstance(weights, QuantizedWeights) or not needs_gradient(weights):
        return None
    parameter = weights if weights._base is None else weights._base
    if accumulate_main_grad:
        _main_grad_like(weights, parameter, name)  # raises here what backward would raise
        return WgradDestination(weights, parameter, queue, name)
    if parameter.is_leaf and type(weights) in _PLAIN and type(parameter) in _PLAIN:
        return WgradDestination(weights, None, queue, name)
    return None


def deliver_wgrad(destination: WgradDestination | None, dy: Tensor, compute: Compute) -> Tensor | None:
    """Computes the gradient of weights in backward, now or later. Returns what autograd gets.

    Args:
        destination: from `destination_of`, in forward.
        dy: the gradient that backward was called with.
        compute: computes it. It keeps the operands, but not the ``ctx`` of an autograd function.

    Raises:
        RuntimeError: there is a destination, and ``create_graph`` is True or gradients are batched.
    """
    if destination is None:
        return compute(None)
    check_backward(dy)
    if destination.queue is None:
        return destination.run(compute)
    destination.queue.append(destination, compute)
    return None


def check_backward(dy: Tensor) -> None:
    """Checks that the gradient of weights with a destination may be delivered there.

    Args:
        dy: the gradient that backward was called with.

    Raises:
        RuntimeError: ``create_graph`` is True, or gradients are batched.
    """
    if torch.is_grad_enabled() or vmap.is_batched(dy):
        found = "create_graph=True" if torch.is_grad_enabled() else "batched gradients"
        raise RuntimeError(
            f"backward: expected a plain one with accumulate_main_grad or delay_wgrad; found {found}; leave both out "
            "where gradients are differentiated or batched"
        )


def _main_grad_like(weights: Tensor, parameter: Tensor, name: str) -> Tensor:
    """The ``main_grad`` of ``parameter``, viewed as ``weights`` view the parameter.

    Raises:
        ValueError: ``weights`` are not all of the parameter, or ``main_grad`` does not fit.
    """
    is_whole = (
        parameter.is_leaf
        and type(weights) in _PLAIN
        and type(parameter) in _PLAIN
        and weights.dim() == 3
        and weights.numel() == parameter.numel()
        and weights.dtype == parameter.dtype
        and not weights.is_neg()
        and parameter.is_contiguous()
        and (weights.is_contiguous() or weights.transpose(1, 2).is_contiguous())
    )
    if not is_whole:
        found = f"{type(weights).__name__} {tuple(weights.shape)} with strides {weights.stride()}"
        if parameter.is_leaf:
            found += f", of a leaf {tuple(parameter.shape)} with strides {parameter.stride()}"
        else:
            found += f", computed by {parameter.grad_fn}"
        expected = "all of a contiguous leaf parameter, (E, K, N) or transposed, with accumulate_main_grad"
        checks.fail(name, expected, found)
    total = getattr(parameter, "main_grad", None)
    if (
        not isinstance(total, Tensor)
        or total.dtype != torch.float32
        or total.shape != parameter.shape
        or total.device != parameter.device
        or not total.is_contiguous()
    ):
        expected = f"float32, contiguous, {tuple(parameter.shape)} on {parameter.device}, like the parameter"
        found = "none"
        if isinstance(total, Tensor):
            found = f"{dtype_name(total.dtype)}, {tuple(total.shape)} with strides {total.stride()} on {total.device}"
        checks.fail(f"main_grad of {name}", expected, found)
    if weights.is_contiguous():
        return total.view(weights.shape)
    num_groups, k, n = weights.shape
    return total.view(num_groups, n, k).transpose(1, 2)
