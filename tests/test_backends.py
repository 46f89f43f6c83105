"""The guarantees, on every backend and every case that its requirements allow; `conftest` skips the others.

Guarantees are numbered as in docs/design.md.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grouped_gemm import (
    BackendKind,
    KernelPreference,
    Machine,
    NoBackendError,
    Pass,
    QuantizedWeights,
    Recipe,
    explain,
    grouped_mm,
    prefer,
    quantize_weights,
    reference,
)
from grouped_gemm.backends import candidates, get_backend
from grouped_gemm.backends.base import Requirement
from grouped_gemm.core.call_spec import CallSpec, RowClass
from grouped_gemm.selection.explanation import Explanation
from grouped_gemm.selection.rules import decide
from grouped_gemm.testing import (
    DGRAD,
    FORWARD,
    SHAPES,
    TRAINING,
    WGRAD,
    Case,
    Inputs,
    Shape,
    as_quantized,
    backend_kinds,
    cases,
    expected,
    make_inputs,
    poisoned_memory,
    quantization_tolerance,
    relative_error,
    rounding_tolerance,
    run,
    worst_row_error,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALED = tuple(recipe for recipe in Recipe if recipe.is_scaled)
RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)
EACH_PASS = (FORWARD, DGRAD, WGRAD)
# Backends whose order of summation depends only on K and on the row's own group (guarantee 6).
BATCH_INVARIANT = {BackendKind.EMULATED, BackendKind.TRITON}
H100 = Machine("nvidia", "sm_90", "NVIDIA H100")


def of_cases(*lists: list[Case]) -> pytest.MarkDecorator:
    """Parametrizes a test with ``case``, each case once."""
    return pytest.mark.parametrize("case", dict.fromkeys(case for cases in lists for case in cases), ids=str)


def call(case: Case, inputs: Inputs, **changed) -> torch.Tensor:
    """`grouped_mm` with the options of ``case``, on the tensors of ``inputs`` or those in ``changed``."""
    a, b, offs = (changed.pop(name, getattr(inputs, name)) for name in ("a", "b", "offs"))
    arguments = {
        "recipe": case.recipe,
        "bias": inputs.bias,
        "out_dtype": case.out_dtype,
        "group_alignment": case.shape.alignment,
        "kernel_preference": case.backend,
    }
    return grouped_mm(a, b, offs, **arguments | changed)


def leaves(inputs: Inputs) -> Inputs:
    """The same operands as leaves that require gradients."""
    bias = None if inputs.bias is None else inputs.bias.clone().requires_grad_()
    return dataclasses.replace(
        inputs, a=inputs.a.clone().requires_grad_(), b=inputs.b.clone().requires_grad_(), bias=bias
    )


def gradients(y: torch.Tensor, inputs: Inputs, dy: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """The gradients of ``a``, ``b`` and, if there is one, the bias."""
    operands = [x for x in (inputs.a, inputs.b, inputs.bias) if x is not None]
    return torch.autograd.grad(y, operands, inputs.dy if dy is None else dy)


def all_equal(found, wanted) -> bool:
    """Whether two sequences of tensors are equal bit for bit, dtypes included."""
    return len(found) == len(wanted) and all(
        x.dtype == y.dtype and torch.equal(*(t.detach().contiguous().view(torch.uint8) for t in (x, y)))
        for x, y in zip(found, wanted)
    )


@pytest.mark.parametrize(
    "dtype",
    [*DTYPES, torch.float64, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e8m0fnu],
    ids=lambda d: str(d)[6:],
)
def test_poisoned_memory_is_nan(dtype):
    with poisoned_memory():
        fresh = (torch.empty(5, dtype=dtype), torch.ones(1).new_empty(5, dtype=dtype))
        alike = torch.empty_like(torch.ones(5), dtype=dtype)
    assert all(x.float().isnan().all() for x in (*fresh, alike))


def test_poisoned_memory_is_the_largest_integer():
    with poisoned_memory():
        fresh = torch.empty(5, dtype=torch.int32)
    assert (fresh == 2**31 - 1).all()


def test_poisoned_memory_restores_the_settings():
    with pytest.raises(KeyError), poisoned_memory():
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("metric", [relative_error, worst_row_error])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_value_is_an_infinite_error(metric, value):
    truth = torch.ones(3, 4)
    found = truth.clone()
    found[1, 2] = value
    assert metric(found, truth) == math.inf
    assert metric(truth, found) == math.inf


def test_a_wrong_row_among_many_is_detected():
    truth = torch.ones(10_000, 4)
    found = truth.clone()
    found[77] = 2
    assert worst_row_error(found, truth) == 1


def test_a_row_that_should_be_zero_has_to_be_zero():
    assert worst_row_error(torch.full((1, 4), 1e-30), torch.zeros(1, 4)) == math.inf
    assert worst_row_error(torch.zeros(1, 4), torch.zeros(1, 4)) == 0


@of_cases(
    cases(recipes=RECIPES, dtypes=DTYPES, passes=(FORWARD, TRAINING), b_contiguous=("k", "n")),
    cases(shapes=SHAPES, out_dtypes=(torch.float32,), has_bias=(True,)),
    cases(dtypes=DTYPES, shapes=(Shape("odd", (3, 4), k=20, n=36), Shape("odder", (3,), k=17, n=15))),
)
def test_a_case_has_the_call_spec_of_its_call(case, device):
    inputs = make_inputs(case, device)
    a = inputs.a.requires_grad_(Pass.DGRAD in case.passes)
    b = inputs.b.requires_grad_(Pass.WGRAD in case.passes)
    decision = explain(
        a,
        b,
        inputs.offs,
        recipe=case.recipe,
        bias=inputs.bias,
        out_dtype=case.out_dtype,
        group_alignment=case.shape.alignment,
    ).decision
    machine = decision.spec.machine
    asked_of_auto = decision.spec._replace(where=machine, preference=KernelPreference.AUTO)
    assert asked_of_auto == case.spec(machine)


@of_cases(
    cases(recipes=Recipe, passes=EACH_PASS, shapes=SHAPES),
    cases(recipes=RECIPES, passes=EACH_PASS, dtypes=DTYPES, b_contiguous=("k", "n")),
    cases(recipes=RECIPES, passes=EACH_PASS, dtypes=DTYPES, out_dtypes=DTYPES),
)
def test_a_pass_agrees_with_the_reference_on_quantized_operands(case, device):
    inputs = make_inputs(case, device)
    pass_ = case.passes[-1]
    found = run(case, inputs).of(pass_)
    assert found.dtype == ((case.out_dtype or case.dtype) if pass_ is Pass.FORWARD else case.dtype)
    assert worst_row_error(found, expected(pass_, inputs, case.recipe)) <= rounding_tolerance(found.dtype, case, device)


@of_cases(
    cases(recipes=Recipe, passes=EACH_PASS, dtypes=DTYPES),
    cases(recipes=RECIPES, passes=EACH_PASS, shapes=[shape for shape in SHAPES if max(shape.k, shape.n) > 200]),
)
def test_a_pass_is_within_the_tolerance_of_its_recipe(case, device):
    inputs = make_inputs(case, device)
    pass_ = case.passes[-1]
    found = run(case, inputs).of(pass_)
    assert relative_error(found, expected(pass_, inputs)) <= quantization_tolerance(case.recipe, found.dtype)


@of_cases(
    cases(recipes=Recipe, dtypes=DTYPES, has_bias=(True,)),
    cases(shapes=SHAPES, has_bias=(True,)),
)
def test_a_bias_is_added_to_the_rows_of_its_group(case, device):
    inputs = make_inputs(case, device)
    y = run(case, inputs).y
    assert worst_row_error(y, expected(Pass.FORWARD, inputs, case.recipe)) <= rounding_tolerance(y.dtype, case, device)


@of_cases(
    cases(recipes=RECIPES, passes=(WGRAD,), has_bias=(True,)),
    cases(passes=(WGRAD,), dtypes=DTYPES, has_bias=(True,)),
    cases(shapes=SHAPES, passes=(WGRAD,), has_bias=(True,)),
)
def test_the_gradient_of_a_bias_is_the_sum_of_its_groups_gradients(case, device):
    inputs = make_inputs(case, device)
    dbias = run(case, inputs).dbias
    sums = reference.group_sums(inputs.dy.double(), inputs.ends)
    assert worst_row_error(dbias, sums) <= rounding_tolerance(dbias.dtype)


@of_cases(cases(has_bias=(True,), passes=(TRAINING,)))
def test_the_gradient_of_a_bias_has_the_dtype_of_the_bias(case, device):
    inputs = make_inputs(case, device)
    inputs = leaves(dataclasses.replace(inputs, bias=inputs.bias.float()))
    dbias = gradients(call(case, inputs), inputs)[2]
    assert dbias.dtype == torch.float32
    sums = reference.group_sums(inputs.dy.double(), inputs.ends)
    assert worst_row_error(dbias, sums) <= rounding_tolerance(torch.float32)


@of_cases(cases(has_bias=(True,)))
def test_the_bias_alone_may_require_a_gradient(case, device):
    inputs = make_inputs(case, device)
    bias = inputs.bias.requires_grad_()
    (dbias,) = torch.autograd.grad(call(case, inputs), bias, inputs.dy)
    assert worst_row_error(dbias, reference.group_sums(inputs.dy.double(), inputs.ends)) <= rounding_tolerance(
        dbias.dtype
    )


@of_cases(cases(recipes=RECIPES, dtypes=DTYPES, passes=(WGRAD,), b_contiguous=("k", "n")))
def test_the_gradient_of_b_has_the_strides_of_b(case, device):
    inputs = make_inputs(case, device)
    assert run(case, inputs).db.stride() == inputs.b.stride()


@of_cases(cases(recipes=Recipe, passes=(WGRAD,)), cases(passes=(WGRAD,), shapes=SHAPES))
def test_the_weight_gradient_form_agrees_with_the_reference(case, device):
    inputs = make_inputs(case, device)
    with poisoned_memory():
        c = call(case, inputs, a=inputs.a.t(), b=inputs.dy)
    assert worst_row_error(c, expected(Pass.WGRAD, inputs, case.recipe)) <= rounding_tolerance(c.dtype, case, device)


@of_cases(cases(recipes=RECIPES, passes=(WGRAD,), dtypes=(torch.bfloat16,), out_dtypes=(torch.float32,)))
def test_the_weight_gradient_form_returns_out_dtype(case, device):
    inputs = make_inputs(case, device)
    c = call(case, inputs, a=inputs.a.t(), b=inputs.dy.to(case.dtype))
    assert c.dtype == torch.float32
    assert worst_row_error(c, expected(Pass.WGRAD, inputs, case.recipe)) <= rounding_tolerance(
        torch.float32, case, device
    )


@of_cases(cases(recipes=Recipe, passes=(TRAINING,)), cases(passes=(TRAINING,), shapes=SHAPES))
@pytest.mark.parametrize("operand", ["a", "b"])
def test_the_weight_gradient_form_has_gradients(case, operand, device):
    inputs = make_inputs(case, device)
    columns, rows = inputs.a.t().contiguous().requires_grad_(), inputs.dy.requires_grad_()
    dc = inputs.b.contiguous()
    with poisoned_memory():
        c = call(case, inputs, a=columns, b=rows)
        found = torch.autograd.grad(c, columns if operand == "a" else rows, dc)[0]
    # With x = a^T: dx is dgrad and db is the forward pass, both with dC in the place of the weights.
    as_weights = dataclasses.replace(inputs, b=dc, dy=rows.detach())
    if operand == "a":
        found, wanted = found.t(), expected(Pass.DGRAD, as_weights, case.recipe)
    else:
        wanted = expected(Pass.FORWARD, as_weights, case.recipe)
    assert worst_row_error(found, wanted) <= rounding_tolerance(case.dtype, case, device)


@of_cases(cases(recipes=SCALED, dtypes=DTYPES, b_contiguous=("k", "n")), cases(recipes=SCALED, shapes=SHAPES))
def test_quantized_weights_give_the_output_of_dynamic_quantization(case, device):
    inputs = make_inputs(case, device)
    weights = quantize_weights(inputs.b, case.recipe, kernel_preference=case.backend)
    with poisoned_memory():
        assert torch.equal(call(case, inputs, b=weights), call(case, inputs))


@of_cases(cases(recipes=SCALED, passes=(DGRAD,), b_contiguous=("k", "n")))
def test_quantized_weights_give_the_gradient_of_dynamic_quantization(case, device):
    inputs = make_inputs(case, device)
    a = inputs.a.requires_grad_()
    weights = quantize_weights(inputs.b, case.recipe, dgrad=True, kernel_preference=case.backend)
    found, wanted = (torch.autograd.grad(call(case, inputs, b=b), a, inputs.dy)[0] for b in (weights, inputs.b))
    assert torch.equal(found, wanted)


def from_checkpoint(case: Case, inputs: Inputs, dgrad: bool) -> tuple[QuantizedWeights, Inputs]:
    """fp8 weights with scales, as a checkpoint stores them, and ``inputs`` with their dequantized values as ``b``."""
    blocks = reference.weight_blocks(case.recipe, 1)
    data, scale = reference.quantize(inputs.b, blocks, case.recipe, torch.float8_e4m3fn)
    weights = quantize_weights(
        data, case.recipe, scale=scale, dtype=case.dtype, dgrad=dgrad, kernel_preference=case.backend
    )
    return weights, dataclasses.replace(inputs, b=reference.dequantize(data, scale, blocks))


@of_cases(cases(recipes=SCALED, dtypes=DTYPES, b_contiguous=("k", "n")), cases(recipes=SCALED, shapes=SHAPES))
def test_a_checkpoints_weights_are_used_without_requantization(case, device):
    inputs = make_inputs(case, device)
    weights, with_values = from_checkpoint(case, inputs, dgrad=False)
    rows = as_quantized(inputs.a, reference.row_blocks(case.recipe), case.recipe)
    wanted = reference.grouped_mm(rows, with_values.b, inputs.ends)
    y = call(case, inputs, b=weights)
    assert y.dtype == case.dtype
    assert worst_row_error(y, wanted) <= rounding_tolerance(y.dtype, case, device)


@of_cases(cases(recipes=SCALED, passes=(DGRAD,), b_contiguous=("k", "n")))
def test_a_checkpoints_weights_give_a_gradient(case, device):
    inputs = make_inputs(case, device)
    weights, with_values = from_checkpoint(case, inputs, dgrad=True)
    a = inputs.a.requires_grad_()
    (da,) = torch.autograd.grad(call(case, inputs, b=weights), a, inputs.dy)
    rows = as_quantized(inputs.dy, reference.row_blocks(case.recipe), case.recipe)
    wanted = reference.grouped_mm(rows, with_values.b.transpose(1, 2), inputs.ends)
    # Square blocks serve both passes; any other recipe may have to quantize the values again, along N.
    exact = case.recipe.block == case.recipe.weight_lines
    allowed = rounding_tolerance(da.dtype, case, device) if exact else quantization_tolerance(case.recipe, da.dtype)
    assert relative_error(da, wanted) <= allowed


# 1. Rows at and past offs[-1] are zero in the output and in dA. Those rows of the inputs are NaN, and so is new memory.


@of_cases(
    cases(recipes=Recipe, passes=(TRAINING,), shapes=[shape for shape in SHAPES if shape.tail]),
    cases(dtypes=DTYPES, passes=(TRAINING,), has_bias=(True,)),
)
def test_rows_past_the_last_group_are_zero(case, device):
    outcome = run(case, make_inputs(case, device))
    end = sum(case.shape.sizes)
    assert torch.count_nonzero(outcome.y[end:]) == 0  # NaN counts as not zero
    assert torch.count_nonzero(outcome.da[end:]) == 0


# 2. An empty group's wgrad is exactly zero; M = 0 stays connected to the graph and gives zero gradients.


@of_cases(
    cases(recipes=Recipe, passes=(TRAINING,), shapes=[s for s in SHAPES if 0 in s.sizes], has_bias=(False, True)),
)
def test_an_empty_group_has_zero_gradients(case, device):
    outcome = run(case, make_inputs(case, device))
    for e, size in enumerate(case.shape.sizes):
        if size == 0:
            assert torch.count_nonzero(outcome.db[e]) == 0
            assert outcome.dbias is None or torch.count_nonzero(outcome.dbias[e]) == 0


@of_cases(cases(recipes=Recipe, passes=(TRAINING,), shapes=[Shape("no_rows", (0, 0))], has_bias=(False, True)))
def test_a_call_without_rows_stays_connected_to_the_graph(case, device):
    inputs = leaves(make_inputs(case, device))
    with poisoned_memory():
        y = call(case, inputs)
        y.sum().backward()
    assert y.shape == (0, case.shape.n)
    assert inputs.a.grad.shape == inputs.a.shape
    assert torch.count_nonzero(inputs.b.grad) == 0
    assert inputs.bias is None or torch.count_nonzero(inputs.bias.grad) == 0


# 3. Forward and backward have no host sync, unless explain() says so beforehand. A call plans once.


def spy(monkeypatch: pytest.MonkeyPatch, case: Case, *names: str) -> list[tuple[str, tuple]]:
    """The calls of these methods of the backend, as name and positional arguments; they grow as calls are made."""
    backend, calls = get_backend(case.backend), []

    def recorded(name):
        original = getattr(backend, name)

        def record(*args, **kwargs):
            calls.append((name, args))
            return original(*args, **kwargs)

        monkeypatch.setattr(backend, name, record)

    for name in names:
        recorded(name)
    return calls


@of_cases(cases(recipes=(Recipe.NONE, Recipe.MXFP8), passes=(TRAINING,)))
def test_offs_is_planned_and_each_operand_quantized_once(case, device, monkeypatch):
    calls = spy(monkeypatch, case, "plan", "quantize_activations", "quantize_weights")
    run(case, make_inputs(case, device))
    assert [name for name, _ in calls] == ["quantize_weights", "plan", "quantize_activations", "quantize_activations"]


@of_cases(cases(passes=(TRAINING,)))
def test_explain_runs_nothing(case, device, monkeypatch):
    calls = spy(monkeypatch, case, "plan", "quantize_activations", "quantize_weights")
    inputs = leaves(make_inputs(case, device))
    assert explain(inputs.a, inputs.b, inputs.offs, kernel_preference=case.backend).decision.is_complete
    assert not calls


def on_a_gpu(machine: Machine, host_sync: bool) -> CallSpec:
    return CallSpec(machine, 8, 4096, 1536, RowClass.LARGE, passes=TRAINING, host_sync=host_sync)


def test_a_backend_with_host_syncs_says_so_and_is_refused_where_they_are_not_allowed(backend):
    if not get_backend(backend).host_syncs:
        pytest.skip(f"{backend.value} has no host sync")
    on_cpu = candidates(torch.device("cpu"))
    allowed = decide(on_a_gpu(H100, host_sync=True), backend, on_cpu)
    assert bool(Explanation(allowed).host_syncs) == allowed.is_complete
    refused = decide(on_a_gpu(H100, host_sync=False), backend, on_cpu)
    assert not refused.is_complete
    assert any("host syncs" in r.reason for r in refused.refusals if r.backend is backend)


@pytest.mark.gpu
@of_cases(cases(recipes=RECIPES, passes=(TRAINING,), has_bias=(False, True)))
def test_no_pass_has_a_host_sync(case, device):
    if get_backend(case.backend).host_syncs:
        pytest.skip(f"{case.backend.value} says: {get_backend(case.backend).host_syncs}")
    inputs = leaves(make_inputs(case, device))
    gradients(call(case, inputs), inputs)  # compiles kernels and fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(call(case, inputs), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@of_cases(cases())
def test_a_call_is_captured_in_a_graph_or_refused(case, device):
    inputs = make_inputs(case, device)
    wanted = call(case, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if get_backend(case.backend).host_syncs and Pass.FORWARD in get_backend(case.backend).host_sync_passes:
        with pytest.raises(NoBackendError, match="CUDA graph capture"), torch.cuda.graph(graph):
            call(case, inputs)
        return
    with torch.cuda.graph(graph):
        y = call(case, inputs)
    graph.replay()
    assert torch.equal(y, wanted)


# 5. Operands of more than 2^31 elements are addressed correctly.


@pytest.mark.gpu
@of_cases(cases(shapes=[Shape("over_2_31_elements", (2**20, 2**20 + 8), tail=3, k=1040, n=16)]))
def test_the_last_rows_of_an_operand_over_2_31_elements_are_right(case, device):
    if torch.cuda.get_device_properties(device).total_memory < 2**35:
        pytest.skip("needs 32 GiB of device memory")
    inputs = make_inputs(case, device)
    assert inputs.a.numel() > 2**31
    y = call(case, inputs)
    end = inputs.ends[-1]
    last_rows = as_quantized(inputs.a[end - 8 : end], reference.row_blocks(case.recipe), case.recipe)
    last = last_rows @ as_quantized(inputs.b, reference.weight_blocks(case.recipe, 1), case.recipe)[1]
    assert worst_row_error(y[end - 8 : end], last) <= rounding_tolerance(y.dtype, case, device)
    assert torch.count_nonzero(y[end:]) == 0


# 6. Results repeat bit for bit, and a row's result does not depend on the other groups' sizes.


@of_cases(
    cases(recipes=Recipe, passes=(TRAINING,), has_bias=(False, True)),
    cases(dtypes=DTYPES, passes=(TRAINING,), shapes=[Shape("odd", (5, 1, 9), k=17, n=15)]),
)
def test_results_repeat_bit_for_bit(case, device):
    inputs = make_inputs(case, device)
    first, second = run(case, inputs), run(case, inputs)
    for name, value in vars(first).items():
        assert value is getattr(second, name) is None or torch.equal(value, getattr(second, name)), name


@of_cases(
    cases(
        backends=sorted(BATCH_INVARIANT & set(backend_kinds()), key=lambda kind: kind.value),
        recipes=RECIPES,
        dtypes=(torch.bfloat16, torch.float32),
        passes=EACH_PASS,
        b_contiguous=("k", "n"),
        shapes=[
            Shape("k16_n704", (0, 7, 0), k=16, n=704),
            Shape("k704_n16", (0, 7, 0), k=704, n=16),
            Shape("k17_n15", (0, 2, 0), k=17, n=15),  # the rows of a group start unaligned
        ],
    )
)
def test_a_row_does_not_depend_on_the_sizes_of_other_groups(case, device):
    alone = make_inputs(case, device)
    size, pass_ = case.shape.sizes[1], case.passes[-1]
    wanted = run(case, alone).of(pass_)
    for before, after, tail in ((1, 0, 0), (2, 5, 0), (3, 0, 4), (0, 40, 1), (13, 1, 0)):
        among = dataclasses.replace(case, shape=dataclasses.replace(case.shape, sizes=(before, size, after), tail=tail))
        rows = slice(before, before + size)
        inputs = dataclasses.replace(make_inputs(among, device, seed=1), b=alone.b)
        inputs.a[rows], inputs.dy[rows] = alone.a, alone.dy
        found = run(among, inputs).of(pass_)
        same = (found[1], wanted[1]) if pass_ is Pass.WGRAD else (found[rows], wanted)
        assert torch.equal(*same), f"groups of {before}, {size} and {after} rows, {tail} rows past the last group"


# 8. NaN and Inf in the input reach the output's rows; they never become a finite number.

NOT_FINITE = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
ROW, GROUP, COLUMN = 5, 1, 130  # a row of group 1 of MIXED, and a column in its own block of 128


def changed_at(x: torch.Tensor, index: tuple[int, ...], value: float) -> torch.Tensor:
    x = x.clone()
    x[index] = value
    return x


@of_cases(cases(recipes=Recipe), cases(recipes=RECIPES, dtypes=(torch.float16, torch.float32)))
@NOT_FINITE
def test_a_nonfinite_value_in_a_reaches_only_its_row_of_the_output(case, value, device):
    inputs = make_inputs(case, device)
    clean = run(case, inputs).y
    y = run(case, dataclasses.replace(inputs, a=changed_at(inputs.a, (ROW, COLUMN), value))).y
    assert not y[ROW].isfinite().any()
    y[ROW] = clean[ROW]
    assert torch.equal(y, clean)


@of_cases(cases(recipes=Recipe, passes=(DGRAD,)))
@NOT_FINITE
def test_a_nonfinite_value_in_dy_reaches_only_its_row_of_da(case, value, device):
    inputs = make_inputs(case, device)
    clean = run(case, inputs).da
    da = run(case, dataclasses.replace(inputs, dy=changed_at(inputs.dy, (ROW, COLUMN), value))).da
    assert not da[ROW].isfinite().any()
    da[ROW] = clean[ROW]
    assert torch.equal(da, clean)


@of_cases(cases(recipes=Recipe, passes=(WGRAD,)))
@NOT_FINITE
@pytest.mark.parametrize("operand", ["a", "dy"])
def test_a_nonfinite_value_in_a_group_reaches_only_its_line_of_db(case, operand, value, device):
    inputs = make_inputs(case, device)
    clean = run(case, inputs).db
    dirty = changed_at(getattr(inputs, operand), (ROW, COLUMN), value)
    db = run(case, dataclasses.replace(inputs, **{operand: dirty})).db
    line = (GROUP, COLUMN) if operand == "a" else (GROUP, slice(None), COLUMN)
    assert not db[line].isfinite().any()
    db[line] = clean[line]
    assert torch.equal(db, clean)


@of_cases(cases(recipes=Recipe, passes=(FORWARD, DGRAD), b_contiguous=("k", "n")))
@NOT_FINITE
def test_a_nonfinite_weight_reaches_only_the_rows_of_its_group(case, value, device):
    inputs = make_inputs(case, device)
    pass_ = case.passes[-1]
    clean = run(case, inputs).of(pass_)
    found = run(case, dataclasses.replace(inputs, b=changed_at(inputs.b, (GROUP, COLUMN, COLUMN), value))).of(pass_)
    start, end = inputs.ends[GROUP - 1], inputs.ends[GROUP]
    assert not found[start:end, COLUMN].isfinite().any()
    found[start:end] = clean[start:end]
    assert torch.equal(found, clean)


# 9. A pass that a backend cannot run is refused at the forward call; backward neither fails nor returns zeros.


def refusing(kind: BackendKind, pass_: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a backend a requirement that nothing meets."""
    never = Requirement("a full moon", lambda p: False, lambda p: "half a one", "Wait.", (pass_,))
    cls = type(get_backend(kind))
    monkeypatch.setattr(cls, "requirements", (*cls.requirements, never))


