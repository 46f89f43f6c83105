"""Selection on made-up machines: which backend runs a pass, which ones refuse it and why, and the messages about it.

The backends of this file declare requirements like those of real ones, and run nothing. Only Emulated is real.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from grouped_gemm import (
    BackendKind,
    CallSpec,
    Explanation,
    KernelPreference,
    Machine,
    NoBackendError,
    Pass,
    Recipe,
    backends,
    grouped_mm,
    quantize_weights,
)
from grouped_gemm.backends import Candidate, emulated
from grouped_gemm.backends.base import (
    Health,
    Requirement,
    _GroupedMMBackend,
    requires_arch,
    requires_dtype,
    requires_recipe,
)
from grouped_gemm.core import call_spec
from grouped_gemm.core.call_spec import RowClass, row_class
from grouped_gemm.selection import explanation as explanation_module
from grouped_gemm.selection import route
from grouped_gemm.selection import spec as spec_module
from grouped_gemm.selection.rules import Decision, auto_order, decide

AUTO = KernelPreference.AUTO
EMULATED, TORCH, TRITON = BackendKind.EMULATED, BackendKind.TORCH, BackendKind.TRITON
DEEPGEMM, HIPBLASLT = BackendKind.DEEPGEMM, BackendKind.HIPBLASLT
FORWARD, DGRAD, WGRAD = Pass
TRAINING = (FORWARD, DGRAD, WGRAD)

MACHINES = {
    "H100": Machine("nvidia", "sm_90", "NVIDIA H100 80GB HBM3"),
    "H200": Machine("nvidia", "sm_90", "NVIDIA H200"),
    "B200": Machine("nvidia", "sm_100", "NVIDIA B200"),
    "RTX 4090": Machine("nvidia", "sm_89", "NVIDIA GeForce RTX 4090"),
    "MI300X": Machine("amd", "gfx942", "AMD Instinct MI300X"),
    "MI355X": Machine("amd", "gfx950", "AMD Instinct MI355X"),
    "CPU": Machine("cpu", "cpu", "cpu"),
}
GPUS = tuple(name for name in MACHINES if name != "CPU")


class Declared(_GroupedMMBackend):
    """A backend that only says what it requires."""

    summary = "Says what it requires."

    def plan(self, *args, **kwargs):
        raise AssertionError("selection must not run a backend")

    quantize_activations = quantize_weights = adopt_weights = grouped_mm = _wgrad = bias_grad = plan


class DeepGEMM(Declared):
    kind = DEEPGEMM
    requirements = (
        requires_recipe((Recipe.FP8_BLOCKWISE,)),
        requires_dtype((torch.bfloat16,)),
        requires_arch(("sm_90", "sm_100"), "Use another backend."),
        requires_arch(("sm_90",), "Use another backend.", passes=(WGRAD,)),
    )

    def padded_to(self, spec: CallSpec) -> int:
        return 128


class Triton(Declared):
    kind = TRITON
    requirements = (requires_arch(("sm_89", "sm_90", "sm_100", "gfx942", "gfx950"), "Use KernelPreference.EMULATED."),)


class Torch(Declared):
    kind = TORCH
    requirements = (
        requires_recipe((Recipe.NONE, Recipe.FP8_ROWWISE)),
        requires_arch(("sm_90", "sm_100", "gfx942", "gfx950"), "Use another backend."),
        Requirement(
            what="groups aligned to 16",
            holds=lambda p: not p.recipe.is_scaled or p.group_alignment % 16 == 0,
            found=lambda p: f"group_alignment={p.group_alignment}",
            fix="Pad every group and guarantee group_alignment=16.",
        ),
    )


class HipBLASLt(Declared):
    kind = HIPBLASLT
    host_syncs = "offs is read at every pass"
    requirements = (
        requires_recipe((Recipe.NONE, Recipe.FP8_ROWWISE)),
        requires_arch(("gfx942", "gfx950"), "Use another backend."),
    )


BACKENDS = {b.kind: b for b in (DeepGEMM(), Triton(), Torch(), HipBLASLt(), emulated.Backend())}
KINDS = tuple(BACKENDS)
STATES = ("present", "broken", "absent")
BROKEN = Health("built for another torch", "Reinstall it.")
EVERYTHING: dict[BackendKind, str] = dict.fromkeys(KINDS, "present")


def candidates(states: Mapping[BackendKind, str]) -> list[Candidate]:
    """The backends that are not absent; those that are not named are present."""
    health = {"present": Health, "broken": lambda: BROKEN}
    states = EVERYTHING | dict(states)
    return [Candidate(BACKENDS[kind], health[states[kind]]) for kind in KINDS if states[kind] != "absent"]


def spec(machine: str, recipe: Recipe = Recipe.FP8_BLOCKWISE, passes=TRAINING, **facts) -> CallSpec:
    return CallSpec(MACHINES[machine], 8, 4096, 2048, RowClass.LARGE, recipe, passes=passes, **facts)


def auto(asked: CallSpec, states: Mapping[BackendKind, str] = EVERYTHING, **options) -> Decision:
    return decide(asked, AUTO, candidates(states), asked_by="default", **options)


def choice(decision: Decision) -> tuple[BackendKind | None, ...]:
    return tuple(decision.backend(pass_) for pass_ in decision.spec.passes)


def message(decision: Decision) -> list[str]:
    with pytest.raises(NoBackendError) as error:
        decision.check()
    return str(error.value).splitlines()


every_machine = pytest.mark.parametrize("machine", MACHINES)
every_gpu = pytest.mark.parametrize("machine", GPUS)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)


def call_specs(machine: str) -> list[CallSpec]:
    """Call specs on a machine: recipes and passes, then changes of a single fact."""
    recipes = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)
    facts = ({"dtype": torch.float16}, {"group_alignment": 16}, {"host_sync": False}, {"weights": (TRITON, TORCH)})
    return [
        *(spec(machine, recipe, passes) for recipe in recipes for passes in ((FORWARD,), TRAINING)),
        *(spec(machine, Recipe.FP8_ROWWISE, (FORWARD, DGRAD), **fact) for fact in facts),
    ]


@functools.cache
def sweep(machine: str, strict: bool = False) -> list[tuple[CallSpec, dict[BackendKind, str], Decision]]:
    """AUTO's decision for every call spec, with backends present, absent or broken in every combination."""
    combinations = [dict(zip(KINDS, states)) for states in itertools.product(STATES, repeat=len(KINDS))]
    return [(p, states, auto(p, states, strict=strict)) for p in call_specs(machine) for states in combinations]


