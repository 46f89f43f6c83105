"""How AUTO chooses by measured times. The times are made up, and so are the machines."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from grouped_gemm import (
    BackendKind,
    CallSpec,
    Explanation,
    KernelPreference,
    Machine,
    Pass,
    Recipe,
    explain,
    grouped_mm,
    override_torch,
    quantize_weights,
)
from grouped_gemm.backends import Candidate, get_backend
from grouped_gemm.backends.base import Health
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.recipes import OF_FASTEST
from grouped_gemm.selection import route
from grouped_gemm.selection.cost_model import PLANS, Call, Profile, Times, expected
from grouped_gemm.selection.rules import FIRST, MARGIN, auto_order, decide, fastest_recipe, times_of_recipes

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


# The fastest recipe


def in_each_recipe(**by_recipe: float | Times) -> dict[Recipe, float]:
    """`times_of_recipes` for times by recipe; a number stands for that of Triton, at the sizes of `times`."""
    found = {name: us if isinstance(us, Times) else times({"triton": us}) for name, us in by_recipe.items()}
    measured = profile(*((STEP._replace(recipe=name), t) for name, t in found.items()))
    return times_of_recipes([decision(spec(recipe=recipe), measured) for recipe in OF_FASTEST])


@pytest.mark.parametrize(
    "by_recipe, expected",
    (
        ({"none": 100.0, "fp8_rowwise": 90.0, "fp8_blockwise": 80.0}, BLOCKWISE),
        ({"none": 100.0, "fp8_rowwise": 90.0, "fp8_blockwise": 95.0}, Recipe.FP8_ROWWISE),
        ({"none": 100.0, "fp8_rowwise": 190.0, "fp8_blockwise": 195.0}, Recipe.NONE),
        ({"none": 100.0, "fp8_blockwise": 99.5}, Recipe.NONE),  # within what medians vary by
        ({"none": 100.0, "fp8_blockwise": math.inf}, Recipe.NONE),
        ({"fp8_blockwise": 1.0}, Recipe.NONE),
        ({}, Recipe.NONE),
    ),
)
def test_fp8_is_the_fastest_measured_recipe(by_recipe, expected):
    assert fastest_recipe(in_each_recipe(**by_recipe)) is expected


def test_recipes_that_were_measured_at_other_sizes_do_not_compare():
    other = times({"triton": 1.0})._replace(num_rows=4096)
    found = in_each_recipe(none=100.0, fp8_rowwise=other, fp8_blockwise=80.0)
    assert found == {Recipe.NONE: 100.0, BLOCKWISE: 80.0}


def test_times_of_two_profiles_do_not_compare():
    """The user's GPU may be slower than that of the shipped profile."""
    none, blockwise = STEP._replace(recipe="none"), times({"triton": 80.0})
    shipped = profile((none, times({"triton": 90.0})), (STEP, blockwise))
    own = profile((none, times({"triton": 200.0})), is_exact=True)
    found = times_of_recipes([decision(spec(recipe=recipe), own, shipped) for recipe in OF_FASTEST])
    assert found == {Recipe.NONE: 200.0}


def test_fp8_counts_the_time_of_the_chosen_plan():
    """Not of a plan that is refused."""
    measured = profile(
        (STEP._replace(recipe="none"), times({"triton": 100.0})), (STEP, times({"deepgemm": 10.0, "triton": 120.0}))
    )
    found = [decision(spec(recipe=recipe), measured, broken=(DEEPGEMM,)) for recipe in OF_FASTEST]
    assert times_of_recipes(found) == {Recipe.NONE: 100.0, BLOCKWISE: 120.0}


def test_an_explanation_shows_what_was_picked_and_what_is_slower():
    by_recipe = {"none": 100.0, "fp8_rowwise": 90.0, "fp8_blockwise": 120.0}
    found = in_each_recipe(**by_recipe)
    measured = profile(*((STEP._replace(recipe=name), times({"triton": us})) for name, us in by_recipe.items()))
    picked = Explanation(decision(spec(recipe=Recipe.FP8_ROWWISE), measured), 8192, found, True)
    assert "  recipes     fp8_rowwise, picked: none 100 us; fp8_rowwise 90 us; fp8_blockwise 120 us" in str(picked)
    assert "WARNING" not in str(picked) and not picked.to_dict()["slower_than_none"]
    forced = Explanation(decision(spec(), measured), 8192, found)
    expected = 'slower than none: fp8_blockwise 120 us, none 100 us. recipe="fp8" picks the faster one.'
    assert expected in str(forced) and forced.to_dict()["slower_than_none"]
    assert forced.to_dict()["recipes_us"] == by_recipe


def test_a_call_in_the_fastest_recipe(monkeypatch):
    """On a CPU nothing was measured: none. Elsewhere the times decide, for a compiled call too."""
    a, w = torch.randn(24, 32), torch.randn(3, 48, 32)
    offs = torch.tensor([3, 3, 24], dtype=torch.int32)
    expected = {recipe: grouped_mm(a, w.mT, offs, recipe=recipe) for recipe in OF_FASTEST}
    assert torch.equal(grouped_mm(a, w.mT, offs, recipe="fp8"), expected[Recipe.NONE])
    assert "none, picked: no such call was measured" in str(explain(a, w.mT, offs, recipe="FP8"))
    named = explain(a, w.mT, offs, recipe="fp8", kernel_preference="emulated")
    assert "none, picked: only AUTO compares recipes" in str(named)
    monkeypatch.setattr(route, "times_of", lambda spec: {Recipe.NONE: 3.0, Recipe.FP8_ROWWISE: 2.0, BLOCKWISE: 1.0})
    route.reset_caches()
    assert torch.equal(grouped_mm(a, w.mT, offs, recipe="fp8"), expected[BLOCKWISE])
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: grouped_mm(a, w.mT, offs, recipe="fp8"), fullgraph=True, backend="eager")
    assert torch.equal(compiled(a), expected[BLOCKWISE])
    quantized = quantize_weights(w.mT, "fp8_rowwise")
    assert torch.equal(grouped_mm(a, quantized, offs, recipe="fp8"), grouped_mm(a, quantized, offs))
    assert "picked" not in str(explain(a, quantized, offs, recipe="fp8"))
    with override_torch(recipe="fp8"):
        y = torch._grouped_mm(a.bfloat16(), w.mT.bfloat16(), offs=offs)
    assert torch.equal(y, grouped_mm(a.bfloat16(), w.mT.bfloat16(), offs, recipe=BLOCKWISE))
    route.reset_caches()


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
