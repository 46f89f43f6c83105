"""Replays of calls: one whose operands are like those of an earlier call allocates and launches the same again.

The host time of a call on small operands is the Python around its launches: tiles, layouts, descriptors, arguments. All
of it follows from shapes, strides, dtypes and alignments. So the second call with the same ones is recorded as a
`Program`: what it allocates, fills, launches and frees, and where in which operand each address lies. Later calls run
the program. A call that does anything else, such as to copy an operand, is not replayed.

This is for eager calls on a GPU. A CUDA graph captures a program as it would capture the call.
"""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grouped_gemm.core.machine import is_capturing
from grouped_gemm.core.pools import Allocation, Fill, Free, Launch, Recorded, View, pooled, rounded
from grouped_gemm.core.preference import AUTOTUNE

Run = Callable[..., Any]
Place = Callable[[Tensor], tuple[int, int] | None]  # `Recording.place`
Step = Callable[[list[Any], list[int]], None]  # takes the slots and their addresses
# On the current device, in half the time of torch.empty_strided.
_new_empty: Any = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
# torch.cuda.current_device, without its checks of what is so once there are tensors on a GPU.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


class Program(NamedTuple):
    """What a call does. Slots are its arguments, then what it allocates.

    Attributes:
        device: the index of the device.
        steps: what it does, in order.
        launch: one of the launches.
        new: a 0 for each slot that it allocates.
        results: what the call returns, with None for tensors.
        views: the tensors that it returns, and their places among the results.
        is_tuple: whether it returns a tuple of the results, or the only one.
    """

    device: int
    steps: list[Step]
    launch: Launch
    new: list[int]
    results: list[Any]
    views: list[tuple[int, View]]
    is_tuple: bool

    def can_run(self) -> bool:
        """Whether it does now what the call would do."""
        return (
            _current_device() == self.device
            and not torch.are_deterministic_algorithms_enabled()  # which fill new memory
            and self.launch.can_run(self.device)
        )

    def run(self, args: Sequence[Any], addresses: list[int]) -> Any:
        """Does what the call does with ``args``, which lie at ``addresses``; 0 for what is no tensor."""
        slots = [*args, *self.new]
        addresses += self.new
        for step in self.steps:
            step(slots, addresses)
        results = self.results.copy()
        for i, view in self.views:
            results[i] = view.of(slots)
        return tuple(results) if self.is_tuple else results[0]


_REFUSED, _SEEN = "refused", "seen"
_programs: dict[tuple[Any, ...], Program | str] = {}
_MAX_PROGRAMS = 4096
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def forget() -> None:
    """Drops all programs, and those that are being recorded, because what calls do may have changed."""
    global _programs
    _programs = {}


def replayed(name: str, run: Run) -> Run:
    """``run``, replayed where that is possible.

    Args:
        name: part of the key of its programs.
        run: a function of tensors, the first one on the device of all, and of constants that can be hashed. Tensors
            have no pending negation: a program takes values as they are in memory. It returns a tensor, or a tuple of
            tensors and constants, or None. All else that it depends on changes only with `forget`.

    Returns:
        ``run``, which also takes a ``number``. Calls with one number differ only in the values, addresses and alignment
        of tensors, and in the first size of the first one: looking at the others would take 2 microseconds.
    """

    def call(*args: Any, number: int | None = None) -> Any:
        if not _is_on_gpu(args[0]) or AUTOTUNE.is_on_now() or _local.recording is not None or _local.rehearses:
            return run(*args)
        programs = _programs
        if number is not None:
            addresses = [x.data_ptr() if isinstance(x, Tensor) else 0 for x in args]
            known: tuple[Any, ...] = (name, number, args[0].shape[0], *[address & 15 for address in addresses])
        else:
            key: list[Any] = [name]
            addresses = []
            for arg in args:
                if isinstance(arg, Tensor):
                    if type(arg) not in _PLAIN:
                        return run(*args)
                    address = arg.data_ptr()
                    key += arg.shape, arg.stride(), arg.dtype, arg.get_device(), address & 15
                    addresses.append(address)
                else:
                    key.append(arg)
                    addresses.append(0)
            known = tuple(key)
        try:
            found = programs.get(known)
        except TypeError:  # a constant cannot be hashed
            return run(*args)
        if isinstance(found, Program):
            return found.run(args, addresses) if found.can_run() else run(*args)
        if found is _REFUSED:
            return run(*args)
        if found is None:  # it may compile kernels, and it may be the only such call
            if len(programs) >= _MAX_PROGRAMS:
                _make_room(programs)
            programs[known] = _SEEN
            return run(*args)
        if is_capturing(args[0]):  # its backends are assumed to be healthy
            return run(*args)
        recording = _local.recording = Recording(args)
        try:
            with recording:
                result = run(*recording.args)
        finally:
            _local.recording = None
            recording.end()
        programs[known] = recording.program(result) or _REFUSED
        return recording.of_caller(result)

    return call


