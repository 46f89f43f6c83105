"""Helpers for the tests of all backends: cases, inputs, expected results, error metrics, poisoned memory.

`cases` is the cross product of the arguments of `grouped_mm`. Only a backend's requirements say which cases it runs:
`refusal` evaluates them. Inputs and expected results do not depend on the backend: `expected` is fp64 arithmetic on the
operands as a recipe quantizes them, so it is the exact answer rather than another estimate.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from grouped_gemm import reference
from grouped_gemm.backends import candidates
from grouped_gemm.core.call_spec import CallSpec, Pass, dtype_name, row_class
from grouped_gemm.core.machine import Machine, machine_of
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.functional import grouped_mm
from grouped_gemm.selection.rules import decide

Passes = tuple[Pass, ...]
FORWARD: Passes = (Pass.FORWARD,)
DGRAD: Passes = (Pass.FORWARD, Pass.DGRAD)
WGRAD: Passes = (Pass.FORWARD, Pass.WGRAD)
TRAINING: Passes = (Pass.FORWARD, Pass.DGRAD, Pass.WGRAD)


@dataclass(frozen=True)
class Shape:
    """Sizes of a call.

    Attributes:
        name: what this shape tests.
        sizes: rows of each group.
        tail: rows past the last group.
        k: K.
        n: N.
        alignment: the ``group_alignment`` that the caller guarantees.
    """

    name: str
    sizes: tuple[int, ...]
    tail: int = 0
    # Multiples of 16, so that rows are aligned for every kernel, but not of 32 or 128, so that last blocks are short.
    k: int = 144
    n: int = 176
    alignment: int = 1

    @property
    def num_rows(self) -> int:
        """M."""
        return sum(self.sizes) + self.tail

    @property
    def ends(self) -> list[int]:
        """The end row of each group."""
        return list(itertools.accumulate(self.sizes))


# A bit of everything: empty groups, a group of one row, short last blocks of 32 and 128, a tail.
MIXED = Shape("mixed", (0, 37, 1, 130, 0), tail=5)
SHAPES = (
    MIXED,
    Shape("empty_first", (0, 5, 7)),
    Shape("empty_middle", (5, 0, 7)),
    Shape("empty_last", (5, 7, 0)),
    Shape("all_empty", (0, 0, 0), tail=4),
    Shape("no_rows", (0, 0)),
    Shape("one_row", (1,)),
    Shape("tail", (5, 3), tail=6),
    Shape("around_32", (31, 32, 33)),
    Shape("around_128", (127, 128, 129), tail=3),
    Shape("many_groups", tuple(i % 4 for i in range(40)), k=32, n=48),
    Shape("large_groups", (300, 513), k=32, n=16),
    Shape("aligned_to_128", (128, 0, 256), k=128, n=128, alignment=128),
    Shape("k2880_n704", (3, 2), k=2880, n=704),
    Shape("k704_n16", (9, 4), k=704, n=16),
    Shape("k16_n2880", (9, 4), k=16, n=2880),
)


@dataclass(frozen=True)
class Case:
    """One kind of call on one backend.

    Attributes:
        backend: the backend that has to run it.
        recipe: how operands are quantized.
        dtype: dtype of ``a``, ``b`` and the bias.
        passes: the passes to run, in the order of `Pass`, always including forward.
        shape: sizes.
        b_contiguous: "k" or "n", the contiguous axis of ``b``.
        out_dtype: dtype of the output; None: ``dtype``.
        has_bias: whether a bias is added.
    """

    backend: BackendKind
    recipe: Recipe = Recipe.NONE
    dtype: torch.dtype = torch.bfloat16
    passes: Passes = FORWARD
    shape: Shape = MIXED
    b_contiguous: str = "k"
    out_dtype: torch.dtype | None = None
    has_bias: bool = False

    def __str__(self) -> str:
        parts = [self.backend.value, self.recipe.value, dtype_name(self.dtype), "+".join(p.value for p in self.passes)]
        parts.append(self.shape.name)
        if self.b_contiguous == "n":
            parts.append("b_in_rows")
        if self.out_dtype is not None:
            parts.append(f"to_{dtype_name(self.out_dtype)}")
        if self.has_bias:
            parts.append("bias")
        return "-".join(parts)

    def spec(self, machine: Machine) -> CallSpec:
        """What selection sees of this case on ``machine``."""
        shape, item = self.shape, self.dtype.itemsize
        rows_of_b = shape.k if self.b_contiguous == "k" else shape.n
        return CallSpec(
            machine,
            len(shape.sizes),
            shape.k,
            shape.n,
            row_class(shape.num_rows, len(shape.sizes)),
            recipe=self.recipe,
            dtype=self.dtype,
            out_dtype=self.out_dtype or self.dtype,
            passes=self.passes,
            b_contiguous=self.b_contiguous,
            has_bias=self.has_bias,
            group_alignment=shape.alignment,
            is_aligned=all(stride * item % 16 == 0 for stride in (shape.k, rows_of_b, shape.k * shape.n)),
        )


def cases(
    *,
    backends: Iterable[BackendKind] | None = None,
    recipes: Iterable[Recipe] = (Recipe.NONE,),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    passes: Iterable[Passes] = (FORWARD,),
    shapes: Iterable[Shape] = (MIXED,),
    b_contiguous: Iterable[str] = ("k",),
    out_dtypes: Iterable[torch.dtype | None] = (None,),
    has_bias: Iterable[bool] = (False,),
) -> list[Case]:
    """The cross product of the arguments, including cases that a backend refuses. Default: all backends."""
    backends = backend_kinds() if backends is None else backends
    combinations = itertools.product(backends, recipes, dtypes, passes, shapes, b_contiguous, out_dtypes, has_bias)
    return [Case(*arguments) for arguments in combinations]


def backend_kinds() -> list[BackendKind]:
    """The backends of this version."""
    return [candidate.backend.kind for candidate in candidates(torch.device("cpu"))]


def refusal(case: Case, device: torch.device) -> str:
    """Why the backend of ``case`` cannot run it on ``device``: every reason and remedy. Empty if it can."""
    decision = decide(case.spec(machine_of(device)), case.backend, candidates(device))
    if decision.is_complete:
        return ""
    reasons = [f"{r.reason}. {r.fix}".rstrip() for r in decision.refusals if r.backend is case.backend]
    return f"{case.backend.value} {' '.join(reasons)}"


@dataclass(frozen=True)
class Inputs:
    """Arguments of a call and the gradient of its output.

    Attributes:
        a: (M, K).
        b: (E, K, N), K or N contiguous.
        bias: (E, N), or None.
        offs: (E,) int32.
        dy: (M, N) in the dtype of the output.
        ends: ``offs`` on the host.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None
    offs: Tensor
    dy: Tensor
    ends: Sequence[int]


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Standard normal operands; the rows past the last group are NaN in ``a`` and ``dy``."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    shape, num_groups = case.shape, len(case.shape.sizes)
    a = normal(shape.num_rows, shape.k)
    b = normal(num_groups, shape.n, shape.k).transpose(1, 2)
    dy = normal(shape.num_rows, shape.n, dtype=case.out_dtype or case.dtype)
    a[sum(shape.sizes) :] = dy[sum(shape.sizes) :] = math.nan
    return Inputs(
        a=a,
        b=b if case.b_contiguous == "k" else b.contiguous(),
        bias=normal(num_groups, shape.n) if case.has_bias else None,
        offs=torch.tensor(shape.ends, dtype=torch.int32, device=device),
        dy=dy,
        ends=shape.ends,
    )


