"""Decisions as text and as data, for `explain`, GROUPED_GEMM_LOG and the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from grouped_gemm.backends import get_backend
from grouped_gemm.core.call_spec import Pass, dtype_name
from grouped_gemm.core.preference import KernelPreference
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.selection.rules import Decision

_WHY = {
    "argument": "asked for by the argument",
    "context": "asked for by prefer(...)",
    "environment": "asked for by the environment",
}


@dataclass(frozen=True)
class Explanation:
    """Which backends run a call, and why. ``print`` it, or use `to_dict`.

    Attributes:
        decision: the decision with its refusals; incomplete if no backend runs the call.
        num_rows: M, if it is known.
        times: measured microseconds of the call by recipe, from `times_of_recipes`.
        is_picked: whether the recipe was picked by these times, as ``recipe="fp8"``.
    """

    decision: Decision
    num_rows: int | None = None
    times: Mapping[Recipe, float] = field(default_factory=dict)
    is_picked: bool = False

    @property
    def host_syncs(self) -> dict[str, str]:
        """By backend, when a call synchronizes the host. Empty if it never does, and always on a CPU."""
        if not self.decision.spec.machine.is_gpu:
            return {}
        syncing = (b for p, b in self.decision.chosen if p in get_backend(b).host_sync_passes)
        return {b.value: get_backend(b).host_syncs for b in syncing if get_backend(b).host_syncs}

    @property
    def padding(self) -> dict[str, int]:
        """For each backend that pads groups, the most rows that it adds."""
        spec = self.decision.spec
        multiples = {b: get_backend(b).padded_to(spec) for b in self.decision.backends}
        return {b.value: spec.num_groups * (m - 1) for b, m in multiples.items() if spec.group_alignment % m}

    @property
    def quantized_bytes(self) -> int | None:
        """Bytes of data that the quantizers of a call read and write; None if M is not known.

        Each backend that quantizes an operand reads it once. Weights that were quantized beforehand are not read.
        Scales are not counted; they add at most 4%.
        """
        spec = self.decision.spec
        if self.num_rows is None:
            return None
        if not spec.recipe.is_scaled:
            return 0
        forward, dgrad, wgrad = map(self.decision.backend, Pass)
        operands = [
            (self.num_rows * spec.k, (forward, wgrad)),
            (self.num_rows * spec.n, (dgrad, wgrad)),
            (0 if spec.weights else spec.num_groups * spec.k * spec.n, (forward, dgrad)),
        ]
        total = 0
        for elements, readers in operands:
            layouts = [kind for kind in readers if kind is not None]
            total += elements * (len(set(layouts)) * spec.dtype.itemsize + len(layouts))
        return total

    @property
    def slower_than_none(self) -> tuple[float, float] | None:
        """The times of the recipe and of none, if none was measured to be faster."""
        mine, none = self.times.get(self.decision.spec.recipe), self.times.get(Recipe.NONE)
        return (mine, none) if mine is not None and none is not None and mine > none else None

    @property
    def why(self) -> str:
        """A phrase that says what the choice rests on."""
        decision = self.decision
        if decision.preference is not KernelPreference.AUTO:
            return _WHY[decision.asked_by]
        if decision.expected is not None:
            return f"AUTO: {decision.expected.source}"
        machine = decision.spec.machine
        unknown = f"; no such call was measured on {machine.name}" if machine.is_gpu else ""
        return f"AUTO: the first backend in the vendor's order that can run it{unknown}"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain strings, numbers, lists and dicts, ready for JSON."""
        spec = self.decision.spec
        return {
            "call": {
                "M": self.num_rows,
                "E": spec.num_groups,
                "K": spec.k,
                "N": spec.n,
                "rows": spec.rows.value,
                "recipe": spec.recipe.value,
                "dtype": dtype_name(spec.dtype),
                "out_dtype": dtype_name(spec.out_dtype),
                "arch": spec.machine.arch,
                "passes": [p.value for p in spec.passes],
                "group_alignment": spec.group_alignment,
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
            "quantized_bytes": self.quantized_bytes,
            "expected": self._expected_as_dict(),
            "recipe_picked": self.is_picked,
            "recipes_us": {recipe.value: us for recipe, us in self.times.items()},
            "slower_than_none": self.slower_than_none is not None,
        }

    def _expected_as_dict(self) -> dict[str, Any] | None:
        expected = self.decision.expected
        if expected is None:
            return None
        return {
            "source": expected.source,
            "plans_us": {plan: None if math.isinf(us) else us for plan, us in expected.plans},
        }

    def __str__(self) -> str:
        decision, chosen = self.decision, dict(self.decision.chosen)
        rows = "" if self.num_rows is None else f"M = {self.num_rows}, "
        lines = [str(decision.spec), f"  {'rows':12}{rows}{decision.spec.rows.value} groups"]
        for pass_ in decision.spec.passes:
            if pass_ in chosen:
                lines.append(f"  {pass_.value:12}{chosen[pass_].value}")
            else:
                is_auto = decision.preference is KernelPreference.AUTO
                who = "all refuse" if is_auto else f"{decision.preference.value} refuses"
                lines.append(f"  {pass_.value:12}{'no backend':12}{who}")
        lines.append(f"  {'why':12}{self.why}")
        if decision.expected is not None:
            lines.append(f"  {'measured':12}{'; '.join(timed(*plan) for plan in decision.expected.plans)}")
        if self.times or self.is_picked:
            recipe = decision.spec.recipe.value
            picked = f"{recipe}, picked: " if self.is_picked else ""
            times = "; ".join(timed(recipe.value, us) for recipe, us in self.times.items())
            compares = decision.preference is KernelPreference.AUTO
            why = "no such call was measured" if compares else "only AUTO compares recipes"
            lines.append(f"  {'recipes':12}{picked}{times or why}")
        if self.slower_than_none:
            mine, none = self.slower_than_none
            text = (
                f'{timed(decision.spec.recipe.value, mine)}, {timed("none", none)}. recipe="fp8" picks the faster one.'
            )
            lines.append(f"  {'WARNING':12}this recipe was measured to be slower than none: {text}")
        if self.quantized_bytes:
            lines.append(f"  {'quantized':12}{_bytes(self.quantized_bytes)} read and written")
        syncs = [f"{backend}: {when}" for backend, when in self.host_syncs.items()]
        lines.append(f"  {'host syncs':12}{'; '.join(syncs) or 'none'}")
        lines.append(f"  {'padding':12}{'; '.join(self._paddings()) or 'none'}")
        lines += [f"  {'refused':12}{line}" for line in decision.refusal_lines()]
        if decision.alternatives:
            lines.append(f"  {'instead':12}{', '.join(kind.value for kind in decision.alternatives)} would run it")
        return "\n".join(lines)

    def _paddings(self) -> list[str]:
        """For each backend, the most rows that it adds, also in percent of M if M is known."""
        percent = {
            b: f" ({100 * rows / self.num_rows:.2g}%)" if self.num_rows else "" for b, rows in self.padding.items()
        }
        return [f"{backend}: at most {rows} rows{percent[backend]}" for backend, rows in self.padding.items()]


def timed(plan: str, microseconds: float) -> str:
    """``triton 1.09 ms``."""
    if math.isinf(microseconds):
        return f"{plan} failed"
    return f"{plan} {microseconds:.0f} us" if microseconds < 995 else f"{plan} {microseconds / 1e3:.3g} ms"


def _bytes(count: int) -> str:
    """``1.2 GB``, in powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1e3
    return f"{size:.3g} GB"
