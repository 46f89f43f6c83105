"""hipBLASLt: AMD's library, called through torch, with one GEMM per group of rows.

The host needs the ends of the groups. They are read once for all plans of an unchanged `offs`. Quantizers write what
`torch._scaled_mm` takes, so each GEMM reads views of their outputs. docs/rocm.md says what this backend refuses, and
why.

M, E, K, N: rows, groups, in and out features. D: K or N. T: M, rounded up to a multiple of 16. O, C: the weights'
output axis and their contraction axis.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from grouped_gemm import reference
from grouped_gemm.backends.base import (
    REQUIRES_EQUAL_DTYPES,
    Health,
    OffsetPlan,
    Requirement,
    TinyRun,
    _GroupedMMBackend,
    as_activations,
    as_weights,
    is_near,
    requires_arch,
    requires_dtype,
    requires_host_sync,
    requires_no_bias,
    unscaled_weights,
)
from grouped_gemm.backends.hipblaslt import layouts as layouts
from grouped_gemm.backends.hipblaslt.layouts import ALIGNMENT, MX_BLOCK, MX_DEPTH, MX_LINES, round_up
from grouped_gemm.core.call_spec import CallSpec, Pass, RowClass, dtype_name
from grouped_gemm.core.library import Size, Steps, define_op, ops
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.quantized import Quantized
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.kernels.quantize.blocks import token_blocks
from grouped_gemm.kernels.quantize.layouts import Operands

_ARCHS = ("gfx942", "gfx950")
_ROWS = "hipblaslt rows"
_COLUMNS = "hipblaslt columns"
_WEIGHTS = "hipblaslt weights"
_TAGS = (torch.Tag.cudagraph_unsafe,)  # of every op that reads the ends of the groups


def _is_mx(spec: CallSpec) -> bool:
    return spec.recipe is Recipe.MXFP8


def _rocm(spec: CallSpec) -> tuple[int, ...]:
    """Major and minor version of the ROCm that torch was built with, pre-releases included; (0,): no ROCm."""
    version = spec.machine.version("rocm")
    return (0,) if version is None else version.release[:2]


def _found_rocm(spec: CallSpec) -> str:
    version = spec.machine.version("rocm")
    return "no ROCm" if version is None else f"ROCm {version}"


def _token_multiple(recipe: Recipe) -> int:
    """The rows of a group, the contraction of wgrad, must be a multiple of this."""
    if not recipe.is_scaled:
        return 1
    return MX_DEPTH if recipe is Recipe.MXFP8 else ALIGNMENT


def _requires_mx_depth(axis: str, pass_: Pass) -> Requirement:
    return Requirement(
        what=f"{axis.upper()} in multiples of {MX_DEPTH} for mxfp8",
        holds=lambda p: not _is_mx(p) or getattr(p, axis) % MX_DEPTH == 0,
        found=lambda p: f"{axis.upper()} = {getattr(p, axis)}",
        fix="Pad the weights, or use another recipe.",
        passes=(pass_,),
    )


class Backend(_GroupedMMBackend):
    """The GEMMs of hipBLASLt, group by group."""

    kind = BackendKind.HIPBLASLT
    summary = "AMD's library through torch, group by group: checked against its contract, not yet run on AMD hardware."
    requirements = (
        requires_arch(_ARCHS, fix="Use another backend."),
        Requirement(
            what="scales per row or per 32 values (hipBLASLt has no blocks of 128 or 128x128)",
            holds=lambda p: p.recipe not in (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2),
            found=lambda p: p.recipe.value,
            fix="Use fp8_rowwise, or mxfp8 on gfx950, or another backend.",
        ),
        Requirement(
            what="ROCm 6.5 or later for fp8 on gfx950",
            holds=lambda p: not p.recipe.is_scaled or p.machine.arch != "gfx950" or _rocm(p) >= (6, 5),
            found=_found_rocm,
            fix="Install torch for a later ROCm, or use another backend.",
        ),
        Requirement(
            what="gfx950 for mxfp8",
            holds=lambda p: not _is_mx(p) or p.machine.arch == "gfx950",
            found=lambda p: p.machine.arch,
            fix="Use fp8_rowwise, or another backend.",
        ),
        Requirement(
            what="ROCm 7.0 to 7.13 for mxfp8 (older versions have no MX scales, later ones want them swizzled)",
            holds=lambda p: not _is_mx(p) or (7, 0) <= _rocm(p) < (7, 14),
            found=_found_rocm,
            fix="Install torch for one of these versions, or use fp8_rowwise, or another backend.",
        ),
        requires_dtype((torch.bfloat16, torch.float16, torch.float32)),
        Requirement(
            what="operands and output in bfloat16 with scales",
            holds=lambda p: not p.recipe.is_scaled or p.dtype is p.out_dtype is torch.bfloat16,
            found=lambda p: f"{dtype_name(p.dtype)} to {dtype_name(p.out_dtype)}",
            fix="Cast the operands, leave out_dtype out, or use another backend.",
        ),
        REQUIRES_EQUAL_DTYPES,
        requires_no_bias((Pass.FORWARD,)),
        Requirement(
            what=f"K and N in multiples of {ALIGNMENT} with scales",
            holds=lambda p: not p.recipe.is_scaled or p.k % ALIGNMENT == p.n % ALIGNMENT == 0,
            found=lambda p: f"K = {p.k}, N = {p.n}",
            fix="Pad the weights, or use another backend.",
        ),
        _requires_mx_depth("k", Pass.FORWARD),
        _requires_mx_depth("n", Pass.DGRAD),
        Requirement(
            what=f"group_alignment a multiple of {ALIGNMENT} with scales, of {MX_DEPTH} for mxfp8",
            holds=lambda p: p.group_alignment % _token_multiple(p.recipe) == 0,
            found=lambda p: f"group_alignment = {p.group_alignment}",
            fix="Pad the groups and pass group_alignment, or use another backend.",
            passes=(Pass.WGRAD,),
        ),
        requires_host_sync(),
    )
    host_syncs = "offs is read once per forward call, and not again while the same tensor is unchanged"

    def required_alignment(self, spec: CallSpec) -> int:
        return _token_multiple(spec.recipe) if Pass.WGRAD in spec.passes else 1

    def health(self, device: torch.device) -> Health:
        """Compares a small GEMM and its wgrad with `reference`, for each recipe that the device supports."""
        run = TinyRun([128, 128, 384], 400, k=128, n=256)  # one group is empty, and 16 rows belong to no group
        machine = machine_of(device)
        for recipe in (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.MXFP8):
            spec = CallSpec(machine, len(run.ends), run.k, run.n, RowClass.LARGE, recipe, group_alignment=MX_DEPTH)
            if not all(requirement.holds(spec) for requirement in self.requirements):
                continue
            if not self._computes_correctly(run, recipe, device, MX_DEPTH):
                return Health(f"a tiny {recipe.value} GEMM gives wrong results", "Install torch for another ROCm.")
        return Health()

    def needs_blocks(self, recipe: Recipe, columns: bool) -> bool:
        return columns and recipe.is_scaled and recipe is not Recipe.MXFP8

    def plan(self, offs: Tensor, num_rows: int, group_alignment: int = 1, *, blocks: bool = False) -> OffsetPlan:
        found = (token_blocks(offs, num_rows),) if blocks and _uses_triton(offs) else ()
        return OffsetPlan(offs, num_rows, (ops.hipblaslt_host_offs(offs), *found))

    def quantize_activations(
        self, x_MD: Tensor, plan: OffsetPlan, recipe: Recipe, *, rows: bool, columns: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        written = x_MD, None, x_MD, None
        if recipe.is_scaled:
            host_offs, *blocks = plan.derived
            written = ops.hipblaslt_quantize_activations(
                x_MD, plan.offs, host_offs, recipe.value, rows, columns, *blocks
            )
        return as_activations(written, recipe, (_ROWS, _COLUMNS), rows=rows, columns=columns)

    def quantize_weights(
        self, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        if not recipe.is_scaled:
            return unscaled_weights(b_EKN, _WEIGHTS, forward=forward, dgrad=dgrad)
        written = ops.hipblaslt_quantize_weights(b_EKN, recipe.value, forward, dgrad)
        return as_weights(written, recipe, _WEIGHTS, forward=forward, dgrad=dgrad)

    def adopt_weights(
        self, data_EKN: Tensor, scale: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        along_k = None
        if forward:
            by_n = _aligned(data_EKN.transpose(1, 2).contiguous())
            lines = layouts.mx_scales(scale) if recipe is Recipe.MXFP8 else scale.contiguous()
            along_k = Quantized(by_n.transpose(1, 2), lines, recipe, 1, _WEIGHTS)
        return along_k, self._requantized_for_dgrad(data_EKN, scale, recipe) if dgrad else None

    def grouped_mm(
        self, lhs: Quantized, rhs: Quantized, plan: OffsetPlan, out_dtype: torch.dtype, bias_EN: Tensor | None = None
    ) -> Tensor:
        rhs_ECO = rhs.data if rhs.axis == 1 else rhs.data.transpose(1, 2)
        return ops.hipblaslt_grouped_mm(
            lhs.data, lhs.scale, rhs_ECO, rhs.scale, plan.offs, plan.derived[0], plan.num_rows, lhs.recipe.value
        )

    def _wgrad(self, first: Quantized, second: Quantized, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        operands = first.data, first.scale, second.data, second.scale
        return ops.hipblaslt_wgrad(*operands, plan.derived[0], plan.num_rows, first.recipe.value)

    def bias_grad(self, dy_MN: Tensor, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        return ops.hipblaslt_group_sums(dy_MN, plan.derived[0], out_dtype)


def _aligned(data: Tensor) -> Tensor:
    """``data``; a copy if it is a view that does not start at a multiple of 16 bytes."""
    return data if data.storage_offset() * data.element_size() % 16 == 0 else data.clone()


_host_values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _read(offs: Tensor) -> list[int]:
    """The values of ``offs`` on the host. Synchronizes the host, unless they were read before.

    They were if the tensor, its memory and its version are the same. Inference tensors have no version.
    """
    if offs.is_inference():
        return _to_host(offs)
    version = offs._version, offs.data_ptr(), offs.shape
    known = _host_values.get(offs)
    if known is None or known[0] != version:
        known = version, _to_host(offs)
        _host_values[offs] = known
    return known[1]


def _to_host(offs: Tensor) -> list[int]:
    return offs.tolist()


@define_op(tags=_TAGS)
def _hipblaslt_host_offs(offs: Tensor) -> Steps[Tensor]:
    yield lambda: torch.empty_like(offs, device="cpu")
    yield torch.tensor(_read(offs), dtype=offs.dtype)


def _uses_triton(x: Tensor) -> bool:
    return x.is_cuda and machine_of(x.device).version("triton") is not None


@define_op(tags=_TAGS)
def _hipblaslt_quantize_activations(
    x_MD: Tensor, offs: Tensor, host_offs: Tensor, recipe: str, rows: bool, columns: bool, blocks: Tensor | None = None
) -> Steps[Operands]:
    out = layouts.activations(x_MD, offs.shape[0], Recipe(recipe), rows=rows, columns=columns)
    yield out
    ends = reference.group_ends(host_offs, x_MD.shape[0])
    if columns:
        _check_group_sizes(ends, _token_multiple(Recipe(recipe)))
    if _uses_triton(x_MD):
        from grouped_gemm.backends.hipblaslt import quantize as hipblaslt_quantize

        hipblaslt_quantize.quantize_activations(x_MD, offs, Recipe(recipe), out, blocks)
    else:
        _fill_activations(x_MD, ends, Recipe(recipe), out)


def _check_group_sizes(ends: list[int], multiple: int) -> None:
    """Checks that group sizes are multiples of ``multiple``, as ``group_alignment`` guarantees and GEMMs need."""
    for e, rows in enumerate(reference.group_slices(ends)):
        size = rows.stop - rows.start
        if size % multiple:
            raise ValueError(
                f"offs[{e}]: expected a group size that is a multiple of {multiple}, as group_alignment guarantees; "
                f"found {size}"
            )


def _fill_activations(x_MD: Tensor, ends: list[int], recipe: Recipe, out: Operands) -> None:
    """The torch twin of `quantize.quantize_activations`."""
    by_row, row_scale, by_column, column_scale = out
    num_rows, features = x_MD.shape
    if by_row.dim() == 2 and num_rows:
        row_blocks = reference.row_blocks(recipe)
        by_row[:num_rows], row_scale[:num_rows] = reference.quantize(x_MD, row_blocks, recipe, by_row.dtype)
    if by_column.dim() == 2:
        for e, rows in enumerate(reference.group_slices(ends)):
            if rows.start == rows.stop:
                continue
            column_blocks = reference.column_blocks(recipe)
            data, scale = reference.quantize(x_MD[rows], column_blocks, recipe, by_column.dtype)
            by_column[:, rows] = data.t()
            scale_of_group = column_scale[e] if recipe.block is None else _scales_of(column_scale, rows)
            scale_of_group[:features] = scale.t()


def _scales_of(scale: Tensor, rows: slice) -> Tensor:
    """The MX scales of a group in wgrad, (D rounded up to 128, rows / 32): contiguous in `layouts.activations`."""
    return scale[rows.start // MX_BLOCK : rows.stop // MX_BLOCK].view(scale.shape[1], -1)


@define_op()
def _hipblaslt_quantize_weights(b_EKN: Tensor, recipe: str, forward: bool, dgrad: bool) -> Steps[Operands]:
    out = layouts.weights(b_EKN, Recipe(recipe), forward=forward, dgrad=dgrad)
    yield out
    if _uses_triton(b_EKN):
        from grouped_gemm.backends.hipblaslt import quantize as hipblaslt_quantize

        hipblaslt_quantize.quantize_weights(b_EKN, Recipe(recipe), out)
    else:
        _fill_weights(b_EKN, Recipe(recipe), out)


def _fill_weights(b_EKN: Tensor, recipe: Recipe, out: Operands) -> None:
    """The torch twin of `quantize.quantize_weights`."""
    for axis, by_line, line_scale in ((1, out[0], out[2]), (2, out[1], out[3])):
        if by_line.dim() != 3:
            continue
        data, scale = reference.quantize(b_EKN, reference.weight_blocks(recipe, axis), recipe, by_line.dtype)
        by_line.copy_(data.transpose(1, 2) if axis == 1 else data)
        # (E, lines, blocks), blocks along `axis`. Rowwise scales, one block per line, are stored as one line.
        scale = scale.transpose(1, 2) if axis == 1 else scale
        if recipe.block is None:
            line_scale.copy_(scale.transpose(1, 2))
        else:
            line_scale[:, : scale.shape[1]] = scale


def _check_operand(name: str, data: Tensor) -> None:
    """Checks that ``data`` has the fp8 type of its device, and an address that hipBLASLt can read."""
    machine = machine_of(data.device)
    if data.dtype != machine.fp8_dtype:
        raise ValueError(
            f"{name}: expected {dtype_name(machine.fp8_dtype)}, the fp8 type of {machine.arch}; "
            f"found {dtype_name(data.dtype)}"
        )
    if data.data_ptr() % 16:
        raise ValueError(f"{name}: expected an address that is a multiple of 16 bytes; found {data.data_ptr():#x}")


def _separate_rows(x_MD: Tensor) -> Tensor:
    """``x_MD``; a copy if its rows share memory, as in an expanded gradient. Otherwise every GEMM would copy it."""
    return x_MD if x_MD.stride(0) >= x_MD.shape[1] else x_MD.contiguous()


@functools.cache
def _has_grouped_gemm(device: torch.device) -> bool:
    """Whether this build of torch has a rowwise grouped GEMM for ``device``. Tries a tiny one."""
    if not hasattr(F, "scaled_grouped_mm"):
        return False
    run = TinyRun([1, 1, 34], 40, k=32, n=48)
    a, b, offs = run.operands(device)
    lhs, lhs_scale, _, _ = _hipblaslt_quantize_activations(a, offs, offs.cpu(), "fp8_rowwise", True, False)
    by_n, _, rhs_scale, _ = _hipblaslt_quantize_weights(b, "fp8_rowwise", True, False)
    truth = reference.grouped_mm(a, b, run.ends)[: run.ends[-1]]
    try:
        found = _grouped_gemm(lhs, lhs_scale, by_n.transpose(1, 2), rhs_scale, offs)[: run.ends[-1]]
        return is_near(found, truth)
    except Exception:  # not in this build, or not for this architecture: one GEMM per group takes its place
        return False


def _grouped_gemm(lhs: Tensor, lhs_scale: Tensor, rhs_ECO: Tensor, rhs_scale: Tensor, offs: Tensor) -> Tensor:
    rowwise = F.ScalingType.RowWise
    return F.scaled_grouped_mm(  # type: ignore[attr-defined]
        lhs, rhs_ECO, lhs_scale.squeeze(1), rowwise, rhs_scale.squeeze(1), rowwise, offs=offs,
        output_dtype=torch.bfloat16,
    )  # fmt: skip


@define_op(tags=_TAGS)
def _hipblaslt_grouped_mm(
    lhs: Tensor, lhs_scale: Tensor | None, rhs_ECO: Tensor, rhs_scale: Tensor | None, offs: Tensor, host_offs: Tensor,
    num_rows: Size, recipe: str,
) -> Steps[Tensor]:  # fmt: skip
    def empty() -> Tensor:
        dtype = lhs.dtype if lhs_scale is None else torch.bfloat16
        return lhs.new_empty(num_rows, rhs_ECO.shape[2], dtype=dtype)

    yield empty
    ends = reference.group_ends(host_offs, num_rows)
    groups = [(e, rows) for e, rows in enumerate(reference.group_slices(ends)) if rows.start < rows.stop]
    if lhs_scale is None or rhs_scale is None:
        lhs, out = _separate_rows(lhs), empty()
        for e, rows in groups:
            torch.mm(lhs[rows], rhs_ECO[e], out=out[rows])
    else:
        _check_operand("a", lhs)
        _check_operand("b", rhs_ECO)
        if Recipe(recipe) is Recipe.MXFP8:
            out = _mx_gemms(lhs, lhs_scale, rhs_ECO, rhs_scale, groups)[:num_rows]
        elif groups and ends == host_offs.tolist() and _has_grouped_gemm(lhs.device):
            out = _grouped_gemm(lhs, lhs_scale, rhs_ECO, rhs_scale, offs)
        else:
            out = empty()
            for e, rows in groups:
                _scaled_mm(lhs[rows], rhs_ECO[e], lhs_scale[rows], rhs_scale[e], out[rows])
    out[ends[-1] :].zero_()
    yield out


def _mx_gemms(
    lhs: Tensor, lhs_scale: Tensor, rhs_ECO: Tensor, rhs_scale: Tensor, groups: list[tuple[int, slice]]
) -> Tensor:
    """One GEMM per group, on a multiple of 16 rows. The next groups overwrite the extra rows."""
    out = lhs.new_empty(lhs.shape[0], rhs_ECO.shape[2], dtype=torch.bfloat16)
    for e, rows in groups:
        size = round_up(rows.stop - rows.start, ALIGNMENT)
        scale = lhs_scale[rows.start : rows.start + round_up(size, MX_LINES)]
        rows = slice(rows.start, rows.start + size)
        _scaled_mm(lhs[rows], rhs_ECO[e], scale, rhs_scale[e], out[rows])
    return out


def _scaled_mm(lhs: Tensor, rhs: Tensor, lhs_scale: Tensor, rhs_scale: Tensor, out: Tensor) -> None:
    torch._scaled_mm(lhs, rhs, lhs_scale, rhs_scale, out_dtype=out.dtype, out=out)


@define_op(tags=_TAGS)
def _hipblaslt_wgrad(
    lhs: Tensor, lhs_scale: Tensor | None, rhs: Tensor, rhs_scale: Tensor | None, host_offs: Tensor, num_rows: Size,
    recipe: str,
) -> Steps[Tensor]:  # fmt: skip
    num_groups = host_offs.shape[0]
    if lhs_scale is None or rhs_scale is None:
        out = lhs.new_empty(num_groups, lhs.shape[1], rhs.shape[1])
        yield out
        lhs, rhs = _separate_rows(lhs), _separate_rows(rhs)
    else:
        out = lhs.new_empty(num_groups, lhs.shape[0], rhs.shape[0], dtype=torch.bfloat16)
        yield out
        _check_operand("a", lhs)
        _check_operand("dy", rhs)
    for e, rows in enumerate(reference.group_slices(reference.group_ends(host_offs, num_rows))):
        if rows.start == rows.stop:
            out[e].zero_()
        elif lhs_scale is None or rhs_scale is None:
            torch.mm(lhs[rows].t(), rhs[rows], out=out[e])
        else:
            if Recipe(recipe) is Recipe.MXFP8:
                scales = _scales_of(lhs_scale, rows), _scales_of(rhs_scale, rows)
            else:
                scales = lhs_scale[e], rhs_scale[e].t()
            _scaled_mm(lhs[:, rows], rhs[:, rows].t(), *scales, out[e])


@define_op(tags=_TAGS)
def _hipblaslt_group_sums(x_MN: Tensor, host_offs: Tensor, out_dtype: torch.dtype) -> Steps[Tensor]:
    yield lambda: x_MN.new_empty(host_offs.shape[0], x_MN.shape[1], dtype=out_dtype)
    ends = reference.group_ends(host_offs, x_MN.shape[0])
    yield reference.group_sums(x_MN, ends, torch.float32).to(out_dtype)
