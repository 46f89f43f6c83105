"""The rules of backend selection, all in this file.

`decide` is a pure function of a call, a preference and candidates, so tests can simulate any machine:

1. A backend refuses a pass if one of its requirements for the pass does not hold, or if its health check fails.
2. A preference that names a backend gets that backend for every pass, or an error. There is no fallback.
3. For each pass, AUTO takes the first backend of the vendor's `auto_order` that does not refuse it.
4. AUTO takes another plan instead if the whole call was measured to be faster by `MARGIN`, on a GPU of exactly this
   name (`cost_model`). A host sync also delays work after the call, which no profile counts. So AUTO takes a plan with
   a host sync for its speed only if the user's own profile has measured exactly this call.
5. On a GPU, AUTO falls back to Emulated only if no other backend runs a pass and `strict` is off. `Decision.falls_back`
   then is true.
6. Only the backend that quantized weights beforehand reads them.
7. ``recipe="fp8"`` takes the recipe whose call AUTO measured to be the fastest, with weights quantized in each call. It
   takes none where that was not measured, and where a scaled recipe is not faster by `MARGIN`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from grouped_gemm.backends import Candidate
from grouped_gemm.core.call_spec import CallSpec, Pass
from grouped_gemm.core.preference import STRICT, BackendKind, KernelPreference, Preference
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.selection.cost_model import PLANS, Expected, Profile, expected

# The backends that AUTO tries first, by vendor; "" is every other device.
FIRST: dict[str, tuple[BackendKind, ...]] = {
    "nvidia": (BackendKind.TRITON, BackendKind.DEEPGEMM, BackendKind.TORCH),
    "amd": (BackendKind.TRITON, BackendKind.HIPBLASLT),
    "": (BackendKind.EMULATED,),
}
MARGIN = 1.01  # how many times as fast another plan must be; medians of one call vary by almost 1% between runs
Chosen = dict[Pass, BackendKind]


def auto_order(vendor: str) -> tuple[BackendKind, ...]:
    """The order in which AUTO tries all backends: those of `FIRST`, the others, and Emulated where it is not first."""
    first = FIRST.get(vendor, FIRST[""])
    others = (kind for kind in BackendKind if kind is not BackendKind.EMULATED)
    return tuple(dict.fromkeys((*first, *others, BackendKind.EMULATED)))


class NoBackendError(RuntimeError):
    """No backend runs the call as requested. The message lists every refusal of every backend, with its remedy."""


@dataclass(frozen=True)
class Refusal:
    """Why a backend does not run some passes of a call.

    Attributes:
        backend: the backend that refuses.
        passes: the passes that it refuses for this reason.
        reason: a phrase that says what is required and what was found, or why the backend was not tried.
        fix: a sentence that says what the user can do.
    """

    backend: BackendKind
    passes: tuple[Pass, ...]
    reason: str
    fix: str


@dataclass(frozen=True)
class Decision:
    """The backend of each pass of a call, and the reasons for the choice.

    Attributes:
        spec: the call.
        preference: the backend that was asked for, or AUTO.
        asked_by: where the preference comes from: "argument", "context", "environment" or "default".
        chosen: the backend of each pass that has one.
        refusals: every refusal of every candidate that was tried, in the order in which they were tried.
        alternatives: if the requested backend refuses, the backends that would run every pass.
        expected: the measurement that AUTO used, if there is one, without the plans that are refused.
    """

    spec: CallSpec
    preference: KernelPreference
    asked_by: str
    chosen: tuple[tuple[Pass, BackendKind], ...]
    refusals: tuple[Refusal, ...]
    alternatives: tuple[BackendKind, ...] = ()
    expected: Expected | None = None

    def backend(self, pass_: Pass) -> BackendKind | None:
        """The backend of a pass; None if the pass is not part of the call, or no backend runs it."""
        for chosen, backend in self.chosen:
            if chosen is pass_:
                return backend
        return None

    @property
    def backends(self) -> tuple[BackendKind, ...]:
        """Each backend that runs a pass, once."""
        return tuple(dict.fromkeys(backend for _, backend in self.chosen))

    @property
    def expected_us(self) -> float | None:
        """The measured microseconds of a call on the chosen backends; None: they were not measured, or failed."""
        chosen = dict(self.chosen)
        for name, us in self.expected.plans if self.expected else ():
            if chosen == {pass_: PLANS[name][pass_] for pass_ in self.spec.passes} and us < math.inf:
                return us
        return None

    @property
    def is_complete(self) -> bool:
        """Whether every pass of the call has a backend."""
        return len(self.chosen) == len(self.spec.passes)

    @property
    def falls_back(self) -> bool:
        """Whether AUTO fell back to Emulated on a GPU."""
        return (
            self.preference is KernelPreference.AUTO
            and self.spec.machine.is_gpu
            and BackendKind.EMULATED in self.backends
        )

    def refusal_lines(self) -> list[str]:
        """One line for each refusal: backend, passes (unless it is all of them), reason, remedy."""
        lines = []
        for refusal in self.refusals:
            everything = refusal.passes == self.spec.passes
            passes = "" if everything else "+".join(p.value for p in refusal.passes) + " "
            lines.append(f"{refusal.backend.value:10}{passes}{refusal.reason}. {refusal.fix}".rstrip())
        return lines

    def check(self) -> None:
        """Checks that every pass has a backend.

        Raises:
            NoBackendError: a pass has none.
        """
        if self.is_complete:
            return
        if self.preference is KernelPreference.AUTO:
            head = f"no backend runs {self.spec}"
        else:
            head = f"{self.preference.value}, requested by the {self.asked_by}, does not run {self.spec}"
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
        spec: the call.
        preference: a backend, or AUTO.
        candidates: the backends of this version, in any order.
        asked_by: where the preference comes from, for `Decision.asked_by`.
        strict: whether to forbid the fallback of AUTO to Emulated on a GPU.
        profiles: measurements on a GPU of this name, in order of precedence.

    Returns:
        A decision, complete or not; `Decision.check` raises if it is not. If a named backend refuses, the decision also
        has the refusals of the other backends, or names them as alternatives.
    """
    preference = KernelPreference.parse(preference)
    candidates_by_kind = {candidate.backend.kind: candidate for candidate in candidates}
    order = auto_order(spec.machine.vendor)
    selection = _Selection(spec, candidates_by_kind, strict and preference is KernelPreference.AUTO)
    if (named := preference.kind) is not None:
        if len(selection.healthy(named)) == len(spec.passes):
            return selection.decision(preference, asked_by, dict.fromkeys(spec.passes, named))
        others = (kind for kind in order if kind is not named)
        alternatives = tuple(kind for kind in others if len(selection.healthy(kind)) == len(spec.passes))
        return selection.decision(preference, asked_by, {}, alternatives=alternatives)
    measured = expected(spec, profiles)
    # A health check may compile for seconds, so only backends that would be chosen are checked.
    while True:
        found = selection.able(measured)
        chosen = _fastest(_first(spec, order, selection), found)
        if all(selection.healthy(kind) for kind in dict.fromkeys(chosen.values())):
            return selection.decision(preference, asked_by, chosen, found)


