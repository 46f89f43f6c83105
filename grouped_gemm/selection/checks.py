"""Checks of a caller's arguments. Every message names the argument, what was expected and what was found.

The checks read shapes and dtypes. They read values only under GROUPED_GEMM_VALIDATE=1.
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
MOST_ROWS = 2**31 - 1  # the largest end row that offs, which is int32, can hold
MOST_EXPERTS = 2**20  # of an MoE layer
_OTHER_INTEGERS = (torch.int64, torch.int16, torch.int8, torch.uint8)
_DTYPE_NAMES = ", ".join(map(dtype_name, DTYPES))


def fail(argument: str, expected: str, found: object) -> NoReturn:
    """Raises the ValueError for a bad argument."""
    raise ValueError(f"{argument}: expected {expected}; found {found}")


def check_tensor(argument: str, value: Any, dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks that ``value`` is a dense tensor of one of these ranks and dtypes.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has another rank or dtype, or is sparse or nested.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor; found {type(value).__name__}")
    if value.is_nested:  # first, because some nested tensors have no shape
        fail(argument, "a dense tensor, such as x.values() of a jagged tensor", "a nested tensor")
    # Dynamo compiles dense tensors only. In the backward of an autograd.Function it cannot trace this check.
    if not torch.compiler.is_compiling() and value.layout is not torch.strided:
        fail(argument, "a dense tensor", value.layout)
    # Not `in`: where Dynamo compiles this function by itself, a second rank becomes a variable, which `in` never finds.
    if all([value.dim() != dim for dim in dims]):
        fail(argument, f"a tensor of rank {' or '.join(map(str, dims))}", f"{value.dim()}, shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        fail(f"{argument}.dtype", "one of " + ", ".join(map(dtype_name, dtypes)), dtype_name(value.dtype))


def check_device(argument: str, x: Tensor | QuantizedWeights, other: str, device: torch.device) -> None:
    """Checks that ``x`` is on ``device``, the device of the argument ``other``."""
    if x.device != device:
        fail(f"{argument}.device", f"{device}, the device of {other}", x.device)


def check_offs(offs: Tensor, num_groups: int | None, device: torch.device) -> None:
    """Checks that ``offs`` has one int32 end row per group, on the device of the operands."""
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
    """Checks the arguments of a `GroupPlan`, without reading values."""
    check_offs(offs, None, offs.device if isinstance(offs, Tensor) else torch.device("cpu"))
    check_options(None, group_alignment)
    if isinstance(num_rows, bool) or not isinstance(num_rows, (int, torch.SymInt)):
        raise TypeError(f"num_rows: expected an int; found {type(num_rows).__name__}")
    # Not while tracing: the guard would bound M, and `tracing.row_class_of` would take it for a bound from the caller.
    if not torch.compiler.is_compiling() and not 0 <= num_rows <= MOST_ROWS:
        fail("num_rows", f"at least 0 and at most {MOST_ROWS}", num_rows)


def check_topk_ids(topk_ids: Tensor, num_experts: int) -> None:
    """Checks the routing of an MoE layer: ``topk_ids`` (T, k) int32 or int64, of any values, and the number of experts.

    `check_slots` checks T * k.
    """
    if isinstance(topk_ids, Tensor) and topk_ids.is_floating_point():
        fail("topk_ids.dtype", "int32 or int64: the indices that torch.topk returns", dtype_name(topk_ids.dtype))
    if isinstance(topk_ids, Tensor) and topk_ids.dim() == 1:
        found = f"shape {tuple(topk_ids.shape)}; pass topk_ids[:, None] for one expert per token"
        fail("topk_ids", "shape (T, k), the k experts of each token", found)
    check_tensor("topk_ids", topk_ids, (2,), (torch.int32, torch.int64))
    check_num_experts(num_experts)


def check_num_experts(num_experts: int) -> None:
    """Checks the number of experts of an MoE layer."""
    if isinstance(num_experts, bool) or not isinstance(num_experts, (int, torch.SymInt)):
        raise TypeError(f"num_experts: expected an int; found {type(num_experts).__name__}")
    if holds(num_experts < 1) or holds(num_experts > MOST_EXPERTS):
        fail("num_experts", f"at least 1 and at most {MOST_EXPERTS}", num_experts)


def check_slots(num_slots: int) -> None:
    """Checks that the routed rows of a call can be counted in int32."""
    if num_slots > MOST_ROWS:
        fail("topk_ids", f"at most {MOST_ROWS} entries, T * k", f"{num_slots}; split the tokens among several calls")


def check_tangents(**operands: Any) -> None:
    """Checks that no operand has a forward-mode derivative, which would be lost. ``operands``: by argument name.

    Raises:
        ValueError: an operand has one.
    """
    for argument, x in operands.items():
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            fail(argument, "a tensor without a tangent (forward-mode AD is not supported)", "a dual tensor")


def check_options(out_dtype: torch.dtype | None, group_alignment: int) -> None:
    """Checks ``out_dtype`` and ``group_alignment``."""
    check_dtype("out_dtype", out_dtype)
    if isinstance(group_alignment, bool) or not isinstance(group_alignment, int):
        raise TypeError(f"group_alignment: expected an int; found {type(group_alignment).__name__}")
    if not 1 <= group_alignment <= MOST_ROWS:
        fail("group_alignment", f"at least 1 and at most {MOST_ROWS}, the largest possible end row", group_alignment)


def check_dtype(argument: str, dtype: Any) -> None:
    """Checks that ``dtype`` is None or a dtype that operands may have."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in DTYPES):
        fail(argument, f"one of {_DTYPE_NAMES}", dtype)