def runs(kind: BackendKind, asked: CallSpec, pass_: Pass, states: Mapping[BackendKind, str]) -> bool:
    """Whether a backend can run a pass, straight from what it declares."""
    owners = asked.weights and dict(zip((FORWARD, DGRAD), asked.weights))
    needed = [requirement for requirement in BACKENDS[kind].requirements if pass_ in requirement.passes]
    return (
        states[kind] == "present"
        and all(requirement.holds(asked) for requirement in needed)
        and (not owners or owners.get(pass_) is kind)
    )


# AUTO


@pytest.mark.parametrize(
    ("machine", "recipe", "states", "expected"),
    (
        ("H100", Recipe.NONE, {}, (TRITON, TRITON, TRITON)),
        ("H100", Recipe.FP8_ROWWISE, {}, (TRITON, TRITON, TRITON)),
        ("H100", Recipe.FP8_BLOCKWISE, {}, (TRITON, TRITON, TRITON)),
        ("H100", Recipe.MXFP8, {}, (TRITON, TRITON, TRITON)),
        ("H200", Recipe.FP8_BLOCKWISE, {}, (TRITON, TRITON, TRITON)),
        ("H200", Recipe.FP8_BLOCKWISE, {TRITON: "broken"}, (DEEPGEMM, DEEPGEMM, DEEPGEMM)),
        ("H200", Recipe.NONE, {TRITON: "absent"}, (TORCH, TORCH, TORCH)),
        ("B200", Recipe.FP8_BLOCKWISE, {}, (TRITON, TRITON, TRITON)),
        ("B200", Recipe.FP8_BLOCKWISE, {TRITON: "absent"}, (DEEPGEMM, DEEPGEMM, EMULATED)),
        ("B200", Recipe.MXFP8, {}, (TRITON, TRITON, TRITON)),
        ("RTX 4090", Recipe.FP8_BLOCKWISE, {}, (TRITON, TRITON, TRITON)),
        ("RTX 4090", Recipe.NONE, {TRITON: "broken"}, (EMULATED, EMULATED, EMULATED)),
        ("MI300X", Recipe.FP8_ROWWISE, {}, (TRITON, TRITON, TRITON)),
        ("MI300X", Recipe.FP8_ROWWISE, {TRITON: "broken"}, (HIPBLASLT, HIPBLASLT, HIPBLASLT)),
        ("MI300X", Recipe.NONE, {TRITON: "absent", HIPBLASLT: "absent"}, (TORCH, TORCH, TORCH)),
        ("MI355X", Recipe.FP8_BLOCKWISE, {}, (TRITON, TRITON, TRITON)),
        ("MI355X", Recipe.FP8_BLOCKWISE, {TRITON: "broken"}, (EMULATED, EMULATED, EMULATED)),
        ("CPU", Recipe.NONE, {}, (EMULATED, EMULATED, EMULATED)),
        ("CPU", Recipe.FP8_BLOCKWISE, {}, (EMULATED, EMULATED, EMULATED)),
    ),
    ids=lambda value: value if isinstance(value, str) else getattr(value, "value", ""),
)
def test_auto_chooses_the_expected_backends(machine, recipe, states, expected):
    assert choice(auto(spec(machine, recipe), states)) == expected


