"""`cache_weights`, `register_weight_cache`: cache the quantized weights of calls for later calls.

Cached layouts must never be used after the weights have changed. Several events drop them, since none covers every
change:

- A new version counter, which in-place ops bump, or a new storage, which ``p.data = x`` sets.
- A step of a torch optimizer. Fused optimizers bump no counter. The counters of a DTensor's local shard, and of the
  parameters that FSDP2 gathers and refills in place, do not follow the parameter that is stepped. If a step was
  captured in a CUDA graph, its parameters are not cached at all, since a replay cannot be noticed.
- The end of the tensor, of its storage, of the block, or of the registered optimizer.

Other changes write to the weights' memory without bumping the counter; `cache_weights` lists them. Only the values show
them. Reading the values at each call would take half the time of quantizing, and comparing them would synchronize the
host. So only GROUPED_GEMM_VALIDATE=1 does that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    """The quantized weights of one `cache_weights` block, or of one optimizer. An entry is freed with its weights."""

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
        """Drops all entries. Call it after a change of weights that the cache cannot notice; see `cache_weights`.

        The entries of all other caches are dropped as well: other blocks or a registered optimizer may have the same
        weights.
        """
        for cache in (self, *_open, *(handle._cache for handle in tuple(_registered))):
            cache._entries.clear()

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
_registered: list[WeightCacheHandle] = []  # not removed yet


@contextmanager
def cache_weights() -> Iterator[WeightCache]:
    """Inside the block, calls of `grouped_mm` quantize each weight once, and again only after it has changed.

    It is for gradient accumulation. Put it around the micro-batches of an optimizer step, or around all of training,
    since a step of any `torch.optim.Optimizer` empties the cache; `register_weight_cache` needs no block. Results are
    bit for bit the same, and weights get gradients as usual. An entry is freed with its tensor: a parameter, or the
    tensor that ``b`` is a view of. It takes one byte per element, or two where a backend has a separate layout for
    dgrad.

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
        cache._entries.clear()


class WeightCacheHandle:
    """The quantized weights of an optimizer's parameters, from `register_weight_cache`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._cache = WeightCache()
        self._optimizer = weakref.ref(optimizer, lambda _: self.remove())
        _registered.append(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all data and scales that are kept now; see `WeightCache.nbytes`."""
        return self._cache.nbytes

    def refresh(self) -> None:
        """Drops all quantized weights: the next calls quantize again. Call it where `cache_weights` calls for `clear`.

        As `WeightCache.clear`, it empties every other cache too.
        """
        self._cache.clear()

    def remove(self) -> None:
        """Ends the registration and frees the memory. Later calls of this method do nothing."""
        with suppress(ValueError):
            _registered.remove(self)
        self._cache._entries.clear()

    def _covers(self, source: Tensor) -> bool:
        """Whether the optimizer has ``source``. Reads ``param_groups`` each time, since no hook tells of a change."""
        optimizer = self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        return any(p is source for group in groups for p in _parameters(group))

    def _after_step(self, optimizer: Optimizer) -> None:
        """Drops everything after a step of its optimizer, and shared parameters after a step of another.

        The other one may be a copy, or what a wrapper steps in its place.
        """
        if optimizer is self._optimizer():
            self._cache._entries.clear()
            return
        for group in optimizer.param_groups:
            for p in _parameters(group):
                self._cache._entries.pop(id(p), None)


def register_weight_cache(optimizer: Optimizer) -> WeightCacheHandle:
    """From now on, calls of `grouped_mm` quantize each parameter of ``optimizer`` once per step of the optimizer.

    It is `cache_weights` without a block: it holds in every thread, that of backward included, and only for parameters
    that are in ``optimizer.param_groups`` at the time of the call, and for their views. Other weights are quantized by
    each call, as before. Results are bit for bit the same. What is kept, noticed and left out is as in
    `cache_weights`, with these differences:

    - A step of another optimizer drops only the parameters that it shares. So two optimizers may take turns.
    - Inside a `cache_weights` block, the parameters of a registered optimizer stay here.
    - The parameters that FSDP2 gathers are not those of the optimizer. They are not kept: use `cache_weights`.

    After a change that bumps no version counter, call ``handle.refresh()``; `cache_weights` lists such changes.
    GROUPED_GEMM_VALIDATE=1 detects them.

    The name is that of torch's hooks: ``register_...`` returns a handle, and ``handle.remove()`` ends what it began.

    Args:
        optimizer: any `torch.optim.Optimizer`. It is not kept alive, nor are its parameters: its end removes the
            handle. A deep copy or an unpickled optimizer has other parameters, and is not registered.

    Returns:
        The handle, which need not be kept. ``handle.nbytes`` is the memory: one byte per element of each weight, or two
        where a backend has a separate layout for dgrad, plus scales. Each CUDA stream has its own copies.

    Raises:
        TypeError: ``optimizer`` is something else.
        RuntimeError: from `grouped_mm`, under GROUPED_GEMM_VALIDATE=1: weights have changed without a new version.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"register_weight_cache: expected a torch.optim.Optimizer; found {type(optimizer).__name__}. "
            "For weights that no such optimizer has, use `with cache_weights()`."
        )
    return WeightCacheHandle(optimizer)


def is_used() -> bool:
    """Whether there is a block, or a registered optimizer. Dynamo takes no cache into a graph."""
    return not torch.compiler.is_compiling() and bool(_open or _registered)


def quantize(backend: _GroupedMMBackend, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool) -> Layouts:
    """`_GroupedMMBackend.quantize_weights`, or its cached result."""
    cache = _cache_of(b_EKN) if recipe.is_scaled and is_used() else None
    if cache is None:
        return backend.quantize_weights(b_EKN, recipe, forward=forward, dgrad=dgrad)
    return cache.quantize(backend, b_EKN, recipe, forward=forward, dgrad=dgrad)


def _cache_of(b: Tensor) -> WeightCache | None:
    """The cache of the registered optimizer that has ``b``, or else of this thread's block, or of a block that has it.

    The last is for autograd, which recomputes in its own threads.
    """
    if not _is_cacheable(b):
        return None
    handles, source = tuple(_registered), _source(b)
    # First the entries: asking an optimizer takes about 0.2 us per parameter.
    handle = next((one for one in handles if b in one._cache), None)
    handle = handle or next((one for one in handles if one._covers(source)), None)
    if handle is not None:
        return handle._cache
    return _local.cache or next((other for other in tuple(_open) if b in other), None)


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
    "weight cache: expected weights {shape} to have the values that were quantized; found others, but the version "
    "counter is still {version}: they were changed through p.data, a collective, a flat buffer, a CUDA graph or "
    "similar. After such a change, call cache.clear(), where cache is the value of `with cache_weights() as cache`, or "
    "handle.refresh(), where handle is the value of register_weight_cache."
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


def _parameters(group: dict[str, Any]) -> Iterator[Tensor]:
    """The parameters of one of an optimizer's groups, as calls see them: a DTensor is its local shard."""
    return (getattr(p, "_local_tensor", p) for p in group["params"])


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """Empties the caches of blocks, and those of registered optimizers where they have the stepped parameters.

    If the step is being captured, remembers its parameters: the step may be replayed.
    """
    for cache in tuple(_open):
        cache._entries.clear()
    for handle in tuple(_registered):
        handle._after_step(optimizer)
    for group in optimizer.param_groups:
        params = group["params"]
        for local in _parameters(group) if params and is_capturing(params[0]) else ():
            _stepped_in_graphs[local.untyped_storage()] = None


register_optimizer_step_post_hook(_after_step)  # at import, since a graph may be captured before the first block
