"""What AUTO makes of measurements, with made-up times on machines that are not here; and the table that is shipped."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from grouped_gemm import BackendKind, CallSpec, Explanation, KernelPreference, Machine, Pass, Recipe
from grouped_gemm.backends import Candidate, get_backend
from grouped_gemm.backends.base import Health
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.selection.cost_model import PARTS, Case, Estimate, Table, estimate, parse, render, shipped
from grouped_gemm.selection.rules import MARGIN, decide

AUTO = KernelPreference.AUTO
TRITON, DEEPGEMM, EMULATED = (BackendKind[name] for name in ("TRITON", "DEEPGEMM", "EMULATED"))
FORWARD, DGRAD, WGRAD = Pass
TRAINING = (FORWARD, DGRAD, WGRAD)
BLOCKWISE = Recipe.FP8_BLOCKWISE
VERSIONS = (("deep_gemm", "0.1.5"), ("triton", "3.6.0"))
H200 = Machine("nvidia", "sm_90", "NVIDIA H200", VERSIONS)
B200 = Machine("nvidia", "sm_100", "NVIDIA B200", VERSIONS)
SIZES = {"num_groups": 8, "k": 4096, "n": 2048}


def times(**changed: float) -> dict[str, float]:
    """100 for each part that is not named, 0 for the plan."""
    return {**dict.fromkeys(PARTS, 100.0), "plan": 0.0, **changed}


def case(deepgemm: dict[str, float], triton: dict[str, float] | None = None, **facts) -> Case:
    facts = {"recipe": "fp8_blockwise", "rows": "large", "whole_blocks": False, **SIZES} | facts
    return Case(num_rows=1024 * facts["num_groups"], times={TRITON: triton or times(), DEEPGEMM: deepgemm}, **facts)


def table(*cases: Case, **facts) -> Table:
    return Table("NVIDIA H200", "sm_90", "2026-11-21", "torch 2.11", cases, **facts)


def spec(machine: Machine = H200, **facts) -> CallSpec:
    facts = {**SIZES, "recipe": BLOCKWISE, "rows": RowClass.LARGE, "passes": TRAINING, "host_sync": True} | facts
    return CallSpec(machine, **facts)


def decision(asked: CallSpec, *tables: Table, broken: tuple[BackendKind, ...] = (), patience: bool = True):
    """What AUTO decides; without ``patience``, DeepGEMM's wgrad waits for the host, as the real one does."""
    kinds = (TRITON, DEEPGEMM, EMULATED)
    deepgemm = get_backend(DEEPGEMM)
    if patience:
        deepgemm = type("Quick", (type(deepgemm),), {"host_syncs": ""})()
    backends = {TRITON: get_backend(TRITON), DEEPGEMM: deepgemm, EMULATED: get_backend(EMULATED)}
    healths = {kind: (lambda: Health("broken", "Mend it.")) if kind in broken else Health for kind in kinds}
    return decide(asked, AUTO, [Candidate(backends[kind], healths[kind]) for kind in kinds], tables=tables)


def chosen(*args, **options) -> tuple[BackendKind | None, ...]:
    found = decision(*args, **options)
    return tuple(found.backend(p) for p in found.spec.passes)


# What a call takes


def test_a_call_on_one_backend_reads_each_operand_once():
    found = Estimate("", 1, {TRITON: {part: 2.0**i for i, part in enumerate(PARTS)}})
    parts = ("plan", "a_both", "g_both", "b_both", "forward", "dgrad", "wgrad")
    assert found.total(dict.fromkeys(TRAINING, TRITON)) == sum(2.0 ** PARTS.index(part) for part in parts)


def test_a_call_on_two_backends_plans_and_reads_twice_where_both_need_it():
    both = {part: 2.0**i for i, part in enumerate(PARTS)}
    found = Estimate("", 1, {TRITON: both, DEEPGEMM: {part: 2.0**20 * time for part, time in both.items()}})
    theirs = ("plan", "a_rows", "b_forward", "forward")
    ours = ("plan", "a_columns", "g_both", "b_dgrad", "dgrad", "wgrad")
    expected = sum(2.0 ** PARTS.index(part) for part in ours) + sum(2.0 ** (20 + PARTS.index(part)) for part in theirs)
    assert found.total({FORWARD: DEEPGEMM, DGRAD: TRITON, WGRAD: TRITON}) == expected


