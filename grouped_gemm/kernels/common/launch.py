"""What every launch needs to know of its operands and its device."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.recipes import Recipe


def can_use_tma(*operands: Tensor) -> bool:
    """Whether TMA can read every operand: contiguous along its last axis, start and other strides 16-byte aligned."""
    return machine_of(operands[0].device).traits.tma and all(map(_is_tma_aligned, operands))


def _is_tma_aligned(x: Tensor) -> bool:
    size = x.element_size()
    *outer, last = x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in outer)


def kind_of(lhs: Tensor, recipe: Recipe) -> str:
    """The kind of operands that `tiles` and the kernels know."""
    if recipe is Recipe.MXFP8:
        return "mx" if machine_of(lhs.device).traits.mx else "mx upcast"
    if recipe.is_scaled:
        return "rowwise" if recipe.block is None else "blockwise"
    return "32 bit" if lhs.element_size() == 4 else "16 bit"


def packed(scale: Tensor | None) -> Tensor | None:
    """MX scales, (..., 4) E8M0, as kernels take them: (...) int32, the first in the lowest byte. Others as they are."""
    if scale is None or scale.dtype != torch.float8_e8m0fnu:
        return scale
    return scale.view(torch.int32).squeeze(-1)


_MOST_PROGRAMS = 65535  # along the second axis of a grid


def in_parts(b_EKN: Tensor, out: Sequence[Tensor]) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """Weights and the tensors that they are quantized into, as many experts at a time as a grid's second axis takes.

    Args:
        b_EKN: (E, K, N).
        out: tensors whose first axis is E; those that are not wanted are empty.
    """
    num_groups = b_EKN.shape[0]
    if num_groups <= _MOST_PROGRAMS:
        yield b_EKN, out
        return
    for first in range(0, num_groups, _MOST_PROGRAMS):
        part = slice(first, first + _MOST_PROGRAMS)
        yield b_EKN[part], [x[part] for x in out]


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; Triton's own is made for kernels, and takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is no smaller than ``n``, which is positive."""
    return 1 << (n - 1).bit_length()


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors or compute units of ``device``: how many programs a persistent kernel has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` the current one, which Triton launches on, in a thread that has a context there."""
    if not x.is_cuda:
        return _HERE
    if not _thread.has_context:
        # Triton encodes descriptors by a call of the driver, which unlike the runtime's makes no context current: and a
        # thread of autograd's may have none yet.
        torch.cuda.mem_get_info(x.device)
        _thread.has_context = True
    return torch.cuda.device(x.device) if torch.cuda.current_device() != x.get_device() else _HERE


class _Thread(threading.local):
    has_context = False


_thread = _Thread()
_HERE = nullcontext()


def describe(
    form: Any, base: Tensor, shape: Sequence[int], strides: Sequence[int], block_shape: list[int], **more: Any
) -> Any:
    """A descriptor, Triton's or Gluon's, of a tensor that `can_use_tma`: without its constructor's own slow checks."""
    described = form.__new__(form)
    more.update(base=base, shape=shape, strides=strides, block_shape=block_shape, padding="zero")
    described.__dict__ = more
    return described


_IS_HIP = torch.version.hip is not None


class _Compiled(NamedTuple):
    """A compiled kernel, and as its launch takes it apart."""

    whole: Any
    run: Callable[..., None]
    function: int
    metadata: Any
    stream_of: Callable[[int], int]  # the current stream of a device


class Launcher:
    """A kernel with its constants, to be launched many times.

    Triton's own look at the arguments of a launch takes tens of microseconds. Here a launch that is like an earlier
    one, in all that Triton compiles for, goes straight to what was compiled.

    Args:
        kernel: a function of Triton or Gluon whose constants come last.
        constants: its constexpr arguments, all of them, in the order of its signature.
        options: ``num_warps`` and its like, unless the kernel has them for arguments.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        self._kernel = kernel
        self._constants = constants
        self._values = tuple(constants.values())
        self._options = options
        self._compiled: dict[tuple[Any, ...], _Compiled] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """Launches on the current stream, as ``kernel[grid](*args, **constants, **options)``.

        Args:
            grid: programs along up to three axes.
            args: tensors, descriptors, integers and None, first a tensor or a descriptor; all on the current device.
        """
        first = args[0]
        device = (first if isinstance(first, Tensor) else first.base).get_device()
        facts: list[Any] = [device]
        add = facts.append
        for arg in args:
            if type(arg) is int:
                # What Triton looks at: whether it is 1, a multiple of 16, and fits 32 bits.
                add(arg if arg == 1 else -(arg & 15 == 0) if -(2**31) <= arg < 2**31 else -2 - (arg & 15 == 0))
            elif arg is None:
                add(None)
            elif isinstance(arg, Tensor):
                add(arg.dtype if arg.data_ptr() & 15 == 0 else (arg.dtype,))
                if _IS_HIP:  # offsets into less than 2 GiB, of the storage, take 32 bits there
                    add(arg.untyped_storage().nbytes() < 2**31)
            else:
                add((arg.base.dtype, *arg.block_shape))
        key = tuple(facts)
        known = self._compiled.get(key)
        if known is None:
            compiled = self._compile_and_launch(grid, args)
            if compiled is not None:  # the interpreter compiles nothing
                stream_of = driver.active.get_current_stream
                parts = compiled.run, compiled.function, compiled.packed_metadata, stream_of
                self._compiled[key] = _Compiled(compiled, *parts)
        elif _is_watched():
            known.whole[(*grid, 1, 1)[:3]](*args, *self._values)
        else:
            _, run, function, metadata, stream_of = known
            x, y, z, *_ = *grid, 1, 1
            run(x, y, z, stream_of(device), function, metadata, None, None, None, *args, *self._values)

    def _compile_and_launch(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        expected, found = self._kernel.arg_names[len(args) :], list(self._constants)
        if found != expected:
            raise ValueError(f"constants: expected {expected}; found {found}")
        if not _is_interpreted(self._kernel):
            return self._kernel[grid](*args, **self._constants, **self._options)
        from grouped_gemm.kernels.common.interpreter import hardware_arithmetic  # needs numpy

        with hardware_arithmetic():
            return self._kernel[grid](*args, **self._constants, **self._options)


def _is_interpreted(kernel: Any) -> bool:
    """Whether Triton interprets ``kernel``; does not import Triton's interpreter, which needs numpy."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    return interpreter is not None and isinstance(kernel, interpreter.InterpretedFunction)


def _is_watched() -> bool:
    """Whether somebody, such as Triton's profiler, hooks launches. Where nobody does, hooks cost a microsecond each."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


_launchers: dict[tuple[Any, ...], Launcher] = {}


def launcher(kernel: Any, constants: dict[str, Any], **options: Any) -> Launcher:
    """The `Launcher` of these arguments, one for all that ask."""
    key = id(kernel), tuple(constants.values()), tuple(options.values())  # a kernel's own hash is slow
    found = _launchers.get(key)
    return found or _launchers.setdefault(key, Launcher(kernel, constants, **options))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, constants: dict[str, Any], **options: Any) -> None:
    """Launches ``kernel`` by its `launcher`."""
    launcher(kernel, constants, **options)(grid, *args)
