"""What a backend is, and how it says what it can do."""

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
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.quantized import Layouts, Quantized
from grouped_gemm.core.recipes import Recipe

ALL_PASSES = tuple(Pass)
_OLDEST_TRITON = "3.6"


@dataclass(frozen=True)
class Requirement:
    """One thing that must hold, declared once and read by selection, error texts, docs/backends.md and test skips.

    Attributes:
        what: what is required, as a phrase that completes "<pass> requires ...".
        holds: whether a call meets it.
        found: what the call has instead, as a phrase.
        fix: what the user can do, as a sentence.
        passes: the passes that need it.
    """

    what: str
    holds: Callable[[CallSpec], bool]
    found: Callable[[CallSpec], str]
    fix: str
    passes: tuple[Pass, ...] = ALL_PASSES


def requires_recipe(recipes: Iterable[Recipe], passes: tuple[Pass, ...] = ALL_PASSES) -> Requirement:
    """The recipe is one of ``recipes``."""
    recipes = tuple(recipes)
    return Requirement(
        what="recipe " + " or ".join(r.value for r in recipes),
        holds=lambda p: p.recipe in recipes,
        found=lambda p: p.recipe.value,
        fix="Use one of these recipes or another backend.",
        passes=passes,
    )


def requires_arch(archs: Iterable[str], fix: str, passes: tuple[Pass, ...] = ALL_PASSES) -> Requirement:
    """The device has exactly one of these architectures: a newer one is another machine, not a better one."""
    archs = tuple(archs)
    return Requirement(
        what=" or ".join(archs),
        holds=lambda p: p.machine.arch in archs,
        found=lambda p: p.machine.arch,
        fix=fix,
        passes=passes,
    )


def requires_dtype(dtypes: Iterable[torch.dtype], passes: tuple[Pass, ...] = ALL_PASSES) -> Requirement:
    """Operands are of one of ``dtypes``."""
    dtypes = tuple(dtypes)
    return Requirement(
        what="operands in " + " or ".join(map(dtype_name, dtypes)),
        holds=lambda p: p.dtype in dtypes,
        found=lambda p: dtype_name(p.dtype),
        fix="Cast the operands or use another backend.",
        passes=passes,
    )


def requires_triton(purpose: str = "", concerns: Callable[[CallSpec], bool] = lambda p: True) -> Requirement:
    """A Triton that this package's kernels run on is there, where the call is one that this ``concerns``."""

    def holds(spec: CallSpec) -> bool:
        version = spec.machine.version("triton")
        return not concerns(spec) or (version is not None and version >= Version(_OLDEST_TRITON))

    return Requirement(
        what=f"triton {_OLDEST_TRITON} or later{purpose}",
        holds=holds,
        found=lambda p: f"triton {p.machine.version('triton')}" if p.machine.version("triton") else "no triton",
        fix=f"pip install 'triton>={_OLDEST_TRITON}'.",
    )


def requires_no_bias(passes: tuple[Pass, ...] = ALL_PASSES) -> Requirement:
    """No bias is added."""
    return Requirement(
        what="no bias",
        holds=lambda p: not p.has_bias,
        found=lambda p: "a bias",
        fix="Add the bias to the result, or use another backend.",
        passes=passes,
    )