@of_cases(cases(passes=(TRAINING,)))
@pytest.mark.parametrize("pass_", Pass, ids=lambda p: p.value)
def test_a_pass_that_is_refused_raises_at_the_forward_call(case, pass_, device, monkeypatch):
    refusing(case.backend, pass_, monkeypatch)
    inputs = leaves(make_inputs(case, device))
    with pytest.raises(NoBackendError, match="requires a full moon; found half a one"):
        call(case, inputs)


@of_cases(cases(passes=(TRAINING,)))
@pytest.mark.parametrize("pass_", [Pass.DGRAD, Pass.WGRAD], ids=lambda p: p.value)
def test_a_refused_pass_that_is_not_needed_does_not_raise(case, pass_, device, monkeypatch):
    refusing(case.backend, pass_, monkeypatch)
    inputs = leaves(make_inputs(case, device))
    with torch.no_grad():
        y = call(case, inputs)
    assert not y.requires_grad
    assert worst_row_error(y, expected(Pass.FORWARD, inputs, case.recipe)) <= rounding_tolerance(y.dtype, case, device)


@of_cases(cases(recipes=SCALED))
def test_weights_quantized_without_dgrad_refuse_a_gradient_at_the_forward_call(case, device):
    inputs = make_inputs(case, device)
    weights = quantize_weights(inputs.b, case.recipe, kernel_preference=case.backend)
    with pytest.raises(
        NoBackendError, match="dgrad requires quantized weights in its layout for dgrad; found no such layout"
    ):
        call(case, inputs, a=inputs.a.requires_grad_(), b=weights)


