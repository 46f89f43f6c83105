"""`GroupPlan`: what backends derive from ``offs``, shared by several calls of `grouped_mm` and their backward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TypeAlias

import torch
from torch import Tensor

from grouped_gemm.backends import get_backend
from grouped_gemm.backends.base import OffsetPlan
from grouped_gemm.core.dense import materialized
from grouped_gemm.core.library import is_intercepted
from grouped_gemm.core.machine import is_capturing
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.core.tracing import holds
from grouped_gemm.selection import checks
from grouped_gemm.selection.route import Route

Plans: TypeAlias = dict[BackendKind, OffsetPlan]


def plans_of(route: Route, offs: Tensor, num_rows: int) -> Plans:
    """The plan of each backend that runs a pass."""
    plans = {}
    for kind, blocks in zip(route.backends, route.blocks):
        plans[kind] = get_backend(kind).plan(offs, num_rows, route.group_alignment, blocks=blocks)
    return plans


class GroupPlan:
    """A plan for groups of rows, made once. Pass it to `grouped_mm` instead of ``offs``.

    Calls with the same groups, such as gate-up and down of an MoE layer, then share what each backend derives from
    ``offs``: row maps, token blocks, ends on the host. The first call that needs it derives it, on the stream of that
    call; all later calls and their backward reuse it. Results are bit for bit those with a plain ``offs``.

    A plan is for one routing: make a new one in each step. If ``offs`` is changed in place, calls plan again. No call
    notices a change that does not bump the version counter: through ``offs.data``, to an inference tensor, by a raw
    kernel or by a CUDA graph replay. Strided ``offs`` are copied, so later changes to them are not noticed either.

    A call plans for itself, as with a plain ``offs``, where a shared plan would be wrong: under a tracer or a dispatch
    mode (selective checkpointing, fake tensors), under `torch.func` transforms, under GROUPED_GEMM_VALIDATE=1, and
    during CUDA graph capture unless the plan was made in a capture. Under `torch.compile` it does too; the compiler
    merges equal planning ops of a graph into one.

    Args:
        offs: (E,) int32, the end row of each group, as in `grouped_mm`.
        num_rows: M, the rows of ``a``.
        group_alignment: the caller guarantees that every group's size is a multiple of it.

    Attributes:
        offs: (E,) int32, contiguous.
        num_rows: M.
        group_alignment: as above.

    Raises:
        TypeError: an argument is not a tensor, or not an int.
        ValueError: ``offs`` has the wrong rank or dtype, or a number is out of range.
    """

    def __init__(self, offs: Tensor, num_rows: int, group_alignment: int = 1) -> None:
        checks.check_groups(offs, num_rows, group_alignment)
        self.offs = materialized(offs).contiguous()
        self.num_rows = num_rows
        self.group_alignment = group_alignment
        self._plans: Plans = {}
        self._plans_with_blocks: Plans = {}
        self._version = _version(self.offs)
        self._captured = is_capturing(self.offs)

    def __repr__(self) -> str:
        return f"GroupPlan({self.offs.shape[0]} groups, {self.num_rows} rows, group_alignment={self.group_alignment})"

    def alignment(self, argument: int) -> int:
        """The guaranteed alignment of a call whose ``group_alignment`` is ``argument``.

        Raises:
            ValueError: ``argument`` differs from the plan's alignment and is not 1, the default.
        """
        checks.check_options(None, argument)
        if argument not in (1, self.group_alignment):
            checks.fail("group_alignment", f"{self.group_alignment}, the alignment of the GroupPlan in offs", argument)
        return self.group_alignment

    def check_rows(self, num_rows: int) -> None:
        """Checks that ``num_rows`` is the plan's M.

        Raises:
            ValueError: it is not.
        """
        if holds(num_rows != self.num_rows):
            found = f"{self.num_rows}; make a GroupPlan for each number of rows"
            checks.fail("offs.num_rows", f"{num_rows}, the rows of a", found)

    def plans(self, route: Route, offs: Tensor) -> Tensor | Plans:
        """The plan of each backend that runs a pass; ``offs`` if the call has to plan for itself.

        Args:
            route: the route of the call.
            offs: ``offs`` after the checks of the call, which may have copied it.
        """
        if is_intercepted() or offs is not self.offs or is_capturing(offs) != self._captured:
            return offs
        version = _version(offs)
        if version != self._version:
            self._version = version
            self._plans.clear()
            self._plans_with_blocks.clear()
        found = {}
        for kind, blocks in zip(route.backends, route.blocks):
            known = self._plans_with_blocks if blocks else self._plans
            if kind not in known:
                # A later call may save it for backward, which a tensor of inference mode cannot be.
                with nullcontext() if offs.is_inference() else torch.inference_mode(False):
                    known[kind] = get_backend(kind).plan(offs, self.num_rows, route.group_alignment, blocks=blocks)
            found[kind] = known[kind]
        return found


def _version(offs: Tensor) -> int:
    """The version counter of ``offs``; 0 where there is none to read."""
    return 0 if torch.compiler.is_compiling() or offs.is_inference() else offs._version