def test_a_guaranteed_alignment_enables_a_backend():
    asked = spec("H100", Recipe.FP8_ROWWISE)
    guaranteed = asked._replace(group_alignment=48)
    assert choice(auto(asked, {TRITON: "absent"})) == (EMULATED, EMULATED, EMULATED)
    assert choice(auto(guaranteed, {TRITON: "absent"})) == (TORCH, TORCH, TORCH)


@every_machine
def test_auto_takes_the_first_backend_in_its_order_that_runs_each_pass(machine):
    order = [kind for kind in auto_order(MACHINES[machine].vendor) if kind in KINDS]
    for asked, states, decision in sweep(machine):
        expected = tuple(next((k for k in order if runs(k, asked, p, states)), None) for p in asked.passes)
        assert choice(decision) == expected


@every_machine
def test_where_no_backend_runs_a_pass_every_candidate_gives_a_reason(machine):
    for asked, states, decision in sweep(machine):
        for pass_, kind in itertools.product(asked.passes, KINDS):
            if decision.backend(pass_) is None and states[kind] != "absent":
                assert any(r.backend is kind and pass_ in r.passes for r in decision.refusals), (
                    f"{kind.value} gives no reason against {pass_.value} of {asked}: {decision.refusal_lines()}"
                )


@every_gpu
def test_auto_never_takes_emulated_on_a_gpu_without_saying_so(machine):
    for _, _, decision in sweep(machine):
        assert decision.falls_back == (EMULATED in choice(decision))


@every_gpu
def test_strict_never_takes_emulated_and_changes_nothing_else(machine):
    for (_, _, decision), (_, _, strict) in zip(sweep(machine), sweep(machine, strict=True)):
        assert choice(strict) == tuple(None if kind is EMULATED else kind for kind in choice(decision))


@every_gpu
def test_every_reason_has_a_remedy(machine):
    for _, _, decision in sweep(machine, strict=True):
        assert all(refusal.reason and refusal.fix for refusal in decision.refusals)


def test_strict_means_nothing_on_a_cpu():
    decision = auto(spec("CPU"), strict=True)
    assert decision.is_complete
    assert not decision.falls_back


def test_asking_for_emulated_on_a_gpu_is_no_fallback_even_under_strict():
    decision = decide(spec("H100"), EMULATED, candidates({}), strict=True)
    assert choice(decision) == (EMULATED, EMULATED, EMULATED)
    assert not decision.falls_back


def test_a_backend_with_host_syncs_is_passed_over_where_they_are_not_allowed():
    asked = spec("RTX 4090", Recipe.NONE, host_sync=False)
    assert choice(auto(asked)) == (TRITON, TRITON, TRITON)
    assert not auto(asked, {TRITON: "broken"}).is_complete


# A named backend


@every_kind
@every_machine
def test_a_named_backend_runs_every_pass_or_none(machine, kind):
    for asked, state in itertools.product(call_specs(machine), STATES):
        decision = decide(asked, kind, candidates({kind: state}))
        complete = all(runs(kind, asked, p, {kind: state}) for p in asked.passes)
        assert choice(decision) == (kind if complete else None,) * len(asked.passes)


