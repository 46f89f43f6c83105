"""How AUTO chooses by measured times. The times are made up, and so are the machines."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from grouped_gemm import BackendKind, CallSpec, Explanation, KernelPreference, Machine, Pass, Recipe
from grouped_gemm.backends import Candidate, get_backend
from grouped_gemm.backends.base import Health
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.selection.cost_model import PLANS, Call, Profile, Times, expected
from grouped_gemm.selection.rules import FIRST, MARGIN, auto_order, decide

AUTO = KernelPreference.AUTO
TRITON, DEEPGEMM, EMULATED = (BackendKind[name] for name in ("TRITON", "DEEPGEMM", "EMULATED"))
FORWARD, DGRAD, WGRAD = Pass
TRAINING = (FORWARD, DGRAD, WGRAD)
BLOCKWISE = Recipe.FP8_BLOCKWISE
VERSIONS = (("deep_gemm", "0.1.5"), ("triton", "3.6.0"))
H200 = Machine("nvidia", "sm_90", "NVIDIA H200", VERSIONS)
SIZES = {"num_groups": 8, "k": 4096, "n": 2048}
STEP = Call("fp8_blockwise", "large", False, True, **SIZES)
MIXED = "deepgemm, wgrad triton"


def times(eager: dict[str, float], captured: dict[str, float] | None = None) -> Times:
    return Times(8192, eager, eager if captured is None else captured, "2026-11-26")


def profile(*calls: tuple[Call, Times], **facts) -> Profile:
    return Profile("NVIDIA H200", dict(calls), **facts)


def of_plans(is_exact: bool = False, **eager: float) -> Profile:
    """A profile of the training step of `spec`; "mixed" is the plan of DeepGEMM with Triton's wgrad."""
    by_plan = {MIXED if plan == "mixed" else plan: us for plan, us in eager.items()}
    return profile((STEP, times(by_plan)), is_exact=is_exact)


def spec(machine: Machine = H200, **facts) -> CallSpec:
    facts = {**SIZES, "recipe": BLOCKWISE, "rows": RowClass.LARGE, "passes": TRAINING} | facts
    return CallSpec(machine, **facts)


def decision(asked: CallSpec, *profiles: Profile, broken: tuple[BackendKind, ...] = (), syncs: bool = False):
    """What AUTO decides; with ``syncs``, DeepGEMM's wgrad has a host sync, as the real one does."""
    kinds = (TRITON, DEEPGEMM, EMULATED)
    deepgemm = get_backend(DEEPGEMM)
    if not syncs:
        deepgemm = type("Quick", (type(deepgemm),), {"host_syncs": ""})()
    found = {TRITON: get_backend(TRITON), DEEPGEMM: deepgemm, EMULATED: get_backend(EMULATED)}
    healths = {kind: (lambda: Health("broken", "Repair it.")) if kind in broken else Health for kind in kinds}
    return decide(asked, AUTO, [Candidate(found[kind], healths[kind]) for kind in kinds], profiles=profiles)


def chosen(*args, **options) -> tuple[BackendKind | None, ...]:
    found = decision(*args, **options)
    return tuple(found.backend(p) for p in found.spec.passes)


def test_every_plan_names_a_backend_for_every_pass():
    assert all(tuple(plan) == tuple(Pass) for plan in PLANS.values())
    assert {kind for plan in PLANS.values() for kind in plan.values()} == set(BackendKind) - {EMULATED}


@pytest.mark.parametrize("vendor", (*FIRST, "tpu"))
def test_auto_tries_every_backend_once_and_emulated_last_on_a_gpu(vendor):
    order = auto_order(vendor)
    assert sorted(order, key=str) == sorted(BackendKind, key=str)
    assert order.index(EMULATED) == (len(order) - 1 if vendor in ("nvidia", "amd") else 0)


# Which measurement applies


def plans(asked: CallSpec, *profiles: Profile) -> dict[str, float] | None:
    found = expected(asked, profiles)
    return None if found is None else dict(found.plans)


def test_the_nearest_profiled_sizes_are_used_and_named():
    near, far = times({"triton": 1.0}), times({"triton": 2.0})
    both = profile((STEP._replace(num_groups=128, k=128, n=128), far), (STEP, near))
    found = expected(spec(num_groups=16, n=512), [both])
    assert found.plans == (("triton", 1.0),)
    assert found.source == (
        "measured on NVIDIA H200, 2026-11-26, at M=8192, E=8, K=4096, N=2048, the nearest profiled sizes"
    )


