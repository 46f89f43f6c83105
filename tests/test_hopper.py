"""The Hopper kernels on large groups, compared with the portable kernels and with the reference.

`test_backends` tests the same guarantees on small shapes, for all backends. Their numbers are those of docs/design.md.

If a test fails: where a few in a thousand values differ by one unit in the last place, the order of operations differs
(the compiler has fused a multiplication and an addition in one of the two kernels). Where whole tiles or the last rows
of groups differ, or are NaN, an address is wrong or a barrier is missing. `TILES` of the kernel says what a tile is.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partialmethod
from typing import Any

import pytest
import torch
from kernel_checks import assert_same_bits
from large import (
    K1000,
    RAGGED,
    TRITON,
    Passes,
    cases_of,
    compile_in_parallel,
    layer,
    portable_kernels,
    tests_of_module,
    train,
    training,
    with_sizes,
)

from grouped_gemm import Pass, Recipe, reference
from grouped_gemm.backends import candidates
from grouped_gemm.core.call_spec import RowClass, row_class
from grouped_gemm.core.machine import machine_of
from grouped_gemm.testing import (
    DGRAD,
    FORWARD,
    TRAINING,
    Case,
    Inputs,
    Shape,
    expected,
    make_inputs,
    relative_error,
    rounding_tolerance,
    run,
    worst_row_error,
)

pytestmark = pytest.mark.gpu

K256 = Shape("k256", RAGGED.sizes, tail=70, k=256, n=RAGGED.n)  # a wgrad has fewer tiles than programs
N696 = Shape("n696", RAGGED.sizes, tail=70, k=RAGGED.k, n=696)  # the last rows of a wgrad are fewer than 64
NONE, ROWWISE, BLOCKWISE = Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    Case(TRITON, NONE, BFLOAT16, TRAINING, RAGGED),
    Case(TRITON, NONE, BFLOAT16, TRAINING, RAGGED, b_contiguous="n"),
    Case(TRITON, NONE, FLOAT16, DGRAD, RAGGED),
    Case(TRITON, NONE, BFLOAT16, DGRAD, K1000),
    Case(TRITON, NONE, BFLOAT16, TRAINING, K256),
    Case(TRITON, NONE, BFLOAT16, FORWARD, RAGGED, out_dtype=FLOAT16, has_bias=True),
    Case(TRITON, NONE, BFLOAT16, FORWARD, RAGGED, out_dtype=FLOAT32),
    Case(TRITON, ROWWISE, BFLOAT16, TRAINING, RAGGED),
    Case(TRITON, ROWWISE, BFLOAT16, TRAINING, RAGGED, b_contiguous="n"),
    Case(TRITON, ROWWISE, BFLOAT16, TRAINING, K1000),
    Case(TRITON, ROWWISE, BFLOAT16, TRAINING, K256),
    Case(TRITON, ROWWISE, BFLOAT16, FORWARD, RAGGED, out_dtype=FLOAT32, has_bias=True),
    Case(TRITON, BLOCKWISE, BFLOAT16, TRAINING, RAGGED),
    Case(TRITON, BLOCKWISE, BFLOAT16, TRAINING, RAGGED, b_contiguous="n"),
    Case(TRITON, BLOCKWISE, BFLOAT16, TRAINING, N696),
    Case(TRITON, BLOCKWISE, BFLOAT16, TRAINING, K256),
    Case(TRITON, BLOCKWISE, BFLOAT16, FORWARD, K1000),
    Case(TRITON, BLOCKWISE, BFLOAT16, FORWARD, RAGGED, out_dtype=FLOAT32, has_bias=True),
)


@pytest.fixture(scope="module", autouse=True)
def compiled(request, device):
    """Compiles in parallel what the tests of this module would compile one after the other."""
    items = tests_of_module(request)
    passes = {case: Passes(case, make_inputs(case, device)) for case in map(of_a_common_shape, cases_of(items))}
    compile_in_parallel(one.quantize for one in passes.values())

    def jobs(name: str) -> list[Callable[[], object]]:
        about = map(of_a_common_shape, cases_of([item for item in items if name in item.originalname]))
        return [gemm for case in dict.fromkeys(about) for gemm in passes[case].gemms()]

    compile_in_parallel(jobs("test_"))
    with portable_kernels():
        compile_in_parallel(jobs("test_a_hopper_kernel"))
    torch.cuda.synchronize()


def of_a_common_shape(case: Case) -> Case:
    """A case that uses the kernels of ``case``, which serve all M of its row class."""
    return dataclasses.replace(case, shape=RAGGED if case.shape.k == RAGGED.k else case.shape)


def tolerance(dtype: torch.dtype, case: Case, device: torch.device) -> float:
    """`rounding_tolerance`, and more for rowwise scales: there the tensor cores sum the whole contraction with 13 bits.

    Each of its thousands of terms is truncated at the last bit of the sum. Blockwise, a sum has only 128 terms."""
    return rounding_tolerance(dtype, case, device) + (2.0**-8 if case.recipe is ROWWISE else 0)


def needs_hopper(device: torch.device) -> None:
    if machine_of(device).arch != "sm_90":
        pytest.skip(f"the Hopper kernels need sm_90; found {machine_of(device).arch}")


@pytest.fixture
def launched(device, monkeypatch) -> list[str]:
    """The Hopper kernels that have been launched."""
    needs_hopper(device)
    from grouped_gemm.kernels.gemm import k_grouped_hopper, m_grouped_hopper

    here = torch.empty(0, device=device).device
    next(c for c in candidates(here) if c.backend.kind is TRITON).health()  # launches kernels as well, once per process
    names = []

    def record(gemm: Any, name: str, original: Callable[..., None], *args) -> None:
        names.append(name)
        original(gemm, *args)

    for module, name in ((m_grouped_hopper, "grouped_mm"), (k_grouped_hopper, "wgrad")):
        monkeypatch.setattr(module.Gemm, "run", partialmethod(record, name, module.Gemm.run))
    return names


# Memory is poisoned with NaN in all calls of `run`, and rows past the last group are NaN in the operands.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hopper_kernel_gives_the_bits_of_the_portable_one(case, device, launched):
    inputs = make_inputs(case, device)
    found = run(case, inputs)
    kernels = {Pass.FORWARD: "grouped_mm", Pass.DGRAD: "grouped_mm", Pass.WGRAD: "wgrad"}
    assert launched == [kernels[p] for p in case.passes], "a Hopper kernel did not run"
    launched.clear()
    with portable_kernels():
        wanted = run(case, inputs)
    assert not launched
    for pass_ in case.passes:
        if pass_ is Pass.WGRAD and case.recipe is BLOCKWISE:  # its order of multiplications differs
            assert relative_error(found.db, wanted.db) <= 1e-4, "wgrad"
        else:
            assert_same_bits(found.of(pass_), wanted.of(pass_), pass_.value)


@training(recipes=(NONE, ROWWISE, BLOCKWISE))
def test_a_gradient_that_is_added_is_that_which_is_stored(case, device, launched):
    passes = Passes(case, make_inputs(case, device))
    passes.quantize()
    columns, backend = (passes.a[1], passes.dy[1], passes.plan), passes.backend
    for contiguous in ("k", "n"):
        db = backend.wgrad(*columns, torch.float32, contiguous=contiguous)
        total = torch.randn_like(db)
        total[[0, 4]] = math.nan  # of groups without rows, which are not read
        expected = total + db
        backend.add_wgrad(*columns, total)
        assert launched == ["wgrad", "wgrad"]
        launched.clear()
        assert total[[0, 4]].isnan().all()
        with_rows = [1, 2, 3, 5]
        if case.recipe is ROWWISE:  # the compiler may fuse the multiplication by the last scale with the addition
            torch.testing.assert_close(total[with_rows], expected[with_rows], rtol=1e-6, atol=1e-5)
        else:
            assert_same_bits(total[with_rows], expected[with_rows], "the sum")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_large_call_agrees_with_the_reference(case, device):
    inputs = make_inputs(case, device)
    outcome, end = run(case, inputs), inputs.ends[-1]
    for pass_ in case.passes:
        found = outcome.of(pass_)
        error, allowed = (
            worst_row_error(found, expected(pass_, inputs, case.recipe)),
            tolerance(found.dtype, case, device),
        )
        assert error <= allowed, f"{pass_.value}: {error:.3g} of {allowed:.3g}; infinite where zeros are expected"
        if pass_ is not Pass.WGRAD:
            assert torch.count_nonzero(found[end:]) == 0, f"{pass_.value}: rows past the last group"


@pytest.mark.parametrize("case", [case for case in CASES if case.passes == FORWARD], ids=str)
def test_a_nan_in_the_weights_of_the_last_group_leaves_rows_past_it_zero(case, device):
    inputs = make_inputs(case, device)
    b = inputs.b.clone()
    b[-1] = math.nan
    y, end = run(case, dataclasses.replace(inputs, b=b)).y, inputs.ends[-1]
    assert end < y.shape[0] and torch.count_nonzero(y[end:]) == 0
    assert y[inputs.ends[-2] : end].isnan().all()


# 5. More than 2^31 elements are addressed correctly: in `a`, in dA and, with scales, in the columns of `a`.
OVER_2_31 = Shape("over_2_31_elements", (0, 400_000, 1, 346_000, 0, 513), tail=70, k=2880, n=704)


@pytest.mark.alone
@training(OVER_2_31)
def test_the_last_group_of_operands_over_2_31_elements_is_right(case, device):
    assert (sum(OVER_2_31.sizes) - 513) * OVER_2_31.k > 2**31
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    if free < 2**36:
        pytest.skip(f"needs 64 GiB of device memory; found {free / 2**30:.0f} GiB free")
    try:
        check_last_group(case, make_inputs(case, device), device)
    finally:
        torch.cuda.empty_cache()


def check_last_group(case: Case, inputs: Inputs, device: torch.device) -> None:
    """Compares with a call of the last group alone: no scale of an operand depends on another group."""
    outcome = run(case, inputs)
    start, end = inputs.ends[-2:]
    rows = slice(start, end)
    alone = dataclasses.replace(inputs, a=inputs.a[rows], b=inputs.b[-1:], dy=inputs.dy[rows], ends=(end - start,))
    for pass_ in Pass:
        found = outcome.of(pass_)
        last = found[-1:] if pass_ is Pass.WGRAD else found[rows]
        error, allowed = worst_row_error(last, expected(pass_, alone, case.recipe)), tolerance(last.dtype, case, device)
        assert error <= allowed, f"{pass_.value}: {error:.3g} of {allowed:.3g}"
        if pass_ is not Pass.WGRAD:
            assert torch.count_nonzero(found[end:]) == 0, f"{pass_.value}: rows past the last group"


# 6. Results repeat bit for bit, and a row's result does not depend on the other groups' sizes.
AMONG = {  # sizes and tail; the 700 rows of the third group start at row 0, 301, 903 or 703
    "alone": ((0, 0, 700, 0, 0, 900), 0),
    "after_301": ((1, 300, 700, 129, 0, 1000), 5),
    "after_903": ((900, 3, 700, 0, 64, 1), 0),
    "after_703": ((63, 640, 700, 7, 2000, 500), 70),
}


@training()
def test_a_row_of_a_large_group_does_not_depend_on_the_sizes_of_others(case, device):
    group, wanted = make_inputs(with_sizes(case, (0, 0, 700, 0, 0, 0)), device), None
    for name, (sizes, tail) in AMONG.items():
        among = with_sizes(case, sizes, tail)
        assert row_class(among.shape.num_rows, len(sizes)) is RowClass.LARGE
        rows = slice(sum(sizes[:2]), sum(sizes[:3]))
        inputs = dataclasses.replace(make_inputs(among, device, seed=1), b=group.b)
        inputs.a[rows], inputs.dy[rows] = group.a, group.dy
        outcome = run(among, inputs)
        found = (outcome.y[rows], outcome.da[rows], outcome.db[2])
        wanted = found if wanted is None else wanted
        for pass_, x, truth in zip(Pass, found, wanted):
            assert_same_bits(x, truth, f"{pass_.value}, {name}: {sizes}")


@training()
def test_large_calls_repeat_bit_for_bit(case, device):
    inputs = make_inputs(case, device)
    first = train(layer(case), inputs)
    for _ in range(5):
        for pass_, x, truth in zip(Pass, train(layer(case), inputs), first):
            assert_same_bits(x, truth, pass_.value)


# 10. offs outside [0, M] or out of order never touches memory out of bounds.
HOSTILE = {
    "out_of_order": (800, 300, 900, 100, 1500, 1200),
    "descending": (1500, 1200, 900, 600, 300, 0),
    "negative": (-50, 700, -1, 1300, 1400, 1400),
    "all_negative": (-6, -5, -4, -3, -2, -1),
    "past_m": (300, 1601, 5000, 10**6, 0, 2**31 - 1),
    "far": (-(2**31), 2**31 - 1, -(2**31), 2**31 - 1, -1, 2**31 - 1),
}


@training(Shape("1600_rows", (400, 300, 200, 400, 100, 200), k=RAGGED.k, n=RAGGED.n))
@pytest.mark.parametrize("ends", HOSTILE.values(), ids=HOSTILE)
def test_any_offs_give_the_bits_of_offs_clamped_to_the_rows(case, ends, device):
    inputs = make_inputs(case, device)
    num_rows = len(inputs.a)
    inside = reference.group_ends(torch.tensor(ends), num_rows)
    # NaN before and after the operands in memory
    a, dy = (
        torch.nn.functional.pad(x, (0, 0, num_rows, num_rows), value=math.nan)[num_rows:-num_rows]
        for x in (inputs.a, inputs.dy)
    )
    found, wanted = (
        run(case, dataclasses.replace(inputs, a=a, dy=dy, offs=torch.tensor(e, dtype=torch.int32, device=device)))
        for e in (ends, inside)
    )
    for pass_ in Pass:
        x = found.of(pass_)
        assert x.isfinite().all(), f"{pass_.value}: read out of bounds, or left values unwritten"
        assert_same_bits(x, wanted.of(pass_), f"{pass_.value}, compared with offs {inside}")
    assert torch.count_nonzero(found.y[inside[-1] :]) == torch.count_nonzero(found.da[inside[-1] :]) == 0
    for e, group in enumerate(reference.group_slices(inside)):
        assert group.start < group.stop or torch.count_nonzero(found.db[e]) == 0, f"wgrad of group {e}, which is empty"