@every_kind
@every_machine
def test_a_named_backend_that_does_not_run_raises_its_reason(machine, kind):
    for asked, state in itertools.product(call_specs(machine), STATES):
        decision = decide(asked, kind, candidates({kind: state}))
        if not decision.is_complete:
            head, reason, *_ = message(decision)
            assert head.startswith(f"{kind.value}, requested by the argument, does not run grouped_mm(")
            assert reason.startswith(f"  {kind.value} ")


@every_kind
@every_machine
def test_where_a_named_backend_refuses_the_alternatives_are_those_that_run_every_pass(machine, kind):
    for asked, state in itertools.product(call_specs(machine), ("absent", "broken")):
        decision = decide(asked, kind, candidates({kind: state}))
        others = {k for k in KINDS if k is not kind and all(runs(k, asked, p, EVERYTHING) for p in asked.passes)}
        assert set(decision.alternatives) == others


def test_a_complete_decision_passes_its_check():
    auto(spec("H100")).check()


# Error messages


def test_the_error_of_a_named_backend_gives_its_reasons_and_the_alternatives():
    head, *lines = message(decide(spec("B200"), DEEPGEMM, candidates({}), asked_by="environment"))
    assert head == (
        "deepgemm, requested by the environment, does not run "
        "grouped_mm(E=8, K=4096, N=2048, fp8_blockwise, bfloat16, sm_100, forward+dgrad+wgrad)"
    )
    for line in (
        "  deepgemm  wgrad requires sm_90; found sm_100. Use another backend.",
        "  triton    would run it.",
        "  torch     requires recipe none or fp8_rowwise; found fp8_blockwise. "
        "Use one of these recipes, or another backend.",
        "  torch     requires groups aligned to 16; found group_alignment=1. "
        "Pad every group and guarantee group_alignment=16.",
        "  emulated  would run it.",
    ):
        assert line in lines


def test_the_error_under_strict_names_the_switch_every_reason_and_every_remedy():
    states = {TRITON: "broken", DEEPGEMM: "absent"}
    head, *lines = message(auto(spec("RTX 4090", Recipe.NONE, (FORWARD,)), states, strict=True))
    assert head == "no backend runs grouped_mm(E=8, K=4096, N=2048, none, bfloat16, sm_89, forward)"
    for line in (
        "  deepgemm  is not part of this version. Use another backend.",
        "  triton    is installed but broken: built for another torch. Reinstall it.",
        "  torch     requires sm_90 or sm_100 or gfx942 or gfx950; found sm_89. Use another backend.",
        "  emulated  is not tried while GROUPED_GEMM_STRICT=1. Ask for it with KernelPreference.EMULATED.",
    ):
        assert line in lines


def test_a_reason_against_some_passes_names_them():
    decision = auto(spec("B200"), {TRITON: "absent"})
    (line,) = (line for line in decision.refusal_lines() if line.startswith("deepgemm"))
    assert line == "deepgemm  wgrad requires sm_90; found sm_100. Use another backend."


# Health


def fail_if_checked() -> Health:
    pytest.fail("health was checked")


@every_machine
def test_health_is_checked_only_where_every_requirement_of_a_pass_holds(machine):
    for asked, (kind, backend) in itertools.product(call_specs(machine), BACKENDS.items()):
        if not any(runs(kind, asked, p, EVERYTHING) for p in asked.passes):
            assert not decide(asked, kind, [Candidate(backend, fail_if_checked)]).is_complete


def test_health_is_checked_where_a_requirement_fails_for_another_pass_only():
    decision = auto(spec("B200"), {TRITON: "absent", DEEPGEMM: "broken"})
    assert [r.passes for r in decision.refusals if "broken" in r.reason] == [TRAINING]


def test_health_of_a_later_backend_is_not_checked():
    (fast,) = (candidate for candidate in candidates({}) if candidate.backend.kind is TRITON)
    others = [Candidate(c.backend, fail_if_checked) for c in candidates({}) if c.backend.kind is not TRITON]
    assert choice(decide(spec("H100"), AUTO, [*others, fast])) == (TRITON, TRITON, TRITON)


def test_health_is_checked_once(monkeypatch):
    runs_of_health = []
    monkeypatch.setattr(emulated.Backend, "health", lambda self, device: runs_of_health.append(device) or BROKEN)
    cpu = torch.device("cpu")
    (candidate,) = (c for c in backends.candidates.__wrapped__(cpu) if c.backend.kind is EMULATED)
    assert candidate.health() == candidate.health() == BROKEN
    assert runs_of_health == [cpu]