# 10. offs outside [0, M] or out of order never touches memory out of bounds.

HOSTILE = {
    "out_of_order": (50, 20, 60, 10),
    "descending": (100, 75, 50, 25),
    "negative": (-50, 20, -1, 60),
    "all_negative": (-4, -3, -2, -1),
    "past_m": (20, 101, 150, 10_000),
    "far": (-(2**31), 2**31 - 1, -(2**31), 2**31 - 1),
}


@of_cases(
    cases(
        recipes=Recipe,
        passes=(TRAINING,),
        shapes=[Shape("100_rows", (25, 25, 25, 25), k=48, n=80)],
        has_bias=(False, True),
    )
)
@pytest.mark.parametrize("ends", HOSTILE.values(), ids=HOSTILE)
def test_bad_offs_read_nothing_out_of_bounds_and_every_row_is_written(case, ends, device):
    inputs = make_inputs(case, device)
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    a, dy = (surrounded_by_nan(x) for x in (inputs.a, inputs.dy))
    for name, value in vars(run(case, dataclasses.replace(inputs, a=a, dy=dy, offs=offs))).items():
        wanted = {"y": dy, "da": a, "db": inputs.b, "dbias": inputs.bias}[name]
        if wanted is None:
            continue
        assert value.shape == wanted.shape, name
        assert value.isfinite().all(), name


