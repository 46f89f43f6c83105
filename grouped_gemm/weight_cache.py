"""`cache_weights`: caches the quantized weights of calls for later calls.

Cached layouts must never be used after the weights have changed. Several events drop them, since none covers every
change:

- A new version counter, which in-place ops bump, or a new storage, which ``p.data = x`` sets.
- A step of a torch optimizer. Fused optimizers bump no counter. The counters of a DTensor's local shard, and of the
  parameters that FSDP2 gathers and refills in place, do not follow the parameter that is stepped. If a step was
  captured in a CUDA graph, its parameters are not cached at all, since a replay cannot be noticed.
- The end of the tensor, of its storage, or of the block.

Other changes write to the weights' memory without bumping the counter; `cache_weights` lists them. Only the values show
them. Reading the values at each call would take half the time of quantizing, and comparing them would synchronize the
host. So only GROUPED_GEMM_VALIDATE=1 does that.
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
class _Entry:
    """The quantized layouts of one tensor.

    Attributes:
        state: the tensor's version and storage when it was quantized, and whether checksums are compared. The storage
            is a weak reference, so that no other storage can get its address.
        watched: weak references that drop this entry when the tensor or its storage is freed.
        layouts: layouts for forward and dgrad, by view of the tensor, backend, recipe and stream.
        checksums: checksum of each view's values, under GROUPED_GEMM_VALIDATE=1.
    """

    state: tuple[int, StorageWeakRef, bool]
    watched: tuple[weakref.ref[Any], ...]
    layouts: dict[tuple[Any, ...], Layouts] = field(default_factory=dict)
    checksums: dict[tuple[Any, ...], int] = field(default_factory=dict)


class WeightCache:
    """The quantized weights of the calls inside one `cache_weights` block. An entry is freed with its weights."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}  # by the id of the tensor that the weights are a view of

    def __contains__(self, b: Tensor) -> bool:
        return id(_source(b)) in self._entries

    @property
    def nbytes(self) -> int:
        """Bytes of all data and scales; tensors that layouts share count once."""
        cached = [layouts for entry in list(self._entries.values()) for layouts in list(entry.layouts.values())]
        return nbytes(operand for layouts in cached for operand in layouts)

    def clear(self) -> None:
        """Drops all entries. Call it after a change of weights that the cache cannot notice; see `cache_weights`."""
        self._entries.clear()

    def quantize(
        self, backend: _GroupedMMBackend, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> Layouts:
        """As `_GroupedMMBackend.quantize_weights`, but quantizes only the layouts that are not cached yet.

        Raises:
            RuntimeError: under GROUPED_GEMM_VALIDATE=1, the values have changed since they were quantized.
        """
        source, validates = _source(b_EKN), VALIDATE.is_on_now()
        state = b_EKN._version, StorageWeakRef(b_EKN.untyped_storage()), validates
        entry = self._entries.get(id(source))
        if entry is None or entry.state != state:
            self._entries[id(source)] = entry = _Entry(state, self._watch(source))
        view = b_EKN.shape, b_EKN.stride(), b_EKN.storage_offset(), b_EKN.dtype
        if validates:
            checksum = _checksum(b_EKN)
            if entry.checksums.setdefault(view, checksum) != checksum:
                raise RuntimeError(_STALE.format(shape=tuple(b_EKN.shape), version=b_EKN._version))
        # Each stream has its own copies, since no other stream waits for the kernel that writes them.
        stream = torch.cuda.current_stream(b_EKN.device).cuda_stream if b_EKN.is_cuda else None
        key = (*view, backend.kind, recipe, stream)
        for_forward, for_dgrad = entry.layouts.get(key, (None, None))
        missing = {"forward": forward and for_forward is None, "dgrad": dgrad and for_dgrad is None}
        if any(missing.values()):
            one, other = backend.quantize_weights(b_EKN, recipe, **missing)
            for_forward, for_dgrad = one or for_forward, other or for_dgrad
            entry.layouts[key] = for_forward, for_dgrad
        return for_forward if forward else None, for_dgrad if dgrad else None

    def _watch(self, source: Tensor) -> tuple[weakref.ref[Any], ...]:
        """Drops the entry of ``source`` when the tensor or its storage is freed, since a new tensor may get its id.

        For a parameter, the weak reference is to a mark in its ``__dict__``, not to the parameter itself: torch does
        not swap a tensor that has weak references, and `Module.to` may swap parameters, together with their
        ``__dict__``. The mark is an empty set, which ``torch.load`` of a saved parameter accepts.
        """
        entries, key = self._entries, id(source)
        mark = source.__dict__.setdefault(_MARK, set()) if isinstance(source, Parameter) else source
        return tuple(weakref.ref(x, lambda _: entries.pop(key, None)) for x in (mark, source.untyped_storage()))


_MARK = "_grouped_gemm_kept"


class _Local(threading.local):
    cache: WeightCache | None = None  # the cache of this thread's block


_local = _Local()
_open: list[WeightCache] = []  # the open blocks' caches, over all threads


@contextmanager
def cache_weights() -> Iterator[WeightCache]:
    """Inside the block, calls of `grouped_mm` quantize each weight once, and again only after it has changed.

    It is for gradient accumulation. Put it around the micro-batches of an optimizer step, or around all of training,
    since a step of any `torch.optim.Optimizer` empties the cache. Results are bit for bit the same, and weights get
    gradients as usual. An entry is freed with its tensor: a parameter, or the tensor that ``b`` is a view of. It takes
    one byte per element, or two where a backend has a separate layout for dgrad.

    The block applies to this thread, and to the backward passes of calls inside it: with activation checkpointing, the
    recomputation uses the entries of forward. A nested block uses the outer block's cache. Some calls do not use the
    cache: calls inside torch.compile, during CUDA graph capture, and under a ``TorchDispatchMode``, such as that of
    selective activation checkpointing; calls with a new ``b`` each time, as under autocast that casts it; and calls
    with parameters whose optimizer step was captured in a CUDA graph.

    Some changes of weights bump no version counter. After one of these, call `WeightCache.clear`:

    - writes through ``p.data``, such as ``p.data.copy_(x)`` and ``p.data += d``, as LoRA merges do;
    - collectives and ``recv`` into a parameter or its ``.data``;
    - writes to memory that a parameter shares without being a view of it, such as a flat buffer after
      ``p.data = flat[i:j]``, ``p.set_(...)``, NumPy or DLPack;
    - a replay of a CUDA graph that changes weights other than by a step of their optimizer;
    - raw kernels that torch does not know of.

    GROUPED_GEMM_VALIDATE=1 detects all of these: each call compares a checksum of the values. That reads all weights
    and synchronizes the host, so it is off by default.

    Yields:
        The cache.

    Raises:
        RuntimeError: from `grouped_mm`, under GROUPED_GEMM_VALIDATE=1: weights have changed without a new version.
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
    """`_GroupedMMBackend.quantize_weights`, or its cached result inside `cache_weights`."""
    cache = None
    if recipe.is_scaled and not torch.compiler.is_compiling() and _open:
        cache = _cache_of(b_EKN)
    if cache is None:
        return backend.quantize_weights(b_EKN, recipe, forward=forward, dgrad=dgrad)
    return cache.quantize(backend, b_EKN, recipe, forward=forward, dgrad=dgrad)


def _cache_of(b: Tensor) -> WeightCache | None:
    """This thread's cache, or else the cache that has ``b``: autograd recomputes in its own threads."""
    cache = _local.cache
    if cache is None:
        cache = next((other for other in tuple(_open) if b in other), None)
    return cache if cache is not None and _is_cacheable(b) else None


def _is_cacheable(b: Tensor) -> bool:
    """Whether layouts of ``b`` may be cached and used by later calls."""
    return (
        type(b) in (Tensor, Parameter)
        and not b.is_inference()  # inference tensors have no version
        and not torch._C._functorch.is_functorch_wrapped_tensor(b)
        # A mode sees each op. Selective checkpointing matches the ops of forward and of the recomputation, in order.
        and torch._C._len_torch_dispatch_stack() == 0
        # A graph owns the memory that is allocated in its capture, and it would bake in layouts cached before.
        and not is_capturing(b)
        and not (_stepped_in_graphs and _source(b).untyped_storage() in _stepped_in_graphs)
    )


def _source(b: Tensor) -> Tensor:
    """The tensor that ``b`` is a view of, or itself."""
    base = b._base
    return b if base is None else base


_STALE = (
    "cache_weights: expected weights {shape} to have the values that were quantized; found others, but the version "
    "counter is still {version}: they were changed through p.data, a collective, a flat buffer, a CUDA graph or "
    "similar. Call cache.clear() after such a change, where cache is the value of `with cache_weights() as cache`."
)


def _checksum(b_EKN: Tensor) -> int:
    """A checksum of the bits and positions of all values. Synchronizes the host.

    It multiplies the bits of each value by an odd factor for its position, and adds up modulo 2^64, so the order of the
    sum does not matter. Any single change is detected. Other changes, such as two swapped values, cancel with a
    probability of at most 2^-32.
    """
    bits = b_EKN.detach().view(_INTEGERS[b_EKN.element_size()])
    bits = bits if bits.stride(2) == 1 else bits.transpose(1, 2)
    num_groups, rows, columns = bits.shape
    column_factors = _factors(columns, bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for e in range(num_groups):  # so that int64 temporaries have the size of one expert
        by_row = (bits[e] * column_factors).sum(1)
        total += (by_row * _factors(rows, bits.device, e + 1)).sum()
    return int(total.item())


_INTEGERS = {2: torch.int16, 4: torch.int32}  # by element size: bfloat16 and float16; float32


def _factors(count: int, device: torch.device, seed: int = 0) -> Tensor:
    """Pseudo-random odd int64 numbers: splitmix64 (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    x = (torch.arange(1, count + 1, device=device) + seed * 2**32) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ (x >> shift)) * factor
    return (x ^ (x >> 31)) | 1


_stepped_in_graphs = WeakIdKeyDictionary()  # storages of parameters whose optimizer step was captured


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """Empties every cache. If the step is being captured, remembers its parameters: the step may be replayed."""
    for cache in tuple(_open):
        cache.clear()
    for group in optimizer.param_groups:
        params = group["params"]
        for p in params if params and is_capturing(params[0]) else ():
            local = getattr(p, "_local_tensor", p)  # of a DTensor
            _stepped_in_graphs[local.untyped_storage()] = None


register_optimizer_step_post_hook(_after_step)  # at import, since a graph may be captured before the first block
