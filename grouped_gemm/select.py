"""Which backend runs which pass: every rule of selection is in this file.

`decide` is a pure function of a problem, a preference and candidates, so that any machine can be simulated:

1. A backend refuses a pass when one of its requirements for it does not hold, or when its tiny run fails.
2. A preference that names a backend gets that backend for every pass, or an error; nothing takes its place.
3. AUTO takes, for each pass, the first backend of its `auto_order` that does not refuse it.
4. On a GPU, AUTO takes Emulated only where `strict` is off, and `Decision.falls_back` says so.
5. Weights that were quantized beforehand are read by the backend that wrote them, and by no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grouped_gemm.backends import Candidate
from grouped_gemm.backends.base import Requirement
from grouped_gemm.preference import STRICT, KernelPreference
from grouped_gemm.problem import Pass, Problem
from grouped_gemm.recipes import Recipe

# In which order AUTO tries, by vendor; "" is every other device. Each backend has a place, so that each has its say.
# `auto_order` has the exception.
AUTO_ORDER: dict[str, tuple[KernelPreference, ...]] = {
    "nvidia": (
        KernelPreference.TRITON,
        KernelPreference.DEEPGEMM,
        KernelPreference.TORCH,
        KernelPreference.HIPBLASLT,
        KernelPreference.EMULATED,
    ),
    "amd": (
        KernelPreference.TRITON,
        KernelPreference.HIPBLASLT,
        KernelPreference.TORCH,
        KernelPreference.DEEPGEMM,
        KernelPreference.EMULATED,
    ),
    "": (
        KernelPreference.EMULATED,
        KernelPreference.TORCH,
        KernelPreference.TRITON,
        KernelPreference.DEEPGEMM,
        KernelPreference.HIPBLASLT,
    ),
}


def auto_order(problem: Problem, pass_: Pass) -> tuple[KernelPreference, ...]:
    """In which order AUTO tries: the vendor's, but DeepGEMM first where its groups need no padding.

    On an H200 (2026-11-21) its blockwise forward and dgrad are 1.03 to 1.18 times as fast as Triton's on groups of
    whole blocks. Padding others costs up to 12% more rows and a copy of the result, and its wgrad is mostly slower.
    """
    order = AUTO_ORDER.get(problem.machine.vendor, AUTO_ORDER[""])
    first = KernelPreference.DEEPGEMM
    is_blockwise = problem.recipe in (Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2)
    if problem.machine.vendor != "nvidia" or not is_blockwise or pass_ is Pass.WGRAD or problem.group_alignment % 128:
        return order
    return (first, *(kind for kind in order if kind is not first))


class NoBackendError(RuntimeError):
    """No backend runs the call as it was asked for. The message has every reason of every backend, with its remedy."""


@dataclass(frozen=True)
class Refusal:
    """Why a backend does not run some passes of a problem.

    Attributes:
        backend: who refuses.
        passes: the passes it refuses for this reason.
        reason: what is required and what was found, as a phrase; or why it was not tried.
        fix: what the user can do, as a sentence.
    """

    backend: KernelPreference
    passes: tuple[Pass, ...]
    reason: str
    fix: str


@dataclass(frozen=True)
class Decision:
    """Who runs which pass of a problem, and the whole trace of why.

    Attributes:
        problem: what was asked.
        preference: who should run it, and
        asked_by: where that was said: "argument", "context", "environment" or "default".
        chosen: the backend of each pass that has one.
        refusals: every reason of every candidate that refused a pass, in the order of trying.
        alternatives: where the backend that was asked for refuses, those that would run every pass.
    """

    problem: Problem
    preference: KernelPreference
    asked_by: str
    chosen: tuple[tuple[Pass, KernelPreference], ...]
    refusals: tuple[Refusal, ...]
    alternatives: tuple[KernelPreference, ...] = ()

    def backend(self, pass_: Pass) -> KernelPreference | None:
        """The backend of a pass; None where the pass is not part of the problem or no backend runs it."""
        for chosen, backend in self.chosen:
            if chosen is pass_:
                return backend
        return None

    @property
    def backends(self) -> tuple[KernelPreference, ...]:
        """Every backend that runs a pass, once."""
        return tuple(dict.fromkeys(backend for _, backend in self.chosen))

    @property
    def is_complete(self) -> bool:
        """Whether every pass of the problem has a backend."""
        return len(self.chosen) == len(self.problem.passes)

    @property
    def falls_back(self) -> bool:
        """Whether AUTO ended at Emulated on a GPU."""
        return (
            self.preference is KernelPreference.AUTO
            and self.problem.machine.is_gpu
            and KernelPreference.EMULATED in self.backends
        )

    def refusal_lines(self) -> list[str]:
        """One line for each refusal: backend, passes where it does not concern all, reason, remedy."""
        lines = []
        for refusal in self.refusals:
            everything = refusal.passes == self.problem.passes
            passes = "" if everything else "+".join(p.value for p in refusal.passes) + " "
            lines.append(f"{refusal.backend.value:10}{passes}{refusal.reason}. {refusal.fix}".rstrip())
        return lines

    def check(self) -> None:
        """Returns where every pass has a backend.

        Raises:
            NoBackendError: a pass has none.
        """
        if self.is_complete:
            return
        if self.preference is KernelPreference.AUTO:
            head = f"no backend runs {self.problem}"
        else:
            head = f"{self.preference.value}, which the {self.asked_by} asks for, does not run {self.problem}"
        others = [f"{kind.value:10}would run it." for kind in self.alternatives]
        raise NoBackendError("\n".join([head, *(f"  {line}" for line in (*self.refusal_lines(), *others))]))


def decide(
    problem: Problem,
    preference: KernelPreference,
    candidates: Sequence[Candidate],
    *,
    asked_by: str = "argument",
    strict: bool = False,
) -> Decision:
    """Picks a backend for each pass of ``problem``.

    Args:
        problem: the facts of the call.
        preference: a backend, or AUTO.
        candidates: the backends of this version, in any order.
        asked_by: where the preference comes from, for the trace.
        strict: whether AUTO may not fall back to Emulated on a GPU.

    Returns:
        A decision, complete or not; `Decision.check` raises where it is not. If a named backend refuses, the
        trace has the others' reasons as well, or names them as alternatives.
    """
    by_kind = {candidate.backend.kind: candidate for candidate in candidates}
    order = AUTO_ORDER.get(problem.machine.vendor, AUTO_ORDER[""])
    refusals: list[Refusal] = []

    def try_passes(kind: KernelPreference) -> list[Pass]:
        """Which passes ``kind`` runs; its reasons for the others go into the trace."""
        if kind not in by_kind:
            refusals.append(Refusal(kind, problem.passes, "is not part of this version", "Use another backend."))
            return []
        found = _refusals(by_kind[kind], problem)
        refusals.extend(found)
        return [p for p in problem.passes if not any(p in refusal.passes for refusal in found)]

    if preference is not KernelPreference.AUTO:
        runs = try_passes(preference)
        if len(runs) == len(problem.passes):
            return Decision(problem, preference, asked_by, tuple((p, preference) for p in runs), tuple(refusals))
        others = (kind for kind in order if kind is not preference)
        alternatives = tuple(kind for kind in others if len(try_passes(kind)) == len(problem.passes))
        return Decision(problem, preference, asked_by, (), tuple(refusals), alternatives)

    chosen: dict[Pass, KernelPreference] = {}
    tried: dict[KernelPreference, list[Pass]] = {}
    for pass_ in problem.passes:
        for kind in auto_order(problem, pass_):
            if kind not in tried:
                if kind is KernelPreference.EMULATED and problem.machine.is_gpu and strict:
                    fix = "Ask for it with KernelPreference.EMULATED."
                    refusals.append(Refusal(kind, problem.passes, f"is not tried while {STRICT.name}=1", fix))
                    tried[kind] = []
                else:
                    tried[kind] = try_passes(kind)
            if pass_ in tried[kind]:
                chosen[pass_] = kind
                break
    in_order = tuple((p, chosen[p]) for p in problem.passes if p in chosen)
    return Decision(problem, preference, asked_by, in_order, tuple(refusals))


def _refusals(candidate: Candidate, problem: Problem) -> list[Refusal]:
    """Every reason of one backend; its health is asked for only where nothing else stands against it."""
    kind = candidate.backend.kind
    found = []
    for requirement in (*candidate.backend.requirements, *_reads_weights(kind)):
        passes = tuple(p for p in problem.passes if p in requirement.passes)
        if passes and not requirement.holds(problem):
            reason = f"requires {requirement.what}; found {requirement.found(problem)}"
            found.append(Refusal(kind, passes, reason, requirement.fix))
    if any(all(p not in refusal.passes for refusal in found) for p in problem.passes):
        health = candidate.health()
        if not health.is_good:
            found.append(Refusal(kind, problem.passes, f"is installed but broken: {health.problem}", health.fix))
    return found


def _reads_weights(kind: KernelPreference) -> tuple[Requirement, Requirement]:
    """Weights that were quantized beforehand are in the layouts of ``kind``."""

    def requirement(pass_: Pass, index: int, fix: str) -> Requirement:
        def found(problem: Problem) -> str:
            owner = problem.weights[index] if problem.weights else None
            return "none" if owner is None else f"{owner.value}'s"

        return Requirement(
            what=f"quantized weights in its layout for {pass_.value}",
            holds=lambda p: p.weights is None or p.weights[index] is kind,
            found=found,
            fix=fix,
            passes=(pass_,),
        )

    return (
        requirement(Pass.FORWARD, 0, "Quantize them with the kernel_preference that the call has."),
        requirement(Pass.DGRAD, 1, "Quantize them with dgrad=True and the kernel_preference that the call has."),
    )