def surrounded_by_nan(x: torch.Tensor) -> torch.Tensor:
    """The same rows, with NaN before and after them in memory."""
    padded = torch.full((3 * len(x), x.shape[1]), math.nan, dtype=x.dtype, device=x.device)
    padded[len(x) : 2 * len(x)] = x
    return padded[len(x) : 2 * len(x)]


# 11. One process may use several threads. Autocast behaves as for torch.matmul.


def test_each_thread_has_its_own_preference():
    inputs = make_inputs(Case(BackendKind.EMULATED), torch.device("cpu"))
    both_inside = threading.Barrier(2)

    def preference_inside(kind: BackendKind) -> BackendKind | None:
        with prefer(kind):
            both_inside.wait(timeout=30)
            found = explain(inputs.a, inputs.b, inputs.offs).decision.preference.kind
            both_inside.wait(timeout=30)
        return found

    kinds = [BackendKind.EMULATED, BackendKind.TRITON]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(preference_inside, kinds)) == kinds


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,), has_bias=(False, True)))
def test_threads_do_not_affect_each_other(case, device):
    several = [leaves(make_inputs(case, device, seed)) for seed in range(4)]

    def train(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        y = call(case, inputs)
        return (y, *gradients(y, inputs))

    one_by_one = [train(inputs) for inputs in several]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(train, several * 3), one_by_one * 3):
            assert all_equal(found, wanted)