@dataclass(frozen=True)
class Outcome:
    """The results of a call: the output and the gradients of the case's passes."""

    y: Tensor
    da: Tensor | None
    db: Tensor | None
    dbias: Tensor | None

    def of(self, pass_: Pass) -> Tensor:
        """The result of one pass.

        Raises:
            ValueError: the pass did not run.
        """
        result = {Pass.FORWARD: self.y, Pass.DGRAD: self.da, Pass.WGRAD: self.db}[pass_]
        if result is None:
            raise ValueError(f"pass_: expected one that ran; found {pass_.value}")
        return result


def run(case: Case, inputs: Inputs) -> Outcome:
    """Calls `grouped_mm` on the backend of ``case``, and backward if its passes include it, in poisoned memory."""
    a = inputs.a.detach().requires_grad_(Pass.DGRAD in case.passes)
    b = inputs.b.detach().requires_grad_(Pass.WGRAD in case.passes)
    bias = None if inputs.bias is None else inputs.bias.detach().requires_grad_(case.passes != FORWARD)
    with poisoned_memory():
        y = grouped_mm(
            a,
            b,
            inputs.offs,
            recipe=case.recipe,
            bias=bias,
            out_dtype=case.out_dtype,
            group_alignment=case.shape.alignment,
            kernel_preference=case.backend,
        )
        leaves = [leaf for leaf in (a, b, bias) if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(y, leaves, inputs.dy) if leaves else ())
    gradients = [next(found) if leaf is not None and leaf.requires_grad else None for leaf in (a, b, bias)]
    return Outcome(y.detach(), *gradients)


def expected(pass_: Pass, inputs: Inputs, recipe: Recipe = Recipe.NONE) -> Tensor:
    """The result of a pass on the operands as ``recipe`` quantizes them, computed in fp64.

    The gradient of the output is first rounded to the dtype of the operands, as in a call.

    Returns:
        The output (M, N), dA (M, K), both zero past the last group, or dB (E, K, N).
    """
    dy = inputs.dy.to(inputs.a.dtype)
    if pass_ is Pass.WGRAD:
        a_columns = _columns_as_quantized(inputs.a, inputs.ends, recipe)
        return reference.wgrad(a_columns, _columns_as_quantized(dy, inputs.ends, recipe), inputs.ends)
    if pass_ is Pass.DGRAD:
        weights = as_quantized(inputs.b, reference.weight_blocks(recipe, 2), recipe)
        rows = as_quantized(dy, reference.row_blocks(recipe), recipe)
        return reference.grouped_mm(rows, weights.transpose(1, 2), inputs.ends)
    weights = as_quantized(inputs.b, reference.weight_blocks(recipe, 1), recipe)
    rows = as_quantized(inputs.a, reference.row_blocks(recipe), recipe)
    return reference.grouped_mm(rows, weights, inputs.ends, inputs.bias)