def test_a_measurement_at_the_same_sizes_is_used_and_named():
    found = expected(spec(), [of_plans(triton=2.0, deepgemm=1.0)])
    assert found.source == "measured on NVIDIA H200, 2026-11-26, at M=8192, E=8, K=4096, N=2048"
    assert found.plans == (("deepgemm", 1.0), ("triton", 2.0)), "the fastest first"


@pytest.mark.parametrize(
    "facts",
    ({"recipe": Recipe.MXFP8}, {"rows": RowClass.SMALL}, {"dtype": torch.float32}, {"passes": (FORWARD,)}),
    ids=("recipe", "rows", "dtype", "passes"),
)
def test_no_measurement_applies_to_another_kind_of_call(facts):
    assert plans(spec(**facts), of_plans(triton=1.0)) is None


@pytest.mark.parametrize(
    "facts",
    ({"recipe": Recipe.FP8_BLOCKWISE_POW2}, {"dtype": torch.float16}, {"passes": (FORWARD, WGRAD)}),
    ids=("powers of two", "float16", "no dgrad"),
)
def test_a_measurement_applies_to_calls_that_take_about_as_long(facts):
    assert plans(spec(**facts), of_plans(triton=1.0)) == {"triton": 1.0}


def test_a_measurement_of_whole_blocks_is_preferred_where_they_are_guaranteed():
    blocks = STEP._replace(whole_blocks=True, k=8192)
    both = profile((STEP, times({"triton": 1.0})), (blocks, times({"triton": 2.0})))
    assert plans(spec(group_alignment=256), both) == {"triton": 2.0}
    assert plans(spec(), both) == {"triton": 1.0}
    assert plans(spec(group_alignment=256), of_plans(triton=1.0)) == {"triton": 1.0}, "better than none"


def test_a_captured_call_has_times_of_its_own():
    both = profile((STEP, times({"triton": 3.0}, {"triton": 1.0})))
    assert plans(spec(), both) == {"triton": 3.0}
    assert plans(spec(captured=True), both) == {"triton": 1.0}


@pytest.mark.parametrize("changed", ({"k": 4097}, {"group_alignment": 128}, {"passes": (FORWARD,)}), ids=str)
def test_an_exact_profile_applies_to_its_own_calls_only(changed):
    exact = profile((STEP, times({"triton": 1.0})), is_exact=True)
    assert plans(spec(), exact) == {"triton": 1.0}
    assert plans(spec(**changed), exact) is None


def test_the_first_profile_that_has_the_call_is_used():
    exact = profile((STEP, times({"triton": 1.0})), is_exact=True)
    shipped = of_plans(triton=2.0)
    assert plans(spec(), exact, shipped) == {"triton": 1.0}
    assert plans(spec(k=4097), exact, shipped) == {"triton": 2.0}


# What AUTO chooses


@pytest.mark.parametrize(
    "measured, expected",
    (
        ({"triton": 100.0, "deepgemm": 100.0}, (TRITON, TRITON, TRITON)),
        ({"triton": 100.0, "deepgemm": 50.0, "mixed": 60.0}, (DEEPGEMM, DEEPGEMM, DEEPGEMM)),
        ({"triton": 100.0, "deepgemm": 70.0, "mixed": 60.0}, (DEEPGEMM, DEEPGEMM, TRITON)),
        ({"triton": 100.0, "torch": 1.0}, (TRITON, TRITON, TRITON)),  # which is not a candidate
        ({"triton": math.inf, "deepgemm": 100.0}, (DEEPGEMM, DEEPGEMM, DEEPGEMM)),
        ({"deepgemm": 1.0}, (TRITON, TRITON, TRITON)),
        ({}, (TRITON, TRITON, TRITON)),
    ),
    ids=("equal", "faster", "faster with another's wgrad", "not installed", "failed", "first unmeasured", "nothing"),
)
def test_auto_takes_the_fastest_plan(measured, expected):
    assert chosen(spec(), of_plans(**measured)) == expected


@pytest.mark.parametrize("factor, expected", ((0.99, TRITON), (1.01, DEEPGEMM)))
def test_auto_leaves_its_order_only_for_more_than_the_margin(factor, expected):
    assert chosen(spec(), of_plans(triton=100.0 * factor * MARGIN, deepgemm=100.0)) == (expected,) * 3