def in_fp32(inputs: Inputs) -> Inputs:
    return leaves(dataclasses.replace(inputs, a=inputs.a.float(), b=inputs.b.float(), bias=inputs.bias.float()))


AUTOCAST_CASES = cases(
    recipes=RECIPES,
    dtypes=(torch.bfloat16, torch.float16),
    passes=(TRAINING,),
    b_contiguous=("k", "n"),
    has_bias=(True,),
)


@of_cases(AUTOCAST_CASES)
def test_autocast_gives_the_output_of_cast_operands(case, device):
    inputs = in_fp32(make_inputs(case, device))
    with torch.autocast(device.type, dtype=case.dtype):
        y = call(case, inputs)
        assert y.dtype == torch.matmul(inputs.a, inputs.b[0]).dtype
    assert all_equal([y], [call(case, make_inputs(case, device))])


@of_cases(AUTOCAST_CASES)
@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward_outside", "backward_inside"])
def test_autocast_gives_gradients_in_the_dtypes_of_the_operands(case, backward_inside, device):
    inputs, low = in_fp32(make_inputs(case, device)), leaves(make_inputs(case, device))
    with torch.autocast(device.type, dtype=case.dtype):
        y = call(case, inputs)
        if backward_inside:
            found = gradients(y, inputs)
    if not backward_inside:
        found = gradients(y, inputs)
    wanted = gradients(call(case, low), low)
    assert all_equal(found, [gradient.float() for gradient in wanted])


