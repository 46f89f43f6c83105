"""How kernels are launched, and what a launch needs to know about its operands and its device."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from grouped_gemm.core import replay
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.pools import Launch
from grouped_gemm.core.recipes import Recipe


def can_use_tma(*operands: Tensor) -> bool:
    """Whether TMA can read every operand: contiguous last axis, 16-byte aligned start and other strides."""
    return machine_of(operands[0].device).traits.tma and all(map(_is_tma_aligned, operands))


def _is_tma_aligned(x: Tensor) -> bool:
    size = x.element_size()
    *outer, last = x.stride()
    return last == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in outer)


def kind_of(lhs: Tensor, recipe: Recipe) -> str:
    """The kind of operands, as `tiles` and the kernels name it."""
    if recipe is Recipe.MXFP8:
        return "mx" if machine_of(lhs.device).traits.mx else "mx upcast"
    if recipe.is_scaled:
        return "rowwise" if recipe.block is None else "blockwise"
    return "32 bit" if lhs.element_size() == 4 else "16 bit"


def packed(scale: Tensor | None) -> Tensor | None:
    """MX scales as GEMMs read them: (..., 4) E8M0 as (...) int32, the first in the lowest byte. Others unchanged."""
    if scale is None or scale.dtype != torch.float8_e8m0fnu:
        return scale
    return scale.view(torch.int32).squeeze(-1)


_MOST_PROGRAMS = 65535  # the limit along the second axis of a grid


def in_parts(b_EKN: Tensor, out: Sequence[Tensor]) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """Splits weights and the tensors that they are quantized into, by experts, so that parts fit a grid's second axis.

    Args:
        b_EKN: (E, K, N).
        out: tensors with a first axis of E; those that are not wanted are empty.
    """
    num_groups = b_EKN.shape[0]
    if num_groups <= _MOST_PROGRAMS:
        yield b_EKN, out
        return
    for first in range(0, num_groups, _MOST_PROGRAMS):
        part = slice(first, first + _MOST_PROGRAMS)
        yield b_EKN[part], [x[part] for x in out]


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. `triton.cdiv` takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``, for positive ``n``."""
    return 1 << (n - 1).bit_length()


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors or compute units of ``device``: the number of programs of a persistent kernel."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` current, which is where Triton launches. Gives the thread a context first."""
    if not x.is_cuda:
        return _HERE
    if not _thread.has_context:
        # Triton encodes descriptors with a driver call, which needs a current context. Unlike a runtime call, it does
        # not make one, and a thread of autograd may not have one yet.
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
    """A descriptor, Triton's or Gluon's, of a tensor that TMA can read, without the slow checks of its constructor."""
    described = form.__new__(form)
    more.update(base=base, shape=shape, strides=strides, block_shape=block_shape, padding="zero")
    described.__dict__ = more
    return described


_IS_HIP = torch.version.hip is not None


class _Compiled(NamedTuple):
    """A compiled kernel, and the parts of it that a launch needs."""

    whole: Any
    run: Callable[..., None]
    function: int
    metadata: Any
    stream_of: Callable[[int], int]  # the current stream of a device


