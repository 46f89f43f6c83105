"""Torch: the grouped GEMMs of torch itself, and the work that they leave to the caller.

Torch does not write rows past the last group, nor the weight gradient of an empty group: this backend sets them to
zero. With ends that are out of order or out of range, torch would read out of bounds: the plan clamps them and makes
them ascend. fp8 wgrad needs contiguous tokens, and group sizes that are multiples of 16 or 32: the quantizers pad.
Layouts: docs/layouts.md.

M, E, K, N: rows, groups, in and out features. D: K or N. O, C: the weights' output axis and their contraction axis.
T: tokens, the rows of groups that are padded to multiples of 32.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm.backends.base import (
    REQUIRES_EQUAL_DTYPES,
    Health,
    OffsetPlan,
    Requirement,
    TinyRun,
    _GroupedMMBackend,
    as_activations,
    as_weights,
    requires_arch,
    requires_no_bias,
    requires_recipe,
    requires_triton,
    unscaled_weights,
)
from grouped_gemm.backends.torch_native import layouts as torch_native_layouts
from grouped_gemm.backends.torch_native.layouts import ALIGNMENT, TOKENS
from grouped_gemm.core.call_spec import CallSpec, dtype_name
from grouped_gemm.core.library import Size, Steps, define_op, ops
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.quantized import Quantized
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.quantize.layouts import Operands

_ROWWISE = (Recipe.FP8_ROWWISE, Recipe.FP8_ROWWISE_POW2)
_MXFP8 = Recipe.MXFP8
_ROWS = "torch rows"
_COLUMNS = "torch columns"
_WEIGHTS = "torch weights"


def _dtypes(spec: CallSpec) -> tuple[torch.dtype, ...]:
    """The dtypes that operands may have. On a GPU, torch multiplies others in a loop that synchronizes the host."""
    if spec.recipe.is_scaled or spec.machine.is_gpu:
        return (torch.bfloat16,)
    return (torch.bfloat16, torch.float16, torch.float32)


def _multiple(spec: CallSpec) -> int:
    """K and N must be multiples of this: 16 bytes of data; for MX a whole block, since torch checks the scales."""
    if spec.recipe is _MXFP8:
        return 32
    return ALIGNMENT if spec.recipe.is_scaled else ALIGNMENT // spec.dtype.itemsize


class Backend(_GroupedMMBackend):
    """The grouped GEMMs of torch itself."""

    kind = BackendKind.TORCH
    summary = "Torch's own `grouped_mm` and `scaled_grouped_mm`, where they run without a host sync."
    requirements = (
        requires_recipe((Recipe.NONE, *_ROWWISE, _MXFP8)),
        requires_arch(
            ("sm_90", "sm_100", "cpu"),
            fix="Use another backend: on other GPUs torch loops over the groups, with a host sync.",
        ),
        Requirement(
            what="sm_90 for rowwise scales",
            holds=lambda p: p.recipe not in _ROWWISE or p.machine.arch == "sm_90",
            found=lambda p: p.machine.arch,
            fix="Use Recipe.NONE, or Recipe.MXFP8 on sm_100, or another backend.",
        ),
        Requirement(
            what="sm_100 for mxfp8",
            holds=lambda p: p.recipe is not _MXFP8 or p.machine.arch == "sm_100",
            found=lambda p: p.machine.arch,
            fix="Use Recipe.NONE, or a rowwise recipe on sm_90, or another backend.",
        ),
        Requirement(
            what="a torch that was built with MSLK for mxfp8",
            holds=lambda p: p.recipe is not _MXFP8 or p.machine.version("mslk") is not None,
            found=lambda p: f"torch {p.machine.version('torch')} without MSLK",
            fix="Install torch 2.11 or later from its own wheels for CUDA, or use another backend.",
        ),
        requires_triton(" to quantize to fp8", lambda p: p.recipe.is_scaled),
        Requirement(
            what="operands in bfloat16, or on a CPU also in float16 or float32",
            holds=lambda p: p.dtype in _dtypes(p),
            found=lambda p: dtype_name(p.dtype),
            fix="Cast the operands, or use another backend.",
        ),
        REQUIRES_EQUAL_DTYPES,
        requires_no_bias(),
        Requirement(
            what="K and N in multiples of 16 bytes (16 values in fp8), and of 32 values in mxfp8",
            holds=lambda p: p.k % _multiple(p) == 0 and p.n % _multiple(p) == 0,
            found=lambda p: f"K = {p.k}, N = {p.n}",
            fix="Pad the weights, or use another backend.",
        ),
        Requirement(
            what="strides in multiples of 16 bytes without scales",
            holds=lambda p: p.recipe.is_scaled or p.is_aligned,
            found=lambda p: "other strides",
            fix="Pass contiguous operands, or use another backend.",
        ),
        Requirement(
            what="fewer than 1024 groups on a GPU",
            holds=lambda p: p.num_groups < 1024 or not p.machine.is_gpu,
            found=lambda p: f"E = {p.num_groups}",
            fix="Use another backend.",
        ),
    )

    def health(self, device: torch.device) -> Health:
        """Compares a small ragged GEMM and its wgrad with `reference`, in bfloat16 and in the fp8 that runs here."""
        machine = machine_of(device)
        recipes = [Recipe.NONE]
        if _has_triton(device):
            recipes += [Recipe.FP8_ROWWISE] if machine.arch == "sm_90" else []
            recipes += [_MXFP8] if machine.arch == "sm_100" and machine.version("mslk") else []
        for recipe in recipes:
            if not self._computes_correctly(TinyRun([3, 3, 20], 24, k=32, n=64), recipe, device):
                return Health(f"a tiny {recipe.value} GEMM gives wrong results", "Use another torch.")
        return Health()

    def needs_blocks(self, recipe: Recipe, columns: bool) -> bool:
        return columns and recipe in _ROWWISE

    def plan(self, offs: Tensor, num_rows: int, group_alignment: int = 1, *, blocks: bool = False) -> OffsetPlan:
        ends, token_ends = ops.torch_plan(offs, num_rows)
        found = (ops.torch_token_blocks(ends, token_ends, num_rows),) if blocks else ()
        return OffsetPlan(offs, num_rows, (ends, token_ends, *found))

    def quantize_activations(
        self, x_MD: Tensor, plan: OffsetPlan, recipe: Recipe, *, rows: bool, columns: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        written = x_MD, None, x_MD, None
        if recipe.is_scaled:
            ends, token_ends, *blocks = plan.derived
            written = ops.torch_quantize_activations(x_MD, ends, token_ends, recipe.value, rows, columns, *blocks)
        return as_activations(written, recipe, (_ROWS, _COLUMNS), rows=rows, columns=columns)

    def quantize_weights(
        self, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        if not recipe.is_scaled:
            return unscaled_weights(b_EKN, _WEIGHTS, forward=forward, dgrad=dgrad)
        written = ops.torch_quantize_weights(b_EKN, recipe.value, forward, dgrad)
        return as_weights(written, recipe, _WEIGHTS, forward=forward, dgrad=dgrad)

    def adopt_weights(
        self, data_EKN: Tensor, scale: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        by_column = None
        if forward:
            by_n = data_EKN.transpose(1, 2).contiguous()
            by_n_scale = torch_native_layouts.swizzled(scale) if recipe is _MXFP8 else scale[:, 0].contiguous()
            by_column = Quantized(by_n.transpose(1, 2), by_n_scale, recipe, 1, _WEIGHTS)
        return by_column, self._requantized_for_dgrad(data_EKN, scale, recipe) if dgrad else None

    def grouped_mm(
        self, lhs: Quantized, rhs: Quantized, plan: OffsetPlan, out_dtype: torch.dtype, bias_EN: Tensor | None = None
    ) -> Tensor:
        rhs_ECO = rhs.data if rhs.axis == 1 else rhs.data.transpose(1, 2)
        return ops.torch_grouped_mm(lhs.data, lhs.scale, rhs_ECO, rhs.scale, plan.derived[0])

    def _wgrad(self, first: Quantized, second: Quantized, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        ends, token_ends, *_ = plan.derived
        if first.scale is None or second.scale is None:
            return ops.torch_wgrad(first.data, second.data, ends)
        return ops.torch_scaled_wgrad(first.data, first.scale, second.data, second.scale, token_ends)

    def bias_grad(self, dy_MN: Tensor, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        # A wgrad with 16 bytes of ones per row as the left operand. No call gets here: a bias is refused.
        ones = dy_MN.new_ones(dy_MN.shape[0], ALIGNMENT // dy_MN.element_size())
        return ops.torch_wgrad(ones, dy_MN, plan.derived[0])[:, 0].to(out_dtype)


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether our own kernels run on ``device``. If not, torch's ops do the same with more passes over memory."""
    return device.type == "cuda" and machine_of(device).version("triton") is not None


