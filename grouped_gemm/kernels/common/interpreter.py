"""Launches under Triton's interpreter, with the arithmetic of the hardware.

Triton's interpreter rounds fp8 wrongly, truncates fp32 to bf16, and computes on the raw bits of bf16 operands. Before
Triton 3.9 it does not support e4m3fnuz either. `hardware_arithmetic` converts floats with torch and computes bf16 and
fp8 operands in fp32. It also leaves out work whose results Triton does not use, a third of the time, and describes each
shape once instead of once per operation, a third of the rest. It applies to one launch at a time, so other kernels in
the process are interpreted as usual. `tl.sum` over bf16 stays wrong: cast first.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_FLOATS = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
# Dtypes for raw bits, by size: for numpy to torch, for numpy itself, and for torch to numpy
_TO_TORCH = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_FROM_TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_convert_float_original = interpreter._convert_float


def _convert_float(x, source, target, rounding_mode):
    if source not in _FLOATS or target not in _FLOATS or rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
        return _convert_float_original(x, source, target, rounding_mode)
    bits = np.ascontiguousarray(x).view(_TO_TORCH[source.primitive_bitwidth // 8]).copy()
    values = torch.from_numpy(bits).view(_FLOATS[source])
    size = target.primitive_bitwidth // 8
    if size == 1:  # conversions to fp8 in hardware saturate and keep NaN
        limit = torch.finfo(_FLOATS[target]).max
        values = values.float().clamp(-limit, limit)
    return values.to(_FLOATS[target]).view(_FROM_TORCH[size]).numpy().view(_RAW[size]).reshape(np.shape(x))


_np_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)


def _get_np_dtype(dtype):
    """Triton's own, which makes a dict at every call."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _np_dtype_of_scalar(scalar)


def _as_fp32(handle):
    scalar = handle.dtype.scalar
    if scalar == tl.bfloat16 or scalar.is_fp8():
        return _convert_float(handle.data, scalar, tl.float32, None).view(np.float32)
    return handle.data


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = np.matmul(_as_fp32(a), _as_fp32(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _in_fp32(original, operands):
    """``original``, but computed in fp32 if one of its first ``operands`` arguments is bf16."""

    def op(self, *args):
        handles, fn = args[:operands], args[operands]
        if fn is np.where or all(handle.dtype.scalar != tl.bfloat16 for handle in handles):
            return original(self, *args)
        result = fn(*map(_as_fp32, handles))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        rounded = _convert_float(result.astype(np.float32), tl.float32, tl.bfloat16, None)
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    return op


_patch_lang_core_original = interpreter._patch_lang_core


def _patch_lang_core(lang, scope):
    _patch_lang_core_original(lang, scope)
    to_ir = lang.dtype.to_ir

    def with_e4m3fnuz(self, builder):
        return builder.get_fp8e4b8_ty() if self.name == "fp8e4b8" else to_ir(self, builder)

    scope.set_attr(lang.dtype, "to_ir", with_e4m3fnuz)


_patch_lang_original = interpreter._patch_lang


def _patch_lang_once():
    """`_patch_lang` for one launch. Triton's own patches everything again at every call of a device function."""
    patched: set[int] = set()

    def patch_lang(fn):
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules and modules <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules)
        return _patch_lang_original(fn)

    return patch_lang


_init_block_type_original = tl.block_type.__init__
_broadcast_original = interpreter.TritonSemantic.broadcast_impl_value


@functools.cache
def _block_of(sides):
    """Shape and size of a block type, and the name of its shape."""
    block = object.__new__(tl.block_type)
    _init_block_type_original(block, tl.int1, [*sides])
    return block.shape, block.numel, str(block.shape)


@functools.cache
def _tensor_of(sides):
    """Shape and size of a tensor."""
    return tl.tuple([tl.constexpr(side) for side in sides]), tl.constexpr(math.prod(sides))


def _init_block_type(self, element_ty, shape):
    sides = tuple([side.value if isinstance(side, tl.constexpr) else side for side in shape])
    self.shape, self.numel, name = _block_of(sides)
    self.element_ty, self.name = element_ty, f"<{name}, {element_ty}>"


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _tensor_of(tuple(type.shape.values) if type.is_block() else ())


def _broadcast_impl_value(self, lhs, rhs):
    """Triton's own, which compares shapes side by side. Those of `_block_of` are equal if they are one object."""
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
        return lhs, rhs
    return _broadcast_original(self, lhs, rhs)


_BUILDER = interpreter.InterpreterBuilder
_OPTIONS = interpreter.interpreter_builder.options
# Triton computes whether each operation on integers overflows, and asserts the result only in debug mode.
_WITHOUT_UNUSED = dataclasses.replace(_OPTIONS, sanitize_overflow=_OPTIONS.sanitize_overflow and _OPTIONS.debug)
_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (interpreter.interpreter_builder, "options", _WITHOUT_UNUSED),
    (interpreter, "_get_np_dtype", _get_np_dtype),
    (interpreter, "_convert_float", _convert_float),
    (interpreter, "_patch_lang_core", _patch_lang_core),
    (tl.block_type, "__init__", _init_block_type),
    (tl.tensor, "__init__", _init_tensor),
    (interpreter.TritonSemantic, "broadcast_impl_value", _broadcast_impl_value),
    (_BUILDER, "create_dot", _create_dot),
    (_BUILDER, "unary_op", _in_fp32(_BUILDER.unary_op, 1)),
    (_BUILDER, "binary_op", _in_fp32(_BUILDER.binary_op, 2)),
    (_BUILDER, "ternary_op", _in_fp32(_BUILDER.ternary_op, 3)),
)
_lock = threading.RLock()  # the interpreter's state is global: one launch at a time


@contextmanager
def hardware_arithmetic() -> Iterator[None]:
    """Replaces what Triton's interpreter computes wrongly, lacks or repeats. One thread at a time can be inside."""
    with _lock:
        replaced = (*_REPLACED, (interpreter, "_patch_lang", _patch_lang_once()))
        originals = [getattr(owner, name) for owner, name, _ in replaced]
        for owner, name, replacement in replaced:
            setattr(owner, name, replacement)
        try:
            yield
        finally:
            for (owner, name, _), original in zip(replaced, originals):
                setattr(owner, name, original)