class Launcher:
    """A kernel with its constants, to be launched many times.

    Triton takes tens of microseconds to look at the arguments of a launch. Here a launch goes straight to the compiled
    kernel if it is like an earlier launch in everything that Triton specializes on.

    Args:
        kernel: a Triton or Gluon function whose constants come last.
        constants: all constexpr arguments, in the order of the signature.
        options: ``num_warps`` and the like, unless they are arguments of the kernel.
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
                # What Triton specializes on: whether it is 1, a multiple of 16, and fits 32 bits.
                add(arg if arg == 1 else -(arg & 15 == 0) if -(2**31) <= arg < 2**31 else -2 - (arg & 15 == 0))
            elif arg is None:
                add(None)
            elif isinstance(arg, Tensor):
                add(arg.dtype if arg.data_ptr() & 15 == 0 else (arg.dtype,))
                if _IS_HIP:  # there, offsets take 32 bits if the storage has less than 2 GiB
                    add(arg.untyped_storage().nbytes() < 2**31)
            else:
                add((arg.base.dtype, *arg.block_shape))
        key = tuple(facts)
        known = self._compiled.get(key)
        if replay.rehearses():
            if known is None:
                self._kernel.warmup(*args, grid=grid, **self._constants, **self._options)
            return
        if known is None:
            compiled = self._compile_and_launch(grid, args)
            if hasattr(compiled, "result"):  # Triton 3.7, if another thread was compiling it
                compiled = compiled.result()
            if compiled is not None:  # the interpreter compiles nothing
                stream_of = driver.active.get_current_stream
                parts = compiled.run, compiled.function, compiled.packed_metadata, stream_of
                self._compiled[key] = known = _Compiled(compiled, *parts)
        elif _is_watched():
            known.whole[(*grid, 1, 1)[:3]](*args, *self._values)
        else:
            _, run, function, metadata, stream_of = known
            x, y, z, *_ = *grid, 1, 1
            run(x, y, z, stream_of(device), function, metadata, None, None, None, *args, *self._values)
        recording = replay.current()
        if recording is not None:
            recording.add(self._prepared(known, device, grid, args, recording.place))

    def _prepared(
        self, compiled: _Compiled | None, device: int, grid: tuple[int, ...], args: tuple[Any, ...], place: replay.Place
    ) -> Launch | None:
        return compiled and Prepared.of(compiled, device, grid, (*args, *self._values), place)

    def _compile_and_launch(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> Any:
        expected, found = self._kernel.arg_names[len(args) :], list(self._constants)
        if found != expected:
            raise ValueError(f"constants: expected {expected}; found {found}")
        if not _is_interpreted(self._kernel):
            return self._kernel[grid](*args, **self._constants, **self._options)
        from grouped_gemm.kernels.common.interpreter import hardware_arithmetic  # needs numpy

        with hardware_arithmetic():
            return self._kernel[grid](*args, **self._constants, **self._options)


_THREADS = min(8, os.cpu_count() or 1)  # a first step needs up to eight kernels


def compile_together(run: Callable[[], object]) -> None:
    """Compiles the kernels that ``run`` would launch, at the same time, and waits for all of them.

    MLIR and LLVM release the GIL, and ptxas and the C compiler of launchers are processes. So kernels that a call needs
    take little longer than the slowest one. What fails to compile is left to the launch that needs the kernel.

    Args:
        run: called once. It allocates, fills and views tensors on the current device and launches kernels of this
            package, and does nothing else.

    Raises:
        Exception: from ``run``, such as out of memory; or Triton cannot do this. Launches still compile one by one.
    """
    with ThreadPoolExecutor(_THREADS) as threads:
        # In a context of its own: an interrupt would leave Triton's mode on, with an executor that has ended.
        copy_context().run(_compile_together, run, _Loader(threads, torch.cuda.current_device()))


def _compile_together(run: Callable[[], object], loader: Any) -> None:
    from triton import AsyncCompileMode  # here: a Triton without it compiles one by one

    mode = AsyncCompileMode(loader, ignore_errors=True)
    try:
        with mode, replay.rehearsal(), torch.no_grad():
            run()
    finally:
        for kernel in mode.future_kernels.values():
            if kernel.kernel is None:  # it failed. Triton 3.7 would keep the error, which may have been out of memory
                kernel.finalize_compile(None)


class _Loader(NamedTuple):
    """Compiles kernels in threads, and loads each one there, so that its launch need not."""

    threads: ThreadPoolExecutor
    device: int

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        return self.threads.submit(self._load, compile_kernel)

    def _load(self, compile_kernel: Callable[[], Any]) -> Any:
        with torch.cuda.device(self.device):
            compiled = compile_kernel()
            _ = compiled.run  # Triton 3.6 runs a C compiler for it
            return compiled


class Prepared:
    """A launch of a compiled kernel with everything but addresses, see `core.replay`.

    It calls the function in C that Triton's launcher ends in. That one takes addresses as integers, and descriptors
    encoded and followed by shapes and strides. Encoded descriptors are kept by address.
    """

    def __init__(self, compiled: _Compiled, device: int, low: Callable[..., None], before: list[Any]) -> None:
        self._device, self._low, self._stream_of = device, low, compiled.stream_of
        self._args = before  # of the function in C; or the last one is a list of those of the kernel
        self._kernel_args: list[Any] = before
        self._addresses: list[tuple[int, int, int]] = []  # place among the arguments, slot, offset
        self._descriptors: list[tuple[int, int, int, Callable[[int], Any], dict[int, Any]]] = []

    @classmethod
    def of(
        cls, compiled: _Compiled, device: int, grid: tuple[int, ...], args: Sequence[Any], place: replay.Place
    ) -> Prepared | None:
        """The launch of ``args``, whose tensors have a ``place``; None: this Triton, or the kernel, needs more."""
        run: Any = compiled.run
        low = _function_in_c(run)
        if low is None:
            return None
        scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
        if scratch or getattr(run, "gsan_enabled", False):
            return None
        begin = [*(*grid, 1, 1)[:3], None, compiled.function, run.launch_cooperative_grid, run.launch_pdl]
        hooks = [compiled.metadata, None, None, None]
        if hasattr(run, "arg_annotations"):  # Triton 3.7
            found = cls(compiled, device, low, [*begin, *hooks, None, None, run.arg_annotations, run.kernel_signature])
            found._kernel_args = []
            found._args.append(found._kernel_args)
        else:
            found = cls(compiled, device, low, [*begin, None, None, *hooks])
        metas = iter(getattr(compiled.whole.metadata, "tensordesc_meta", None) or ())
        return found if all([found._add(arg, place, metas) for arg in args]) else None

    def _add(self, arg: Any, place: replay.Place, metas: Iterator[Any]) -> bool:
        into = self._kernel_args
        if isinstance(arg, Tensor):
            found = place(arg)
            if found is not None:
                self._addresses.append((len(into), *found))
            into.append(None)
            return found is not None
        if not hasattr(arg, "block_shape"):
            into.append(arg)
            return True
        found, meta = place(arg.base), next(metas, None)
        if found is None or meta is None:
            return False
        encode = functools.partial(_encode, arg.__class__, {**arg.__dict__, "base": None}, meta)
        self._descriptors.append((len(into), *found, encode, {}))
        into += [None, *arg.shape, *arg.strides]
        return True

    def can_run(self, device: int) -> bool:
        """Whether this thread may launch now, and nobody watches."""
        return _thread.has_context and not _is_watched()

    def __call__(self, addresses: Sequence[int]) -> None:
        """Launches on the current stream."""
        args = self._args.copy()
        kernel_args = args
        if self._kernel_args is not self._args:
            kernel_args = args[-1] = self._kernel_args.copy()
        args[3] = self._stream_of(self._device)
        for at, slot, offset in self._addresses:
            kernel_args[at] = addresses[slot] + offset
        for at, slot, offset, encode, encoded in self._descriptors:
            address = addresses[slot] + offset
            found = encoded.get(address)
            if found is None:
                if len(encoded) >= _MAX_DESCRIPTORS:
                    encoded.clear()
                found = encoded[address] = encode(address)
            kernel_args[at] = found
        self._low(*args)


_MAX_DESCRIPTORS = 256  # of an operand: layers of a model share a launch, and each has weights of its own


def _function_in_c(run: Any) -> Callable[..., None] | None:
    """What Triton's launcher on CUDA calls in the end; None if this is another launcher."""
    if not hasattr(run, "launch_pdl"):  # that of ROCm, whose function takes other arguments
        return None
    launch = getattr(run, "launch", None)
    if isinstance(launch, FunctionType):  # a wrapper that encodes descriptors
        launch = inspect.getclosurevars(launch).nonlocals.get("launcher")
    return launch if isinstance(launch, BuiltinFunctionType) else None


