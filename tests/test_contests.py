"""Contests: what is measured of whom, and the file that keeps it. Backends here are Emulated's, times are made up."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grouped_gemm import BackendKind, CallSpec, Machine, Pass, Recipe
from grouped_gemm.autotune import profile
from grouped_gemm.backends import Candidate, emulated
from grouped_gemm.backends.base import Requirement
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.selection import cost_model
from grouped_gemm.selection.cost_model import PARTS, Case

TRITON, DEEPGEMM, TORCH = (BackendKind[name] for name in ("TRITON", "DEEPGEMM", "TORCH"))
TRAINING = tuple(Pass)
H200 = Machine("nvidia", "sm_90", "NVIDIA H200", (("torch", "2.11.0"), ("triton", "3.6.0")))
CPU = torch.device("cpu")


class Rival(emulated.Backend):
    """Emulated under another name."""

    kind = DEEPGEMM


class ForwardOnly(emulated.Backend):
    kind = TRITON
    requirements = (Requirement("no gradients", lambda p: False, lambda p: "one", "None.", TRAINING[1:]),)


class Broken(emulated.Backend):
    """Compiles, and fails at its second launch."""

    kind = TORCH
    launches = 0

    def grouped_mm(self, *args: Any, **options: Any) -> torch.Tensor:
        self.launches += 1
        if self.launches > 1:
            raise RuntimeError("no kernel\nfor this")
        return super().grouped_mm(*args, **options)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GROUPED_GEMM_CACHE_DIR", str(tmp_path / "cache"))
    profile._known.clear()
    yield tmp_path / "cache"
    profile._known.clear()


def spec(recipe: Recipe = Recipe.FP8_BLOCKWISE, **facts: Any) -> CallSpec:
    return CallSpec(H200, 3, 32, 48, RowClass.SMALL, recipe, **{"passes": TRAINING} | facts)


def held(asked: CallSpec, *backends: type[emulated.Backend]) -> tuple[Case, dict[BackendKind, str], int]:
    """A contest whose parts take 1, 2, 3, ... microseconds; and how many were timed."""
    timed = []

    def timer(calls: dict[BackendKind, Callable[[], Any]]) -> dict[BackendKind, float]:
        for kind, run in calls.items():
            run()
            timed.append(kind)
        return {kind: float(len(timed) - i) for i, kind in enumerate(calls)}

    contestants = [Candidate(backend()) for backend in backends]
    case, failed = profile.measure(asked, 60, CPU, contestants, timer, lambda calls: dict.fromkeys(calls, 0.5))
    return case, failed, len(timed)


# Measuring


def test_every_part_of_every_backend_is_measured():
    case, failed, count = held(spec(), Rival, ForwardOnly)
    assert set(case.times[DEEPGEMM]) == set(PARTS)
    assert set(case.times[TRITON]) == {"plan", "a_rows", "b_forward", "forward"}
    assert not failed
    assert count == len(PARTS) + 4
    times = [time for parts in case.times.values() for time in parts.values()]
    assert sorted(times) == list(range(1, count + 1)), "each part has a time of its own"


@pytest.mark.parametrize(
    "passes, parts",
    (
        (TRAINING[:1], {"plan", "a_rows", "b_forward", "forward"}),
        (TRAINING[:2], {"plan", "a_rows", "g_rows", "b_forward", "b_dgrad", "b_both", "forward", "dgrad"}),
        (
            (Pass.FORWARD, Pass.WGRAD),
            {"plan", "a_rows", "a_columns", "a_both", "g_columns", "b_forward", "forward", "wgrad"},
        ),
    ),
    ids=lambda value: "+".join(p.value for p in value) if isinstance(value, tuple) else "",
)
def test_only_the_parts_of_the_passes_are_measured(passes, parts):
    case, _, _ = held(spec(passes=passes), Rival)
    assert set(case.times[DEEPGEMM]) == parts


@pytest.mark.parametrize("rows, in_graphs", ((RowClass.LARGE, False), (RowClass.SMALL, True), (RowClass.DECODE, True)))
def test_few_rows_are_timed_in_graphs_and_what_waits_is_not(monkeypatch, rows, in_graphs):
    class Patient(emulated.Backend):
        kind, host_syncs, host_sync_passes = TRITON, "wgrad waits", (Pass.WGRAD,)

    timed = {"graphs": [], "events": []}

    def timer(how: str) -> Callable[..., Any]:
        return lambda calls: timed[how].extend(calls) or dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(profile, "captured_microseconds", timer("graphs"))
    monkeypatch.setattr(profile, "device_microseconds", timer("events"))
    asked = spec()._replace(rows=rows)
    profile.measure(asked, 60, CPU, [Candidate(Patient())], on_host=lambda calls: dict.fromkeys(calls, 1.0))
    waiting = 1 if in_graphs else len(PARTS)
    assert (len(timed["graphs"]), len(timed["events"])) == (len(PARTS) - waiting, waiting)


def test_the_host_is_measured_as_well():
    case, _, _ = held(spec(), Rival, ForwardOnly)
    assert {kind: set(parts) for kind, parts in case.hosts.items()} == {k: set(p) for k, p in case.times.items()}
    assert set(case.hosts[DEEPGEMM].values()) == {0.5}


def test_what_is_not_quantized_costs_nothing():
    case, _, _ = held(spec(Recipe.NONE), Rival)
    quantizers = {part for part in PARTS if part[:2] in ("a_", "g_", "b_")}
    assert {part for part, time in case.times[DEEPGEMM].items() if time == 0} == quantizers


def test_a_backend_that_fails_is_out_of_the_contest_with_its_reason():
    case, failed, _ = held(spec(), Broken, Rival)
    assert set(case.times[DEEPGEMM]) == set(PARTS) and case.times[TORCH] == case.hosts[TORCH] == {}
    assert failed == {TORCH: "RuntimeError: no kernel for this"}


def test_a_case_knows_what_was_measured():
    case, _, _ = held(spec(Recipe.FP8_ROWWISE_POW2, group_alignment=256), Rival)
    assert dataclasses.replace(case, times={}, hosts={}) == Case("fp8_rowwise", "small", True, 3, 32, 48, 60, {})


@pytest.mark.parametrize("rows, groups, alignment", ((60, 3, 1), (1000, 7, 128), (5, 8, 1), (0, 2, 1), (100, 1, 128)))
def test_uneven_ends_are_ends(rows, groups, alignment):
    ends = profile.uneven_ends(rows, groups, alignment, CPU)
    assert ends.dtype == torch.int32 and ends.shape == (groups,)
    assert (ends.diff() >= 0).all() and ends[0] >= 0 and ends[-1] <= rows
    assert (ends % alignment == 0).all()


# The file

PARTS_OF_TWO = {TRITON: {"plan": 1.0, "forward": 2.0}, DEEPGEMM: {"plan": 1.5, "forward": 1.0}}
CASE = Case("fp8_blockwise", "large", False, 8, 4096, 2048, 8192, PARTS_OF_TWO, {TRITON: {"plan": 3.0}})


def in_a_new_process() -> None:
    profile._known.clear()


def test_without_a_file_nothing_is_known():
    assert profile.known(H200).cases == ()


def test_what_was_measured_serves_this_process_and_later_ones():
    profile.store(H200, [CASE])
    assert profile.known(H200).cases == (CASE,)
    in_a_new_process()
    assert profile.known(H200).cases == (CASE,)
    assert profile.known(H200).is_exact


def test_what_another_process_was_faster_to_measure_is_used():
    theirs, other = dataclasses.replace(CASE, num_rows=4096), dataclasses.replace(CASE, k=128)
    profile.store(H200, [theirs])
    profile._known[H200] = dataclasses.replace(profile.known(H200), cases=())  # this one had looked before
    profile.store(H200, [CASE, other])
    assert set(profile.known(H200).cases) == {theirs, other}
    in_a_new_process()
    assert set(profile.known(H200).cases) == {theirs, other}


def test_the_file_is_looked_at_again_before_measuring():
    assert profile.known(H200).cases == ()
    before = dict(profile._known)
    profile.store(H200, [CASE])
    profile._known.update(before)  # as in the other process
    profile.read_again(H200)
    assert profile.known(H200).cases == (CASE,)


def test_others_may_read_the_file():
    profile.store(H200, [CASE])
    umask = os.umask(0o022)
    os.umask(umask)
    assert profile.path().stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    "machine",
    (
        dataclasses.replace(H200, name="NVIDIA H100"),
        dataclasses.replace(H200, versions=(("torch", "2.13.0"), ("triton", "3.6.0"))),
        dataclasses.replace(H200, versions=(*H200.versions, ("deep_gemm", "0.1.5"))),
    ),
    ids=("gpu", "torch", "deep_gemm"),
)
def test_another_machine_knows_nothing_of_it(machine):
    profile.store(H200, [CASE])
    assert profile.known(machine).cases == ()
    profile.store(machine, [CASE])
    assert profile.known(H200).cases == (CASE,), "nor does it lose what is another's"


def test_its_own_measurements_come_first_where_they_are_wanted():
    profile.store(H200, [CASE])
    own, shipped = profile.tables(H200, tunes=True)
    assert own.cases == (CASE,)
    assert profile.tables(H200, tunes=False) == (shipped,) == (cost_model.shipped("nvidia"),)
    assert profile.tables(Machine("cpu", "cpu", "cpu"), tunes=True) == ()


def damaged(**changes: object) -> str:
    """A file with one entry that has been changed; None takes a name out of it."""
    profile.store(H200, [CASE])
    content = json.loads(profile.path().read_text())
    content["cases"][0].update(changes)
    content["cases"] = [{name: value for name, value in content["cases"][0].items() if value is not None}]
    return json.dumps(content)


@pytest.mark.parametrize(
    "text",
    (
        lambda: "",
        lambda: "{}",
        lambda: '{"schema": 2, "cases": []}',
        lambda: '{"schema": 1, "cases": [{}]}',
        lambda: damaged(k="4096"),
        lambda: damaged(whole_blocks="no"),
        lambda: damaged(setting=None),
        lambda: damaged(times={"mill": {}}),
        lambda: damaged(times={"triton": {"plan": math.nan}}),
        lambda: damaged(hosts={"triton": {"plan": -1.0}}),
        lambda: damaged(times={"triton": {"plan": 10**400}}),
        lambda: damaged(times={"triton": {"plan": math.inf}}),
        lambda: damaged(n=0),
        lambda: damaged(k=True),
        lambda: damaged(num_rows=10**30),
    ),
    ids=range(15),
)
def test_a_damaged_file_is_ignored_with_a_warning_and_replaced(folder, text):
    folder.mkdir()
    profile.path().write_text(text())
    in_a_new_process()
    with pytest.warns(UserWarning, match="The file is ignored"):
        assert profile.known(H200).cases == ()
    profile.store(H200, [CASE])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_a_new_process()
        assert profile.known(H200).cases == (CASE,)


def test_a_directory_that_cannot_be_written_is_named(folder):
    folder.write_text("a file, where a directory should be")
    with pytest.warns(UserWarning) as caught:
        profile.store(H200, [CASE])
    assert all(str(folder) in str(warning.message) for warning in caught)
    assert any("expected a directory to keep it in" in str(warning.message) for warning in caught)
    assert profile.known(H200).cases == (CASE,), "this process knows"


def test_a_home_directory_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_CACHE_DIR", "~no_such_user_/x")
    with pytest.warns(
        UserWarning, match="no home directory for ~no_such_user_/x.*Set GROUPED_GEMM_CACHE_DIR"
    ) as caught:
        assert profile.known(H200).cases == ()
        profile.store(H200, [CASE])
    assert len(caught) == 2
    assert profile.known(H200).cases == (CASE,)
