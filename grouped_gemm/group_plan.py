"""`GroupPlan`: what backends derive from ``offs``, once for several calls of `grouped_mm` and their backward."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from grouped_gemm.backends import get_backend
from grouped_gemm.backends.base import OffsetPlan
from grouped_gemm.core.dense import materialized
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
    """Groups of rows, planned once: pass it to `grouped_mm` in the place of ``offs``.

    Calls with the same groups, such as gate-up and down of a MoE layer, then share what each backend derives from
    ``offs``: row maps, token blocks, ends on the host. It is derived at the first call that needs it, on the stream of
    that call, and serves all later calls and their backward. Results are those of a plain ``offs``, bit for bit.

    A plan is for one routing: make a new one in each step. After a change of ``offs`` in place, eager calls plan anew.
    Compiled code does not see a change, and no call sees one that moves no version counter: ``offs.data``, inference
    tensors, raw kernels, the replay of a CUDA graph. In the capture of a CUDA graph, only a plan that was made in a
    capture is used; with any other one a call plans for itself, as with a plain ``offs``. Under GROUPED_GEMM_VALIDATE=1
    each call checks the values of ``offs``, and plans for itself as well.

    Args:
        offs: (E,) int32, the end row of each group, as in `grouped_mm`.
        num_rows: M, the rows of ``a``.
        group_alignment: a guarantee that every group's size is a multiple of it.

    Attributes:
        offs: (E,) int32, contiguous.
        num_rows: M.
        group_alignment: as above.

    Raises:
        TypeError: an argument is no tensor or no int.
        ValueError: rank or dtype of ``offs`` is another, or a number is out of range.
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
            ValueError: the call has one of its own.
        """
        if argument not in (1, self.group_alignment):
            checks.fail("group_alignment", f"{self.group_alignment}, as offs, a GroupPlan, has it", argument)
        return self.group_alignment

    def check_rows(self, num_rows: int) -> None:
        """``num_rows`` is M.

        Raises:
            ValueError: it is not.
        """
        if holds(num_rows != self.num_rows):
            found = f"{self.num_rows}; make a GroupPlan for each number of rows"
            checks.fail("offs.num_rows", f"{num_rows}, the rows of a", found)

    def plans(self, route: Route, offs: Tensor) -> Tensor | Plans:
        """The plan of each backend that runs a pass; ``offs`` where the call has to plan for itself.

        Args:
            route: of the call.
            offs: what the checks of the call have made of ``offs``.
        """
        if offs is not self.offs or is_capturing(offs) != self._captured:
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
                known[kind] = get_backend(kind).plan(offs, self.num_rows, route.group_alignment, blocks=blocks)
            found[kind] = known[kind]
        return found


def _version(offs: Tensor) -> int:
    """Changes with the values of ``offs``; 0 where that cannot be seen."""
    return 0 if torch.compiler.is_compiling() or offs.is_inference() else offs._version
