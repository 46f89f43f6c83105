"""torch.compile(fullgraph=True): one graph, forward and backward, and one compilation per row class."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from kernel_checks import assert_same_bits
from large import RAGGED, layer, train, training, with_sizes
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

from grouped_gemm import BackendKind, NoBackendError, Pass, Recipe, autograd, grouped_mm, ops, prefer, quantize_weights
from grouped_gemm.backends import get_backend
from grouped_gemm.core import tracing
from grouped_gemm.moe import rows
from grouped_gemm.moe.activation import ACTIVATIONS, activate
from grouped_gemm.moe.routing import route
from grouped_gemm.selection import checks
from grouped_gemm.testing import make_inputs

NUM_GROUPS, K, N = 4, 32, 64
# three sizes of each row class; none is 0 or 1, which Dynamo never makes symbolic
ROWS = (40, 48, 64, 100, 512, 1000, 1100, 2000, 3000)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(num_rows: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """a, w (E, N, K), bias (E, N) and offs, with an empty group and three rows past the last one."""
    a = torch.randn(num_rows, K, dtype=dtype, requires_grad=True)
    w = torch.randn(NUM_GROUPS, N, K, dtype=dtype, requires_grad=True)
    bias = torch.randn(NUM_GROUPS, N, dtype=dtype, requires_grad=True)
    ends = (num_rows // 4, num_rows // 2, num_rows // 2, num_rows - 3)
    return a, w, bias, torch.tensor(ends, dtype=torch.int32)


def gradients(function, a, w, bias, offs) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of a, w and bias."""
    y = function(a, w, bias, offs)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    return (y, *torch.autograd.grad(y, (a, w, bias), dy))


# The recipes of powers of two differ only in a constant of the graph.
RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE, Recipe.MXFP8)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.value)
def test_compiles_once_per_row_class_and_agrees_with_eager_bit_for_bit(recipe):
    def layer(a, w, bias, offs):
        return grouped_mm(a, w.transpose(1, 2), offs, recipe=recipe, bias=bias)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_rows in ROWS:
        case = operands(num_rows)
        for ours, eager in zip(gradients(compiled, *case), gradients(layer, *case)):
            assert torch.equal(ours, eager)
    assert counter.frame_count == 3  # decode, small, large


@pytest.mark.gpu
@training(recipes=(Recipe.NONE, Recipe.FP8_BLOCKWISE))
def test_triton_compiles_once_for_a_row_class_and_agrees_with_eager_bit_for_bit(case, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer(case), fullgraph=True, dynamic=True, backend=counter)
    for tail in (70, 471):
        inputs = make_inputs(with_sizes(case, RAGGED.sizes, tail), device)
        for pass_, ours, eager in zip(Pass, train(compiled, inputs), train(layer(case), inputs)):
            assert_same_bits(ours, eager, f"{pass_.value}, M = {len(inputs.a)}")
    assert counter.frame_count == 1, "compiled again for another M of the same row class"


def test_inductor_agrees_with_eager():
    def layer(a, w, bias, offs):
        return grouped_mm(a, w.transpose(1, 2), offs, recipe="fp8_blockwise", bias=bias)

    case = operands(100)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for ours, eager in zip(gradients(compiled, *case), gradients(layer, *case)):
        assert torch.equal(ours, eager)