def test_the_passes_of_one_backend_add_up_to_the_call():
    found = Estimate("", 1, {TRITON: {part: 2.0**i for i, part in enumerate(PARTS)}})
    for passes in ((FORWARD,), (FORWARD, DGRAD), TRAINING, (FORWARD, WGRAD), (WGRAD,)):
        chosen = dict.fromkeys(passes, TRITON)
        assert sum(found.of_pass(TRITON, p, chosen) for p in passes) == found.total(chosen)


def test_the_passes_of_two_backends_add_up_to_the_call():
    both = {part: 2.0**i for i, part in enumerate(PARTS)}
    found = Estimate("", 1, {TRITON: both, DEEPGEMM: {part: 2.0**20 * time for part, time in both.items()}})
    chosen = {FORWARD: DEEPGEMM, DGRAD: DEEPGEMM, WGRAD: TRITON}
    assert sum(found.of_pass(kind, p, chosen) for p, kind in chosen.items()) == found.total(chosen)


def test_a_call_takes_what_the_slower_of_host_and_device_takes():
    hosts = {TRITON: times(forward=1000.0), DEEPGEMM: times(plan=400.0)}
    found = Estimate("", 1, {TRITON: times(), DEEPGEMM: times()}, hosts)
    assert found.total({FORWARD: TRITON}) == 1200
    assert found.total({FORWARD: DEEPGEMM}) == 700
    assert Estimate("", 1, {TRITON: times()}, {TRITON: times(a_rows=1.0)}).total({FORWARD: TRITON}) == 300


def test_the_host_takes_the_same_for_other_sizes():
    slow_host = dataclasses.replace(case(times()), hosts={TRITON: times(forward=5000.0)})
    asked = spec(k=8192, passes=(FORWARD,))
    assert estimate(asked, [table(slow_host)]).hosts[TRITON]["forward"] == 5000


def test_what_was_not_measured_takes_forever():
    found = Estimate("", 1, {TRITON: {"plan": 1.0, "a_rows": 1.0, "b_forward": 1.0, "forward": 1.0}})
    assert found.total({FORWARD: TRITON}) == 4
    assert math.isinf(found.total({FORWARD: TRITON, DGRAD: TRITON}))
    assert math.isinf(found.total({FORWARD: DEEPGEMM}))
    assert math.isinf(found.of_pass(TRITON, DGRAD, dict.fromkeys(TRAINING, TRITON)))


def test_weights_that_were_quantized_beforehand_cost_nothing():
    asked = spec(passes=(FORWARD, DGRAD), weights=(TRITON, TRITON))
    with_weights, without = (estimate(p, [table(case(times()))]) for p in (asked, spec(passes=(FORWARD, DGRAD))))
    on_triton = dict.fromkeys((FORWARD, DGRAD), TRITON)
    assert without.total(on_triton) - with_weights.total(on_triton) == 100


# Which case speaks


def test_the_nearest_sizes_speak_scaled_by_the_work():
    near = case(times(), times(forward=300.0, a_rows=150.0, plan=7.0))
    far = case(times(), num_groups=128, k=128, n=128)
    found = estimate(spec(num_groups=16, n=512), [table(near, far)])
    parts = found.times[TRITON]
    assert parts["forward"] == 300 * 2 * 0.25
    assert parts["a_rows"] == 150 * 2
    assert parts["g_rows"] == 100 * 2 * 0.25
    assert parts["b_both"] == 100 * 2 * 0.25
    assert parts["plan"] == 7
    assert found.num_rows == 16 * 1024
    assert found.source == "measured on NVIDIA H200, 2026-11-21 at E=8, K=4096, N=2048"


def test_no_part_takes_less_than_a_launch_but_one_that_is_none():
    parts = estimate(spec(k=1, n=1), [table(case(times(), times(a_rows=0.0)))]).times[TRITON]
    assert parts["forward"] == 3 and parts["a_rows"] == 0


def test_the_same_sizes_speak_for_themselves():
    assert estimate(spec(), [table(case(times()))]).source == "measured on NVIDIA H200, 2026-11-21"


def test_another_gpu_follows_the_nearest_that_is_known_and_says_so():
    assert estimate(spec(B200), [table(case(times()))]).source.startswith(
        "measured on NVIDIA H200, the nearest that is known, 2026-11-21"
    )


@pytest.mark.parametrize(
    "facts",
    ({"recipe": Recipe.MXFP8}, {"rows": RowClass.SMALL}, {"dtype": torch.float16}),
    ids=("recipe", "rows", "dtype"),
)
def test_nothing_speaks_for_another_kind_of_call(facts):
    assert estimate(spec(**facts), [table(case(times()))]) is None


def test_power_of_two_scales_take_the_same_time():
    assert estimate(spec(recipe=Recipe.FP8_BLOCKWISE_POW2), [table(case(times()))]) is not None