def test_auto_takes_no_plan_with_a_host_sync_for_its_speed():
    faster = of_plans(triton=100.0, deepgemm=1.0, mixed=50.0)
    assert chosen(spec(), faster, syncs=True) == (DEEPGEMM, DEEPGEMM, TRITON)
    assert chosen(spec(), of_plans(triton=100.0, deepgemm=1.0), syncs=True) == (TRITON,) * 3
    assert chosen(spec(), faster, broken=(TRITON,), syncs=True) == (DEEPGEMM,) * 3, "nothing else runs the pass"


def test_auto_takes_a_plan_with_a_host_sync_where_exactly_this_call_was_measured():
    own = of_plans(is_exact=True, triton=100.0, deepgemm=1.0, mixed=50.0)
    assert chosen(spec(), own, syncs=True) == (DEEPGEMM,) * 3
    assert chosen(spec(host_sync=False), own, syncs=True) == (DEEPGEMM, DEEPGEMM, TRITON)


def test_a_call_without_wgrad_ignores_the_wgrad_of_a_plan():
    faster = of_plans(triton=100.0, deepgemm=90.0, mixed=50.0)
    assert chosen(spec(passes=(FORWARD, DGRAD)), faster, syncs=True) == (DEEPGEMM, DEEPGEMM)


@pytest.mark.parametrize("faster, expected", ((True, BackendKind.HIPBLASLT), (False, TRITON)))
def test_hipblaslt_is_taken_where_it_was_measured_to_be_faster(faster, expected):
    machine = Machine("amd", "gfx942", "AMD Instinct MI300X", (*VERSIONS, ("rocm", "7.1")))
    asked = spec(machine, recipe=Recipe.FP8_ROWWISE, group_alignment=128)
    measured = times({"triton": 100.0, "hipblaslt": 50.0 if faster else 100.0})
    own = Profile(machine.name, {Call.of(asked): measured}, is_exact=True)
    kinds = (TRITON, BackendKind.HIPBLASLT)
    found = decide(asked, AUTO, [Candidate(get_backend(kind)) for kind in kinds], profiles=[own])
    assert found.backends == (expected,)


def test_auto_passes_over_a_fast_backend_that_is_broken_and_says_so():
    found = decision(spec(), of_plans(triton=100.0, deepgemm=1.0), broken=(DEEPGEMM,))
    assert found.backends == (TRITON,)
    assert "deepgemm  is installed but broken: broken. Repair it." in found.refusal_lines()
    assert found.expected.plans == (("triton", 100.0),)


def test_the_health_of_a_backend_that_is_not_chosen_is_not_checked():
    assert decision(spec(), of_plans(triton=1.0, deepgemm=1.0), broken=(DEEPGEMM,)).refusals == ()


def test_a_backend_that_refuses_is_not_chosen_for_its_speed():
    assert chosen(spec(k=4000), of_plans(triton=100.0, deepgemm=1.0)) == (TRITON,) * 3


def test_equal_calls_are_decided_alike_whatever_the_order_of_candidates():
    measured = of_plans(triton=100.0, deepgemm=50.0)
    kinds = (TRITON, DEEPGEMM, EMULATED)
    found = {
        decide(spec(), AUTO, [Candidate(get_backend(kind)) for kind in order], profiles=[measured])
        for order in itertools.permutations(kinds)
    }
    assert len(found) == 1


# Explanations


def test_an_explanation_gives_the_times_of_the_plans():
    found = decision(spec(), of_plans(triton=1230.0, deepgemm=1240.0, mixed=math.inf))
    assert str(Explanation(found, 8192)).splitlines()[2:7] == [
        "  forward     triton",
        "  dgrad       triton",
        "  wgrad       triton",
        "  why         AUTO: measured on NVIDIA H200, 2026-11-26, at M=8192, E=8, K=4096, N=2048",
        "  measured    triton 1.23 ms; deepgemm 1.24 ms; deepgemm, wgrad triton failed",
    ]


def test_an_explanation_without_measurements_says_so():
    found = decision(spec(recipe=Recipe.MXFP8), of_plans(triton=1.0))
    assert (
        "AUTO: the first backend in the vendor's order that can run it; no such call was measured on NVIDIA H200"
        in str(Explanation(found, 8192))
    )
    assert Explanation(found, 8192).to_dict()["expected"] is None


def test_an_explanation_on_a_cpu_does_not_mention_profiles():
    found = decision(spec(Machine("cpu", "cpu", "cpu")))
    assert Explanation(found).why == "AUTO: the first backend in the vendor's order that can run it"
