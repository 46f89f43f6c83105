"""Checks of what a caller passes. Every message names the argument, what was found and what was expected.

Shapes and dtypes only: nothing here looks at values, except under GROUPED_GEMM_VALIDATE=1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from grouped_gemm import reference
from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.library import Size, Steps, define_op
from grouped_gemm.core.preference import VALIDATE
from grouped_gemm.core.quantized import QuantizedWeights
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.core.tracing import holds

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
MOST_ROWS = 2**31 - 1  # that offs, which is int32, can speak of
_OTHER_INTEGERS = (torch.int64, torch.int16, torch.int8, torch.uint8)
_DTYPE_NAMES = ", ".join(map(dtype_name, DTYPES))


def fail(argument: str, expected: str, found: object) -> NoReturn:
    """Raises the ValueError of a bad argument."""
    raise ValueError(f"{argument}: expected {expected}; found {found}")


def check_tensor(argument: str, value: Any, dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """``value`` is a tensor of one of these ranks and dtypes.

    Raises:
        TypeError: it is no tensor.
        ValueError: rank or dtype is another, or it is sparse or nested.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor; found {type(value).__name__}")
    if value.is_nested:  # before its shape, which some of them do not have
        fail(argument, "a dense tensor, such as x.values() of a jagged tensor", "a nested tensor")
    # Dynamo compiles dense tensors only, and in the backward of an autograd.Function does not let anybody ask.
    if not torch.compiler.is_compiling() and value.layout is not torch.strided:
        fail(argument, "a dense tensor", value.layout)
    if value.dim() not in dims:
        fail(argument, f"a tensor of rank {' or '.join(map(str, dims))}", f"{value.dim()}, shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        fail(f"{argument}.dtype", "one of " + ", ".join(map(dtype_name, dtypes)), dtype_name(value.dtype))


def check_device(argument: str, x: Tensor | QuantizedWeights, other: str, device: torch.device) -> None:
    """``x`` is on ``device``, where the argument ``other`` is."""
    if x.device != device:
        fail(f"{argument}.device", f"{device}, where {other} is", x.device)


def check_offs(offs: Tensor, num_groups: int | None, device: torch.device) -> None:
    """``offs`` has one int32 end row per group, on the operands' device."""
    if isinstance(offs, Tensor) and offs.dtype in _OTHER_INTEGERS:
        fail(
            "offs.dtype",
            "int32: offs.int() if these are end rows, offs.cumsum(0, dtype=torch.int32) if they are group sizes",
            dtype_name(offs.dtype),
        )
    check_tensor("offs", offs, (1,), (torch.int32,))
    check_device("offs", offs, "a", device)
    if num_groups is None and holds(offs.shape[0] == 0):
        fail("offs", "at least one group", "none")
    if num_groups is not None and holds(offs.shape[0] != num_groups):
        fail("offs", f"{num_groups} entries, one for each matrix of b", offs.shape[0])


def check_groups(offs: Tensor, num_rows: int, group_alignment: int) -> None:
    """``offs`` are end rows of groups of ``num_rows`` rows, in multiples of ``group_alignment``; looks at no values."""
    check_offs(offs, None, offs.device if isinstance(offs, Tensor) else torch.device("cpu"))
    check_options(None, group_alignment)
    if isinstance(num_rows, bool) or not isinstance(num_rows, (int, torch.SymInt)):
        raise TypeError(f"num_rows: expected an int; found {type(num_rows).__name__}")
    # A guard on the largest one would bound M, which `tracing.row_class_of` would take for a bound that was stated.
    if not torch.compiler.is_compiling() and not 0 <= num_rows <= MOST_ROWS:
        fail("num_rows", f"at least 0 and at most {MOST_ROWS}", num_rows)


def check_tangents(**operands: Any) -> None:
    """No operand, by the name of its argument, has a forward-mode derivative, which would be lost.

    Raises:
        ValueError: one has.
    """
    for argument, x in operands.items():
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            fail(argument, "a tensor without a tangent, as there are no forward-mode derivatives", "a dual tensor")


def check_options(out_dtype: torch.dtype | None, group_alignment: int) -> None:
    """``out_dtype`` and ``group_alignment`` are such values."""
    check_dtype("out_dtype", out_dtype)
    if isinstance(group_alignment, bool) or not isinstance(group_alignment, int):
        raise TypeError(f"group_alignment: expected an int; found {type(group_alignment).__name__}")
    if not 1 <= group_alignment <= MOST_ROWS:
        fail("group_alignment", f"at least 1 and at most {MOST_ROWS}, the largest end row", group_alignment)


def check_dtype(argument: str, dtype: Any) -> None:
    """``dtype`` is one that operands may have, or None."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in DTYPES):
        fail(argument, f"one of {_DTYPE_NAMES}", dtype)


def check_operands(a: Tensor, b: Tensor | QuantizedWeights, offs: Tensor, bias: Tensor | None) -> None:
    """``a`` (M, K), ``b`` (E, K, N), ``offs`` (E,) and ``bias`` (E, N) fit each other."""
    check_tensor("a", a, (2,), DTYPES)
    if not isinstance(b, QuantizedWeights):
        check_tensor("b", b, (2, 3), DTYPES)  # 2 are another form of the call, checked by check_contraction
    num_groups, k, n = b.shape
    if a.shape[1] != k:
        fail("b.shape[1]", f"K = {a.shape[1]}, as a has it", k)
    if holds(num_groups < 1) or k < 1 or n < 1:
        fail("b", "E, K and N of at least 1", tuple(b.shape))
    _check_together(a, b)
    check_offs(offs, num_groups, a.device)
    if bias is None:
        return
    check_bias(bias, b.shape)
    check_device("bias", bias, "a", a.device)


def check_bias(bias: Tensor, shape: Sequence[int]) -> None:
    """``bias`` is (E, N), for weights of ``shape`` (E, K, N)."""
    num_groups, _, n = shape
    check_tensor("bias", bias, (2,), DTYPES)
    if holds(bias.shape[0] != num_groups) or bias.shape[1] != n:
        fail("bias", f"shape (E, N) = {(num_groups, n)}", tuple(bias.shape))


def check_contraction(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None) -> None:
    """``a`` (K, M), ``b`` (M, N) and ``offs`` (E,), which splits M, fit each other."""
    check_tensor("a", a, (2,), DTYPES)
    check_tensor("b", b, (2,), DTYPES)
    if holds(a.shape[1] != b.shape[0]):
        fail("b.shape[0]", f"{a.shape[1]}, the columns of a", b.shape[0])
    if a.shape[0] < 1 or b.shape[1] < 1:
        fail("a and b", "at least one row of a and one column of b", (tuple(a.shape), tuple(b.shape)))
    _check_together(a, b)
    check_offs(offs, None, a.device)
    if bias is not None:
        fail("bias", "None where b has 2 dimensions", type(bias).__name__)


def check_weights(b: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> None:
    """``b`` (E, K, N) is to be quantized, or is a checkpoint's fp8 with ``scale``, which `as_scale` checks."""
    is_fp8 = isinstance(b, Tensor) and b.dtype in FP8_DTYPES
    if scale is None and is_fp8:
        fail("scale", "the factors of weights that are fp8 already", "None; pass the checkpoint's scales")
    if scale is not None and isinstance(b, Tensor) and not is_fp8:
        found = f"{dtype_name(b.dtype)}; leave scale out to quantize these values"
        fail("b.dtype", "float8_e4m3fn, as a checkpoint's weights with scales have", found)
    check_tensor("b", b, (3,), DTYPES if scale is None else FP8_DTYPES)
    if min(b.shape) < 1:
        fail("b", "E, K and N of at least 1", tuple(b.shape))
    check_dtype("dtype", dtype)


def as_scale(scale: Tensor, b: Tensor, recipe: Recipe) -> Tensor:
    """A checkpoint's scales as backends adopt them: in the dtype of ``recipe``, which is exact, one for each block.

    Args:
        scale: in the shape of the recipe, or one for each expert, (E,), (E, 1) or (E, 1, 1).
        b: the checkpoint's weights, (E, K, N).
        recipe: the recipe that they follow.

    Raises:
        TypeError: ``scale`` is no tensor.
        ValueError: dtype, device or shape do not fit; or under GROUPED_GEMM_VALIDATE=1, which is a host sync, a scale
            is no power of two though the recipe wants them.
    """
    is_mx = recipe is Recipe.MXFP8
    dtypes = (torch.float8_e8m0fnu, torch.uint8) if is_mx else (*DTYPES, torch.float8_e8m0fnu)
    if isinstance(scale, Tensor) and scale.dtype not in dtypes:
        expected = f"one of {', '.join(map(dtype_name, dtypes))} for {recipe.value}"
        codes = "use scale.to(torch.float8_e8m0fnu) if these are powers of two"
        if not is_mx:
            codes = "use scale.float() if these are numbers, or scale.view(torch.float8_e8m0fnu) if they are E8M0 codes"
        fail("scale.dtype", expected, f"{dtype_name(scale.dtype)}; {codes}")
    check_tensor("scale", scale, (1, 2, 3), dtypes)
    if scale.device != b.device:
        fail("scale.device", f"{b.device}, where b is", f"{scale.device}; pass scale.to(b.device)")
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    blocks = reference.weight_blocks(recipe, 1)
    shape = tuple(1 if side is None else -(-size // side) for size, side in zip(b.shape, blocks))
    is_each = scale.shape[0] == scale.numel() == b.shape[0]  # one for each expert
    if tuple(scale.shape) != shape and not is_each:
        expected = f"shape {shape} for {recipe.value} and b of {tuple(b.shape)}, or one for each expert, {shape[:1]}"
        fail("scale", expected, f"{tuple(scale.shape)}; {_remedy_of_shape(scale, b, recipe, shape)}")
    if recipe.power_of_two_scales and VALIDATE.is_on():
        _check_powers_of_two(scale, recipe)
    scale = scale.detach().to(recipe.scale_dtype)
    return scale.reshape(-1, 1, 1).expand(shape).contiguous() if is_each else scale


def _remedy_of_shape(scale: Tensor, b: Tensor, recipe: Recipe, shape: tuple[int, ...]) -> str:
    """What to do about scales whose shape is not ``shape``."""
    num_groups, blocks, _ = shape
    side, half = recipe.weight_lines, b.shape[2] // 2
    parts = -(-half // side)
    if side > 1 and b.shape[2] % 2 == 0 and tuple(scale.shape) == (num_groups, blocks, 2 * parts):
        return (
            f"these are the scales of two parts of {half} columns, gate and up, that were quantized apart: a block of "
            f"{side} columns across both has no scale. Pass the parts apart, b[:, :, :{half}] with "
            f"scale[:, :, :{parts}], and b[:, :, {half}:] with scale[:, :, {parts}:]"
        )
    if scale.dim() == 3 and tuple(scale.transpose(1, 2).shape) == shape:
        return "pass scale.transpose(1, 2): scales have the axes of b"
    if scale.dim() == 2 and tuple(scale.unsqueeze(1).shape) == shape:
        return "pass scale.unsqueeze(1)"
    return "scales have the axes of b, one for each block: docs/layouts.md has the shapes"


def _check_powers_of_two(scale: Tensor, recipe: Recipe) -> None:
    wrong = torch.frexp(scale.float()).mantissa != 0.5
    if not wrong.any():
        return
    index = wrong.nonzero()[0].tolist()
    found = float(scale[tuple(index)])
    if found != found:
        remedy = "a NaN makes every value of its block NaN: mend the checkpoint"
    else:
        remedy = f"use {recipe.value.removesuffix('_pow2')}, which takes any scale"
    fail(f"scale{index}", f"a power of two, as {recipe.value} has", f"{found}; {remedy}")


def _check_together(a: Tensor, b: Tensor | QuantizedWeights) -> None:
    if b.dtype != a.dtype:
        fail("b.dtype", f"{dtype_name(a.dtype)}, as a has it", dtype_name(b.dtype))
    check_device("b", b, "a", a.device)


@define_op(tags=(torch.Tag.cudagraph_unsafe,))
def checked_offs(offs: Tensor, num_rows: Size, group_alignment: int) -> Steps[Tensor]:
    """A copy of ``offs`` whose values have been looked at; waits for the device.

    Raises:
        ValueError: ends are out of order, outside [0, M], or a group's size breaks the promise of its alignment.
    """
    yield lambda: torch.empty_like(offs)
    start = 0
    ends = offs.tolist()
    if ends != sorted(ends) and min(ends) >= 0 and sum(ends) == num_rows:
        fail("offs", "end rows: offs.cumsum(0, dtype=torch.int32)", f"group sizes, whose sum is M = {num_rows}")
    for e, end in enumerate(ends):
        if not 0 <= end <= num_rows:
            fail(f"offs[{e}]", f"an end row from 0 to M = {num_rows}", end)
        if end < start:
            fail(f"offs[{e}]", f"at least offs[{e - 1}] = {start}", end)
        if (end - start) % group_alignment:
            fail(f"offs[{e}]", f"a group size that is a multiple of group_alignment = {group_alignment}", end - start)
        start = end
    yield offs.clone()


@define_op()
def counted_offs(offs: Tensor, num_groups: Size) -> Steps[Tensor]:
    """A copy of ``offs``, checked when the graph runs: its length or E was data-dependent while the graph was traced.

    AOTAutograd drops what `torch._check` asserts of a size that it can replace by a constant.

    Raises:
        ValueError: there are more or fewer ends than ``num_groups``, or none.
    """
    yield lambda: offs.new_empty(num_groups)
    if num_groups < 1:
        fail("b", "E of at least 1", num_groups)
    if offs.shape[0] != num_groups:
        fail("offs", f"{num_groups} entries, one for each matrix of b", offs.shape[0])
    yield offs.clone()