def _aligned(x: Tensor) -> Tensor:
    """``x``, one of its last two axes contiguous, with lines that start at multiples of 16 bytes; else a copy.

    `CallSpec.is_aligned` covers the strides, but a slice of a tensor may start anywhere.
    """
    lines = x if x.stride(-1) == 1 else x.mT
    starts = x.data_ptr(), *(stride * x.element_size() for stride in lines.stride()[:-1])
    if lines.stride(-2) >= lines.shape[-1] and not any(start % ALIGNMENT for start in starts):
        return x
    lines = lines.clone(memory_format=torch.contiguous_format)
    return lines if x.stride(-1) == 1 else lines.mT


def _scaled_grouped_mm(lhs: Tensor, lhs_scale: Tensor, rhs: Tensor, rhs_scale: Tensor, ends: Tensor) -> Tensor:
    """torch's fp8 grouped GEMM, rowwise or MX according to the dtype of the scales.

    Rowwise, it accumulates in the tensor cores, as this package's own kernels do (docs/numerics.md).
    """
    if lhs_scale.dtype == torch.float8_e8m0fnu:
        kind, swizzle, fast = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4, False
    else:
        kind, swizzle, fast = F.ScalingType.RowWise, None, True
        if rhs.dim() == 2:
            lhs_scale, rhs_scale = lhs_scale.flatten(), rhs_scale.flatten()
    return F.scaled_grouped_mm(  # type: ignore[attr-defined]
        lhs, rhs, lhs_scale, kind, rhs_scale, kind, swizzle_a=swizzle, swizzle_b=swizzle, offs=ends,
        output_dtype=torch.bfloat16, use_fast_accum=fast,
    )  # fmt: skip