def test_weight_gradient_form_compiles():
    def layer(a, b, offs):
        return grouped_mm(a.t(), b, offs, recipe="mxfp8")

    a, _, _, offs = operands(100)
    g = torch.randn(100, N, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    dc = torch.randn(NUM_GROUPS, K, N, dtype=torch.bfloat16)
    ours, eager = compiled(a, g, offs), layer(a, g, offs)
    assert torch.equal(ours, eager)
    for mine, theirs in zip(torch.autograd.grad(ours, (a, g), dc), torch.autograd.grad(eager, (a, g), dc)):
        assert torch.equal(mine, theirs)


def test_quantized_weights_compile_with_a_gradient_to_the_activations():
    a, w, _, offs = operands(100)
    weights = quantize_weights(w.detach().transpose(1, 2), "fp8_blockwise", dgrad=True)

    def layer(a, offs):
        return grouped_mm(a, weights, offs)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    ours, eager = compiled(a, offs), layer(a, offs)
    dy = torch.randn_like(eager)
    assert torch.equal(ours, eager)
    assert torch.equal(torch.autograd.grad(ours, a, dy)[0], torch.autograd.grad(eager, a, dy)[0])


class Layer(torch.autograd.Function):
    """A user's own Function around the call."""

    @staticmethod
    def forward(ctx, a, w, offs):
        ctx.save_for_backward(w, offs)
        return grouped_mm(a, w.transpose(1, 2), offs)

    @staticmethod
    def backward(ctx, dy):
        w, offs = ctx.saved_tensors
        return grouped_mm(dy, w, offs), None, None


def test_the_backward_of_an_autograd_function_compiles():
    a, w, _, offs = operands(100)
    w, dy = w.detach(), torch.randn(100, N, dtype=torch.bfloat16)
    compiled = torch.compile(lambda a: Layer.apply(a, w, offs), fullgraph=True, backend="aot_eager")
    right = torch.autograd.grad(grouped_mm(a, w.transpose(1, 2), offs), a, dy)[0]
    assert torch.equal(torch.autograd.grad(compiled(a), a, dy)[0], right)


def test_a_compiled_function_follows_prefer():
    a, w, _, offs = operands(100)

    def layer(a, w, offs):
        return grouped_mm(a, w.transpose(1, 2), offs)

    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(a, w, offs)
    with prefer(BackendKind.TRITON), pytest.raises(Exception, match="triton, requested by the context"):
        compiled(a, w, offs)
    compiled(a, w, offs)


# Data-dependent sizes

MASK = torch.arange(100) % 3 > 0
KEPT = int(MASK.sum())
RECIPES_AND_NONE = pytest.mark.parametrize("recipe", [Recipe.NONE, Recipe.FP8_BLOCKWISE], ids=lambda r: r.value)


@pytest.fixture
def data_dependent():
    """Dynamo keeps data-dependent sizes in the graph."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


def ends_of(num_rows: int) -> torch.Tensor:
    return torch.tensor([num_rows // 4, num_rows // 2, num_rows // 2, num_rows - 3], dtype=torch.int32)


def assert_compiles(layer, *arguments) -> None:
    """One graph, which gives the bits of the eager call, in forward and in the gradients of all leaves."""
    ours = torch.compile(layer, fullgraph=True, backend="aot_eager")(*arguments)
    eager = layer(*arguments)
    assert torch.equal(ours, eager)
    leaves = [x for x in arguments if x.requires_grad]
    if leaves:
        dy = torch.linspace(-1, 1, eager.numel()).view_as(eager).to(eager.dtype)
        for mine, theirs in zip(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(eager, leaves, dy)):
            assert torch.equal(mine, theirs)


@RECIPES_AND_NONE
def test_rows_selected_by_a_mask(recipe, data_dependent):
    def layer(a, w, bias, mask, offs):
        return grouped_mm(a[mask.nonzero().squeeze(1)], w.transpose(1, 2), offs, recipe=recipe, bias=bias)

    a, w, bias, _ = operands(100)
    assert_compiles(layer, a, w, bias, MASK, ends_of(KEPT))


@RECIPES_AND_NONE
def test_operands_of_a_weight_gradient_selected_by_a_mask(recipe, data_dependent):
    def layer(a, g, mask, offs):
        return grouped_mm(a[mask].t(), g[mask], offs, recipe=recipe)

    a, _, _, _ = operands(100)
    assert_compiles(layer, a, torch.randn(100, N).bfloat16().requires_grad_(), MASK, ends_of(KEPT))


def test_rows_selected_by_a_mask_may_be_column_major(data_dependent):
    def layer(a, w, mask, offs):
        return grouped_mm(a[mask].t().contiguous().t(), w.transpose(1, 2), offs)

    a, w, _, _ = operands(100)
    assert_compiles(layer, a, w, MASK, ends_of(KEPT))


def test_rows_from_the_split_sizes_of_an_all_to_all(data_dependent):
    def layer(w, sizes, offs):
        received = w.new_ones(sum(sizes.tolist()), K)
        return grouped_mm(received, w.transpose(1, 2), offs)

    _, w, _, _ = operands(100)
    assert_compiles(layer, w, torch.tensor([30, 20]), ends_of(50))


def test_rows_marked_as_unbacked():
    def layer(a, w, offs):
        return grouped_mm(a, w.transpose(1, 2), offs, recipe="fp8_blockwise")

    a, w, _, offs = operands(100)
    torch._dynamo.decorators.mark_unbacked(a, 0)
    assert_compiles(layer, a, w, offs)


@pytest.mark.parametrize("bounds", [(2, 4096), (100, 500), (2, 64)], ids=str)
def test_stated_bounds_of_rows_are_not_narrowed(bounds):
    def layer(a, w, offs):
        return grouped_mm(a, w.transpose(1, 2), offs)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for num_rows in bounds:
        a, w, _, offs = operands(num_rows)
        torch._dynamo.mark_dynamic(a, 0, min=bounds[0], max=bounds[1])
        assert torch.equal(compiled(a, w, offs), layer(a, w, offs))
    assert counter.frame_count == 1


@RECIPES_AND_NONE
@pytest.mark.parametrize("form", ["matrices", "weight gradient"])
def test_offs_of_data_dependent_length(recipe, form, data_dependent):
    def ends(experts):
        return torch.bincount(experts).cumsum(0, dtype=torch.int32)

    def matrices(a, w, experts):
        return grouped_mm(a, w.transpose(1, 2), ends(experts), recipe=recipe)

    def weight_gradient(a, w, experts):
        return grouped_mm(a.t(), a, ends(experts), recipe=recipe)

    a, w, _, _ = operands(100)
    experts = torch.arange(100) * NUM_GROUPS // 100
    layer = matrices if form == "matrices" else weight_gradient
    assert_compiles(layer, a, w if form == "matrices" else w.detach(), experts)


def test_offs_whose_length_differs_from_b_raise_when_the_graph_runs(data_dependent):
    def layer(a, w, experts):
        return grouped_mm(a, w.transpose(1, 2), torch.bincount(experts).cumsum(0, dtype=torch.int32))

    a, w, _, _ = operands(100)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(a, w, torch.arange(100) * NUM_GROUPS // 100)
    with pytest.raises(ValueError, match="offs: expected 4 entries, one for each matrix of b; found 5"):
        compiled(a, w, torch.arange(100) * (NUM_GROUPS + 1) // 100)


@RECIPES_AND_NONE
def test_matrices_selected_by_a_mask(recipe, data_dependent):
    def layer(a, w, bias, mask, offs):
        return grouped_mm(a, w[mask].transpose(1, 2), offs[mask], recipe=recipe, bias=bias[mask])

    a, w, bias, offs = operands(100)
    assert_compiles(layer, a, w, bias, torch.tensor([True, False, True, True]), offs)


def test_matrices_selected_by_a_mask_are_counted_when_the_graph_runs(data_dependent):
    def layer(a, w, offs, mask):
        return grouped_mm(a, w[mask].transpose(1, 2), offs)

    a, w, _, offs = operands(100)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(a, w, offs, torch.ones(NUM_GROUPS, dtype=torch.bool))
    with pytest.raises(ValueError, match="offs: expected 3 entries, one for each matrix of b; found 4"):
        compiled(a, w, offs, torch.tensor([True, False, True, True]))
    with pytest.raises(ValueError, match="b: expected E of at least 1; found 0"):
        compiled(a, w, offs, torch.zeros(NUM_GROUPS, dtype=torch.bool))


def test_a_weight_gradient_without_groups_raises_when_the_graph_runs(data_dependent):
    def layer(a, offs, mask):
        return grouped_mm(a.t(), a, offs[mask])

    a, _, _, offs = operands(100)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(a, offs, torch.ones(NUM_GROUPS, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="Runtime assertion failed"):
        compiled(a, offs, torch.zeros(NUM_GROUPS, dtype=torch.bool))


def at_most_300(size):
    torch._check(size >= 2)
    torch._check(size <= 300)
    return size


@pytest.mark.parametrize(
    "size, expected",
    [
        (lambda kept: kept.shape[0], True),
        (lambda kept: kept.shape[0] * 2, True),
        (lambda kept: kept.reshape(-1, 7).shape[0], True),
        (lambda kept: kept.shape[1], False),
        (lambda kept: at_most_300(kept.shape[0]), True),
    ],
    ids=["rows", "twice the rows", "reshaped", "static", "bounded"],
)
def test_is_data_dependent(size, expected, data_dependent):
    def layer(a, mask):
        return a * 2 if tracing.is_data_dependent(size(a[mask])) else a * 3

    a = torch.ones(4, 14)
    found = torch.compile(layer, fullgraph=True, backend="eager")(a, torch.tensor([True, True, True, False]))
    assert (found[0, 0] == 2) == expected


def test_is_data_dependent_causes_no_recompilation():
    def layer(a):
        return a * 2 if tracing.is_data_dependent(a.shape[0]) else a * 3

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    assert [int(compiled(torch.ones(m))[0]) for m in (4, 5, 11, 100)] == [3, 3, 3, 3]
    assert counter.frame_count == 1


def test_a_weight_gradient_of_different_numbers_of_rows_raises_when_the_graph_runs(data_dependent):
    def layer(a, mask, other, offs):
        return grouped_mm(a[mask].t(), a[other], offs)

    a, _, _, _ = operands(100)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(a, MASK, MASK, ends_of(KEPT))
    with pytest.raises(RuntimeError, match="Runtime assertion failed"):
        compiled(a, MASK, ~MASK, ends_of(KEPT))


# Errors


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"kernel_preference": "deepgemm"}, NoBackendError, "deepgemm  requires sm_90 or sm_100; found cpu"),
        ({"group_alignment": 0}, ValueError, "group_alignment: expected at least 1 and at most 2147483647"),
        ({"recipe": "fp9"}, ValueError, "recipe: expected a Recipe or one of none"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_an_error_keeps_its_type_with_graph_breaks_and_its_text_with_fullgraph(options, error, text):
    a, w, _, offs = operands(100)

    def layer(a, w, offs):
        return grouped_mm(a, w.transpose(1, 2), offs, **options)

    with pytest.raises(error, match=text):
        torch.compile(layer, backend="eager")(a, w, offs)
    torch._dynamo.reset()  # Dynamo remembers that the function runs eagerly
    with pytest.raises(torch._dynamo.exc.Unsupported) as caught:
        torch.compile(layer, backend="eager", fullgraph=True)(a, w, offs)
    assert text in str(caught.value)


def test_an_unknown_switch_is_an_error_of_its_own_type(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_BACKEND", "fastest")
    a, w, _, offs = operands(100)
    compiled = torch.compile(lambda a, w, offs: grouped_mm(a, w.transpose(1, 2), offs), backend="eager")
    with pytest.raises(ValueError, match="GROUPED_GEMM_BACKEND: expected one of auto"):
        compiled(a, w, offs)


def test_a_bad_argument_is_named_while_tracing():
    a, w, _, offs = operands(100)
    compiled = torch.compile(lambda a, w, offs: grouped_mm(a, w, offs), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"b\.shape\[1\]: expected K = 32"):
        compiled(a, w, offs)


def test_validation_happens_when_the_graph_runs(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    a, w, _, offs = operands(100)
    compiled = torch.compile(
        lambda a, w, offs: grouped_mm(a, w.transpose(1, 2), offs), fullgraph=True, backend="aot_eager"
    )
    compiled(a, w, offs)
    with pytest.raises(ValueError, match=r"offs\[1\]: expected at least offs\[0\] = 50; found 20"):
        compiled(a, w, torch.tensor([50, 20, 60, 100], dtype=torch.int32))


def test_autocast_applies_inside_a_graph():
    a, w, bias, offs = operands(100, torch.float32)

    def layer(a, w, bias, offs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return grouped_mm(a, w.transpose(1, 2), offs, bias=bias)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    ours, eager = gradients(compiled, a, w, bias, offs), gradients(layer, a, w, bias, offs)
    assert ours[0].dtype == torch.bfloat16
    for mine, theirs in zip(ours, eager):
        assert torch.equal(mine, theirs)


# What an autograd function returns


class _Results(TorchFunctionMode):
    """Records what each function of torch returns."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.results += result if isinstance(result, tuple) else (result,)
        return result


def calls_of_autograd_functions() -> dict[str, Callable[[], torch.Tensor]]:
    """Calls in fp32, where a cast to the operands' dtype returns its argument. A name begins with its function."""
    a, w, bias, offs = operands(12, torch.float32)
    b, plan = w.transpose(1, 2), get_backend(BackendKind.EMULATED).plan(offs, 12)
    _, source, places = route(torch.arange(12).view(6, 2) % NUM_GROUPS, NUM_GROUPS)
    x, weights = a[:6], torch.rand(6, 2, requires_grad=True)
    row_id_map = places.t().flatten()
    calls = {
        "GroupedMM": lambda: grouped_mm(a, b, offs, bias=bias),
        "GroupedWgrad": lambda: grouped_mm(a.t(), a, offs),
        "_GroupSums": lambda: autograd._GroupSums.apply(a, plan, BackendKind.EMULATED, torch.float32),
        "_Gather": lambda: rows.gather(x, source, places),
        "_Gather weighted": lambda: rows._Gather.apply(x, weights, source, places),
        "_Combine": lambda: rows.combine(a, weights, source, places),
        "_Dots": lambda: rows._Dots.apply(x, a, weights, source, places),
        "_Permute": lambda: ops.permute(x, places)[0],
        "_Unpermute": lambda: ops.unpermute(a, row_id_map, weights),
    }
    for name, kind in ACTIVATIONS.items():
        pre = (a, a.clone()) if kind.is_gated else (a,)
        calls[f"_Activate {name}"] = functools.partial(activate, kind, *pre)
    return calls


CALLS = calls_of_autograd_functions()


def test_every_autograd_function_has_a_call():
    ours = {f.__name__ for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith("grouped_gemm.")}
    # The forward of the first never runs. The second needs a Hopper GPU, where test_moe_fused.py compiles it, and the
    # third several ranks, where expert_parallel_ranks.py does.
    assert ours - {"_EachSample", "_FusedExperts", "_Send", "_Return", "_Values"} == {name.split()[0] for name in CALLS}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_exactly_one_op_returns_what_an_autograd_function_returns(call):
    """Compiled by torch 2.11, the gradients would be zero: see torch.compile in docs/design.md."""
    with _Results() as mode:
        y = call()
    assert sum(result is y for result in mode.results) == 1


def test_a_check_of_ranks_that_is_compiled_alone():
    """As after a graph break. Dynamo makes the rank a variable at the second one."""
    torch._dynamo.reset()
    check = torch.compile(checks.check_tensor, backend="aot_eager")
    for rank in (2, 3, 1):
        check("x", torch.ones([4] * rank), (rank,), checks.DTYPES)
    with pytest.raises(ValueError, match=r"^x: expected a tensor of rank 2; found 3"):
        check("x", torch.ones(4, 4, 4), (2,), checks.DTYPES)