# Weights that were quantized beforehand


def test_only_the_backend_that_wrote_the_weights_reads_them():
    asked = spec("H100", passes=(FORWARD, DGRAD), weights=(DEEPGEMM, DEEPGEMM))
    decision = auto(asked)
    assert choice(decision) == (DEEPGEMM, DEEPGEMM)
    assert decision.refusal_lines()[0] == (
        "triton    forward requires quantized weights in its layout for forward; found the layout of deepgemm. "
        "Quantize them with the kernel_preference of the call."
    )


def test_each_pass_runs_on_the_backend_that_wrote_its_layout():
    asked = spec("H100", passes=(FORWARD, DGRAD), weights=(DEEPGEMM, TRITON))
    assert choice(auto(asked)) == (DEEPGEMM, TRITON)


def test_weights_without_a_layout_for_dgrad_say_how_to_get_one():
    decision = auto(spec("H100", passes=(FORWARD, DGRAD), weights=(TRITON, None)))
    assert choice(decision) == (TRITON, None)
    assert "found no such layout. Quantize them with dgrad=True" in "\n".join(message(decision))


def test_a_named_backend_does_not_read_the_weights_of_another():
    decision = decide(spec("H100", passes=(FORWARD,), weights=(TRITON, None)), DEEPGEMM, candidates({}))
    assert choice(decision) == (None,)
    assert decision.alternatives == (TRITON,)
    assert decision.refusal_lines()[0] == (
        "deepgemm  requires quantized weights in its layout for forward; found the layout of triton. "
        "Quantize them with the kernel_preference of the call."
    )


# Decisions as values


def test_equal_problems_give_equal_decisions_with_equal_hashes():
    first, second = auto(spec("B200")), auto(spec("B200"))
    assert first == second
    assert len({first, second}) == 1


@every_machine
def test_the_order_of_the_candidates_does_not_matter(machine):
    asked = spec(machine, weights=(TORCH, TORCH))
    decisions = {decide(asked, AUTO, order) for order in itertools.permutations(candidates({TRITON: "broken"}))}
    assert len(decisions) == 1


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    ((0, "decode"), (128, "decode"), (129, "small"), (2048, "small"), (2049, "large")),
)
def test_the_row_class_follows_the_average_group_size(num_rows, expected):
    assert row_class(num_rows, num_groups=8) is RowClass(expected)