@define_op(replays=True)
def _torch_plan(offs: Tensor, num_rows: Size) -> Steps[tuple[Tensor, Tensor]]:
    out = torch_native_layouts.plan(offs, num_rows)
    yield out
    if _has_triton(offs.device):
        from grouped_gemm.backends.torch_native import quantize as torch_native_quantize

        torch_native_quantize.fill_plan(offs, num_rows, out)
        return
    ends = offs.clamp(0, num_rows).cummax(0).values
    sizes = ends.diff(prepend=ends.new_zeros(1))
    tokens = (sizes + (TOKENS - 1)).clamp(min=TOKENS) // TOKENS * TOKENS
    yield ends, tokens.cumsum(0, dtype=torch.int32)


@define_op(replays=True)
def _torch_token_blocks(ends: Tensor, token_ends: Tensor, num_rows: Size) -> Steps[Tensor]:
    blocks = torch_native_layouts.token_blocks(ends, num_rows)
    yield blocks
    from grouped_gemm.backends.torch_native import quantize as torch_native_quantize

    torch_native_quantize.find_blocks(ends, token_ends, num_rows, blocks)


@define_op(replays=True)
def _torch_quantize_activations(
    x_MD: Tensor, ends: Tensor, token_ends: Tensor, recipe: str, rows: bool, columns: bool,
    blocks: Tensor | None = None,
) -> Steps[Operands]:  # fmt: skip
    out = torch_native_layouts.activations(x_MD, ends.shape[0], Recipe(recipe), rows=rows, columns=columns)
    yield out
    from grouped_gemm.backends.torch_native import quantize as torch_native_quantize
    from grouped_gemm.backends.torch_native import quantize_mx as torch_native_quantize_mx

    if Recipe(recipe) is _MXFP8:
        torch_native_quantize_mx.quantize_activations(x_MD, ends, token_ends, out)
    else:
        torch_native_quantize.quantize(x_MD, ends, token_ends, Recipe(recipe), out, blocks)


