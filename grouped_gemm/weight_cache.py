"""`cache_weights`: what calls have quantized their weights to, kept for the calls that follow.

Kept layouts must never outlive the values that they stand for. Several things end them, as none sees every change:

- The version counter of the weights, which in-place ops move, and their storage, which ``p.data = x`` replaces.
- A step of an optimizer of torch. Fused ones move no counter; those of a DTensor's local shard and of the parameters
  that FSDP2 gathers, which refills them in place, do not follow the parameter that is stepped. Parameters whose step
  was captured in a CUDA graph are not kept at all, since nothing tells of a replay.
- The end of the tensor, of its storage, or of the block.

What is left changes the memory of the weights without moving their counter; `cache_weights` lists the ways. Only the
values would show it, and to read them at each call would take half the time of quantizing, and a host sync to compare
them. So that is what GROUPED_GEMM_VALIDATE=1 does, and nothing else.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from grouped_gemm.backends.base import _GroupedMMBackend
from grouped_gemm.core.machine import is_capturing
from grouped_gemm.core.preference import VALIDATE
from grouped_gemm.core.quantized import Layouts, nbytes
from grouped_gemm.core.recipes import Recipe


@dataclass
class _Kept:
    """What one tensor was quantized to.

    Attributes:
        state: its version then, where its values were, and whether checksums are compared. The storage is a weak
            reference, so that no other storage takes over the address.
        watched: weak references that drop all this when the tensor or its storage goes.
        layouts: those of forward and dgrad, by all that tells apart what was asked for: views of one tensor, backends,
            recipes, streams.
        checksums: of the values of each view, under GROUPED_GEMM_VALIDATE=1.
    """

    state: tuple[int, StorageWeakRef, bool]
    watched: tuple[weakref.ref[Any], ...]
    layouts: dict[tuple[Any, ...], Layouts] = field(default_factory=dict)
    checksums: dict[tuple[Any, ...], int] = field(default_factory=dict)


class WeightCache:
    """What calls inside one `cache_weights` block have quantized their weights to; goes with the weights."""

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}  # by the id of the tensor that weights are a view of

    def __contains__(self, b: Tensor) -> bool:
        return id(_source(b)) in self._kept

    @property
    def nbytes(self) -> int:
        """Bytes of all data and scales; what layouts share counts once."""
        kept = [layouts for one in list(self._kept.values()) for layouts in list(one.layouts.values())]
        return nbytes(operand for layouts in kept for operand in layouts)

    def clear(self) -> None:
        """Drops everything: for weights that changed unseen. `cache_weights` lists the ways."""
        self._kept.clear()

    def quantize(
        self, backend: _GroupedMMBackend, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> Layouts:
        """`_GroupedMMBackend.quantize_weights` of what is not here yet.

        Raises:
            RuntimeError: under GROUPED_GEMM_VALIDATE=1, the values are not those that were quantized.
        """
        source, validates = _source(b_EKN), VALIDATE.is_on_now()
        state = b_EKN._version, StorageWeakRef(b_EKN.untyped_storage()), validates
        kept = self._kept.get(id(source))
        if kept is None or kept.state != state:
            self._kept[id(source)] = kept = _Kept(state, self._watch(source))
        where = b_EKN.shape, b_EKN.stride(), b_EKN.storage_offset(), b_EKN.dtype
        if validates:
            checksum = _checksum(b_EKN)
            if kept.checksums.setdefault(where, checksum) != checksum:
                raise RuntimeError(_CHANGED_UNSEEN.format(shape=tuple(b_EKN.shape), version=b_EKN._version))
        # Each stream has its own copies: another one would not wait for the kernel that writes them.
        stream = torch.cuda.current_stream(b_EKN.device).cuda_stream if b_EKN.is_cuda else None
        key = (*where, backend.kind, recipe, stream)
        for_forward, for_dgrad = kept.layouts.get(key, (None, None))
        missing = {"forward": forward and for_forward is None, "dgrad": dgrad and for_dgrad is None}
        if any(missing.values()):
            one, other = backend.quantize_weights(b_EKN, recipe, **missing)
            for_forward, for_dgrad = one or for_forward, other or for_dgrad
            kept.layouts[key] = for_forward, for_dgrad
        return for_forward if forward else None, for_dgrad if dgrad else None

    def _watch(self, source: Tensor) -> tuple[weakref.ref[Any], ...]:
        """Drops what is kept of ``source`` when the tensor or its storage goes; the next one may get the same id.

        Of a parameter, a mark in its ``__dict__`` has the weak reference: torch swaps no tensor that has one itself,
        and `Module.to` may swap parameters, their ``__dict__`` included. The mark is an empty set, which any
        ``torch.load`` of a saved parameter takes.
        """
        kept, key = self._kept, id(source)
        mark = source.__dict__.setdefault(_MARK, set()) if isinstance(source, Parameter) else source
        return tuple(weakref.ref(x, lambda _: kept.pop(key, None)) for x in (mark, source.untyped_storage()))


_MARK = "_grouped_gemm_kept"


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
    activation checkpointing; those whose ``b`` is new at each call, as under autocast that casts it; and those with
    parameters whose optimizer's step was captured in a CUDA graph.

    Some changes of weights move no version counter that a call could see. After one of these, `WeightCache.clear`:

    - writes through ``p.data``, such as ``p.data.copy_(x)`` and ``p.data += d``, as LoRA merges do;
    - collectives and ``recv`` into a parameter or its ``.data``;
    - writes to memory that a parameter shares but is no view of, such as a flat buffer after ``p.data = flat[i:j]``,
      ``p.set_(...)``, NumPy or DLPack;
    - a replay of a CUDA graph that changes weights in any other way than by the step of an optimizer of their own;
    - raw kernels, which do not tell torch.

    GROUPED_GEMM_VALIDATE=1 finds all of these: each call compares a checksum of the values. That reads all weights and
    is a host sync, too much to do at each call without being asked.

    Yields:
        The cache.

    Raises:
        RuntimeError: by a call of `grouped_mm`, under GROUPED_GEMM_VALIDATE=1: weights have changed unseen.
    """
    if _local.cache is not None:
        yield _local.cache
        return
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
        and not (_stepped_in_graphs and _source(b).untyped_storage() in _stepped_in_graphs)
    )


