"""The base class of backends, and the requirements that they declare."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from grouped_gemm import reference
from grouped_gemm.core.call_spec import CallSpec, Pass, dtype_name
from grouped_gemm.core.machine import OLDEST_TRITON
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.quantized import Layouts, Quantized
from grouped_gemm.core.recipes import Recipe

ALL_PASSES = tuple(Pass)


@dataclass(frozen=True)
class Requirement:
    """A condition for running a pass. Selection, error messages, docs/backends.md and test skips all read it.

    Attributes:
        what: a phrase that completes "<pass> requires ...".
        holds: whether a call meets the requirement.
        found: a phrase for what the call has instead.
        fix: a sentence that says what the user can do.
        passes: the passes that it applies to.
    """

    what: str
    holds: Callable[[CallSpec], bool]
    found: Callable[[CallSpec], str]
    fix: str
    passes: tuple[Pass, ...] = ALL_PASSES


def requires_recipe(recipes: Iterable[Recipe], passes: tuple[Pass, ...] = ALL_PASSES) -> Requirement:
    """Requires one of ``recipes``."""
    recipes = tuple(recipes)
    return Requirement(
        what="recipe " + " or ".join(r.value for r in recipes),
        holds=lambda p: p.recipe in recipes,
        found=lambda p: p.recipe.value,
        fix="Use one of these recipes, or another backend.",
        passes=passes,
    )


def requires_arch(archs: Iterable[str], fix: str, passes: tuple[Pass, ...] = ALL_PASSES) -> Requirement:
    """Requires exactly one of these architectures. A newer architecture does not run the kernels of an older one."""
    archs = tuple(archs)
    return Requirement(
        what=" or ".join(archs),
        holds=lambda p: p.machine.arch in archs,
        found=lambda p: p.machine.arch,
        fix=fix,
        passes=passes,
    )


def requires_dtype(dtypes: Iterable[torch.dtype], passes: tuple[Pass, ...] = ALL_PASSES) -> Requirement:
    """Requires operands in one of ``dtypes``."""
    dtypes = tuple(dtypes)
    return Requirement(
        what="operands in " + " or ".join(map(dtype_name, dtypes)),
        holds=lambda p: p.dtype in dtypes,
        found=lambda p: dtype_name(p.dtype),
        fix="Cast the operands, or use another backend.",
        passes=passes,
    )


def requires_triton(purpose: str = "", concerns: Callable[[CallSpec], bool] = lambda p: True) -> Requirement:
    """Requires a Triton that can run this package's kernels, for the calls that it ``concerns``."""

    def holds(spec: CallSpec) -> bool:
        version = spec.machine.version("triton")
        return not concerns(spec) or (version is not None and version >= Version(OLDEST_TRITON))

    return Requirement(
        what=f"triton {OLDEST_TRITON} or later{purpose}",
        holds=holds,
        found=lambda p: f"triton {p.machine.version('triton')}" if p.machine.version("triton") else "no triton",
        fix=f"pip install 'triton>={OLDEST_TRITON}'.",
    )


def requires_no_bias(passes: tuple[Pass, ...] = ALL_PASSES) -> Requirement:
    """Requires a call without a bias."""
    return Requirement(
        what="no bias",
        holds=lambda p: not p.has_bias,
        found=lambda p: "a bias",
        fix="Add the bias to the result, or use another backend.",
        passes=passes,
    )


def requires_host_sync(passes: tuple[Pass, ...] = ALL_PASSES) -> Requirement:
    """Requires, on a GPU, that the call may synchronize the host. A backend with host syncs declares it."""
    return Requirement(
        what="host syncs to be allowed",
        holds=lambda p: p.host_sync or not p.machine.is_gpu,
        found=lambda p: "CUDA graph capture or prefer(host_sync=False)",
        fix="Call it outside of captures and prefer(host_sync=False), or use another backend.",
        passes=passes,
    )


