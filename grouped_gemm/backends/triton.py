"""Triton: this package's own kernels. They need no vendor library, no padded groups and no host sync.

Kernels and quantizers are in `grouped_gemm.kernels`, which is imported at the first launch. Layouts: docs/layouts.md.

M, E, K, N: rows, groups, in and out features. D: K or N.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from grouped_gemm import reference
from grouped_gemm.backends.base import (
    Health,
    OffsetPlan,
    Requirement,
    TinyRun,
    _GroupedMMBackend,
    as_activations,
    as_weights,
    requires_dtype,
    requires_recipe,
    requires_triton,
    unscaled_weights,
)
from grouped_gemm.core.call_spec import CallSpec
from grouped_gemm.core.library import Changed, Size, Steps, define_op, is_intercepted, ops
from grouped_gemm.core.machine import ARCHS, GPU_ARCHS, is_capturing
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.quantized import Quantized
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.quantize import layouts
from grouped_gemm.kernels.quantize.blocks import token_blocks
from grouped_gemm.kernels.quantize.layouts import Operands

_ROWS = "triton rows"
_COLUMNS = "triton columns"
_WEIGHTS = "triton weights"


# The kernels of a health check are those of calls in bfloat16, with N contiguous and more than 16 rows per group.
_TINY = TinyRun([30, 30, 80], 96, k=64, n=16)


def _run_tiny(a: Tensor, b: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    y = ops.triton_grouped_mm(a, None, b, None, None, offs, "none", torch.bfloat16)
    return y, ops.triton_wgrad(a, None, y, None, offs, a.shape[0], "none", torch.bfloat16)


def _requires_gpu_in(archs: tuple[str, ...], purpose: str, concerns: Callable[[CallSpec], bool]) -> Requirement:
    """Requires a GPU of one of ``archs``, for the calls that it ``concerns``."""
    return Requirement(
        what=" or ".join(archs) + purpose,
        holds=lambda p: not p.machine.is_gpu or p.machine.arch in archs or not concerns(p),
        found=lambda p: p.machine.arch,
        fix="Use another recipe, or another backend." if purpose else "Use another backend.",
    )


class Backend(_GroupedMMBackend):
    """Kernels of this package, in Triton."""

    kind = BackendKind.TRITON
    summary = "This package's own kernels: no padding, no vendor library, no host sync."
    requirements = (
        Requirement(
            what="a GPU",
            holds=lambda p: p.machine.is_gpu or (p.machine.vendor == "cpu" and p.machine.interprets),
            found=lambda p: p.machine.vendor,
            fix="Use another backend; for tests, start the process with TRITON_INTERPRET=1.",
        ),
        Requirement(
            what="compiled kernels on a GPU",  # the interpreter would copy everything to the host
            holds=lambda p: not (p.machine.is_gpu and p.machine.interprets),
            found=lambda p: "TRITON_INTERPRET=1",
            fix="Start the process without TRITON_INTERPRET.",
        ),
        _requires_gpu_in(GPU_ARCHS, "", lambda p: True),
        requires_triton(),
        requires_recipe(Recipe),
        _requires_gpu_in(
            tuple(arch for arch in GPU_ARCHS if ARCHS[arch].fp8), " for fp8", lambda p: p.recipe.is_scaled
        ),
        requires_dtype((torch.bfloat16, torch.float16, torch.float32)),
    )

    def health(self, device: torch.device) -> Health:
        """Compares a small ragged GEMM and its wgrad with `reference`."""
        fix = "Install the triton that this torch was built with."
        if device.type == "cpu":
            fix = "Triton's interpreter needs numpy, and Triton 3.6 needs numpy<2.4."
        a, b, offs = _TINY.operands(device)
        try:
            if device.type == "cpu":
                # Import them together: each import makes Triton read TRITON_INTERPRET, which may change in between.
                from grouped_gemm.kernels.gemm import k_grouped, m_grouped  # noqa: F401
                from grouped_gemm.kernels.quantize import fp8 as quantize_fp8  # noqa: F401
            self.compile_together(lambda: None, a)
            y, db = _run_tiny(a, b, offs)
        except Exception as error:
            return Health(f"{type(error).__name__}: {error}", fix)
        a, b, y, db = a.cpu(), b.cpu(), y.cpu(), db.cpu()  # a first GEMM of torch on a GPU would load cuBLAS
        right_y, right_db = reference.grouped_mm(a, b, _TINY.ends), reference.wgrad(a, y, _TINY.ends)
        # Each value, to a few roundings of bfloat16: a row too many or too few in a group barely changes a norm.
        if all(torch.allclose(x.double(), right, rtol=0.01, atol=0.01) for x, right in ((y, right_y), (db, right_db))):
            return Health()
        return Health("a tiny GEMM gives wrong results", fix)

    def compile_together(self, run: Callable[[], object], x: Tensor) -> None:
        if not x.is_cuda or is_capturing(x) or is_intercepted():
            return

        def run_all() -> None:
            _run_tiny(*_TINY.empty_operands(x.device))  # the health check follows, or was earlier
            run()

        with suppress(Exception):  # the health check reports a Triton that cannot be imported
            from grouped_gemm.kernels.common import launch

            with launch.on_device(x):
                launch.compile_together(run_all)

    def needs_blocks(self, recipe: Recipe, columns: bool) -> bool:
        if recipe is Recipe.MXFP8:
            return False  # each program finds its own group
        return recipe.is_scaled and (columns or recipe.block is not None)

    def plan(self, offs: Tensor, num_rows: int, group_alignment: int = 1, *, blocks: bool = False) -> OffsetPlan:
        return OffsetPlan(offs, num_rows, (token_blocks(offs, num_rows),) if blocks else ())

    def quantize_activations(
        self, x_MD: Tensor, plan: OffsetPlan, recipe: Recipe, *, rows: bool, columns: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        written = x_MD, None, x_MD, None
        if recipe.is_scaled:
            written = ops.triton_quantize_activations(x_MD, plan.offs, recipe.value, rows, columns, *plan.derived)
        return as_activations(written, recipe, (_ROWS, _COLUMNS), rows=rows, columns=columns)

    def quantize_weights(
        self, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        if not recipe.is_scaled:
            return unscaled_weights(b_EKN, _WEIGHTS, forward=forward, dgrad=dgrad)
        by_n, by_k, scale, dgrad_scale = ops.triton_quantize_weights(b_EKN, recipe.value, forward, dgrad)
        dgrad_scale = scale if recipe.weight_lines > 1 else dgrad_scale
        return as_weights((by_n, by_k, scale, dgrad_scale), recipe, _WEIGHTS, forward=forward, dgrad=dgrad)

    def adopt_weights(
        self, data_EKN: Tensor, scale: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        if recipe.weight_lines > 1:  # square blocks serve both passes
            return (
                Quantized(_contiguous(data_EKN, 1), scale, recipe, 1, _WEIGHTS) if forward else None,
                Quantized(_contiguous(data_EKN, 2), scale, recipe, 2, _WEIGHTS) if dgrad else None,
            )
        by_line = self._requantized_for_dgrad(data_EKN, scale, recipe) if dgrad else None
        scale = layouts.mx_scales(scale) if recipe is Recipe.MXFP8 else scale[:, 0].contiguous()
        along_k = Quantized(_contiguous(data_EKN, 1), scale, recipe, 1, _WEIGHTS)
        return along_k if forward else None, by_line

    def grouped_mm(
        self, lhs: Quantized, rhs: Quantized, plan: OffsetPlan, out_dtype: torch.dtype, bias_EN: Tensor | None = None
    ) -> Tensor:
        data_ECO, scale = rhs.data, rhs.scale
        if rhs.axis == 2:
            data_ECO = data_ECO.transpose(1, 2)
            scale = scale.transpose(1, 2) if scale is not None and scale.dim() == 3 else scale
        bias_EN = None if bias_EN is None else bias_EN.contiguous()
        return ops.triton_grouped_mm(
            lhs.data, lhs.scale, data_ECO, scale, bias_EN, plan.offs, lhs.recipe.value, out_dtype
        )

    def _wgrad(self, first: Quantized, second: Quantized, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        operands = first.data, first.scale, second.data, second.scale
        return ops.triton_wgrad(*operands, plan.offs, plan.num_rows, first.recipe.value, out_dtype)

    def _add_wgrad(self, first: Quantized, second: Quantized, plan: OffsetPlan, sum_EPQ: Tensor) -> None:
        operands = first.data, first.scale, second.data, second.scale
        ops.triton_wgrad_add(sum_EPQ, *operands, plan.offs, plan.num_rows, first.recipe.value)

    def bias_grad(self, dy_MN: Tensor, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        return ops.triton_group_sums(dy_MN, plan.offs, out_dtype)


def _contiguous(data_EKN: Tensor, axis: int) -> Tensor:
    """``data_EKN`` with ``axis``, 1 or 2, contiguous; copied only if it is not."""
    if data_EKN.stride(axis) == 1:
        return data_EKN
    return data_EKN.transpose(axis, 2).contiguous().transpose(axis, 2)


@define_op(replays=True)
def _triton_grouped_mm(
    lhs_MC: Tensor, lhs_scale: Tensor | None, rhs_ECO: Tensor, rhs_scale: Tensor | None, bias_EO: Tensor | None,
    offs: Tensor, recipe: str, out_dtype: torch.dtype,
) -> Steps[Tensor]:  # fmt: skip
    out_MO = torch.empty(lhs_MC.shape[0], rhs_ECO.shape[2], dtype=out_dtype, device=lhs_MC.device)
    yield out_MO
    from grouped_gemm.kernels.gemm import m_grouped

    m_grouped.grouped_mm(lhs_MC, lhs_scale, rhs_ECO, rhs_scale, bias_EO, offs, Recipe(recipe), out_MO)


@define_op(replays=True)
def _triton_wgrad(
    lhs: Tensor, lhs_scale: Tensor | None, rhs: Tensor, rhs_scale: Tensor | None, offs: Tensor, num_rows: Size,
    recipe: str, out_dtype: torch.dtype,
) -> Steps[Tensor]:  # fmt: skip
    out_EPQ = torch.empty(offs.shape[0], lhs.shape[1], rhs.shape[1], dtype=out_dtype, device=lhs.device)
    yield out_EPQ
    from grouped_gemm.kernels.gemm import k_grouped

    k_grouped.wgrad(lhs, lhs_scale, rhs, rhs_scale, offs, num_rows, Recipe(recipe), out_EPQ)


@define_op(replays=True)
def _triton_wgrad_add(
    sum_EPQ: Changed, lhs: Tensor, lhs_scale: Tensor | None, rhs: Tensor, rhs_scale: Tensor | None, offs: Tensor,
    num_rows: Size, recipe: str,
) -> Steps[None]:  # fmt: skip
    yield None
    from grouped_gemm.kernels.gemm import k_grouped

    k_grouped.wgrad(lhs, lhs_scale, rhs, rhs_scale, offs, num_rows, Recipe(recipe), sum_EPQ, accumulate=True)


@define_op(replays=True)
def _triton_group_sums(x_MN: Tensor, offs: Tensor, out_dtype: torch.dtype) -> Steps[Tensor]:
    out_EN = x_MN.new_empty(offs.shape[0], x_MN.shape[1], dtype=out_dtype)
    yield out_EN
    from grouped_gemm.kernels.gemm import k_grouped

    k_grouped.group_sums(x_MN, offs, out_EN)


@define_op(replays=True)
def _triton_quantize_activations(
    x_MD: Tensor, offs: Tensor, recipe: str, rows: bool, columns: bool, blocks: Tensor | None = None
) -> Steps[Operands]:
    out = layouts.activations(x_MD, offs.shape[0], Recipe(recipe), rows=rows, columns=columns)
    yield out
    from grouped_gemm.kernels.quantize import fp8 as quantize_fp8
    from grouped_gemm.kernels.quantize import mx as quantize_mx

    if Recipe(recipe) is Recipe.MXFP8:
        quantize_mx.quantize_activations(x_MD, offs, out)
    else:
        quantize_fp8.quantize_activations(x_MD, offs, Recipe(recipe), out, blocks)


@define_op(replays=True)
def _triton_quantize_weights(b_EKN: Tensor, recipe: str, forward: bool, dgrad: bool) -> Steps[Operands]:
    out = layouts.weights(b_EKN, Recipe(recipe), forward=forward, dgrad=dgrad)
    yield out
    from grouped_gemm.kernels.quantize import fp8 as quantize_fp8
    from grouped_gemm.kernels.quantize import mx as quantize_mx

    if Recipe(recipe) is Recipe.MXFP8:
        quantize_mx.quantize_weights(b_EKN, out)
    else:
        quantize_fp8.quantize_weights(b_EKN, Recipe(recipe), out)