def _source(b: Tensor) -> Tensor:
    """The tensor that ``b`` is a view of, or itself."""
    base = b._base
    return b if base is None else base


_CHANGED_UNSEEN = (
    "cache_weights: expected weights {shape} to have the values that were quantized; found others, though the version "
    "counter is still {version}: they were changed through p.data, a collective, a flat buffer, a CUDA graph or the "
    "like. Call cache.clear() after such a change; cache is what cache_weights() yields."
)


def _checksum(b_EKN: Tensor) -> int:
    """A number that tells values apart, bit for bit and place by place; waits for the device.

    The bits of each value times an odd factor of its place, added up modulo 2^64: integers give the same sum in any
    order. Any single change shows; others, such as two values swapped, cancel with a chance of 2^-32 or less.
    """
    bits = b_EKN.detach().view(_INTEGERS[b_EKN.element_size()])
    bits = bits if bits.stride(2) == 1 else bits.transpose(1, 2)
    num_groups, lines, depth = bits.shape
    along = _factors(depth, bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for e in range(num_groups):  # the temporaries are those of one expert, in int64
        by_line = (bits[e] * along).sum(1)
        total += (by_line * _factors(lines, bits.device, e + 1)).sum()
    return int(total.item())


_INTEGERS = {2: torch.int16, 4: torch.int32}  # of bfloat16 and float16, and of float32


def _factors(count: int, device: torch.device, seed: int = 0) -> Tensor:
    """Odd int64 numbers that look random: splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    x = (torch.arange(1, count + 1, device=device) + seed * 2**32) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift)) * factor
    return (x ^ (x >> 31)) | 1


_stepped_in_graphs = WeakIdKeyDictionary()  # storages of parameters


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """Empties every cache; and remembers the parameters of a step that is captured, and may be replayed."""
    for cache in tuple(_open):
        cache.clear()
    for group in optimizer.param_groups:
        params = group["params"]
        for p in params if params and is_capturing(params[0]) else ():
            local = getattr(p, "_local_tensor", p)  # of a DTensor
            _stepped_in_graphs[local.untyped_storage()] = None


register_optimizer_step_post_hook(_after_step)  # now: a graph may be captured before the first block
