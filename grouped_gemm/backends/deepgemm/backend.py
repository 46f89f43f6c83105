"""DeepGEMM: the vendor's kernels, with quantizers that write exactly the layouts that they read.

Any package that provides `deep_gemm` works. docs/deepgemm.md says what it needs, and what this backend refuses and why.

M, E, K, N: rows, groups, in and out features. D: K or N. O, C: the weights' output axis and their contraction axis.
R: rows after each group is padded to a multiple of 128.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grouped_gemm.backends.base import (
    Health,
    OffsetPlan,
    Requirement,
    TinyRun,
    _GroupedMMBackend,
    as_activations,
    as_weights,
    requires_arch,
    requires_dtype,
    requires_host_sync,
    requires_no_bias,
    requires_recipe,
    unscaled_weights,
)
from grouped_gemm.backends.deepgemm import layouts as deepgemm_layouts
from grouped_gemm.backends.deepgemm import package as deepgemm_package
from grouped_gemm.backends.deepgemm.layouts import BLOCK
from grouped_gemm.core.call_spec import CallSpec, Pass, dtype_name
from grouped_gemm.core.library import Size, Steps, define_op, ops
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.quantized import Quantized
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.quantize import layouts
from grouped_gemm.kernels.quantize.layouts import Operands

_SCALED = (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2)
_ROWS = "deepgemm rows"
_COLUMNS = "deepgemm columns"
_WEIGHTS = "deepgemm weights"


def _multiple(spec: CallSpec) -> int:
    """K and N must be multiples of this: a block with scales, a swizzled line of shared memory without."""
    return BLOCK if spec.recipe.is_scaled else 64


class Backend(_GroupedMMBackend):
    """The kernels of the package deep_gemm."""

    kind = BackendKind.DEEPGEMM
    summary = "The vendor's kernels from the package deep_gemm, on groups padded to multiples of 128 rows."
    requirements = (
        requires_arch(("sm_90", "sm_100"), fix="Use another backend."),
        Requirement(
            what="deep_gemm",
            holds=lambda p: p.machine.version("deep_gemm") is not None,
            found=lambda p: "none",
            fix=f"{deepgemm_package.INSTALL}.",
        ),
        requires_recipe((*_SCALED, Recipe.NONE)),
        Requirement(
            what="a recipe with scales",
            holds=lambda p: p.recipe.is_scaled,
            found=lambda p: p.recipe.value,
            fix="Use fp8_blockwise or another backend.",
            passes=(Pass.WGRAD,),
        ),
        Requirement(
            what="power-of-two scales on sm_100",
            holds=lambda p: p.machine.arch != "sm_100" or p.recipe is not Recipe.FP8_BLOCKWISE,
            found=lambda p: f"the fp32 scales of {p.recipe.value}",
            fix="Use fp8_blockwise_pow2, which has such scales, or another backend.",
        ),
        requires_arch(("sm_90",), fix="Use another backend.", passes=(Pass.WGRAD,)),
        Requirement(
            what="sm_90 for a recipe without scales",
            holds=lambda p: p.recipe.is_scaled or p.machine.arch == "sm_90",
            found=lambda p: p.machine.arch,
            fix="Use another backend.",
        ),
        requires_dtype((torch.bfloat16,)),
        Requirement(
            what="output in bfloat16",
            holds=lambda p: p.out_dtype is torch.bfloat16,
            found=lambda p: dtype_name(p.out_dtype),
            fix="Leave out_dtype out, or use another backend.",
            passes=(Pass.FORWARD,),
        ),
        requires_no_bias((Pass.FORWARD,)),
        Requirement(
            what="K and N in multiples of 128, or of 64 without scales",
            holds=lambda p: p.k % _multiple(p) == 0 and p.n % _multiple(p) == 0 and p.k > 0 and p.n > 0,
            found=lambda p: f"K = {p.k}, N = {p.n}",
            fix="Pad the weights, or use another backend.",
        ),
        requires_host_sync((Pass.WGRAD,)),
    )
    host_syncs = "wgrad reads the padded group sizes"
    host_sync_passes = (Pass.WGRAD,)

    def padded_to(self, spec: CallSpec) -> int:
        return BLOCK

    def health(self, device: torch.device) -> Health:
        """Checks package, compiler and symbols, then compares a small padded GEMM and its wgrad with `reference`."""
        health = deepgemm_package.check(machine_of(device))
        if not health.is_good:
            return health
        try:
            return self._tiny_run(device)
        except Exception as error:
            return deepgemm_package.explain(error, machine_of(device))

    def _tiny_run(self, device: torch.device) -> Health:
        run = TinyRun([130, 130, 200], 210, k=256, n=128)
        wgrad_dtype = torch.float32 if machine_of(device).arch == "sm_90" else None
        if self._computes_correctly(run, Recipe.FP8_BLOCKWISE_POW2, device, wgrad_dtype=wgrad_dtype):
            return Health()
        return Health("a tiny GEMM gives wrong results", f"{deepgemm_package.INSTALL}.")

    def plan(self, offs: Tensor, num_rows: int, group_alignment: int = 1, *, blocks: bool = False) -> OffsetPlan:
        is_aligned = group_alignment % BLOCK == 0
        return OffsetPlan(offs, num_rows, tuple(ops.deepgemm_plan(offs, num_rows, is_aligned)))

    def quantize_activations(
        self, x_MD: Tensor, plan: OffsetPlan, recipe: Recipe, *, rows: bool, columns: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        written = x_MD, None, x_MD, None
        if recipe.is_scaled:
            row_map, blocks, _ = plan.derived
            written = ops.deepgemm_quantize_activations(x_MD, row_map, blocks, recipe.value, rows, columns)
        return as_activations(written, recipe, (_ROWS, _COLUMNS), rows=rows, columns=columns)

    def quantize_weights(
        self, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        if not recipe.is_scaled:
            return unscaled_weights(b_EKN, _WEIGHTS, forward=forward, dgrad=dgrad)
        by_n, by_k, scale = ops.deepgemm_quantize_weights(b_EKN, recipe.value, forward, dgrad)
        scale = scale.transpose(1, 2)
        return as_weights((by_n, by_k, scale, scale), recipe, _WEIGHTS, forward=forward, dgrad=dgrad)

    def adopt_weights(
        self, data_EKN: Tensor, scale: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        scale = _dense(scale)
        by_n = data_EKN.transpose(1, 2).contiguous().transpose(1, 2) if forward else data_EKN
        return (
            Quantized(by_n, scale, recipe, 1, _WEIGHTS) if forward else None,
            Quantized(data_EKN.contiguous(), scale, recipe, 2, _WEIGHTS) if dgrad else None,
        )

    def grouped_mm(
        self, lhs: Quantized, rhs: Quantized, plan: OffsetPlan, out_dtype: torch.dtype, bias_EN: Tensor | None = None
    ) -> Tensor:
        row_map, blocks, _ = plan.derived
        rhs_EOC, scale = rhs.data, rhs.scale
        if rhs.axis == 1:
            rhs_EOC = rhs_EOC.transpose(1, 2)
            scale = None if scale is None else scale.transpose(1, 2)
        return ops.deepgemm_grouped_mm(lhs.data, lhs.scale, rhs_EOC, scale, row_map, blocks, plan.num_rows)

    def _wgrad(self, first: Quantized, second: Quantized, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        _, _, sizes = plan.derived
        return ops.deepgemm_wgrad(first.data, first.scale, second.data, second.scale, sizes, out_dtype)

    def bias_grad(self, dy_MN: Tensor, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        return ops.deepgemm_group_sums(dy_MN, plan.offs, out_dtype)


def _dense(x: Tensor) -> Tensor:
    """``x`` with one of its last two axes contiguous, and matrices without gaps; copied only if it is not so."""
    is_dense = x.is_contiguous() or x.transpose(-2, -1).is_contiguous()
    return x if is_dense else x.contiguous()


def _for_tma(x: Tensor) -> Tensor:
    """``x`` with rows that start at multiples of 16 bytes; copied only if they do not."""
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def _with_next_block(row_map: Tensor) -> Tensor:
    """``row_map``, followed in memory by a block of -1 as in `layouts.plan`. Offloading of saved tensors drops it."""
    end = row_map.storage_offset() + row_map.shape[0] + BLOCK
    if row_map.untyped_storage().nbytes() >= end * row_map.element_size():
        return row_map
    return F.pad(row_map, (0, BLOCK), value=-1)[: row_map.shape[0]]


@define_op(replays=True)
def _deepgemm_plan(offs: Tensor, num_rows: Size, is_aligned: bool) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    out = deepgemm_layouts.plan(offs, num_rows, is_aligned)
    yield out
    from grouped_gemm.backends.deepgemm import quantize as deepgemm_quantize

    deepgemm_quantize.fill_plan(offs, num_rows, out)


@define_op(replays=True)
def _deepgemm_quantize_activations(
    x_MD: Tensor, row_map: Tensor, blocks: Tensor, recipe: str, rows: bool, columns: bool
) -> Steps[Operands]:
    out = deepgemm_layouts.activations(x_MD, blocks, row_map.shape[0], rows=rows, columns=columns)
    yield out
    from grouped_gemm.backends.deepgemm import quantize as deepgemm_quantize

    deepgemm_quantize.quantize_activations(x_MD, blocks, Recipe(recipe), out)


@define_op(replays=True)
def _deepgemm_quantize_weights(
    b_EKN: Tensor, recipe: str, forward: bool, dgrad: bool
) -> Steps[tuple[Tensor, Tensor, Tensor]]:
    by_n, by_k, _, _ = layouts.weights(b_EKN, Recipe(recipe), forward=forward, dgrad=dgrad)
    num_groups, k, n = b_EKN.shape
    scale = b_EKN.new_empty(num_groups, n // BLOCK, k // BLOCK, dtype=torch.float32)
    yield by_n, by_k, scale
    from grouped_gemm.kernels.quantize import fp8 as quantize_fp8

    quantize_fp8.quantize_weights(b_EKN, Recipe(recipe), (by_n, by_k, scale.transpose(1, 2), scale[:0, 0, 0]))


@define_op()
def _deepgemm_grouped_mm(
    lhs: Tensor, lhs_scale: Tensor | None, rhs_EOC: Tensor, rhs_scale: Tensor | None, row_map: Tensor, blocks: Tensor,
    num_rows: Size,
) -> Steps[Tensor]:  # fmt: skip
    out_MO = lhs.new_empty(num_rows, rhs_EOC.shape[1], dtype=torch.bfloat16)
    yield out_MO
    from grouped_gemm.backends.deepgemm import quantize as deepgemm_quantize
    from grouped_gemm.kernels.common.launch import on_device

    if num_rows == 0:
        return
    is_padded = row_map.shape[0] != num_rows
    out_RO = out_MO.new_empty(row_map.shape[0], out_MO.shape[1]) if is_padded else out_MO
    package, row_map = deepgemm_package.functions(), _with_next_block(row_map)
    with on_device(lhs):
        if lhs_scale is None:
            lhs = deepgemm_quantize.pad(lhs, blocks) if is_padded else _for_tma(lhs)
            package.grouped_mm(lhs, _dense(rhs_EOC), out_RO, row_map)
        else:
            package.scaled_grouped_mm((lhs, lhs_scale), (rhs_EOC, rhs_scale), out_RO, row_map, recipe=(1, BLOCK, BLOCK))
        if is_padded:
            deepgemm_quantize.unpad(out_RO, blocks, out_MO)
        # For blocks that belong to no group, Hopper's scaled kernel stores zeros. The others multiply them by some b.
        elif lhs_scale is None or machine_of(lhs.device).arch != "sm_90":
            deepgemm_quantize.zero_tail(out_MO, blocks)


@define_op(tags=(torch.Tag.cudagraph_unsafe,))
def _deepgemm_wgrad(
    lhs: Tensor, lhs_scale: Tensor, rhs: Tensor, rhs_scale: Tensor, sizes: Tensor, out_dtype: torch.dtype
) -> Steps[Tensor]:
    p, q = lhs_scale.shape[1], rhs_scale.shape[1]
    yield lambda: lhs_scale.new_empty(sizes.shape[0], p, q, dtype=out_dtype)
    from grouped_gemm.kernels.common.launch import on_device

    out_EPQ = lhs_scale.new_zeros(sizes.shape[0], p, q)  # the kernel adds to it
    on_host: list[int] = sizes.tolist()
    tokens = sum(on_host)
    if tokens:
        # Scales are passed with D contiguous, as DeepGEMM's own transform would make them. That transform needs shared
        # memory for all blocks of 64 lines at once. From 908 blocks on its launch fails: CUDA_ERROR_INVALID_VALUE.
        operands: list[Any] = [
            (data[: tokens * scale.shape[1]], scale[: tokens // BLOCK].t())
            for data, scale in ((lhs, lhs_scale), (rhs, rhs_scale))
        ]
        with on_device(lhs):
            deepgemm_package.functions().scaled_wgrad(*operands, out_EPQ, on_host, sizes, out_EPQ)
    yield out_EPQ.to(out_dtype)


@define_op(replays=True)
def _deepgemm_group_sums(x_MN: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Steps[Tensor]:
    out_EN = x_MN.new_empty(offs.shape[0], x_MN.shape[1], dtype=out_dtype)
    yield out_EN
    from grouped_gemm.kernels.gemm import k_grouped

    k_grouped.group_sums(x_MN, offs, out_EN)
