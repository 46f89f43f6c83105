"""Decisions as text and as data: what `explain`, GROUPED_GEMM_LOG and the command line show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grouped_gemm.backends import get_backend
from grouped_gemm.preference import KernelPreference
from grouped_gemm.problem import dtype_name
from grouped_gemm.select import Decision

_WHY = {
    "default": "AUTO: the first in its order that can run it",
    "argument": "asked for by the argument",
    "context": "asked for by prefer(...)",
    "environment": "asked for by the environment",
}


@dataclass(frozen=True)
class Explanation:
    """Why a call runs where it runs. ``print`` it, or take `to_dict`.

    Attributes:
        decision: the decision with its trace; incomplete where no backend runs the call.
        num_rows: M, where it is known.
    """

    decision: Decision
    num_rows: int | None = None

    @property
    def host_syncs(self) -> dict[str, str]:
        """By backend, when a call waits for the host; empty where it never does, as always on a CPU."""
        if not self.decision.problem.machine.is_gpu:
            return {}
        waiting = (b for p, b in self.decision.chosen if p in get_backend(b).host_sync_passes)
        return {b.value: get_backend(b).host_syncs for b in waiting if get_backend(b).host_syncs}

    @property
    def padding(self) -> dict[str, int]:
        """By backend that pads groups, how many rows it adds at most."""
        problem = self.decision.problem
        multiples = {b: get_backend(b).padded_to(problem) for b in self.decision.backends}
        return {b.value: problem.num_groups * (m - 1) for b, m in multiples.items() if problem.group_alignment % m}

    @property
    def why(self) -> str:
        """What made the preference, as a phrase."""
        is_auto = self.decision.preference is KernelPreference.AUTO
        return _WHY["default" if is_auto else self.decision.asked_by]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain strings, numbers, lists and dicts, ready for JSON."""
        problem = self.decision.problem
        return {
            "problem": {
                "M": self.num_rows,
                "E": problem.num_groups,
                "K": problem.k,
                "N": problem.n,
                "rows": problem.rows.value,
                "recipe": problem.recipe.value,
                "dtype": dtype_name(problem.dtype),
                "out_dtype": dtype_name(problem.out_dtype),
                "arch": problem.machine.arch,
                "passes": [p.value for p in problem.passes],
                "group_alignment": problem.group_alignment,
            },
            "preference": self.decision.preference.value,
            "asked_by": self.decision.asked_by,
            "runs": self.decision.is_complete,
            "chosen": {p.value: backend.value for p, backend in self.decision.chosen},
            "refusals": [
                {
                    "backend": r.backend.value,
                    "passes": [p.value for p in r.passes],
                    "reason": r.reason,
                    "fix": r.fix,
                }
                for r in self.decision.refusals
            ],
            "alternatives": [backend.value for backend in self.decision.alternatives],
            "host_syncs": self.host_syncs,
            "padding_rows_at_most": self.padding,
        }

    def __str__(self) -> str:
        decision, chosen = self.decision, dict(self.decision.chosen)
        rows = "" if self.num_rows is None else f"M = {self.num_rows}, "
        lines = [str(decision.problem), f"  {'rows':12}{rows}{decision.problem.rows.value} groups"]
        for pass_ in decision.problem.passes:
            if pass_ in chosen:
                lines.append(f"  {pass_.value:12}{chosen[pass_].value:12}{self.why}")
            else:
                is_auto = decision.preference is KernelPreference.AUTO
                who = "every one refuses" if is_auto else f"{decision.preference.value} refuses, {self.why}"
                lines.append(f"  {pass_.value:12}{'no backend':12}{who}")
        syncs = [f"{backend}: {when}" for backend, when in self.host_syncs.items()]
        padding = [f"{backend}: at most {rows} rows" for backend, rows in self.padding.items()]
        lines.append(f"  {'host syncs':12}{'; '.join(syncs) or 'none'}")
        lines.append(f"  {'padding':12}{'; '.join(padding) or 'none'}")
        lines += [f"  {'refused':12}{line}" for line in decision.refusal_lines()]
        if decision.alternatives:
            lines.append(f"  {'instead':12}{', '.join(kind.value for kind in decision.alternatives)} would run it")
        return "\n".join(lines)