class _Address(NamedTuple):
    """A stand-in for a tensor."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def _encode(form: Any, parts: dict[str, Any], meta: Any, address: int) -> Any:
    """A descriptor of what is at ``address``, as Triton's launcher encodes it."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    described = form.__new__(form)
    described.__dict__ = {**parts, "base": _Address(address)}
    num_parameters = make_tensordesc_arg.__code__.co_argcount  # Triton 3.9 has one more
    return make_tensordesc_arg(described, meta, *[None] * (num_parameters - 2))[0]


def _is_interpreted(kernel: Any) -> bool:
    """Whether Triton interprets ``kernel``. Does not import the interpreter, which needs numpy."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    return interpreter is not None and isinstance(kernel, interpreter.InterpretedFunction)


def _is_watched() -> bool:
    """Whether launches are hooked, for example by Triton's profiler. Calling empty hooks costs a microsecond each."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


_launchers: dict[tuple[Any, ...], Launcher] = {}


def launcher(kernel: Any, constants: dict[str, Any], **options: Any) -> Launcher:
    """The `Launcher` of these arguments, made once."""
    key = id(kernel), tuple(constants.values()), tuple(options.values())  # a kernel's own hash is slow
    found = _launchers.get(key)
    return found or _launchers.setdefault(key, Launcher(kernel, constants, **options))


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, constants: dict[str, Any], **options: Any) -> None:
    """Launches ``kernel`` through its `launcher`."""
    launcher(kernel, constants, **options)(grid, *args)