def test_a_case_of_whole_blocks_comes_before_a_nearer_one_where_they_are_promised():
    blocks = case(times(), times(forward=50.0), whole_blocks=True, **SIZES | {"k": 8192})
    both = table(case(times()), blocks)
    assert estimate(spec(group_alignment=256), [both]).times[TRITON]["forward"] == 50 * 4096 / 8192
    assert estimate(spec(), [both]).times[TRITON]["forward"] == 100


def test_a_graph_does_not_wait_for_the_host():
    slow_host = table(dataclasses.replace(case(times()), hosts={TRITON: times(forward=5000.0)}), is_exact=True)
    assert estimate(spec(passes=(FORWARD,)), [slow_host]).total({FORWARD: TRITON}) == 5200
    assert estimate(spec(passes=(FORWARD,), captured=True), [slow_host]).total({FORWARD: TRITON}) == 300


@pytest.mark.parametrize("changed", ({"k": 4097}, {"group_alignment": 128}), ids=str)
def test_an_exact_table_speaks_for_its_own_cases_only(changed):
    exact = table(case(times()), is_exact=True)
    assert estimate(spec(), [exact]) is not None
    assert estimate(spec(**changed), [exact]) is None


def test_an_exact_table_speaks_only_where_every_pass_was_measured():
    forward = {part: 1.0 for part in ("plan", "a_rows", "b_forward", "forward")}
    exact = table(case(forward, forward), is_exact=True)
    assert estimate(spec(passes=(FORWARD,)), [exact]).times[TRITON]["forward"] == 1
    assert estimate(spec(), [exact]) is None
    assert estimate(spec(), [exact, table(case(times()))]).times[TRITON]["forward"] == 100


# What AUTO takes

SLOW = {"forward": 200.0, "dgrad": 200.0}


@pytest.mark.parametrize(
    "deepgemm, expected",
    (
        ({}, (TRITON, TRITON, TRITON)),
        (dict.fromkeys(PARTS, 50.0), (DEEPGEMM, DEEPGEMM, DEEPGEMM)),
        ({"wgrad": 1.0, "a_columns": 1.0, "g_columns": 1.0, **SLOW}, (TRITON, TRITON, DEEPGEMM)),
        # a and dY are read once more, for 100 each
        ({"wgrad": 1.0, **SLOW}, (TRITON, TRITON, TRITON)),
        ({"forward": 1.0, "a_rows": 1.0, "b_forward": 1.0, "dgrad": 200.0, "wgrad": 200.0}, (DEEPGEMM, TRITON, TRITON)),
    ),
    ids=("equal", "faster", "faster wgrad", "faster wgrad that has to be fed", "faster forward"),
)
def test_auto_takes_what_makes_the_whole_call_fastest(deepgemm, expected):
    assert chosen(spec(), table(case(times(**deepgemm)))) == expected


def test_auto_leaves_its_order_for_more_than_the_margin_only():
    (total,) = (t for kind, t in decision(spec(), table(case(times()))).expected.others if kind is TRITON)
    gain = total * (1 - 1 / MARGIN)
    for share, expected in ((0.9, TRITON), (1.1, DEEPGEMM)):
        faster = times(forward=100 - share * gain / 3, dgrad=100 - share * gain / 3, wgrad=100 - share * gain / 3)
        assert chosen(spec(), table(case(faster))) == (expected,) * 3


def test_auto_takes_nothing_that_waits_for_the_host():
    faster = table(case(dict.fromkeys(PARTS, 1.0)))
    assert chosen(spec(), faster, patience=False) == (DEEPGEMM, DEEPGEMM, TRITON)
    assert chosen(spec(), faster, broken=(TRITON,), patience=False) == (DEEPGEMM, DEEPGEMM, DEEPGEMM)


def test_auto_takes_what_waits_where_this_very_call_was_measured_so():
    own = table(case(dict.fromkeys(PARTS, 1.0)), is_exact=True)
    assert chosen(spec(), own, patience=False) == (DEEPGEMM,) * 3
    assert chosen(spec(host_sync=False), own, patience=False) == (DEEPGEMM, DEEPGEMM, TRITON)


