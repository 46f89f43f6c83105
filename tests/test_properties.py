"""Properties that hold for all sizes of groups, of the tail, of K and of N, and for all values of ``offs``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from grouped_gemm import Pass, Recipe
from grouped_gemm.testing import (
    DGRAD,
    FORWARD,
    TRAINING,
    WGRAD,
    Case,
    Shape,
    expected,
    make_inputs,
    refusal,
    rounding_tolerance,
    run,
    sums_coarsely,
    worst_row_error,
)

# Derandomized, so that a failure is caused by a change, and is the same on every machine.
# A backend may refuse most of what is drawn; one that refuses all of it fails, as unsatisfiable.
quick = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.filter_too_much],
)

recipes = st.sampled_from(Recipe)
# Around multiples of 32 and 128, so that the last block is full, short, or a single value; and multiples of 16.
features = st.one_of(
    st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129]), st.integers(1, 10).map(lambda i: 16 * i)
)
group_sizes = st.lists(st.one_of(st.just(0), st.integers(1, 40), st.integers(120, 136)), min_size=1, max_size=5)
shapes = st.builds(
    lambda sizes, tail, k, n: Shape("drawn", tuple(sizes), tail, k, n),
    group_sizes,
    st.integers(0, 40),
    features,
    features,
)
int32 = st.integers(-(2**31), 2**31 - 1)


@pytest.fixture(autouse=True)
def _runs_here(backend, device):
    """Skips a backend that cannot run on this machine, but not one that refuses only some of the drawn cases."""
    if reasons := refusal(Case(backend, Recipe.NONE, passes=FORWARD), device):
        pytest.skip(reasons)


@quick
@given(shape=shapes, recipe=recipes, passes=st.sampled_from([FORWARD, DGRAD, WGRAD]), seed=st.integers(0, 9))
def test_a_pass_agrees_with_the_reference(backend, device, shape, recipe, passes, seed):
    case = Case(backend, recipe, passes=passes, shape=shape)
    assume(not refusal(case, device))
    inputs = make_inputs(case, device, seed)
    found = run(case, inputs).of(passes[-1])
    terms = None
    if sums_coarsely(case, device):  # shows where terms cancel, as they may in rows of a single value
        magnitudes = {name: getattr(inputs, name).abs() for name in ("a", "b", "dy")}
        terms = expected(passes[-1], dataclasses.replace(inputs, **magnitudes), recipe)
    error = worst_row_error(found, expected(passes[-1], inputs, recipe), terms)
    assert error <= rounding_tolerance(found.dtype, case, device)


@quick
@given(offs=st.lists(st.one_of(st.integers(-5, 105), int32), min_size=1, max_size=5), recipe=recipes)
def test_every_value_of_every_result_is_written_for_any_offs(backend, device, offs, recipe):
    shape = Shape("drawn", (100, *[0] * (len(offs) - 1)), k=32, n=48)
    case = Case(backend, recipe, passes=TRAINING, shape=shape)
    assume(not refusal(case, device))
    inputs = make_inputs(case, device)
    outcome = run(case, dataclasses.replace(inputs, offs=torch.tensor(offs, dtype=torch.int32, device=device)))
    for pass_ in Pass:
        assert outcome.of(pass_).isfinite().all(), pass_