def check_operands(a: Tensor, b: Tensor | QuantizedWeights, offs: Tensor, bias: Tensor | None) -> None:
    """Checks that ``a`` (M, K), ``b`` (E, K, N), ``offs`` (E,) and ``bias`` (E, N) fit together."""
    check_tensor("a", a, (2,), DTYPES)
    if not isinstance(b, QuantizedWeights):
        check_tensor("b", b, (2, 3), DTYPES)  # check_contraction checks calls with 2 dimensions
    num_groups, k, n = b.shape
    if a.shape[1] != k:
        fail("b.shape[1]", f"K = {a.shape[1]}, as in a", k)
    if holds(num_groups < 1) or k < 1 or n < 1:
        fail("b", "E, K and N of at least 1", tuple(b.shape))
    _check_together(a, b)
    check_offs(offs, num_groups, a.device)
    if bias is None:
        return
    check_bias(bias, b.shape)
    check_device("bias", bias, "a", a.device)


def check_bias(bias: Tensor, shape: Sequence[int]) -> None:
    """Checks that ``bias`` is (E, N), for weights of ``shape`` (E, K, N)."""
    num_groups, _, n = shape
    check_tensor("bias", bias, (2,), DTYPES)
    if holds(bias.shape[0] != num_groups) or bias.shape[1] != n:
        fail("bias", f"shape (E, N) = {(num_groups, n)}", tuple(bias.shape))


def check_contraction(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None) -> None:
    """Checks that ``a`` (K, M), ``b`` (M, N) and ``offs`` (E,), which splits M, fit together."""
    check_tensor("a", a, (2,), DTYPES)
    check_tensor("b", b, (2,), DTYPES)
    if holds(a.shape[1] != b.shape[0]):
        fail("b.shape[0]", f"{a.shape[1]}, the number of columns of a", b.shape[0])
    if a.shape[0] < 1 or b.shape[1] < 1:
        fail("a and b", "at least one row of a and one column of b", (tuple(a.shape), tuple(b.shape)))
    _check_together(a, b)
    check_offs(offs, None, a.device)
    if bias is not None:
        fail("bias", "None if b has 2 dimensions", type(bias).__name__)


def check_weights(b: Tensor, scale: Tensor | None, dtype: torch.dtype | None) -> None:
    """Checks ``b`` (E, K, N): values to quantize, or a checkpoint's fp8 data with ``scale``. `as_scale` checks that."""
    is_fp8 = isinstance(b, Tensor) and b.dtype in FP8_DTYPES
    if scale is None and is_fp8:
        fail("scale", "the scales of the fp8 weights", "None; pass the checkpoint's scales")
    if scale is not None and isinstance(b, Tensor) and not is_fp8:
        found = f"{dtype_name(b.dtype)}; leave scale out to quantize these values"
        fail("b.dtype", "float8_e4m3fn for a checkpoint's weights with scales", found)
    check_tensor("b", b, (3,), DTYPES if scale is None else FP8_DTYPES)
    if min(b.shape) < 1:
        fail("b", "E, K and N of at least 1", tuple(b.shape))
    check_dtype("dtype", dtype)


