"""What a recorded call allocates, as few allocations, see `core.replay`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor


class Launch(Protocol):
    """A launch that lacks only addresses."""

    def can_run(self, device: int) -> bool:
        """Whether this thread may launch on ``device`` now."""

    def __call__(self, addresses: Sequence[int]) -> None:
        """Launches on the current stream, with the addresses of operands and then of what was allocated."""


class View(NamedTuple):
    """A tensor in a slot.

    Attributes:
        slot: the slot.
        layout: size, stride, and offset in values from the tensor in the slot; None: it is that tensor.
    """

    slot: int
    layout: tuple[Sequence[int], Sequence[int], int] | None

    def of(self, slots: list[Any]) -> Tensor:
        """The tensor."""
        tensor: Tensor = slots[self.slot]
        if self.layout is None:
            return tensor
        size, stride, offset = self.layout
        return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


class Allocation(NamedTuple):
    """Memory for slots, one after the other; zeros, or with any values."""

    slots: tuple[int, ...]
    is_zero: bool = False


class Fill(NamedTuple):
    """Fills a tensor with one value; None: with zeros, by `zero_`."""

    view: View
    value: float | None


class Free(NamedTuple):
    """Frees what slots have."""

    slots: tuple[int, ...]


Recorded: TypeAlias = Allocation | Fill | Free | Launch


# Bytes of a slot in a pool. Memory that was freed serves later requests that fit. In a pool, weights that a call
# quantizes would need new memory for each M, since the pool grows with M.
_MOST_POOLED = 1 << 20


def rounded(nbytes: int) -> int:
    """How many bytes an allocation of ``nbytes`` takes."""
    return -(-nbytes // 512) * 512


def pooled(steps: Sequence[Recorded], nbytes: Mapping[int, int], returned: set[int]) -> list[Recorded]:
    """The same steps with fewer allocations, each of which takes microseconds.

    What is neither returned nor freed before the last launch is one allocation. Zeros that are not returned are another
    one, with one fill. Neither is done if the call would then take more memory at any time. Large slots stay alone.
    Nothing is allocated for tensors without memory.

    Args:
        steps: what the call does, each allocation with one slot.
        nbytes: `rounded` bytes of each slot that is allocated.
        returned: the slots that the call returns.
    """
    without_memory = {slot for slot, size in nbytes.items() if size == 0} - returned
    found = [step for step in steps if _slot_of(step) not in without_memory]
    while isinstance(found[-1], Free):
        found.pop()  # the end of the call frees it
    last = max(i for i, step in enumerate(found) if _slot_of(step) is None)
    freed = {step.slots[0] for step in found[:last] if isinstance(step, Free)}
    filled = [step.view.slot for step in found if isinstance(step, Fill)]
    scratch, zeros = list[int](), list[int]()
    for step, after in itertools.pairwise(found):
        if isinstance(step, Allocation) and (slot := step.slots[0]) not in returned and nbytes[slot] <= _MOST_POOLED:
            if after == Fill(View(slot, None), None) and filled.count(slot) == 1:
                zeros.append(slot)
            elif slot not in freed and slot not in filled:
                scratch.append(slot)
    for pool, is_zero in ((scratch, False), (zeros, True)):
        if pool:
            changed = _with_pool(found, pool, is_zero)
            found = changed if _peak(changed, nbytes) <= _peak(found, nbytes) else found
    return found


def _slot_of(step: Recorded) -> int | None:
    """The first slot of a step; None: it is a launch."""
    if isinstance(step, (Allocation, Free)):
        return step.slots[0]
    return step.view.slot if isinstance(step, Fill) else None


def _with_pool(steps: Sequence[Recorded], pool: list[int], is_zero: bool) -> list[Recorded]:
    """``steps`` with one allocation for ``pool``, where its first slot is allocated, freed with its last one."""
    found, left = list[Recorded](), list(pool)
    for step in steps:
        slot = _slot_of(step)
        if slot not in pool:
            found.append(step)
        elif isinstance(step, Allocation) and slot == pool[0]:
            found.append(Allocation(tuple(pool), is_zero))
        elif isinstance(step, Free):
            left.remove(slot)
            if not left:
                found.append(Free(tuple(pool)))
    return found


def _peak(steps: Sequence[Recorded], nbytes: Mapping[int, int]) -> int:
    live = peak = 0
    for step in steps:
        if isinstance(step, (Allocation, Free)):
            size = sum(nbytes[slot] for slot in step.slots)
            live += size if isinstance(step, Allocation) else -size
            peak = max(peak, live)
    return peak
