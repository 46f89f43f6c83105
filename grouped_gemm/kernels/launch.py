"""What every launch needs to know of its operands and its device."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from grouped_gemm.device import machine_of
from grouped_gemm.recipes import Recipe

# Architectures whose copy engine (TMA) reads tiles through descriptors. The interpreter knows descriptors, too.
_TMA_ARCHS = ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "cpu")

# Architectures whose matrix cores take MX operands as they are. Elsewhere our kernels widen them: `tl.dot_scaled` would
# as well, but before Triton 3.8 neither compiles for gfx942 nor runs interpreted, and on sm_121 Triton 3.6 would widen
# them in more shared memory than there is.
MX_ARCHS = ("sm_100", "sm_103", "sm_120", "gfx950")


def can_use_tma(*operands: Tensor) -> bool:
    """Whether TMA can read every operand: contiguous along its last axis, start and other strides 16-byte aligned."""
    return machine_of(operands[0].device).arch in _TMA_ARCHS and all(map(_is_tma_aligned, operands))


def _is_tma_aligned(x: Tensor) -> bool:
    size = x.element_size()
    *outer, last = x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in outer)


def kind_of(lhs: Tensor, recipe: Recipe) -> str:
    """The kind of operands that `tiles` and the kernels know."""
    if recipe is Recipe.MXFP8:
        return "mx" if machine_of(lhs.device).arch in MX_ARCHS else "mx upcast"
    if recipe.is_scaled:
        return "rowwise" if recipe.block is None else "blockwise"
    return "32 bit" if lhs.element_size() == 4 else "16 bit"


def packed(scale: Tensor | None) -> Tensor | None:
    """MX scales, (..., 4) E8M0, as kernels take them: (...) int32, the first in the lowest byte. Others as they are."""
    if scale is None or scale.dtype != torch.float8_e8m0fnu:
        return scale
    return scale.view(torch.int32).squeeze(-1)


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
    described.__dict__.update(base=base, shape=shape, strides=strides, block_shape=block_shape, padding="zero", **more)
    return described


_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, constants: dict[str, Any], **options: Any) -> None:
    """Launches ``kernel`` on the current stream, as ``kernel[grid](*args, **constants, **options)``.

    Triton's own look at the arguments of a launch takes tens of microseconds. Here a launch that is like an earlier
    one, in all that Triton compiles for, goes straight to what was compiled.

    Args:
        kernel: a function of Triton or Gluon whose constants come last.
        grid: programs along up to three axes.
        args: tensors, descriptors, integers and None.
        constants: its constexpr arguments, all of them, in the order of its signature.
        options: ``num_warps`` and its like, unless the kernel has them for arguments.
    """
    values = tuple(constants.values())
    facts: list[Any] = [kernel, values, tuple(options.values())]
    for arg in args:
        if type(arg) is int:
            # What Triton looks at: whether it is 1, a multiple of 16, and fits 32 bits.
            facts.append(arg if arg == 1 else -(arg & 15 == 0) if -(2**31) <= arg < 2**31 else -2 - (arg & 15 == 0))
        elif isinstance(arg, Tensor):
            facts += (arg.dtype, arg.data_ptr() & 15 == 0, arg.get_device())
        elif arg is None:
            facts.append(None)
        else:
            facts += (arg.base.dtype, *arg.block_shape, arg.base.get_device())
    key = tuple(facts)
    compiled = _compiled.get(key)
    if compiled is None:
        if list(constants) != kernel.arg_names[len(args) :]:
            raise ValueError(f"constants: expected {kernel.arg_names[len(args) :]}; found {list(constants)}")
        compiled = kernel[grid](*args, **constants, **options)
        if compiled is not None:  # the interpreter compiles nothing
            _compiled[key] = compiled
    else:
        compiled[(*grid, 1, 1)[:3]](*args, *values)
