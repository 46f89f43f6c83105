"""Profiles: which calls are measured on which plans, and the file of times. Backends are Emulated, times made up."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grouped_gemm import BackendKind, CallSpec, Machine, Pass, Recipe, backends
from grouped_gemm.autotune import profile
from grouped_gemm.autotune.measure import measure, uneven_ends
from grouped_gemm.backends import Candidate, emulated
from grouped_gemm.backends.base import Requirement
from grouped_gemm.core import store
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.selection.cost_model import Call, Times, expected

TRITON, DEEPGEMM, TORCH = (BackendKind[name] for name in ("TRITON", "DEEPGEMM", "TORCH"))
TRAINING = tuple(Pass)
H200 = Machine("nvidia", "sm_90", "NVIDIA H200", (("torch", "2.11.0"), ("triton", "3.6.0")))
CPU = torch.device("cpu")


class First(emulated.Backend):
    kind, host_syncs = TRITON, ""


class Rival(First):
    kind = DEEPGEMM


class ForwardOnly(First):
    kind = TORCH
    requirements = (Requirement("no gradients", lambda p: False, lambda p: "one", "None.", TRAINING[1:]),)


class Broken(First):
    kind = TORCH

    def grouped_mm(self, *args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")


class Syncs(First):
    kind, host_syncs, host_sync_passes = DEEPGEMM, "wgrad syncs", (Pass.WGRAD,)
    requirements = (
        Requirement("permission to sync", lambda p: p.host_sync, lambda p: "host_sync=False", "None.", (Pass.WGRAD,)),
    )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GROUPED_GEMM_CACHE_DIR", str(tmp_path / "cache"))
    profile.forget()
    yield tmp_path / "cache"
    profile.forget()


@pytest.fixture
def measured(monkeypatch):
    """Measures a call on some backends: each plan takes 1, 2, 3, ... microseconds, half of that captured."""

    def run(asked: CallSpec, *classes: type[emulated.Backend]) -> tuple[dict[Call, Times], dict[str, str]]:
        instances = {backend.kind: backend() for backend in classes}
        monkeypatch.setattr(backends, "_instances", instances)

        def timer(factor: float) -> Callable[..., dict[str, float]]:
            def times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
                for call in calls.values():
                    call()
                return {plan: factor * (i + 1) for i, plan in enumerate(calls)}

            return times

        return measure(asked, 60, CPU, list(map(Candidate, instances.values())), timer(1.0), timer(0.5))

    return run


def spec(recipe: Recipe = Recipe.FP8_BLOCKWISE, **facts: Any) -> CallSpec:
    return CallSpec(CPU, 3, 32, 48, RowClass.SMALL, recipe, **{"passes": TRAINING} | facts)


FORWARD = Call("fp8_blockwise", "small", False, False, 3, 32, 48)
STEP = FORWARD._replace(training=True)


# Measuring


def test_forward_and_step_are_measured_on_every_plan_that_runs_them(measured):
    found, failed = measured(spec(), First, Rival, ForwardOnly)
    assert not failed and set(found) == {FORWARD, STEP}
    assert list(found[FORWARD].eager) == ["torch", "triton", "deepgemm"], "plans that differ in wgrad are one here"
    assert found[STEP].eager == {"triton": 1.0, "deepgemm": 2.0, "deepgemm, wgrad triton": 3.0}
    assert found[STEP].captured == {"triton": 0.5, "deepgemm": 1.0, "deepgemm, wgrad triton": 1.5}
    assert found[STEP].num_rows == 60


def test_a_call_without_gradients_is_measured_in_forward_alone(measured):
    found, _ = measured(spec(passes=TRAINING[:1]), First)
    assert set(found) == {FORWARD}


def test_a_call_with_some_gradients_computes_only_these(measured):
    class NoWgrad(First):
        def _wgrad(self, *args: Any) -> torch.Tensor:
            pytest.fail("wgrad of weights that need no gradient")

    found, failed = measured(spec(passes=TRAINING[:2]), NoWgrad)
    assert not failed and found[STEP].eager == {"triton": 1.0}


def test_a_plan_with_a_host_sync_is_not_captured(measured):
    found, failed = measured(spec(), First, Syncs)
    assert not failed
    assert set(found[STEP].eager) == {"triton", "deepgemm", "deepgemm, wgrad triton"}
    assert set(found[STEP].captured) == {"triton", "deepgemm, wgrad triton"}
    assert "deepgemm" in found[FORWARD].captured


def test_a_plan_that_fails_is_kept_as_failed_with_its_reason(measured):
    found, failed = measured(spec(), First, Broken)
    assert found[STEP].eager == {"triton": 1.0, "torch": math.inf}
    assert failed == {"torch": "RuntimeError: no kernel for this"}


def test_a_plan_that_fails_only_in_a_graph_does_not_stop_the_others(measured):
    class FailsLater(Broken):
        calls = 0

        def grouped_mm(self, *args: Any, **options: Any) -> torch.Tensor:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("later")
            return emulated.Backend.grouped_mm(self, *args, **options)

    found, failed = measured(spec(passes=TRAINING[:1]), First, FailsLater)
    assert found[FORWARD].eager == {"torch": 1.0, "triton": 2.0}
    assert found[FORWARD].captured == {"torch": math.inf, "triton": 0.5}
    assert failed == {"torch": "RuntimeError: later"}


def test_a_measurement_is_stored_by_base_recipe_and_whole_blocks(measured):
    found, _ = measured(spec(Recipe.FP8_ROWWISE_POW2, group_alignment=256), First)
    assert Call("fp8_rowwise", "small", True, True, 3, 32, 48) in found


@pytest.mark.parametrize("rows, groups, alignment", ((60, 3, 1), (1000, 7, 128), (5, 8, 1), (0, 2, 1), (100, 1, 128)))
def test_uneven_ends_are_valid_offs(rows, groups, alignment):
    ends = uneven_ends(rows, groups, alignment, CPU)
    assert ends.dtype == torch.int32 and ends.shape == (groups,)
    assert (ends.diff() >= 0).all() and ends[0] >= 0 and ends[-1] <= rows
    assert (ends % alignment == 0).all()


# The file

TIMES = Times(8192, {"triton": 2.0, "deepgemm": 1.0, "torch": math.inf}, {"triton": 1.5}, "2026-11-26")


def known(machine: Machine = H200) -> dict[Call, Times]:
    return dict(profile.known(machine).times)


def test_without_a_file_nothing_is_known():
    assert known() == {}


def test_measurements_serve_this_process_and_later_ones():
    profile.store(H200, {STEP: TIMES})
    assert known() == {STEP: TIMES}
    profile.forget()
    assert known() == {STEP: TIMES}
    assert profile.known(H200).is_exact


def test_a_measurement_that_another_process_stored_first_is_used():
    theirs = TIMES._replace(num_rows=4096)
    profile.store(H200, {STEP: theirs})
    profile._section._known = {name: {} for name in profile._section._known}  # this process had looked before
    profile.store(H200, {STEP: TIMES, FORWARD: TIMES})
    assert known() == {STEP: theirs, FORWARD: TIMES}
    profile.forget()
    assert known() == {STEP: theirs, FORWARD: TIMES}


@pytest.mark.parametrize(
    "machine",
    (
        dataclasses.replace(H200, name="NVIDIA H100"),
        dataclasses.replace(H200, versions=(("torch", "2.13.0"), ("triton", "3.6.0"))),
        dataclasses.replace(H200, versions=(*H200.versions, ("deep_gemm", "0.1.5"))),
    ),
    ids=("gpu", "torch", "deep_gemm"),
)
def test_measurements_do_not_serve_another_machine(machine):
    profile.store(H200, {STEP: TIMES})
    assert known(machine) == {}
    profile.store(machine, {STEP: TIMES})
    assert known() == {STEP: TIMES}, "storing for another machine keeps them"


def test_own_measurements_come_first_under_autotune():
    profile.store(H200, {STEP: TIMES})
    own, *shipped = profile.profiles(H200, tunes=True)
    assert own.times == {STEP: TIMES}
    assert list(profile.profiles(H200, tunes=False)) == shipped == [profile.shipped("NVIDIA H200")]
    assert profile.profiles(Machine("cpu", "cpu", "cpu"), tunes=True) == ()


def test_another_gpu_has_no_shipped_profile():
    assert profile.shipped("NVIDIA H200 NVL") is None
    assert profile.shipped("AMD Instinct MI300X") is None


def damaged(**changes: object) -> str:
    """A file whose one entry has been changed; None removes a field."""
    profile.store(H200, {STEP: TIMES})
    content = json.loads(store.path().read_text())
    content["profiles"][0].update(changes)
    content["profiles"] = [{name: value for name, value in content["profiles"][0].items() if value is not None}]
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    (
        lambda: "",
        lambda: "{}",
        lambda: '{"schema": 1, "profiles": []}',
        lambda: '{"schema": 2, "profiles": [{}]}',
        lambda: '{"schema": 2, "profiles": [3]}',
        lambda: '{"schema": 2, "profiles": 3}',
        lambda: damaged(k=None),
        lambda: damaged(k=[4096]),
        lambda: damaged(setting=None),
        lambda: damaged(eager={"triton": math.nan}),
        lambda: damaged(captured={"triton": -1.0}),
        lambda: damaged(eager={"triton": 10**400}),
    ),
    ids=range(12),
)
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(folder, text):
    folder.mkdir()
    content = text()
    store.path().write_text(content)
    profile.forget()
    with pytest.warns(UserWarning, match="ignored. Delete the file"):
        assert known() == {}
    profile.store(H200, {STEP: TIMES})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile.forget()
        assert known() == {STEP: TIMES}


# The profiles that are shipped


def test_one_damaged_entry_costs_no_other():
    profile.store(H200, {STEP: TIMES, FORWARD: TIMES})
    content = json.loads(store.path().read_text())
    del content["profiles"][0]["k"]
    content["tiles"] = [{"of": "another section"}, 3]
    store.path().write_text(json.dumps(content))
    profile.forget()
    with pytest.warns(UserWarning, match="Damaged entries are ignored"):
        assert known() == {FORWARD: TIMES}
    profile.store(H200, {STEP: TIMES})
    assert json.loads(store.path().read_text())["tiles"] == content["tiles"]
    profile.forget()
    assert known() == {STEP: TIMES, FORWARD: TIMES}


def test_an_entry_for_an_impossible_call_applies_to_none():
    store.path().write_text(damaged(k="32"))
    profile.forget()
    assert expected(spec(), [profile.known(H200)]) is None


def test_a_plan_of_another_version_is_passed_over():
    profile.store(H200, {STEP: TIMES})
    content = json.loads(store.path().read_text())
    content["profiles"][0]["eager"]["mill"] = 1.0
    store.path().write_text(json.dumps(content))
    profile.forget()
    assert known() == {STEP: TIMES}


@pytest.mark.parametrize("gpu", ("NVIDIA H100 80GB HBM3", "NVIDIA H200"))
def test_a_shipped_profile_is_complete(gpu):
    found = profile.shipped(gpu)
    kinds = {call[:4] for call in found.times}
    large = {(recipe, "large", whole) for recipe in ("none", "fp8_rowwise", "fp8_blockwise") for whole in (False, True)}
    few = {(recipe, rows, False) for recipe in ("none", "fp8_rowwise", "fp8_blockwise") for rows in ("small", "decode")}
    assert kinds == {(*kind, training) for kind in large | few for training in (False, True)}
    for call, times in found.times.items():
        assert times.num_rows >= call.num_groups
        for clock in (times.eager, times.captured):
            assert math.isfinite(clock["triton"]), "the first in the order is always measured"