def _make_room(programs: dict[tuple[Any, ...], Program | str]) -> None:
    """Forgets calls that came once, such as those with an M of their own; and all, if that makes little room."""
    for key, found in list(programs.items()):
        if found is _SEEN:
            programs.pop(key, None)
    if len(programs) > _MAX_PROGRAMS // 2:
        programs.clear()


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


class _Local(threading.local):
    recording: Recording | None = None
    rehearses = False


_local = _Local()


def current() -> Recording | None:
    """What this thread records now."""
    return _local.recording


def rehearses() -> bool:
    """Whether this thread is in a `rehearsal`."""
    return _local.rehearses


@contextmanager
def rehearsal() -> Iterator[None]:
    """What this thread calls in the block allocates, and compiles what it would launch. Nothing is replayed."""
    _local.rehearses = True
    try:
        yield
    finally:
        _local.rehearses = False


# The implementations of ops that may be replayed as part of a call.
implementations: dict[Any, Run] = {}


class _Slot(NamedTuple):
    """A tensor that the call was given, or that it has allocated."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int  # in its storage


class Recording(TorchDispatchMode):
    """Records a call while it runs.

    Args:
        args: of the call, first a tensor.
    """

    def __init__(self, args: Sequence[Any]) -> None:
        super().__init__()
        self._device: int = args[0].get_device()
        self._given = args
        # What to call with. They stay alive, so that their identities are theirs. A tensor that is given twice becomes
        # two objects: a later call may be given two tensors.
        self.args = [x.detach() if isinstance(x, Tensor) and _is_in(args[:i], x) else x for i, x in enumerate(args)]
        self._slots = [_slot_of(arg) if isinstance(arg, Tensor) else None for arg in args]
        self._slot_by_id = {id(arg): i for i, arg in enumerate(self.args) if isinstance(arg, Tensor)}
        self._views: list[Tensor] = []  # of arguments; they stay alive too
        self._alive: dict[int, dict[int, Any]] = {}  # weak references to all tensors in a slot that was allocated
        self._steps: list[Recorded] = []
        self._nbytes: dict[int, int] = {}  # of each slot that was allocated, as much as the allocator takes
        self._launch: Launch | None = None
        self._is_refused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in implementations:
            with self:
                return implementations[func](*args)
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self._allocate(result)
        elif func is _aten.new_zeros.default:
            self._allocate(result)
            self._fill(result, None)
        elif func is _aten.zero_.default:
            self._fill(args[0], None)
        elif func is _aten.fill_.Scalar:
            self._fill(args[0], args[1])
        elif func.is_view and id(args[0]) in self._slot_by_id and not _has_tensor(args[1:]):
            for view in result if isinstance(result, (list, tuple)) else [result]:
                if _shares_memory(view, args[0]):
                    self._keep(view, self._slot_by_id[id(args[0])])
                else:  # such as contiguous(), which is said to be a view where no autograd takes it apart
                    self._is_refused = True
        else:
            self._is_refused = True
        return result

    def place(self, x: Tensor) -> tuple[int, int] | None:
        """The slot of ``x``, and how many bytes after its beginning; None, and no program, if it has none."""
        slot = self._slot_by_id.get(id(x))
        whole = None if slot is None else self._slots[slot]
        if slot is None or whole is None:
            self._is_refused = True
            return None
        return slot, x.data_ptr() - whole.address if x.numel() else 0

    def add(self, launch: Launch | None) -> None:
        """Adds a launch. None: it cannot be replayed."""
        if launch is None:
            self._is_refused = True
            return
        self._launch = launch
        self._steps.append(launch)

    def end(self) -> None:
        """Ends the call: whatever it frees from now on is its result. Leaves no cycle that would keep tensors alive."""
        for alive in self._alive.values():
            alive.clear()
        self._alive.clear()

    def of_caller(self, result: Any) -> Any:
        """The result of the call, with the tensors that the caller gave in place of `args`."""
        given = {id(x): own for x, own in zip(self.args, self._given)}
        if isinstance(result, tuple):
            return tuple([given.get(id(x), x) for x in result])
        return given.get(id(result), result)

    def program(self, result: Any) -> Program | None:
        """The program of the call, whose result is given; None: it cannot be replayed."""
        is_tuple = isinstance(result, tuple)
        results = list(result) if is_tuple else [result]
        views = [(i, self._view(x)) for i, x in enumerate(results) if isinstance(x, Tensor)]
        found = [(i, view) for i, view in views if view is not None]
        if self._is_refused or self._launch is None:
            return None
        steps = [self._step(step) for step in pooled(self._steps, self._nbytes, {view.slot for _, view in found})]
        constants = [None if isinstance(x, Tensor) else x for x in results]
        return Program(self._device, steps, self._launch, [0] * len(self._nbytes), constants, found, is_tuple)

    def _step(self, step: Recorded) -> Step:
        if isinstance(step, Free):
            return functools.partial(_free, step.slots[0])
        if isinstance(step, Fill):
            return functools.partial(_fill, step.view, step.value)
        if not isinstance(step, Allocation):
            return lambda slots, addresses: step(addresses)
        first = step.slots[0]
        if len(step.slots) == 1 and not step.is_zero:
            form = self._slots[first]
            assert form is not None, "what was allocated is a tensor"
            return functools.partial(_allocate, first, form.shape, form.stride, form.dtype)
        ends = list(itertools.accumulate(self._nbytes[slot] for slot in step.slots))
        return functools.partial(_allocate_pool, list(zip(step.slots, [0, *ends])), (ends[-1],), step.is_zero)

    def _keep(self, x: Tensor, slot: int) -> None:
        """Notes that ``x`` is in ``slot``, which is free once no such tensor is left."""
        key = id(x)
        self._slot_by_id[key] = slot
        if slot < len(self.args):
            self._views.append(x)
            return
        alive = self._alive.setdefault(slot, {})

        def release(_: Any) -> None:
            self._slot_by_id.pop(key, None)
            alive.pop(key, None)
            if not alive and slot in self._alive:
                self._steps.append(Free((slot,)))

        alive[key] = weakref.ref(x, release)

    def _allocate(self, x: Tensor) -> None:
        if x.get_device() != self._device:
            self._is_refused = True
        slot = len(self._slots)
        self._slots.append(_slot_of(x))
        self._nbytes[slot] = rounded(x.untyped_storage().nbytes())
        self._steps.append(Allocation((slot,)))
        self._keep(x, slot)

    def _fill(self, x: Tensor, value: float | None) -> None:
        """Notes that ``x`` is filled with ``value``; None: with zeros, by `zero_`."""
        view = self._view(x)
        if view is not None:
            self._steps.append(Fill(view, value))

    def _view(self, x: Tensor) -> View | None:
        slot = self._slot_by_id.get(id(x))
        whole = None if slot is None else self._slots[slot]
        if whole is None or slot is None or x.dtype != whole.dtype:
            self._is_refused = True
            return None
        found = _slot_of(x)
        if found == whole:
            return View(slot, None)
        return View(slot, (found.shape, found.stride, found.start - whole.start))


def _shares_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage()._cdata == y.untyped_storage()._cdata


def _has_tensor(args: Sequence[Any]) -> bool:
    """Whether a view by ``args`` may depend on values, such as narrow() from where a tensor says."""
    return any(isinstance(arg, Tensor) for arg in args)


def _is_in(args: Sequence[Any], x: Tensor) -> bool:
    return any(arg is x for arg in args)


def _slot_of(x: Tensor) -> _Slot:
    return _Slot(x.data_ptr(), x.dtype, tuple(x.shape), x.stride(), int(x.storage_offset()))


# Steps


def _allocate(
    slot: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, slots: list[Any], addresses: list[int]
) -> None:
    new = slots[slot] = _new_empty(size, stride, dtype)
    addresses[slot] = new.data_ptr()


def _allocate_pool(
    places: list[tuple[int, int]], size: Sequence[int], is_zero: bool, slots: list[Any], addresses: list[int]
) -> None:
    """One tensor for several slots, each at so many bytes."""
    pool = slots[places[0][0]] = _new_empty(size, (1,), torch.uint8)
    if is_zero:
        pool.zero_()
    address = pool.data_ptr()
    for slot, offset in places:
        addresses[slot] = address + offset


def _fill(view: View, value: float | None, slots: list[Any], addresses: list[int]) -> None:
    if value is None:
        view.of(slots).zero_()
    else:
        view.of(slots).fill_(value)


def _free(slot: int, slots: list[Any], addresses: list[int]) -> None:
    slots[slot] = None


_aten = torch.ops.aten
_EMPTY = frozenset(
    (
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.empty_strided.default,
        _aten.new_empty.default,
        _aten.new_empty_strided.default,
    )
)
