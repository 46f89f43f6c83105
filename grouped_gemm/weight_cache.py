"""`cache_weights`: what calls have quantized their weights to, kept for the calls that follow.

Kept layouts must never outlive the values that they stand for. Three things end them, as none sees every change:

- The version counter of the weights, which in-place ops move, and their storage, which ``p.data = x`` replaces.
- A step of an optimizer of torch. Fused ones move no counter; those of a DTensor's local shard and of the parameters
  that FSDP2 gathers, which refills them in place, do not follow the parameter that is stepped.
- The end of the block.

What is left is a change by hand that moves no counter, such as ``p.data.copy_(x)``: after it, `WeightCache.clear`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from grouped_gemm.backends.base import _GroupedMMBackend
from grouped_gemm.device import is_capturing
from grouped_gemm.operand import Layouts, nbytes
from grouped_gemm.recipes import Recipe


@dataclass
class _Kept:
    """What one tensor was quantized to.

    Attributes:
        version: its version then.
        storage: where its values were. A weak reference, so that no other storage takes over the address.
        layouts: those of forward and dgrad, by all that tells apart what was asked for: views of one tensor, backends,
            recipes, streams.
    """

    version: int
    storage: StorageWeakRef
    layouts: dict[tuple[Any, ...], Layouts] = field(default_factory=dict)


class WeightCache:
    """What calls inside one `cache_weights` block have quantized their weights to; goes with the weights."""

    def __init__(self) -> None:
        self._kept = WeakIdKeyDictionary()  # by the tensor that weights are a view of

    def __contains__(self, b: Tensor) -> bool:
        return _source(b) in self._kept

    @property
    def nbytes(self) -> int:
        """Bytes of all data and scales; what layouts share counts once."""
        kept = [layouts for one in list(self._kept.values()) for layouts in list(one.layouts.values())]
        return nbytes(operand for layouts in kept for operand in layouts)

    def clear(self) -> None:
        """Drops everything: for weights that changed without a trace, as by ``p.data.copy_(x)``."""
        self._kept = WeakIdKeyDictionary()

    def quantize(
        self, backend: _GroupedMMBackend, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> Layouts:
        """`_GroupedMMBackend.quantize_weights` of what is not here yet."""
        source, version, storage = _source(b_EKN), b_EKN._version, StorageWeakRef(b_EKN.untyped_storage())
        kept = self._kept.get(source)
        if kept is None or (kept.version, kept.storage) != (version, storage):
            self._kept[source] = kept = _Kept(version, storage)
        # Each stream has its own copies: another one would not wait for the kernel that writes them.
        stream = torch.cuda.current_stream(b_EKN.device).cuda_stream if b_EKN.is_cuda else None
        where = b_EKN.shape, b_EKN.stride(), b_EKN.storage_offset(), b_EKN.dtype
        key = (*where, backend.kind, recipe, stream)
        for_forward, for_dgrad = kept.layouts.get(key, (None, None))
        missing = {"forward": forward and for_forward is None, "dgrad": dgrad and for_dgrad is None}
        if any(missing.values()):
            one, other = backend.quantize_weights(b_EKN, recipe, **missing)
            for_forward, for_dgrad = one or for_forward, other or for_dgrad
            kept.layouts[key] = for_forward, for_dgrad
        return for_forward if forward else None, for_dgrad if dgrad else None


class _Local(threading.local):
    cache: WeightCache | None = None  # of the block around this thread's calls


_local = _Local()
_open: list[WeightCache] = []  # of every thread


@contextmanager
def cache_weights() -> Iterator[WeightCache]:
    """Calls of `grouped_mm` inside the block quantize each weight once, and again when it has changed.

    For gradient accumulation: put it around the micro-batches of an optimizer step, or around all of training, since
    a step of any `torch.optim.Optimizer` empties the cache. Results are the same bit for bit, gradients flow to the
    weights as ever, and what is kept goes with its tensor: a parameter, or what ``b`` is a view of. It takes a byte for
    each element, two where a backend has a layout of its own for dgrad.

    The block holds for this thread, and for the backward passes of what is called in it: activation checkpointing finds
    there what forward has kept. A block inside another one changes nothing. Some calls neither keep nor find anything:
    those inside torch.compile, during CUDA graph capture, and under a ``TorchDispatchMode``, such as that of selective
    activation checkpointing; and those whose ``b`` is new at each call, as under autocast that casts it.

    Yields:
        The cache. `WeightCache.clear` it after a change of weights by hand that moves no version counter, such as
        ``p.data.copy_(x)``.
    """
    if _local.cache is not None:
        yield _local.cache
        return
    _watch_optimizers()
    _local.cache = cache = WeightCache()
    _open.append(cache)
    try:
        yield cache
    finally:
        _local.cache = None
        _open.remove(cache)
        cache.clear()


def quantize(backend: _GroupedMMBackend, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool) -> Layouts:
    """`_GroupedMMBackend.quantize_weights`, or what is kept of it inside `cache_weights`."""
    cache = None
    if recipe.is_scaled and not torch.compiler.is_compiling() and _open:
        cache = _cache_of(b_EKN)
    if cache is None:
        return backend.quantize_weights(b_EKN, recipe, forward=forward, dgrad=dgrad)
    return cache.quantize(backend, b_EKN, recipe, forward=forward, dgrad=dgrad)


def _cache_of(b: Tensor) -> WeightCache | None:
    """This thread's cache, or else the one that has ``b``: autograd recomputes in threads of its own."""
    cache = _local.cache
    if cache is None:
        cache = next((other for other in tuple(_open) if b in other), None)
    return cache if cache is not None and _can_be_kept(b) else None


def _can_be_kept(b: Tensor) -> bool:
    """Whether layouts of ``b`` may be kept, and used by calls that were not there when they were written."""
    return (
        type(b) in (Tensor, Parameter)
        and not b.is_inference()  # which has no version
        and not torch._C._functorch.is_functorch_wrapped_tensor(b)
        # A mode sees each op. Selective checkpointing pairs those of forward with those of the recomputation, in order.
        and torch._C._len_torch_dispatch_stack() == 0
        # Memory of a graph is the graph's, and what was kept outside would be baked into it.
        and not is_capturing(b)
    )


def _source(b: Tensor) -> Tensor:
    """The tensor that ``b`` is a view of, or itself."""
    base = b._base
    return b if base is None else base


@functools.cache
def _watch_optimizers() -> None:
    """From the first block on, the step of any optimizer empties every cache."""
    register_optimizer_step_post_hook(_after_step)


def _after_step(*_: Any) -> None:
    for cache in tuple(_open):
        cache.clear()