@define_op(replays=True)
def _torch_quantize_weights(b_EKN: Tensor, recipe: str, forward: bool, dgrad: bool) -> Steps[Operands]:
    out = torch_native_layouts.weights(b_EKN, Recipe(recipe), forward=forward, dgrad=dgrad)
    yield out
    from grouped_gemm.kernels.quantize import fp8 as quantize_fp8
    from grouped_gemm.kernels.quantize import mx as quantize_mx

    if Recipe(recipe) is _MXFP8:
        quantize_mx.quantize_weights(b_EKN, out, scales="swizzled")
    else:
        quantize_fp8.quantize_weights(b_EKN, Recipe(recipe), out)


@define_op()
def _torch_grouped_mm(
    lhs_MC: Tensor, lhs_scale: Tensor | None, rhs_ECO: Tensor, rhs_scale: Tensor | None, ends: Tensor
) -> Steps[Tensor]:
    def empty() -> Tensor:
        dtype = lhs_MC.dtype if lhs_scale is None else torch.bfloat16
        return lhs_MC.new_empty(lhs_MC.shape[0], rhs_ECO.shape[2], dtype=dtype)

    yield empty
    if lhs_MC.shape[0] == 0:
        yield empty()
        return
    if lhs_scale is None or rhs_scale is None:
        out_MO = F.grouped_mm(_aligned(lhs_MC), _aligned(rhs_ECO), offs=ends)
    else:
        out_MO = _scaled_grouped_mm(lhs_MC, lhs_scale, rhs_ECO, rhs_scale, ends)
    if _has_triton(ends.device):
        from grouped_gemm.backends.torch_native import quantize as torch_native_quantize

        torch_native_quantize.zero_tail(out_MO, ends)
    else:
        rows = torch.arange(out_MO.shape[0], device=ends.device)
        out_MO.masked_fill_((rows >= ends[-1])[:, None], 0)
    yield out_MO


@define_op()
def _torch_wgrad(lhs_MP: Tensor, rhs_MQ: Tensor, ends: Tensor) -> Steps[Tensor]:
    shape = ends.shape[0], lhs_MP.shape[1], rhs_MQ.shape[1]
    yield lambda: lhs_MP.new_empty(shape)
    if lhs_MP.shape[0] == 0:
        yield lhs_MP.new_zeros(shape)
        return
    out_EPQ = F.grouped_mm(_aligned(lhs_MP).t(), _aligned(rhs_MQ), offs=ends)
    if _has_triton(ends.device):
        from grouped_gemm.backends.torch_native import quantize as torch_native_quantize

        torch_native_quantize.zero_empty_groups(out_EPQ, ends)
    else:
        out_EPQ.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
    yield out_EPQ


@define_op()
def _torch_scaled_wgrad(
    lhs_PT: Tensor, lhs_scale: Tensor, rhs_QT: Tensor, rhs_scale: Tensor, token_ends: Tensor
) -> Steps[Tensor]:
    shape = token_ends.shape[0], lhs_PT.shape[0], rhs_QT.shape[0]
    yield lambda: lhs_PT.new_empty(shape, dtype=torch.bfloat16)
    yield _scaled_grouped_mm(lhs_PT, lhs_scale, rhs_QT.t(), rhs_scale, token_ends)