@of_cases(cases(dtypes=(torch.float32,), has_bias=(True,)))
def test_a_region_without_autocast_computes_in_the_dtype_of_the_operands(case, device):
    inputs = make_inputs(case, device)
    with torch.autocast(device.type, dtype=torch.bfloat16), torch.autocast(device.type, enabled=False):
        y = call(case, inputs)
    assert all_equal([y], [call(case, inputs)])


@of_cases(cases(has_bias=(True,)))
@pytest.mark.parametrize("operand", ["b", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=["float64", "int32"])
def test_autocast_does_not_cast_what_it_would_not_cast_for_matmul(case, operand, dtype, device):
    inputs = make_inputs(case, device)
    with torch.autocast(device.type, dtype=case.dtype):
        with pytest.raises(RuntimeError, match="same dtype"):
            torch.matmul(inputs.a, inputs.b[0].to(dtype))
        with pytest.raises(ValueError, match=rf"^{operand}\.dtype: "):
            call(case, inputs, **{operand: getattr(inputs, operand).to(dtype)})


# Operands may have any layout in memory.


LAYOUTS_OF_ROWS = {
    "slice_of_columns": lambda x: torch.nn.functional.pad(x, (3, 5), value=math.nan)[:, 3:-5],
    "every_second_column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every_second_row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "overlapping": lambda x: x.flatten()[: sum(x.shape) - 1].unfold(0, x.shape[1], 1),
}
LAYOUTS_OF_WEIGHTS = {
    "slice_across_both": lambda b: torch.nn.functional.pad(b, (3, 5, 1, 2), value=math.nan)[:, 1:-2, 3:-5],
    "slice_across_both_transposed": lambda b: (
        torch.nn.functional.pad(b.mT, (3, 5, 1, 2), value=math.nan)[:, 1:-2, 3:-5].mT
    ),
    "every_second": lambda b: b.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2],
    "one_matrix_for_all": lambda b: b[:1].expand(b.shape),
}