def times_of_recipes(decisions: Sequence[Decision]) -> dict[Recipe, float]:
    """Measured microseconds by recipe, of decisions on one call in recipes of which the first is none.

    Recipes that were measured at other sizes than none are left out, and those of which one is from the user's own
    profile and the other is not. Without a time of none, there are no times.
    """
    none, *_ = decisions
    if none.expected is None or none.expected_us is None:
        return {}
    alike = none.expected.sizes, none.expected.is_exact
    return {
        decision.spec.recipe: us
        for decision in decisions
        if (us := decision.expected_us) is not None
        and decision.expected
        and (decision.expected.sizes, decision.expected.is_exact) == alike
    }


def fastest_recipe(times: Mapping[Recipe, float]) -> Recipe:
    """The recipe that ``recipe="fp8"`` stands for, from `times_of_recipes`."""
    best = min(times, key=lambda recipe: times[recipe], default=Recipe.NONE)
    return best if best in times and times[Recipe.NONE] > MARGIN * times[best] else Recipe.NONE


def able_plans(spec: CallSpec, candidates: Sequence[Candidate]) -> dict[str, Chosen]:
    """The plans that run every pass of ``spec`` on healthy backends. Of plans that agree in these passes, the first."""
    selection = _Selection(spec, {candidate.backend.kind: candidate for candidate in candidates}, strict=True)
    able: dict[str, Chosen] = {}
    for name in PLANS:
        plan = selection.plan(name)
        if plan and plan not in able.values() and all(selection.healthy(kind) for kind in plan.values()):
            able[name] = plan
    return able


