"""The cost model: measured times of whole calls on each plan. AUTO compares them.

A plan names the backend of each pass. A profile has the measured times of whole calls on one GPU, by kind of call and
plan. A time includes all that a call does: group plan, quantizers, GEMMs, host time. Times are never added or scaled.
For sizes that were not measured, the times of the nearest profiled sizes are used. A profile applies only to GPUs of
exactly its name. On other GPUs, AUTO follows the vendor's order.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from grouped_gemm.core.call_spec import CallSpec, Pass
from grouped_gemm.core.preference import BackendKind

# The plans that AUTO compares: the backends of forward, dgrad and wgrad.
PLANS: dict[str, dict[Pass, BackendKind]] = {
    kind.value: dict.fromkeys(Pass, kind) for kind in BackendKind if kind is not BackendKind.EMULATED
}
PLANS["deepgemm, wgrad triton"] = PLANS["deepgemm"] | {Pass.WGRAD: BackendKind.TRITON}


class Call(NamedTuple):
    """A kind of call, with its sizes.

    Attributes:
        recipe: name of the recipe, without "_pow2", since both take the same time.
        rows: name of the row class.
        whole_blocks: whether the caller guarantees that every group is a multiple of 128 rows.
        training: whether the call runs forward and backward, or forward only.
        num_groups: E.
        k: K.
        n: N.
    """

    recipe: str
    rows: str
    whole_blocks: bool
    training: bool
    num_groups: int
    k: int
    n: int

    @classmethod
    def of(cls, spec: CallSpec) -> Call:
        """The kind of call that ``spec`` describes."""
        recipe = spec.recipe.value.removesuffix("_pow2")
        training = spec.passes != (Pass.FORWARD,)
        sizes = spec.num_groups, spec.k, spec.n
        return cls(recipe, spec.rows.value, spec.group_alignment % 128 == 0, training, *sizes)

    def distance(self, other: Call) -> tuple[bool, float]:
        """Whether the calls differ in `whole_blocks`; and the sum of the absolute logarithms of their sizes' ratios.

        E counts half. It says how often a kernel repeats its work; K and N say what the work is.
        """
        groups, k, n = (abs(math.log(max(x, 1) / max(y, 1))) for x, y in zip(self[-3:], other[-3:]))
        return self.whole_blocks != other.whole_blocks, 0.5 * groups + k + n


class Times(NamedTuple):
    """The times of one kind of call, in microseconds by plan; infinite if the plan failed.

    Attributes:
        num_rows: M of the timed calls.
        eager: time of an eager call, on the host or on the device, whichever is longer.
        captured: time of a call that is replayed in a CUDA graph.
        date: the date of the measurement, as "2026-11-26".
    """

    num_rows: int
    eager: Mapping[str, float]
    captured: Mapping[str, float]
    date: str


@dataclass(frozen=True)
class Profile:
    """The measurements of one GPU.

    Attributes:
        gpu: the name of the GPU.
        times: by kind of call.
        is_exact: whether an entry applies to its own sizes only.
    """

    gpu: str
    times: Mapping[Call, Times]
    is_exact: bool = False


@dataclass(frozen=True)
class Expected:
    """The measurement behind a decision.

    Attributes:
        source: a phrase that says where, when and at which sizes it was taken.
        plans: microseconds of a whole call by plan, the fastest first; infinite if the plan failed.
        is_exact: whether the user measured exactly this call.
        sizes: M, E, K and N of the measurement.
    """

    source: str
    plans: tuple[tuple[str, float], ...]
    is_exact: bool = False
    sizes: tuple[int, ...] = ()


def expected(spec: CallSpec, profiles: Sequence[Profile]) -> Expected | None:
    """The times of the nearest call in the first of ``profiles`` that has calls of this kind; None: no profile has.

    float16 takes the times of bfloat16, which runs the same kernels. float32 was not measured.
    """
    if spec.dtype not in (torch.bfloat16, torch.float16):
        return None
    asked = Call.of(spec)
    for profile in profiles:
        alike = [call for call in profile.times if (call[:2], call.training) == (asked[:2], asked.training)]
        if profile.is_exact:
            alike = [call for call in alike if call == asked]
        if alike:
            nearest = min(alike, key=asked.distance)
            times = profile.times[nearest]
            by_plan = times.captured if spec.captured else times.eager
            sizes = f"M={times.num_rows}, E={nearest.num_groups}, K={nearest.k}, N={nearest.n}"
            near = "" if nearest[-3:] == asked[-3:] else ", the nearest profiled sizes"
            source = f"measured on {profile.gpu}, {times.date}, at {sizes}{near}"
            in_full = asked.training == (len(spec.passes) == len(Pass))  # with all gradients, or without any
            plans = tuple(sorted(by_plan.items(), key=lambda item: item[1]))
            return Expected(source, plans, profile.is_exact and in_full, (times.num_rows, *nearest[-3:]))
    return None