def as_laid_out(name: str, layout, inputs: Inputs) -> Inputs:
    """``inputs`` with one operand laid out differently; its values may change, not its shape."""
    changed = layout(getattr(inputs, name))
    assert changed.shape == getattr(inputs, name).shape
    assert changed.stride() != getattr(inputs, name).stride()
    return dataclasses.replace(inputs, **{name: changed})


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,)), cases(dtypes=(torch.float32,), passes=(TRAINING,)))
@pytest.mark.parametrize("operand", ["a", "dy"])
@pytest.mark.parametrize("layout", LAYOUTS_OF_ROWS.values(), ids=LAYOUTS_OF_ROWS)
def test_rows_may_have_any_layout(case, operand, layout, device):
    inputs = as_laid_out(operand, layout, make_inputs(case, device))
    outcome = run(case, inputs)
    for pass_ in Pass:
        found = outcome.of(pass_)
        assert worst_row_error(found, expected(pass_, inputs, case.recipe)) <= rounding_tolerance(
            found.dtype, case, device
        ), pass_


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,)), cases(dtypes=(torch.float32,), passes=(TRAINING,)))
@pytest.mark.parametrize("layout", LAYOUTS_OF_WEIGHTS.values(), ids=LAYOUTS_OF_WEIGHTS)
def test_weights_may_have_any_layout(case, layout, device):
    inputs = as_laid_out("b", layout, make_inputs(case, device))
    outcome = run(case, inputs)
    for pass_ in Pass:
        found = outcome.of(pass_)
        assert worst_row_error(found, expected(pass_, inputs, case.recipe)) <= rounding_tolerance(
            found.dtype, case, device
        ), pass_


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,), out_dtypes=(torch.float32,)))
@pytest.mark.parametrize("layout", LAYOUTS_OF_ROWS.values(), ids=LAYOUTS_OF_ROWS)
def test_the_gradient_of_an_output_in_another_dtype_may_have_any_layout(case, layout, device):
    inputs = as_laid_out("dy", layout, make_inputs(case, device))
    outcome = run(case, inputs)
    for pass_ in (Pass.DGRAD, Pass.WGRAD):
        found = outcome.of(pass_)
        assert worst_row_error(found, expected(pass_, inputs, case.recipe)) <= rounding_tolerance(
            found.dtype, case, device
        ), pass_


def assert_negation_is_resolved(operand: str, case: Case, device: torch.device) -> None:
    inputs = make_inputs(case, device)
    negated = dataclasses.replace(inputs, **{operand: torch._neg_view(-getattr(inputs, operand))})
    found, right = run(case, negated), run(case, inputs)
    for pass_ in Pass:
        assert torch.equal(found.of(pass_), right.of(pass_)), pass_


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,)))
@pytest.mark.parametrize("operand", ["a", "b", "offs", "dy"])
def test_a_pending_negation_is_resolved(case, operand, device):
    assert_negation_is_resolved(operand, case, device)


@of_cases(cases(passes=(TRAINING,), has_bias=(True,)))
def test_a_pending_negation_of_a_bias_is_resolved(case, device):
    assert_negation_is_resolved("bias", case, device)


@of_cases(cases(passes=(TRAINING,)))
@pytest.mark.parametrize("operand", ["a", "dy"])
@pytest.mark.parametrize("layout", LAYOUTS_OF_ROWS.values(), ids=LAYOUTS_OF_ROWS)
def test_a_backend_receives_contiguous_rows(case, operand, layout, device, monkeypatch):
    calls = spy(monkeypatch, case, "quantize_activations")
    run(case, as_laid_out(operand, layout, make_inputs(case, device)))
    assert [args[0].stride(1) for _, args in calls] == [1, 1]


@of_cases(cases(passes=(TRAINING,)))
@pytest.mark.parametrize("layout", LAYOUTS_OF_WEIGHTS.values(), ids=LAYOUTS_OF_WEIGHTS)
def test_a_backend_receives_weights_with_k_or_n_contiguous(case, layout, device, monkeypatch):
    calls = spy(monkeypatch, case, "quantize_weights")
    run(case, as_laid_out("b", layout, make_inputs(case, device)))
    assert [1 in args[0].stride()[1:] for _, args in calls] == [True]


@of_cases(cases(recipes=RECIPES))
def test_offs_may_be_strided(case, device):
    inputs = make_inputs(case, device)
    strided = inputs.offs.repeat_interleave(2)[::2]
    assert not strided.is_contiguous()
    assert torch.equal(call(case, inputs, offs=strided), call(case, inputs))


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,), has_bias=(True,)))
def test_the_gradient_of_a_sum_is_that_of_ones(case, device):
    inputs = leaves(make_inputs(case, device))
    found = gradients(call(case, inputs).sum(), inputs, dy=torch.ones((), dtype=case.dtype, device=device))
    assert all_equal(found, gradients(call(case, inputs), inputs, dy=torch.ones_like(inputs.dy)))


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,)))
def test_gradients_reach_the_bases_of_operands_that_are_views(case, device):
    inputs = make_inputs(case, device)
    wide_a = torch.nn.functional.pad(inputs.a, (8, 8)).requires_grad_()
    wide_b = torch.nn.functional.pad(inputs.b, (8, 8, 8, 8)).requires_grad_()
    call(case, inputs, a=wide_a[:, 8:-8], b=wide_b[:, 8:-8, 8:-8]).backward(inputs.dy)
    outcome = run(case, inputs)
    for gradient, inner in ((wide_a.grad, outcome.da), (wide_b.grad, outcome.db)):
        place = (slice(8, -8),) if gradient.dim() == 2 else (slice(8, -8), slice(8, -8))
        assert worst_row_error(gradient[(..., *place)], inner.double()) <= rounding_tolerance(case.dtype, case, device)
        assert torch.count_nonzero(gradient) == torch.count_nonzero(gradient[(..., *place)])


# Uses of autograd.


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,)))
@pytest.mark.parametrize("passes", [DGRAD, WGRAD], ids=["dgrad", "wgrad"])
def test_a_single_gradient_equals_the_one_computed_with_others(case, passes, device):
    inputs = make_inputs(case, device)
    alone, with_others = run(dataclasses.replace(case, passes=passes), inputs), run(case, inputs)
    assert torch.equal(alone.of(passes[-1]), with_others.of(passes[-1]))


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,), has_bias=(True,)))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients_gives_the_output_of_one_with_them(case, mode, device):
    inputs = leaves(make_inputs(case, device))
    with mode():
        y = call(case, inputs)
    assert not y.requires_grad
    assert torch.equal(y, call(case, inputs))


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,), has_bias=(False, True)))
def test_activation_checkpointing_changes_nothing(case, device):
    inputs = leaves(make_inputs(case, device))
    plain = call(case, inputs)
    recomputed = checkpoint(call, case, inputs, use_reentrant=False)
    assert all_equal([recomputed], [plain])
    assert all_equal(gradients(recomputed, inputs), gradients(plain, inputs))