REQUIRES_EQUAL_DTYPES = Requirement(
    what="output in the dtype of the operands",
    holds=lambda p: p.dtype is p.out_dtype,
    found=lambda p: f"{dtype_name(p.dtype)} to {dtype_name(p.out_dtype)}",
    fix="Leave out_dtype out, or use another backend.",
)


@dataclass(frozen=True)
class Health:
    """Whether a backend works on a device. Only a tiny run can show that; an import cannot.

    Attributes:
        problem: why it does not work; empty if it does.
        fix: a sentence that says what the user can do about it.
    """

    problem: str = ""
    fix: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the backend works."""
        return not self.problem


@dataclass(eq=False)  # not frozen: that costs half a microsecond per plan
class OffsetPlan:
    """What a backend derives from ``offs``, once for all passes of a call, or of all calls with one `GroupPlan`.

    Attributes:
        offs: (E,) int32, as the caller passed it.
        num_rows: M.
        derived: tensors that the backend computed, such as a row map. They are saved for backward with ``offs``.
    """

    offs: Tensor
    num_rows: int
    derived: tuple[Tensor, ...] = ()


class TinyRun(NamedTuple):
    """The operands of a health check: the ends of the groups, M, K and N."""

    ends: list[int]
    num_rows: int
    k: int
    n: int

    def operands(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """``a`` (M, K), ``b`` (E, K, N), both bfloat16, and ``offs``."""
        num_groups, num_rows, k, n = len(self.ends), self.num_rows, self.k, self.n
        a_MK = torch.linspace(-1, 1, num_rows * k, device=device).view(num_rows, k).bfloat16()
        b_EKN = torch.linspace(-2, 1, num_groups * k * n, device=device).view(num_groups, k, n).bfloat16()
        return a_MK, b_EKN, torch.tensor(self.ends, dtype=torch.int32, device=device)

    def empty_operands(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The same with any values."""
        num_groups, bf16 = len(self.ends), torch.bfloat16
        a_MK = torch.empty(self.num_rows, self.k, dtype=bf16, device=device)
        b_EKN = torch.empty(num_groups, self.k, self.n, dtype=bf16, device=device)
        return a_MK, b_EKN, torch.empty(num_groups, dtype=torch.int32, device=device)


def is_near(result: Tensor, truth: Tensor) -> bool:
    """Whether the result of a tiny GEMM is right.

    Quantization causes a relative error of 0.04. A wrong layout, scale or fp8 type, or a missing group, causes a far
    larger one.
    """
    return bool((result.double() - truth).norm() <= 0.1 * truth.norm())


def as_activations(
    written: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    recipe: Recipe,
    layouts: tuple[str, str],
    *,
    rows: bool,
    columns: bool,
) -> Layouts:
    """Wraps the outputs of a quantizer op as the result of `_GroupedMMBackend.quantize_activations`.

    Args:
        written: data and scales of the row layout, then of the column layout.
        recipe: the recipe of the quantizer.
        layouts: the names of the two layouts.
        rows: whether to return the row layout.
        columns: whether to return the column layout.
    """
    by_row, row_scale, by_column, column_scale = written
    return (
        Quantized(by_row, row_scale, recipe, 1, layouts[0]) if rows else None,
        Quantized(by_column, column_scale, recipe, 0, layouts[1]) if columns else None,
    )


def as_weights(
    written: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    recipe: Recipe,
    layout: str,
    *,
    forward: bool,
    dgrad: bool,
) -> Layouts:
    """Wraps the outputs of a quantizer op as the result of `_GroupedMMBackend.quantize_weights`.

    Args:
        written: data (E, N, K) and (E, K, N), both contiguous, then the scales of each.
        recipe: the recipe of the quantizer.
        layout: the name of the layout.
        forward: whether to return the operand of forward.
        dgrad: whether to return the operand of dgrad.
    """
    by_n, by_k, forward_scale, dgrad_scale = written
    return (
        Quantized(by_n.transpose(1, 2), forward_scale, recipe, 1, layout) if forward else None,
        Quantized(by_k, dgrad_scale, recipe, 2, layout) if dgrad else None,
    )