def as_quantized(x: Tensor, blocks: reference.Blocks, recipe: Recipe) -> Tensor:
    """``x`` quantized with ``recipe`` and dequantized again, in fp64."""
    if not recipe.is_scaled:
        return x.double()
    data, scale = reference.quantize(x, blocks, recipe, machine_of(x.device).fp8_dtype)
    return reference.dequantize(data, scale, blocks).double()


def _columns_as_quantized(x_MD: Tensor, ends: Sequence[int], recipe: Recipe) -> Tensor:
    """As `as_quantized`, along the rows of each group."""
    values = torch.zeros_like(x_MD, dtype=torch.float64)
    for rows in reference.group_slices(ends):
        if rows.start < rows.stop:
            values[rows] = as_quantized(x_MD[rows], reference.column_blocks(recipe), recipe)
    return values


def relative_error(found: Tensor, truth: Tensor) -> float:
    """``|found - truth| / |truth|`` in Frobenius norms, in fp64; infinite if any value is not finite."""
    found, truth = found.double().flatten(), truth.double().flatten()
    return _relative(found, truth, truth)


def worst_row_error(found: Tensor, truth: Tensor, terms: Tensor | None = None) -> float:
    """The largest `relative_error` of a row, along the last axis, so that one wrong row is not averaged away.

    A row whose truth is zero must be exactly zero. With ``terms``, errors are relative to ``terms`` instead of
    ``truth``: pass `expected` of the operands' magnitudes, which stays large where terms cancel out.
    """
    against = truth if terms is None else terms
    return _relative(*(x.double().flatten(0, -2) for x in (found, truth, against)))


def _relative(found: Tensor, truth: Tensor, against: Tensor) -> float:
    if found.shape != truth.shape:
        raise ValueError(f"found: expected shape {tuple(truth.shape)}; found {tuple(found.shape)}")
    difference, size = (found - truth).norm(dim=-1), against.norm(dim=-1)
    error = torch.where(difference == 0, 0.0, difference / size)
    return error.nan_to_num(nan=math.inf, posinf=math.inf).max().item() if error.numel() else 0.0


def rounding_tolerance(dtype: torch.dtype, case: Case | None = None, device: torch.device | None = None) -> float:
    """The largest allowed `worst_row_error` against `expected` with the same recipe.

    The quantized operands are the same, so two errors remain. First, the result is rounded once to ``dtype``, by at
    most half a unit in the last place: eps / 2 of each value, and so of the norm. Second, products are accumulated in
    fp32, with an error below 2^-18 for standard normal data and up to a few thousand terms. If ``case`` accumulates fp8
    products in the tensor cores of ``device``, and these are Ada's or Hopper's, they add with 13 bits: below 2^-11.
    """
    coarse = case is not None and device is not None and sums_coarsely(case, device)
    return torch.finfo(dtype).eps / 2 + (2.0**-11 if coarse else 2.0**-18)


def sums_coarsely(case: Case, device: torch.device) -> bool:
    """Whether tensor cores add with only 13 mantissa bits: fp8 on Ada and Hopper. There, MX operands are widened."""
    traits = machine_of(device).traits
    in_fp8 = case.recipe.is_scaled and (case.recipe is not Recipe.MXFP8 or traits.mx)
    return in_fp8 and case.backend is not BackendKind.EMULATED and traits.sums_fp8_coarsely


def quantization_tolerance(recipe: Recipe, dtype: torch.dtype) -> float:
    """The largest allowed `relative_error` against `expected` without a recipe, for standard normal data.

    e4m3 has 3 mantissa bits. In the binade [1, 2) its values are 1/8 apart, so the error is uniform within 1/16, or
    1/16 / sqrt(3) = 0.036 root mean square. Relative to the root mean square of the values in the binade, about 1.4,
    that is 0.026. It is the same in every binade, for any scale: recipes differ in their range, which normal data does
    not exhaust. The errors of two operands are independent, so a product has sqrt(2) * 0.026 = 0.037. The tolerance
    adds a third for small samples; a wrong scale, block or axis is off by far more.
    """
    return 0.05 if recipe.is_scaled else rounding_tolerance(dtype)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills memory from ``torch.empty`` and similar calls with NaN or the largest integer, to expose unwritten values.

    It applies to the whole process, including backward threads.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    with warnings.catch_warnings():
        # torch fills memory only in deterministic mode, and then warns about every op without such an algorithm.
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