def holds_a_tensor(value: object) -> bool:
    """Whether a tensor can be reached from ``value`` through containers and attributes."""
    if isinstance(value, torch.Tensor):
        return True
    if isinstance(value, dict):
        return any(map(holds_a_tensor, value.values()))
    if isinstance(value, (list, tuple, set)):
        return any(map(holds_a_tensor, value))
    return dataclasses.is_dataclass(value) and any(map(holds_a_tensor, vars(value).values()))


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,), has_bias=(False, True)))
def test_tensors_for_backward_are_saved_through_autograd(case, device):
    inputs, packed = leaves(make_inputs(case, device)), []

    def pack(x: torch.Tensor) -> int:
        packed.append(x)
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index].clone()):
        y = call(case, inputs)
    assert any(x.numel() >= inputs.a.numel() for x in packed)
    assert any(x.numel() >= inputs.b.numel() for x in packed)
    attributes = vars(y.grad_fn)
    assert attributes  # the route at least, or this is the wrong object
    assert not [name for name, value in attributes.items() if holds_a_tensor(value)]
    assert all_equal(gradients(y, inputs), gradients(call(case, inputs), inputs))


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,)))
def test_a_retained_graph_gives_the_same_gradients_again(case, device):
    inputs = leaves(make_inputs(case, device))
    y = call(case, inputs)
    first = torch.autograd.grad(y, (inputs.a, inputs.b), inputs.dy, retain_graph=True)
    assert all_equal(gradients(y, inputs), first)


@of_cases(cases(recipes=RECIPES, passes=(TRAINING,)))
def test_a_second_backward_raises_torchs_own_error(case, device):
    inputs = leaves(make_inputs(case, device))
    y = call(case, inputs)
    gradients(y, inputs)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(y, inputs)


@of_cases(cases(dtypes=DTYPES, passes=(TRAINING,)), cases(passes=(TRAINING,), b_contiguous=("k", "n")))
def test_unscaled_gradients_have_gradients(case, device):
    inputs = leaves(make_inputs(case, device))
    a, b, dy = inputs.a, inputs.b, inputs.dy.requires_grad_()
    to_da, to_db = torch.randn_like(a), torch.randn_like(b)
    first = torch.autograd.grad(call(case, inputs), (a, b), dy, create_graph=True)
    found = torch.autograd.grad(first, (a, b, dy), (to_da, to_db))
    right = (
        reference.grouped_mm(dy, to_db.transpose(1, 2), inputs.ends),
        reference.wgrad(to_da, dy, inputs.ends),
        reference.grouped_mm(to_da, b, inputs.ends) + reference.grouped_mm(a, to_db, inputs.ends),
    )
    for ours, truth in zip(found, right):
        assert relative_error(ours, truth) <= 2 * rounding_tolerance(ours.dtype, case, device)


@of_cases(cases(passes=(TRAINING,), has_bias=(True,)))
def test_the_gradient_of_a_bias_has_a_gradient(case, device):
    inputs = leaves(make_inputs(case, device))
    dy = inputs.dy.requires_grad_()
    (dbias,) = torch.autograd.grad(call(case, inputs), inputs.bias, dy, create_graph=True)
    to_dbias = torch.randn_like(dbias)
    (found,) = torch.autograd.grad(dbias, dy, to_dbias)
    right = torch.zeros_like(found)
    for e, rows in enumerate(reference.group_slices(inputs.ends)):
        right[rows] = to_dbias[e]
    assert torch.equal(found, right)


@of_cases(cases(passes=(TRAINING,)))
def test_the_weight_gradient_form_has_second_gradients(case, device):
    inputs = leaves(make_inputs(case, device))
    x, g = inputs.a, inputs.dy.requires_grad_()
    dc, to_dx, to_dg = torch.randn_like(inputs.b).requires_grad_(), torch.randn_like(x), torch.randn_like(g)
    c = grouped_mm(x.t(), g, inputs.offs, kernel_preference=case.backend)
    first = torch.autograd.grad(c, (x, g), dc, create_graph=True)
    found = torch.autograd.grad(first, (x, g, dc), (to_dx, to_dg))
    right = (
        reference.grouped_mm(to_dg, dc.transpose(1, 2), inputs.ends),
        reference.grouped_mm(to_dx, dc, inputs.ends),
        reference.wgrad(to_dx, g, inputs.ends) + reference.wgrad(x, to_dg, inputs.ends),
    )
    for ours, truth in zip(found, right):
        assert relative_error(ours, truth) <= 2 * rounding_tolerance(ours.dtype, case, device)


@of_cases(cases(recipes=SCALED, passes=(TRAINING,)))
@pytest.mark.parametrize("dy_needs_grad", [False, True])
def test_a_graph_of_scaled_gradients_is_refused(case, dy_needs_grad, device):
    inputs = leaves(make_inputs(case, device))
    y = call(case, inputs)
    refused = pytest.raises(RuntimeError, match=f"create_graph=False with recipe {case.recipe.value}; found True")
    with refused:
        torch.autograd.grad(y, inputs.a, inputs.dy.requires_grad_(dy_needs_grad), create_graph=True, allow_unused=True)
    c = grouped_mm(inputs.a.t(), inputs.dy, inputs.offs, recipe=case.recipe, kernel_preference=case.backend)
    with refused:
        torch.autograd.grad(c.sum(), inputs.a, create_graph=True)