class _Selection:
    """The refusals of each backend for one call. A backend is tried once, when it is first needed."""

    def __init__(self, spec: CallSpec, candidates: Mapping[BackendKind, Candidate], strict: bool) -> None:
        self._spec = spec
        self._candidates = candidates
        self._strict = strict
        self._refusals: dict[BackendKind, list[Refusal]] = {}
        self._health_checked: set[BackendKind] = set()

    def runs(self, kind: BackendKind) -> list[Pass]:
        """The passes that ``kind`` runs as far as is known. Records its refusals of the others."""
        if kind not in self._refusals:
            self._refusals[kind] = self._refusals_of(kind)
        return [p for p in self._spec.passes if not any(p in refusal.passes for refusal in self._refusals[kind])]

    def healthy(self, kind: BackendKind) -> list[Pass]:
        """The passes that ``kind`` runs after its health check. A backend that runs no pass is not checked."""
        if self.runs(kind) and kind not in self._health_checked:
            self._health_checked.add(kind)
            health = self._candidates[kind].health()
            if not health.is_good:
                reason = f"is installed but broken: {health.problem}"
                self._refusals[kind].append(Refusal(kind, self._spec.passes, reason, health.fix))
        return self.runs(kind)

    def plan(self, name: str, syncs: bool = True) -> Chosen:
        """The plan of this name for the passes of the call. Empty if a pass is refused, or has a host sync although
        ``syncs`` is False.
        """
        plan = {pass_: PLANS[name][pass_] for pass_ in self._spec.passes}
        runs = all(kind in self._candidates and pass_ in self.runs(kind) for pass_, kind in plan.items())
        return plan if runs and (syncs or not any(self._syncs(*item) for item in plan.items())) else {}

    def able(self, measured: Expected | None) -> Expected | None:
        """``measured`` without the plans that AUTO must not take; None if no plan is left."""
        if measured is None:
            return None
        plans = tuple(item for item in measured.plans if self.plan(item[0], syncs=measured.is_exact))
        return replace(measured, plans=plans) if plans else None

    def _syncs(self, pass_: Pass, kind: BackendKind) -> bool:
        backend = self._candidates[kind].backend
        return bool(backend.host_syncs and pass_ in backend.host_sync_passes)

    def _refusals_of(self, kind: BackendKind) -> list[Refusal]:
        passes = self._spec.passes
        if kind not in self._candidates:
            return [Refusal(kind, passes, "is not part of this version", "Use another backend.")]
        if kind is BackendKind.EMULATED and self._spec.machine.is_gpu and self._strict:
            fix = "Ask for it with KernelPreference.EMULATED."
            return [Refusal(kind, passes, f"is not tried while {STRICT.name}=1", fix)]
        return _unmet_requirements(self._candidates[kind], self._spec)

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


def _first(spec: CallSpec, order: Sequence[BackendKind], selection: _Selection) -> Chosen:
    """For each pass, the first backend of ``order`` that runs it. Its health may still be unchecked."""
    chosen: Chosen = {}
    for pass_ in spec.passes:
        for kind in order:
            if pass_ in selection.runs(kind):
                chosen[pass_] = kind
                break
    return chosen


def _fastest(first: Chosen, measured: Expected | None) -> Chosen:
    """The fastest measured plan if it is at least `MARGIN` times as fast as ``first``; else ``first``."""
    if measured is None:
        return first
    plans = [({pass_: PLANS[name][pass_] for pass_ in first}, us) for name, us in measured.plans]
    own = [us for plan, us in plans if plan == first]
    best, least = plans[0]
    return best if own and own[0] > MARGIN * least else first


def _unmet_requirements(candidate: Candidate, spec: CallSpec) -> list[Refusal]:
    """A refusal for each requirement of one backend that does not hold, and for weights in another's layout."""
    kind = candidate.backend.kind
    found = []
    for requirement in candidate.backend.requirements:
        passes = tuple(p for p in spec.passes if p in requirement.passes)
        if passes and not requirement.holds(spec):
            reason = f"requires {requirement.what}; found {requirement.found(spec)}"
            found.append(Refusal(kind, passes, reason, requirement.fix))
    for pass_, owner in zip((Pass.FORWARD, Pass.DGRAD), spec.weights or ()):
        if pass_ in spec.passes and owner is not kind:
            layout = "no such layout" if owner is None else f"the layout of {owner.value}"
            reason = f"requires quantized weights in its layout for {pass_.value}; found {layout}"
            dgrad = "dgrad=True and " if pass_ is Pass.DGRAD else ""
            fix = f"Quantize them with {dgrad}the kernel_preference of the call."
            found.append(Refusal(kind, (pass_,), reason, fix))
    return found