@pytest.mark.parametrize("faster, expected", ((True, BackendKind.HIPBLASLT), (False, TRITON)))
def test_hipblaslt_is_taken_where_it_was_measured_to_be_faster(faster, expected):
    machine = Machine("amd", "gfx942", "AMD Instinct MI300X", (*VERSIONS, ("rocm", "7.1")))
    kinds = (TRITON, BackendKind.HIPBLASLT)
    asked = spec(machine, recipe=Recipe.FP8_ROWWISE, group_alignment=128)
    theirs = dict.fromkeys(PARTS, 50.0 if faster else 100.0)
    measured = Case("fp8_rowwise", "large", True, **SIZES, num_rows=8192, times=dict(zip(kinds, (times(), theirs))))
    own = Table(machine.name, machine.arch, "2026-11-21", "as now", (measured,), is_exact=True)
    found = decide(asked, AUTO, [Candidate(get_backend(kind)) for kind in kinds], tables=[own])
    assert found.backends == (expected,)


def test_auto_passes_over_a_fast_backend_that_is_broken_and_says_so():
    found = decision(spec(), table(case(dict.fromkeys(PARTS, 1.0))), broken=(DEEPGEMM,))
    assert found.backends == (TRITON,)
    assert "deepgemm  is installed but broken: broken. Mend it." in found.refusal_lines()


def test_the_health_of_what_is_not_taken_is_not_looked_at():
    assert decision(spec(), table(case(times())), broken=(DEEPGEMM,)).refusals == ()


def test_auto_follows_its_order_where_its_first_was_not_measured():
    unmeasured = dataclasses.replace(case(times()), times={DEEPGEMM: dict.fromkeys(PARTS, 1.0)})
    assert chosen(spec(), table(unmeasured)) == (TRITON,) * 3


def test_auto_leaves_a_backend_that_failed_to_be_measured():
    failed = dataclasses.replace(case(times()), times={TRITON: {}, DEEPGEMM: times()})
    assert chosen(spec(), table(failed)) == (DEEPGEMM,) * 3


def test_measurements_of_one_vendor_say_nothing_of_another():
    assert shipped("amd") is None


def test_a_refusal_stands_against_any_speed():
    assert chosen(spec(k=4000), table(case(dict.fromkeys(PARTS, 1.0)))) == (TRITON,) * 3


def test_equal_problems_are_decided_alike_whatever_the_order_of_candidates():
    faster = table(case(times(forward=1.0)), case(times(dgrad=1.0), k=4095))
    kinds = (TRITON, DEEPGEMM, EMULATED)
    found = {
        decide(spec(), AUTO, [Candidate(get_backend(kind)) for kind in order], tables=[faster])
        for order in itertools.permutations(kinds)
    }
    assert len(found) == 1


# How it is told


def test_an_explanation_gives_the_times_of_those_that_run_and_of_those_that_would():
    found = decision(spec(), table(case(times(forward=50.0, dgrad=300.0, wgrad=5.0, a_both=150.0))))
    lines = str(Explanation(found, 8192)).splitlines()
    assert lines[2:7] == [
        "  forward     triton      about 300 us; deepgemm 250 us",
        "  dgrad       triton      about 200 us; deepgemm 500 us",
        "  wgrad       triton      about 100 us; deepgemm 205 us",
        "  why         AUTO: measured on NVIDIA H200, 2026-11-21",
        "  expected    600 us in all, for M = 8192; deepgemm alone 705 us",
    ]


def test_times_of_large_groups_are_those_of_the_call_s_own_rows():
    text = str(Explanation(decision(spec(), table(case(times()))), 81920))
    assert "expected    6 ms in all, for M = 81920" in text


def test_an_explanation_without_measurements_has_no_times():
    found = decision(spec(recipe=Recipe.MXFP8), table(case(times())))
    assert "about" not in str(Explanation(found, 8192))
    assert Explanation(found, 8192).to_dict()["expected"] is None


# The table that is shipped


def test_a_table_survives_being_written():
    eager = dataclasses.replace(case(times(forward=1.5)), hosts={TRITON: times(plan=2.5)})
    some = table(eager, case({"plan": 1.0}, whole_blocks=True, rows="decode"))
    assert parse(render(some)) == some


def test_the_shipped_table_is_whole():
    found = shipped("nvidia")
    assert (found.gpu, found.arch) == ("NVIDIA H200", "sm_90")
    assert {(c.recipe, c.rows) for c in found.cases} == set(
        itertools.product(("none", "fp8_rowwise", "fp8_blockwise"), ("large", "small", "decode"))
    )
    for c in found.cases:
        assert set(c.times[TRITON]) == set(PARTS), "Triton is first in the order: it is compared with"
        assert set(c.hosts) == set(c.times)
        parts = (*c.times.values(), *c.hosts.values())
        assert all(0 <= time < 1e6 and math.isfinite(time) for measured in parts for time in measured.values())
        assert c.num_rows >= c.num_groups
