"""Which backend runs which pass: every rule of selection is in this file.

`decide` is a pure function of a call, a preference and candidates, so that any machine can be simulated:

1. A backend refuses a pass when one of its requirements for it does not hold, or when its tiny run fails.
2. A preference that names a backend gets that backend for every pass, or an error; nothing takes its place.
3. AUTO takes, for each pass, the first backend of the vendor's `AUTO_ORDER` that does not refuse it,
4. unless another plan for the whole call was measured to be faster by `MARGIN`, on a GPU of exactly this name
   (`cost_model`). A host sync also delays what comes after the call, which no profile counts: a plan with one is taken
   for its speed only where the user's own profile has measured this very call.
5. On a GPU, AUTO takes Emulated only where nothing else runs a pass and `strict` is off; `Decision.falls_back` says so.
6. Weights that were quantized beforehand are read by the backend that wrote them, and by no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from grouped_gemm.backends import Candidate
from grouped_gemm.backends.base import Requirement
from grouped_gemm.core.call_spec import CallSpec, Pass
from grouped_gemm.core.preference import STRICT, BackendKind, KernelPreference, Preference
from grouped_gemm.selection.cost_model import PLANS, Expected, Profile, expected

_EMULATED, _TORCH, _TRITON, _DEEPGEMM, _HIPBLASLT = BackendKind
# The order in which AUTO tries, by vendor; "" is every other device. Each backend has a place, so that each is asked.
AUTO_ORDER: dict[str, tuple[BackendKind, ...]] = {
    "nvidia": (_TRITON, _DEEPGEMM, _TORCH, _HIPBLASLT, _EMULATED),
    "amd": (_TRITON, _HIPBLASLT, _TORCH, _DEEPGEMM, _EMULATED),
    "": (_EMULATED, _TORCH, _TRITON, _DEEPGEMM, _HIPBLASLT),
}
MARGIN = 1.01  # how many times as fast another plan must be: medians of one call differ by almost 1% between runs
Chosen = dict[Pass, BackendKind]


class NoBackendError(RuntimeError):
    """No backend runs the call as it was asked for. The message has every reason of every backend, with its remedy."""


@dataclass(frozen=True)
class Refusal:
    """Why a backend does not run some passes of a call.

    Attributes:
        backend: who refuses.
        passes: the passes it refuses for this reason.
        reason: what is required and what was found, as a phrase; or why it was not tried.
        fix: what the user can do, as a sentence.
    """

    backend: BackendKind
    passes: tuple[Pass, ...]
    reason: str
    fix: str


@dataclass(frozen=True)
class Decision:
    """Who runs which pass of a call, and the whole trace of why.

    Attributes:
        spec: what was asked.
        preference: who should run it, and
        asked_by: where that was said: "argument", "context", "environment" or "default".
        chosen: the backend of each pass that has one.
        refusals: every reason of every candidate that refused a pass, in the order of trying.
        alternatives: where the backend that was asked for refuses, those that would run every pass.
        expected: the measurement that AUTO looked at, if there is one; only plans that nobody refuses.
    """

    spec: CallSpec
    preference: KernelPreference
    asked_by: str
    chosen: tuple[tuple[Pass, BackendKind], ...]
    refusals: tuple[Refusal, ...]
    alternatives: tuple[BackendKind, ...] = ()
    expected: Expected | None = None

    def backend(self, pass_: Pass) -> BackendKind | None:
        """The backend of a pass; None where the pass is not part of the call or no backend runs it."""
        for chosen, backend in self.chosen:
            if chosen is pass_:
                return backend
        return None

    @property
    def backends(self) -> tuple[BackendKind, ...]:
        """Every backend that runs a pass, once."""
        return tuple(dict.fromkeys(backend for _, backend in self.chosen))

    @property
    def summary(self) -> str:
        """``forward triton, dgrad triton``."""
        return ", ".join(f"{pass_.value} {backend.value}" for pass_, backend in self.chosen)

    @property
    def is_complete(self) -> bool:
        """Whether every pass of the call has a backend."""
        return len(self.chosen) == len(self.spec.passes)

    @property
    def falls_back(self) -> bool:
        """Whether AUTO ended at Emulated on a GPU."""
        return (
            self.preference is KernelPreference.AUTO
            and self.spec.machine.is_gpu
            and BackendKind.EMULATED in self.backends
        )

    def refusal_lines(self) -> list[str]:
        """One line for each refusal: backend, passes where it does not concern all, reason, remedy."""
        lines = []
        for refusal in self.refusals:
            everything = refusal.passes == self.spec.passes
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
            head = f"no backend runs {self.spec}"
        else:
            head = f"{self.preference.value}, which the {self.asked_by} asks for, does not run {self.spec}"
        others = [f"{kind.value:10}would run it." for kind in self.alternatives]
        raise NoBackendError("\n".join([head, *(f"  {line}" for line in (*self.refusal_lines(), *others))]))


def decide(
    spec: CallSpec,
    preference: Preference,
    candidates: Sequence[Candidate],
    *,
    asked_by: str = "argument",
    strict: bool = False,
    profiles: Sequence[Profile] = (),
) -> Decision:
    """Picks a backend for each pass of ``spec``.

    Args:
        spec: the facts of the call.
        preference: a backend, or AUTO.
        candidates: the backends of this version, in any order.
        asked_by: where the preference comes from, for the trace.
        strict: whether AUTO may not fall back to Emulated on a GPU.
        profiles: measurements on a GPU of this name, those that count most first.

    Returns:
        A decision, complete or not; `Decision.check` raises where it is not. If a named backend refuses, the
        trace has the others' reasons as well, or names them as alternatives.
    """
    preference = KernelPreference.parse(preference)
    candidates_by_kind = {candidate.backend.kind: candidate for candidate in candidates}
    order = AUTO_ORDER.get(spec.machine.vendor, AUTO_ORDER[""])
    trial = _Trial(spec, candidates_by_kind, strict and preference is KernelPreference.AUTO)
    if (named := preference.kind) is not None:
        if len(trial.healthy(named)) == len(spec.passes):
            return trial.decision(preference, asked_by, dict.fromkeys(spec.passes, named))
        others = (kind for kind in order if kind is not named)
        alternatives = tuple(kind for kind in others if len(trial.healthy(kind)) == len(spec.passes))
        return trial.decision(preference, asked_by, {}, alternatives=alternatives)
    measured = expected(spec, profiles)
    # A tiny run may compile for seconds, so only those are looked at that would be chosen.
    while True:
        found = trial.able(measured)
        chosen = _fastest(_first(spec, order, trial), found)
        if all(trial.healthy(kind) for kind in dict.fromkeys(chosen.values())):
            return trial.decision(preference, asked_by, chosen, found)


def able_plans(spec: CallSpec, candidates: Sequence[Candidate]) -> dict[str, Chosen]:
    """The plans that run every pass of ``spec`` on healthy backends; once where two agree in these passes."""
    trial = _Trial(spec, {candidate.backend.kind: candidate for candidate in candidates}, strict=True)
    able: dict[str, Chosen] = {}
    for name in PLANS:
        plan = trial.plan(name)
        if plan and plan not in able.values() and all(trial.healthy(kind) for kind in plan.values()):
            able[name] = plan
    return able


class _Trial:
    """What the backends say to a call, each asked once, and only where it matters."""

    def __init__(self, spec: CallSpec, candidates: Mapping[BackendKind, Candidate], strict: bool) -> None:
        self._spec = spec
        self._candidates = candidates
        self._strict = strict
        self._refusals: dict[BackendKind, list[Refusal]] = {}
        self._looked_at: set[BackendKind] = set()

    def runs(self, kind: BackendKind) -> list[Pass]:
        """Which passes ``kind`` runs, as far as is known; its reasons for the others go into the trace."""
        if kind not in self._refusals:
            self._refusals[kind] = self._say(kind)
        return [p for p in self._spec.passes if not any(p in refusal.passes for refusal in self._refusals[kind])]

    def healthy(self, kind: BackendKind) -> list[Pass]:
        """Likewise, after its tiny run, if it has a pass to run at all."""
        if self.runs(kind) and kind not in self._looked_at:
            self._looked_at.add(kind)
            health = self._candidates[kind].health()
            if not health.is_good:
                reason = f"is installed but broken: {health.problem}"
                self._refusals[kind].append(Refusal(kind, self._spec.passes, reason, health.fix))
        return self.runs(kind)

    def plan(self, name: str, syncs: bool = True) -> Chosen:
        """The plan of this name for the passes of the call; empty where one is refused or syncs and may not."""
        plan = {pass_: PLANS[name][pass_] for pass_ in self._spec.passes}
        runs = all(kind in self._candidates and pass_ in self.runs(kind) for pass_, kind in plan.items())
        return plan if runs and (syncs or not any(self._syncs(*item) for item in plan.items())) else {}

    def able(self, measured: Expected | None) -> Expected | None:
        """``measured`` without the plans that AUTO may not take; None where none is left."""
        if measured is None:
            return None
        plans = tuple(item for item in measured.plans if self.plan(item[0], syncs=measured.is_exact))
        return replace(measured, plans=plans) if plans else None

    def _syncs(self, pass_: Pass, kind: BackendKind) -> bool:
        backend = self._candidates[kind].backend
        return bool(backend.host_syncs and pass_ in backend.host_sync_passes)

    def _say(self, kind: BackendKind) -> list[Refusal]:
        passes = self._spec.passes
        if kind not in self._candidates:
            return [Refusal(kind, passes, "is not part of this version", "Use another backend.")]
        if kind is BackendKind.EMULATED and self._spec.machine.is_gpu and self._strict:
            fix = "Ask for it with KernelPreference.EMULATED."
            return [Refusal(kind, passes, f"is not tried while {STRICT.name}=1", fix)]
        return _refusals(self._candidates[kind], self._spec)

    def decision(
        self,
        preference: KernelPreference,
        asked_by: str,
        chosen: Chosen,
        expected: Expected | None = None,
        alternatives: tuple[BackendKind, ...] = (),
    ) -> Decision:
        refusals = tuple(refusal for refusals in self._refusals.values() for refusal in refusals)
        in_order = tuple((p, chosen[p]) for p in self._spec.passes if p in chosen)
        return Decision(self._spec, preference, asked_by, in_order, refusals, alternatives, expected)


def _first(spec: CallSpec, order: Sequence[BackendKind], trial: _Trial) -> Chosen:
    """For each pass, the first of ``order`` that runs it and, where it is broken, will say so."""
    chosen: Chosen = {}
    for pass_ in spec.passes:
        for kind in order:
            if pass_ in trial.runs(kind):
                chosen[pass_] = kind
                break
    return chosen


def _fastest(first: Chosen, measured: Expected | None) -> Chosen:
    """``first``, unless a measured plan makes the whole call `MARGIN` times as fast."""
    if measured is None:
        return first
    plans = [({pass_: PLANS[name][pass_] for pass_ in first}, us) for name, us in measured.plans]
    own = [us for plan, us in plans if plan == first]
    best, least = plans[0]
    return best if own and own[0] > MARGIN * least else first


def _refusals(candidate: Candidate, spec: CallSpec) -> list[Refusal]:
    """Every requirement of one backend that does not hold."""
    kind = candidate.backend.kind
    found = []
    for requirement in (*candidate.backend.requirements, *_reads_weights(kind)):
        passes = tuple(p for p in spec.passes if p in requirement.passes)
        if passes and not requirement.holds(spec):
            reason = f"requires {requirement.what}; found {requirement.found(spec)}"
            found.append(Refusal(kind, passes, reason, requirement.fix))
    return found


def _reads_weights(kind: BackendKind) -> tuple[Requirement, Requirement]:
    """Weights that were quantized beforehand are in the layouts of ``kind``."""

    def requirement(pass_: Pass, index: int, fix: str) -> Requirement:
        def found(spec: CallSpec) -> str:
            owner = spec.weights[index] if spec.weights else None
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