def unscaled_weights(b_EKN: Tensor, layout: str, *, forward: bool, dgrad: bool) -> Layouts:
    """The same for Recipe.NONE: ``b`` itself serves both passes."""
    return (
        Quantized(b_EKN, None, Recipe.NONE, 1, layout) if forward else None,
        Quantized(b_EKN, None, Recipe.NONE, 2, layout) if dgrad else None,
    )


class _GroupedMMBackend(ABC):
    """One way to run every pass of a grouped GEMM. A backend is stateless; one instance serves all threads and devices.

    torch.compile traces the methods. Code that cannot be traced, such as a kernel launch or a read of group sizes,
    belongs in an op of ``torch.library`` with a fake. Only such an op may read tensor values. No op returns one of
    its arguments.
    """

    kind: ClassVar[BackendKind]
    summary: ClassVar[str]  # one sentence for doctor and docs/backends.md
    requirements: ClassVar[tuple[Requirement, ...]]
    host_syncs: ClassVar[str] = ""  # a phrase that says when a call synchronizes the host; empty: never
    host_sync_passes: ClassVar[tuple[Pass, ...]] = ALL_PASSES  # the passes that do so, if any does
    compiles: ClassVar[bool] = True  # whether kernels are compiled or loaded at first use; if so, `warmup` runs them

    def padded_to(self, spec: CallSpec) -> int:
        """This backend pads every group to a multiple of this many rows, unless the caller did; 1: it does not pad."""
        return 1

    def required_alignment(self, spec: CallSpec) -> int:
        """The caller has to pad every group to a multiple of this many rows, and guarantee it; 1: any size will do."""
        return 1

    def health(self, device: torch.device) -> Health:
        """Runs something tiny on ``device``. Called once per process and device, after all requirements hold."""
        return Health()

    def compile_together(self, run: Callable[[], object], x: Tensor) -> None:  # noqa: B027
        """Compiles the kernels that ``run`` launches for ``x``, at the same time. Or not: then each launch does so."""

    def _computes_correctly(
        self,
        run: TinyRun,
        recipe: Recipe,
        device: torch.device,
        group_alignment: int = 1,
        wgrad_dtype: torch.dtype | None = torch.bfloat16,
    ) -> bool:
        """Whether a small GEMM, and its wgrad unless ``wgrad_dtype`` is None, are close to `reference`."""
        a_MK, b_EKN, offs = run.operands(device)
        plan = self.plan(offs, run.num_rows, group_alignment)
        lhs, a_columns = self.quantize_activations(a_MK, plan, recipe, rows=True, columns=wgrad_dtype is not None)
        rhs, _ = self.quantize_weights(b_EKN, recipe, forward=True, dgrad=False)
        assert lhs is not None and rhs is not None, "both were requested"
        y = self.grouped_mm(lhs, rhs, plan, torch.bfloat16)
        if not is_near(y, reference.grouped_mm(a_MK, b_EKN, run.ends)):
            return False
        if wgrad_dtype is None:
            return True
        _, y_columns = self.quantize_activations(y, plan, recipe, rows=False, columns=True)
        assert a_columns is not None and y_columns is not None, "both were requested"
        db = self.wgrad(a_columns, y_columns, plan, wgrad_dtype, contiguous="n")
        return is_near(db, reference.wgrad(a_MK, y, run.ends))

    def needs_blocks(self, recipe: Recipe, columns: bool) -> bool:
        """Whether `quantize_activations` needs the token blocks. If so, the plan computes them once.

        Args:
            recipe: the recipe of the call.
            columns: whether the backend quantizes operands of wgrad.
        """
        return False

    @abstractmethod
    def plan(self, offs: Tensor, num_rows: int, group_alignment: int = 1, *, blocks: bool = False) -> OffsetPlan:
        """The plan for groups that end at rows ``offs``, (E,) int32, with sizes that are multiples of
        ``group_alignment``.

        With ``blocks``, the plan has the token blocks of `needs_blocks`. Without, each quantizer computes its own.
        """

    @abstractmethod
    def quantize_activations(
        self, x_MD: Tensor, plan: OffsetPlan, recipe: Recipe, *, rows: bool, columns: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        """Quantizes ``a`` or dY into the layouts that this backend's kernels read, with one read of ``x_MD``.

        Args:
            x_MD: (M, D), contiguous rows. Rows at and past ``offs[-1]`` may hold anything.
            plan: from this backend's `plan`.
            recipe: the recipe. With NONE, the operand itself is the layout.
            rows: whether to write the operand of forward and dgrad, for a contraction along D.
            columns: whether to write the operand of wgrad, for a contraction along each group's rows.

        Returns:
            The two layouts; None for a layout that was not requested.
        """

    @abstractmethod
    def quantize_weights(
        self, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        """Quantizes ``b`` (E, K, N), K or N contiguous, for forward (contraction along K) and dgrad (along N)."""

    @abstractmethod
    def adopt_weights(
        self, data_EKN: Tensor, scale: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        """Puts a checkpoint's fp8 weights into the layouts for forward and dgrad. Values are kept if the recipe allows.

        Args:
            data_EKN: (E, K, N) in the device's fp8 type, K or N contiguous.
            scale: dequantization factors: rowwise (E, 1, N), blockwise (E, ceil(K/128), ceil(N/128)), both fp32;
                MXFP8 (E, ceil(K/32), N) in float8_e8m0fnu.
            recipe: the recipe of the checkpoint.
            forward: whether to return the operand of forward.
            dgrad: whether to return the operand of dgrad.
        """

    def _requantized_for_dgrad(self, data_EKN: Tensor, scale: Tensor, recipe: Recipe) -> Quantized | None:
        """Quantizes a checkpoint's weights again for dgrad, which sums over N. The checkpoint's scales run along K."""
        values = reference.dequantize(data_EKN, scale, reference.weight_blocks(recipe, 1))
        return self.quantize_weights(values, recipe, forward=False, dgrad=True)[1]

    @abstractmethod
    def grouped_mm(
        self, lhs: Quantized, rhs: Quantized, plan: OffsetPlan, out_dtype: torch.dtype, bias_EN: Tensor | None = None
    ) -> Tensor:
        """Forward; or dgrad, given dY and the weights' dgrad layout. (M, N or K), zero at and past ``offs[-1]``."""

    def wgrad(
        self, lhs: Quantized, rhs: Quantized, plan: OffsetPlan, out_dtype: torch.dtype, *, contiguous: str
    ) -> Tensor:
        """dB (E, K, N), exactly zero for an empty group. Its contiguous axis is ``contiguous``, "k" or "n"."""
        if contiguous == "k":
            return self._wgrad(rhs, lhs, plan, out_dtype).transpose(1, 2)
        return self._wgrad(lhs, rhs, plan, out_dtype)

    @abstractmethod
    def _wgrad(self, first: Quantized, second: Quantized, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        """``first[rows].T @ second[rows]`` for each group: (E, P, Q), contiguous. P, Q: features of the operands."""

    def add_wgrad(self, lhs: Quantized, rhs: Quantized, plan: OffsetPlan, sum_EKN: Tensor) -> None:
        """Adds dB to ``sum_EKN`` (E, K, N) float32, which is contiguous or the transpose of a contiguous tensor."""
        if sum_EKN.is_contiguous():
            self._add_wgrad(lhs, rhs, plan, sum_EKN)
        else:
            self._add_wgrad(rhs, lhs, plan, sum_EKN.transpose(1, 2))

    def _add_wgrad(self, first: Quantized, second: Quantized, plan: OffsetPlan, sum_EPQ: Tensor) -> None:
        """Adds `_wgrad` to ``sum_EPQ`` (E, P, Q), contiguous. A backend whose kernel can add overrides it."""
        sum_EPQ.add_(self._wgrad(first, second, plan, torch.float32))

    @abstractmethod
    def bias_grad(self, dy_MN: Tensor, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        """The sum of each group's rows of dY, accumulated in fp32: (E, N)."""