def as_scale(scale: Tensor, b: Tensor, recipe: Recipe) -> Tensor:
    """A checkpoint's scales in the form that backends adopt: one per block, in the dtype of ``recipe``.

    The conversion is exact.

    Args:
        scale: in the shape of the recipe; or one per expert: (E,), (E, 1) or (E, 1, 1).
        b: the checkpoint's weights, (E, K, N).
        recipe: the recipe of the checkpoint.

    Raises:
        TypeError: ``scale`` is not a tensor.
        ValueError: dtype, device or shape do not fit. Under GROUPED_GEMM_VALIDATE=1, which synchronizes the host, also
            if the recipe needs powers of two and a scale is none.
    """
    is_mx = recipe is Recipe.MXFP8
    dtypes = (torch.float8_e8m0fnu, torch.uint8) if is_mx else (*DTYPES, torch.float8_e8m0fnu)
    if isinstance(scale, Tensor) and scale.dtype not in dtypes:
        expected = f"one of {', '.join(map(dtype_name, dtypes))} for {recipe.value}"
        codes = "use scale.to(torch.float8_e8m0fnu) if the values are powers of two"
        if not is_mx:
            codes = "use scale.float() if these are values, or scale.view(torch.float8_e8m0fnu) if they are E8M0 codes"
        fail("scale.dtype", expected, f"{dtype_name(scale.dtype)}; {codes}")
    check_tensor("scale", scale, (1, 2, 3), dtypes)
    if scale.device != b.device:
        fail("scale.device", f"{b.device}, the device of b", f"{scale.device}; pass scale.to(b.device)")
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    blocks = reference.weight_blocks(recipe, 1)
    shape = tuple(1 if side is None else -(-size // side) for size, side in zip(b.shape, blocks))
    is_each = scale.shape[0] == scale.numel() == b.shape[0]  # one per expert
    if tuple(scale.shape) != shape and not is_each:
        expected = f"shape {shape} for {recipe.value} and b of shape {tuple(b.shape)}, or one per expert, {shape[:1]}"
        fail("scale", expected, f"{tuple(scale.shape)}; {_remedy_of_shape(scale, b, recipe, shape)}")
    if recipe.power_of_two_scales and VALIDATE.is_on():
        _check_powers_of_two(scale, recipe)
    scale = scale.detach().to(recipe.scale_dtype)
    return scale.reshape(-1, 1, 1).expand(shape).contiguous() if is_each else scale


def _remedy_of_shape(scale: Tensor, b: Tensor, recipe: Recipe, shape: tuple[int, ...]) -> str:
    """What the user can do about scales of another shape than ``shape``."""
    num_groups, blocks, _ = shape
    side, half = recipe.weight_lines, b.shape[2] // 2
    parts = -(-half // side)
    if side > 1 and b.shape[2] % 2 == 0 and tuple(scale.shape) == (num_groups, blocks, 2 * parts):
        return (
            f"these are the scales of two parts of {half} columns, gate and up, that were quantized separately: a "
            f"block of {side} columns that spans both has no scale. Pass the parts separately, b[:, :, :{half}] with "
            f"scale[:, :, :{parts}], and b[:, :, {half}:] with scale[:, :, {parts}:]"
        )
    if scale.dim() == 3 and tuple(scale.transpose(1, 2).shape) == shape:
        return "pass scale.transpose(1, 2): scales have the axes of b"
    if scale.dim() == 2 and tuple(scale.unsqueeze(1).shape) == shape:
        return "pass scale.unsqueeze(1)"
    return "scales have the axes of b, with one scale per block: docs/layouts.md lists the shapes"


def _check_powers_of_two(scale: Tensor, recipe: Recipe) -> None:
    wrong = torch.frexp(scale.float()).mantissa != 0.5
    if not wrong.any():
        return
    index = wrong.nonzero()[0].tolist()
    found = float(scale[tuple(index)])
    if found != found:
        remedy = "it makes every value of its block NaN: repair the checkpoint"
    else:
        remedy = f"use {recipe.value.removesuffix('_pow2')}, which takes any scale"
    fail(f"scale{index}", f"a power of two for {recipe.value}", f"{found}; {remedy}")


def _check_together(a: Tensor, b: Tensor | QuantizedWeights) -> None:
    if b.dtype != a.dtype:
        fail("b.dtype", f"{dtype_name(a.dtype)}, the dtype of a", dtype_name(b.dtype))
    check_device("b", b, "a", a.device)


@define_op(tags=(torch.Tag.cudagraph_unsafe,))
def checked_offs(offs: Tensor, num_rows: Size, group_alignment: int) -> Steps[Tensor]:
    """Checks the values of ``offs``, and returns a copy. Synchronizes the host.

    Raises:
        ValueError: ends are out of order or outside [0, M], or a group's size is not a multiple of ``group_alignment``.
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
    """Checks the length of ``offs`` when a graph runs, and returns a copy.

    It is for graphs where the length of ``offs`` or E is data-dependent. AOTAutograd drops a `torch._check` on a size
    that it can replace by a constant.

    Raises:
        ValueError: ``offs`` has more or fewer entries than ``num_groups``, or none.
    """
    yield lambda: offs.new_empty(num_groups)
    if num_groups < 1:
        fail("b", "E of at least 1", num_groups)
    if offs.shape[0] != num_groups:
        fail("offs", f"{num_groups} entries, one for each matrix of b", offs.shape[0])
    yield offs.clone()