# Calls of grouped_mm as on another machine


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Decides calls with CPU tensors as on another machine; the backend that they choose must be Emulated."""
    for variable in ("BACKEND", "STRICT", "LOG", "VALIDATE"):
        monkeypatch.delenv(f"GROUPED_GEMM_{variable}", raising=False)
    monkeypatch.setattr(explanation_module, "get_backend", BACKENDS.__getitem__)
    route.reset_caches()

    def move(machine: str, states: Mapping[BackendKind, str]) -> None:
        monkeypatch.setattr(call_spec, "machine_of", lambda device: MACHINES[machine])
        monkeypatch.setattr(route, "candidates", lambda device: tuple(candidates(states)))

    yield move
    route.reset_caches()


ALL_BUT_EMULATED_BROKEN = dict.fromkeys((DEEPGEMM, TRITON, TORCH, HIPBLASLT), "broken")


def call(k: int = 32, **options) -> torch.Tensor:
    a, b = torch.ones(4, k, dtype=torch.bfloat16), torch.ones(2, k, 16, dtype=torch.bfloat16)
    return grouped_mm(a, b, torch.tensor([1, 4], dtype=torch.int32), **options)


def texts_of_warnings(*calls: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for function in calls:
            function()
    return [str(warning.message) for warning in caught]


def test_the_fallback_warns_once_and_names_what_was_refused(on):
    on("H100", ALL_BUT_EMULATED_BROKEN)
    (text,) = texts_of_warnings(call, call, lambda: call(k=48))
    assert "none falls back to the Emulated backend" in text
    assert "triton    is installed but broken: built for another torch. Reinstall it." in text
    assert "GROUPED_GEMM_STRICT=1" in text and "KernelPreference.EMULATED" in text


def test_another_set_of_reasons_warns_again(on):
    on("H100", ALL_BUT_EMULATED_BROKEN)
    assert len(texts_of_warnings(call, lambda: call(recipe="fp8_blockwise"))) == 2


def test_quantize_weights_warns_of_the_fallback_as_well(on):
    on("H100", ALL_BUT_EMULATED_BROKEN)
    (text,) = texts_of_warnings(lambda: quantize_weights(torch.ones(1, 32, 32), "mxfp8"))
    assert "mxfp8 falls back to the Emulated backend" in text


def test_emulated_by_name_does_not_warn(on):
    on("H100", ALL_BUT_EMULATED_BROKEN)
    assert texts_of_warnings(lambda: call(kernel_preference="emulated")) == []


def test_a_cpu_does_not_warn(on):
    on("CPU", {})
    assert texts_of_warnings(call) == []


def test_strict_makes_the_fallback_an_error(on, monkeypatch):
    on("H100", ALL_BUT_EMULATED_BROKEN)
    monkeypatch.setenv("GROUPED_GEMM_STRICT", "1")
    with pytest.raises(NoBackendError, match="emulated  is not tried while GROUPED_GEMM_STRICT=1"):
        call()


def test_strict_acts_on_the_next_call(on, monkeypatch):
    on("H100", ALL_BUT_EMULATED_BROKEN)
    texts_of_warnings(call)
    monkeypatch.setenv("GROUPED_GEMM_STRICT", "1")
    with pytest.raises(NoBackendError):
        call()


def pretend_capture(monkeypatch: pytest.MonkeyPatch, is_capturing: bool) -> None:
    monkeypatch.setattr(spec_module, "is_capturing", lambda x: is_capturing)


def test_a_capture_that_begins_after_a_call_refuses_host_syncs(on, monkeypatch):
    on("H100", ALL_BUT_EMULATED_BROKEN)
    texts_of_warnings(call)
    pretend_capture(monkeypatch, True)
    with pytest.raises(NoBackendError, match="emulated  requires host syncs to be allowed"):
        call()


def test_a_decision_during_capture_is_not_cached(on, monkeypatch):
    """During capture, a backend that has not been checked counts as healthy."""
    on("CPU", {})
    pretend_capture(monkeypatch, True)
    monkeypatch.setattr(emulated.Backend, "requirements", ())
    call()
    assert route._decide_once.cache_info().currsize == 0 and not route._known
    pretend_capture(monkeypatch, False)
    call()
    assert route._decide_once.cache_info().currsize == 1 and route._known


def test_a_decision_that_forget_overtakes_is_not_cached(on, monkeypatch):
    """Another thread may store a new profile while a call is decided by the old one."""
    on("CPU", {})
    original, decisions = route.decide, []

    def overtaken(*args, **options) -> Decision:
        if "asked_by" not in options:  # what is expected before the decision
            return original(*args, **options)
        decisions.append(original(*args, **options))
        if len(decisions) == 1:
            route.forget()
        return decisions[-1]

    monkeypatch.setattr(route, "decide", overtaken)
    for _ in range(3):
        call()
    assert len(decisions) == 2


def test_the_log_shows_each_distinct_decision_once(on, monkeypatch, capsys):
    on("CPU", {})
    monkeypatch.setenv("GROUPED_GEMM_LOG", "1")
    for k in (32, 32, 48, 32):
        call(k)
    log = capsys.readouterr().err
    assert [line for line in log.splitlines() if line.startswith("grouped_mm(")] == [
        "grouped_mm(E=2, K=32, N=16, none, bfloat16, cpu, forward)",
        "grouped_mm(E=2, K=48, N=16, none, bfloat16, cpu, forward)",
    ]


def test_the_log_shows_a_decision_that_was_made_before_it_was_switched_on(on, monkeypatch, capsys):
    on("CPU", {})
    call()
    monkeypatch.setenv("GROUPED_GEMM_LOG", "1")
    call()
    assert "grouped_mm(E=2, K=32" in capsys.readouterr().err


def test_the_log_is_silent_unless_asked_for(on, capsys):
    on("CPU", {})
    call()
    assert capsys.readouterr().err == ""


# Explanations


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Explanation]:
    monkeypatch.setattr(explanation_module, "get_backend", BACKENDS.__getitem__)
    return lambda decision: Explanation(decision, num_rows=5000)


def table(explanation: Explanation) -> list[list[str]]:
    """The text of an explanation, its lines split where two spaces are."""
    return [re.split(r" {2,}", line.strip()) for line in str(explanation).splitlines()]


def test_an_explanation_shows_backends_reasons_and_refusals(explained):
    lines = table(explained(auto(spec("B200"), {TRITON: "absent"})))
    assert lines[0] == ["grouped_mm(E=8, K=4096, N=2048, fp8_blockwise, bfloat16, sm_100, forward+dgrad+wgrad)"]
    for line in (
        ["forward", "deepgemm"],
        ["dgrad", "deepgemm"],
        ["wgrad", "emulated"],
        [
            "why",
            "AUTO: the first backend in the vendor's order that can run it; no such call was measured on NVIDIA B200",
        ],
        ["quantized", "453 MB read and written"],
        ["padding", "deepgemm: at most 1016 rows (20%)"],
        ["refused", "deepgemm", "wgrad requires sm_90; found sm_100. Use another backend."],
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("asked_by", "why"),
    (("argument", "by the argument"), ("context", "by prefer(...)"), ("environment", "by the environment")),
)
def test_an_explanation_shows_where_the_backend_was_asked_for(explained, asked_by, why):
    decision = decide(spec("H100"), TRITON, candidates({}), asked_by=asked_by)
    assert explained(decision).why == f"asked for {why}"


def test_an_explanation_shows_host_syncs(explained):
    decision = decide(spec("MI300X", Recipe.NONE), HIPBLASLT, candidates({}))
    assert explained(decision).host_syncs == {"hipblaslt": "offs is read at every pass"}
    assert ["host syncs", "hipblaslt: offs is read at every pass"] in table(explained(decision))


def test_a_cpu_has_no_host_syncs(explained):
    assert explained(auto(spec("CPU"))).host_syncs == {}


@pytest.mark.parametrize(("alignment", "padding"), ((1, {"deepgemm": 1016}), (16, {"deepgemm": 1016}), (256, {})))
def test_padding_depends_on_the_guaranteed_alignment(explained, alignment, padding):
    asked = spec("H100", group_alignment=alignment)
    assert explained(decide(asked, DEEPGEMM, candidates({}))).padding == padding


def test_an_explanation_of_a_call_that_no_backend_runs_says_so(explained):
    explanation = explained(auto(spec("RTX 4090"), {TRITON: "broken"}, strict=True))
    assert ["forward", "no backend", "all refuse"] in table(explanation)
    assert explanation.to_dict()["runs"] is False


def test_an_explanation_of_a_named_backend_that_refuses_names_those_that_would_run(explained):
    explanation = explained(decide(spec("B200"), DEEPGEMM, candidates({}), asked_by="context"))
    lines = table(explanation)
    assert ["forward", "no backend", "deepgemm refuses"] in lines
    assert ["why", "asked for by prefer(...)"] in lines
    assert ["instead", "triton, emulated would run it"] in lines
    assert explanation.to_dict()["alternatives"] == ["triton", "emulated"]


@every_machine
def test_an_explanation_survives_json(explained, machine):
    data = explained(auto(spec(machine), {TRITON: "broken"})).to_dict()
    assert json.loads(json.dumps(data)) == data


def test_an_explanation_as_data_is_complete(explained):
    data = explained(auto(spec("MI300X", Recipe.FP8_ROWWISE, group_alignment=128), {TRITON: "broken"})).to_dict()
    assert data == {
        "call": {
            "M": 5000,
            "E": 8,
            "K": 4096,
            "N": 2048,
            "rows": "large",
            "recipe": "fp8_rowwise",
            "dtype": "bfloat16",
            "out_dtype": "bfloat16",
            "arch": "gfx942",
            "passes": ["forward", "dgrad", "wgrad"],
            "group_alignment": 128,
        },
        "preference": "auto",
        "asked_by": "default",
        "runs": True,
        "chosen": {"forward": "hipblaslt", "dgrad": "hipblaslt", "wgrad": "hipblaslt"},
        "refusals": [
            {
                "backend": "triton",
                "passes": ["forward", "dgrad", "wgrad"],
                "reason": "is installed but broken: built for another torch",
                "fix": "Reinstall it.",
            },
        ],
        "alternatives": [],
        "host_syncs": {"hipblaslt": "offs is read at every pass"},
        "padding_rows_at_most": {},
        # a and dY: 2 bytes read, and 1 written for each of two layouts; so are the weights
        "quantized_bytes": 4 * (5000 * 4096 + 5000 * 2048 + 8 * 4096 * 2048),
        "expected": None,
        "recipe_picked": False,
        "recipes_us": {},
        "slower_than_none": False,
    }