def requires_leave_to_wait(passes: tuple[Pass, ...] = ALL_PASSES) -> Requirement:
    """Passes may wait for the device, if it is one: of a backend with host syncs."""
    return Requirement(
        what="leave to wait for the device",
        holds=lambda p: p.host_sync or not p.machine.is_gpu,
        found=lambda p: "CUDA graph capture or prefer(host_sync=False)",
        fix="Call it elsewhere or use another backend.",
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
    """Whether a backend works on a device: what a tiny run showed, which no import can show.

    Attributes:
        problem: why it does not work; empty where it does.
        fix: what the user can do about it, as a sentence.
    """

    problem: str = ""
    fix: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the backend works."""
        return not self.problem


@dataclass(eq=False)  # not frozen, which costs half a microsecond for each
class OffsetPlan:
    """What a backend derives from ``offs``, once for all passes of a call, or of all calls with one `GroupPlan`.

    Attributes:
        offs: (E,) int32, as the caller gave it.
        num_rows: M.
        derived: tensors of the backend's own making, such as a row map. They are saved for backward with ``offs``.
    """

    offs: Tensor
    num_rows: int
    derived: tuple[Tensor, ...] = ()


class TinyRun(NamedTuple):
    """The operands that `_GroupedMMBackend.health` tries a backend with: ends of groups, M, K and N."""

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


def is_near(result: Tensor, truth: Tensor) -> bool:
    """Whether a tiny product is right: quantization alone is 0.04 off; a wrong layout, scale or fp8 type, or a group
    that was left out, by far more."""
    return bool((result.double() - truth).norm() <= 0.1 * truth.norm())


def as_activations(
    written: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    recipe: Recipe,
    layouts: tuple[str, str],
    *,
    rows: bool,
    columns: bool,
) -> Layouts:
    """What `_GroupedMMBackend.quantize_activations` returns, from what its op has written.

    Args:
        written: data and scales by rows, data and scales by columns.
        recipe: how it was quantized.
        layouts: names of the two layouts.
        rows: whether the first is wanted.
        columns: whether the second is wanted.
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
    """What `_GroupedMMBackend.quantize_weights` returns, from what its op has written.

    Args:
        written: data (E, N, K) and (E, K, N), both contiguous, then the scales of each.
        recipe: how they were quantized.
        layout: its name.
        forward: whether the first is wanted.
        dgrad: whether the second is wanted.
    """
    by_n, by_k, forward_scale, dgrad_scale = written
    return (
        Quantized(by_n.transpose(1, 2), forward_scale, recipe, 1, layout) if forward else None,
        Quantized(by_k, dgrad_scale, recipe, 2, layout) if dgrad else None,
    )


def unscaled_weights(b_EKN: Tensor, layout: str, *, forward: bool, dgrad: bool) -> Layouts:
    """Likewise of Recipe.NONE: ``b`` as it is, for both."""
    return (
        Quantized(b_EKN, None, Recipe.NONE, 1, layout) if forward else None,
        Quantized(b_EKN, None, Recipe.NONE, 2, layout) if dgrad else None,
    )


class _GroupedMMBackend(ABC):
    """One way to run every pass of a grouped GEMM. A backend is stateless; one instance serves all threads and devices.

    Methods are traced by torch.compile: what cannot be traced (a kernel launch, a look at the groups) goes
    behind an op of ``torch.library`` with a fake. Nothing may look at tensor values outside such an op, and no
    op returns its own argument.
    """

    kind: ClassVar[BackendKind]
    summary: ClassVar[str]  # one sentence for doctor and docs/backends.md
    requirements: ClassVar[tuple[Requirement, ...]]
    host_syncs: ClassVar[str] = ""  # when a call waits for the host, as a phrase; empty: never
    host_sync_passes: ClassVar[tuple[Pass, ...]] = ALL_PASSES  # the passes that do, where any does
    compiles: ClassVar[bool] = True  # whether kernels are compiled or loaded at first use, which `warmup` does ahead

    def padded_to(self, spec: CallSpec) -> int:
        """The multiple of rows that this backend pads every group to, where the caller has not; 1: it does not pad."""
        return 1

    def health(self, device: torch.device) -> Health:
        """Runs something tiny on ``device``. Called once per process and device, after all requirements hold."""
        return Health()

    def _gets_right(
        self,
        run: TinyRun,
        recipe: Recipe,
        device: torch.device,
        group_alignment: int = 1,
        wgrad_dtype: torch.dtype | None = torch.bfloat16,
    ) -> bool:
        """Whether a small product, and its wgrad unless its dtype is None, are near `reference`, for `health`."""
        a_MK, b_EKN, offs = run.operands(device)
        plan = self.plan(offs, run.num_rows, group_alignment)
        lhs, a_columns = self.quantize_activations(a_MK, plan, recipe, rows=True, columns=wgrad_dtype is not None)
        rhs, _ = self.quantize_weights(b_EKN, recipe, forward=True, dgrad=False)
        assert lhs is not None and rhs is not None, "they are asked for"
        y = self.grouped_mm(lhs, rhs, plan, torch.bfloat16)
        if not is_near(y, reference.grouped_mm(a_MK, b_EKN, run.ends)):
            return False
        if wgrad_dtype is None:
            return True
        _, y_columns = self.quantize_activations(y, plan, recipe, rows=False, columns=True)
        assert a_columns is not None and y_columns is not None, "they are asked for"
        db = self.wgrad(a_columns, y_columns, plan, wgrad_dtype, contiguous="n")
        return is_near(db, reference.wgrad(a_MK, y, run.ends))

    def needs_blocks(self, recipe: Recipe, columns: bool) -> bool:
        """Whether `quantize_activations` looks for the blocks of tokens: then they are found once, in the plan.

        Args:
            recipe: of the call.
            columns: whether the backend quantizes operands of wgrad.
        """
        return False

    @abstractmethod
    def plan(self, offs: Tensor, num_rows: int, group_alignment: int = 1, *, blocks: bool = False) -> OffsetPlan:
        """The plan of groups that end at rows ``offs``, (E,) int32, in multiples of ``group_alignment``.

        With ``blocks`` it has those that `needs_blocks` speaks of. Without them, each quantizer finds its own.
        """

    @abstractmethod
    def quantize_activations(
        self, x_MD: Tensor, plan: OffsetPlan, recipe: Recipe, *, rows: bool, columns: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        """``a`` or dY in the layouts that this backend's kernels read, both from one read of ``x_MD``.

        Args:
            x_MD: (M, D), rows contiguous. Rows at and past ``offs[-1]`` may hold anything.
            plan: from `plan` of this backend.
            recipe: the recipe; where it is NONE the operand itself is the layout.
            rows: whether the operand of forward and dgrad is wanted, contraction along D.
            columns: whether the operand of wgrad is wanted, contraction along each group's rows.

        Returns:
            The two layouts; None for one that is not wanted.
        """

    @abstractmethod
    def quantize_weights(
        self, b_EKN: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        """``b`` (E, K, N), K or N contiguous, in the layouts for forward (contraction along K) and dgrad (along N)."""

    @abstractmethod
    def adopt_weights(
        self, data_EKN: Tensor, scale: Tensor, recipe: Recipe, *, forward: bool, dgrad: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        """A checkpoint's fp8 weights in the layouts for forward and dgrad: the same values where the recipe lets them.

        Args:
            data_EKN: (E, K, N) in the device's fp8 type, K or N contiguous.
            scale: dequantization factors: rowwise (E, 1, N), blockwise (E, ceil(K/128), ceil(N/128)), both fp32;
                MXFP8 (E, ceil(K/32), N) in float8_e8m0fnu.
            recipe: the recipe that data and scale follow.
            forward: whether the operand of forward is wanted.
            dgrad: whether the operand of dgrad is wanted.
        """

    def _requantized_for_dgrad(self, data_EKN: Tensor, scale: Tensor, recipe: Recipe) -> Quantized | None:
        """A checkpoint's weights, whose scales run along K, for dgrad, which sums over N and needs others."""
        values = reference.dequantize(data_EKN, scale, reference.weight_blocks(recipe, 1))
        return self.quantize_weights(values, recipe, forward=False, dgrad=True)[1]

    @abstractmethod
    def grouped_mm(
        self, lhs: Quantized, rhs: Quantized, plan: OffsetPlan, out_dtype: torch.dtype, bias_EN: Tensor | None = None
    ) -> Tensor:
        """Forward, or dgrad on dY and the weights' dgrad layout: (M, N or K), zero at and past ``offs[-1]``."""

    def wgrad(
        self, lhs: Quantized, rhs: Quantized, plan: OffsetPlan, out_dtype: torch.dtype, *, contiguous: str
    ) -> Tensor:
        """dB (E, K, N), exactly zero where a group is empty; its fastest axis is ``contiguous``, "k" or "n"."""
        if contiguous == "k":
            return self._wgrad(rhs, lhs, plan, out_dtype).transpose(1, 2)
        return self._wgrad(lhs, rhs, plan, out_dtype)

    @abstractmethod
    def _wgrad(self, first: Quantized, second: Quantized, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        """Per group, the transpose of ``first`` times ``second``: (E, P, Q), contiguous, their features being P, Q."""

    @abstractmethod
    def bias_grad(self, dy_MN: Tensor, plan: OffsetPlan, out_dtype: torch.dtype) -> Tensor:
        """The sum of each group's rows of dY, accumulated in fp32: (E, N)."""
