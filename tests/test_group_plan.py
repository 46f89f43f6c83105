"""`GroupPlan`: calls that share one give the same results as with a plain ``offs``, and plan once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from grouped_gemm import (
    BackendKind,
    GroupPlan,
    QuantizedGroupedLinear,
    explain,
    gemm_ops,
    group_plan,
    grouped_mm,
    prefer,
    quantize_weights,
)
from grouped_gemm.core import library

E, K, N = 4, 32, 64
SIZES = (10, 0, 20, 7)
M = sum(SIZES) + 3  # three rows of no group
PLANNING = {"emulated": "emulated_host_offs", "torch": "torch_plan"}
on_each = pytest.mark.parametrize("by, recipe", (("emulated", None), ("emulated", "fp8_rowwise"), ("torch", None)))


@contextmanager
def counted_ops() -> Iterator[Counter[str]]:
    """Counts the calls of this package's ops, by name; without a dispatch mode, under which no call shares a plan."""
    found: Counter[str] = Counter()

    def counting(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: found.update([name]) or op(*args)

    with pytest.MonkeyPatch.context() as patch:
        for name, op in list(vars(library.ops).items()):
            patch.setattr(library.ops, name, counting(name, op))
        yield found


def make(num_rows: int = M) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``a`` (M, K), gate-up (E, K, N), down (E, N, K) and ``offs``."""
    torch.manual_seed(0)
    shapes = (num_rows, K), (E, K, N), (E, N, K)
    leaves = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    return *leaves, torch.tensor(SIZES).cumsum(0, dtype=torch.int32)


def experts(a: Tensor, up: Tensor, down: Tensor, groups: Tensor | GroupPlan, recipe: str | None) -> Tensor:
    return grouped_mm(torch.relu(grouped_mm(a, up, groups, recipe=recipe)), down, groups, recipe=recipe)


def results(function: Callable[..., Tensor], *operands: Any) -> tuple[Tensor, ...]:
    """The output, and the gradients of the operands that need one."""
    leaves = [x for x in operands if isinstance(x, Tensor) and x.requires_grad]
    for x in leaves:
        x.grad = None
    y = function(*operands)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return y, *(x.grad for x in leaves)


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@on_each
def test_two_calls_and_their_backward_plan_once_and_give_the_same_bits(by, recipe):
    *operands, offs = make()
    with prefer(by):
        experts(*operands, offs, recipe)  # the first call may also try the backend on a small problem
        with counted_ops() as plain:
            expected = results(experts, *operands, offs, recipe)
        with counted_ops() as shared:
            found = results(experts, *operands, GroupPlan(offs, M), recipe)
    assert_equal(found, expected)
    assert (plain[PLANNING[by]], shared[PLANNING[by]]) == (2, 1)


@on_each
def test_the_weight_gradient_form_takes_a_plan(by, recipe):
    a, _, _, offs = make()
    dy = torch.randn(M, N).bfloat16().requires_grad_()

    def wgrad(a: Tensor, dy: Tensor, groups: Tensor | GroupPlan) -> Tensor:
        return grouped_mm(a.t(), dy, groups, recipe=recipe, kernel_preference=by)

    assert_equal(results(wgrad, a, dy, GroupPlan(offs, M)), results(wgrad, a, dy, offs))


def test_second_gradients_use_the_same_plan():
    *operands, offs = make()
    bias = torch.randn(E, N).bfloat16().requires_grad_()

    def gradients(a: Tensor, b: Tensor, bias: Tensor, groups: Tensor | GroupPlan) -> Tensor:
        y = grouped_mm(a, b, groups, bias=bias, kernel_preference="emulated")
        parts = torch.autograd.grad(y.square().sum(), (a, b, bias), create_graph=True)
        return torch.stack([part.square().sum() for part in parts])

    with counted_ops() as shared:
        found = results(gradients, *operands[:2], bias, GroupPlan(offs, M))
    assert_equal(found, results(gradients, *operands[:2], bias, offs))
    assert shared["emulated_host_offs"] == 1


@pytest.mark.parametrize("use_reentrant", (False, True))
@pytest.mark.parametrize("is_made_inside", (False, True))
def test_checkpointed_layers_compute_the_same_again(use_reentrant, is_made_inside):
    *operands, offs = make()

    def layer(a: Tensor, up: Tensor, down: Tensor, groups: Tensor | GroupPlan) -> Tensor:
        return experts(a, up, down, GroupPlan(groups, M) if is_made_inside else groups, "fp8_rowwise")

    def checkpointed(*operands: Any) -> Tensor:
        return checkpoint(layer, *operands, use_reentrant=use_reentrant)

    with prefer("emulated"):
        groups = offs if is_made_inside else GroupPlan(offs, M)
        assert_equal(results(checkpointed, *operands, groups), results(experts, *operands, offs, "fp8_rowwise"))


def recompute_the_gemms(_: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE if op in gemm_ops() else CheckpointPolicy.MUST_SAVE


@on_each
def test_selective_checkpointing_replays_the_planning_of_the_right_call(by, recipe):
    """A plan that was shared would leave out a planning op when the layer is computed again."""
    a, up, down, offs = make()
    others = torch.tensor((5, 6, 30, M), dtype=torch.int32)
    policy = partial(create_selective_checkpoint_contexts, recompute_the_gemms)

    def layer(a: Tensor, up: Tensor, down: Tensor, groups: Tensor | GroupPlan) -> Tensor:
        with prefer(by):
            return grouped_mm(grouped_mm(a, up, groups, recipe=recipe), down, others, recipe=recipe)

    def checkpointed(*operands: Any) -> Tensor:
        return checkpoint(layer, *operands, use_reentrant=False, context_fn=policy)

    assert_equal(results(checkpointed, a, up, down, GroupPlan(offs, M)), results(layer, a, up, down, offs))


@pytest.mark.parametrize("trace", ("fake", "make_fx", "export", "jit"))
def test_a_plan_keeps_nothing_of_a_trace(trace):
    a, up, _, offs = make()
    a, up, plan = a.detach(), up.detach(), GroupPlan(offs, M)

    class Layer(torch.nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return grouped_mm(a, up, plan, kernel_preference="emulated")

    layer = Layer()
    if trace == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            layer(mode.from_tensor(a))
    elif trace == "make_fx":
        layer(a)
        assert "emulated_host_offs" in make_fx(layer)(a).code, "planned in the graph, not a constant of it"
    elif trace == "export":
        torch.export.export(layer, (a,))
    else:
        torch.jit.trace(layer, (a,))
    y = layer(a)
    assert type(y) is Tensor
    assert torch.equal(y, grouped_mm(a, up, offs, kernel_preference="emulated"))


def test_a_plan_that_inference_mode_used_first_serves_training():
    *operands, offs = make()
    plan = GroupPlan(offs, M)
    with prefer("emulated"):
        with torch.inference_mode():
            experts(*operands, plan, None)
        assert_equal(results(experts, *operands, plan, None), results(experts, *operands, offs, None))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("is_made_inside", (False, True))
def test_a_compiled_checkpoint_takes_a_plan(is_made_inside):
    *operands, offs = make()

    def layer(a: Tensor, up: Tensor, down: Tensor, groups: Tensor | GroupPlan) -> Tensor:
        groups = GroupPlan(groups, a.shape[0]) if is_made_inside else groups
        return checkpoint(experts, a, up, down, groups, "fp8_rowwise", use_reentrant=False)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with prefer("emulated"):
        groups = offs if is_made_inside else GroupPlan(offs, M)
        assert_equal(results(compiled, *operands, groups), results(experts, *operands, offs, "fp8_rowwise"))


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_block_that_is_called_twice_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")
    block = torch.compile(grouped_mm, fullgraph=True, backend=counter)
    a, up, _, offs = make()
    with prefer("emulated"), torch.no_grad():
        plan = GroupPlan(offs, M)
        for _ in range(3):
            block(a, up, plan)
    assert counter.frame_count == 1


def test_saved_tensor_hooks_see_the_tensors_of_a_plan():
    *operands, offs = make()
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        experts(*operands, GroupPlan(offs, M), None)
    assert sum(x.dtype == torch.int32 and x.data_ptr() == offs.data_ptr() for x in seen) == 2


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("recipe, is_made_inside", ((None, False), ("fp8_blockwise", True)))
def test_compiles_once_per_row_class_and_plans_once_per_graph(recipe, is_made_inside):
    def layer(a: Tensor, up: Tensor, down: Tensor, groups: Tensor | GroupPlan) -> Tensor:
        groups = GroupPlan(groups, a.shape[0]) if is_made_inside else groups
        return experts(a, up, down, groups, recipe)

    planned: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        planned.append(sum("emulated_host_offs" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    plain = lambda graph, _: make_boxed_func(graph.forward)  # noqa: E731
    inductors = min_cut_rematerialization_partition  # how Inductor splits a graph: it merges equal ops
    counter = CompileCounterWithBackend(aot_autograd(fw_compiler=count, bw_compiler=plain, partition_fn=inductors))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    with prefer("emulated"):
        for num_rows in (40, 48, 300, 400, 2000, 3000):
            *operands, offs = make(num_rows)
            groups = offs if is_made_inside else GroupPlan(offs, num_rows)
            assert_equal(results(compiled, *operands, groups), results(experts, *operands, offs, recipe))
    assert counter.frame_count == 3  # decode, small, large
    assert planned == [1, 1, 1], "the calls of a graph share their planning"


def test_offs_changed_in_place_are_planned_again():
    a, up, _, offs = make()
    plan = GroupPlan(offs, M)
    with prefer("emulated"), torch.no_grad():
        for ends in ((10, 10, 30, 37), (1, 2, 3, 40)):
            offs.copy_(torch.tensor(ends))
            assert torch.equal(grouped_mm(a, up, plan), grouped_mm(a, up, offs.clone()))


def test_offs_of_inference_mode_are_planned_once():
    with torch.inference_mode():
        a, up, _, offs = make()
        plan = GroupPlan(offs, M)
        with prefer("emulated"), counted_ops() as ops:
            y, again = grouped_mm(a, up, plan), grouped_mm(a, up, plan)
    assert torch.equal(y, again)
    assert ops["emulated_host_offs"] == 1


def test_strided_offs_are_laid_out_once():
    a, up, _, offs = make()
    plan = GroupPlan(offs.repeat_interleave(2)[::2], M)
    with prefer("emulated"), counted_ops() as ops:
        assert torch.equal(grouped_mm(a, up, plan), grouped_mm(a, up, plan))
    assert ops["emulated_host_offs"] == 1


@pytest.mark.parametrize("made, used, plans", ((False, True, 2), (True, False, 2), (True, True, 1), (False, False, 1)))
def test_a_plan_is_not_shared_between_capture_and_eager_calls(monkeypatch, made, used, plans):
    a, up, _, offs = make()
    monkeypatch.setattr(group_plan, "is_capturing", lambda x: made)
    plan = GroupPlan(offs, M)
    monkeypatch.setattr(group_plan, "is_capturing", lambda x: used)
    with prefer("emulated"), torch.no_grad(), counted_ops() as ops:
        assert torch.equal(grouped_mm(a, up, plan), grouped_mm(a, up, plan))
    assert ops["emulated_host_offs"] == plans


@pytest.mark.gpu
def test_a_captured_layer_follows_offs(device):
    """Guarantee 3, with a plan that is made in the capture."""
    operands, offs = [x.detach().to(device) for x in make()[:3]], make()[3].to(device)
    others = torch.tensor((5, 6, 30, 40), dtype=torch.int32, device=device)

    def layer() -> Tensor:
        return experts(*operands, GroupPlan(offs, M), "fp8_rowwise")

    with prefer("triton"), torch.no_grad():
        layer()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer()
        for ends in (offs.clone(), others):
            offs.copy_(ends)
            graph.replay()
            assert torch.equal(y, layer())


def test_vmap_takes_a_plan():
    a, up, _, offs = make()
    samples = torch.stack([a.detach(), 2 * a.detach()])
    with prefer("emulated"):
        found = torch.func.vmap(lambda x: grouped_mm(x, up.detach(), GroupPlan(offs, M)))(samples)
        assert torch.equal(found[1], grouped_mm(samples[1], up.detach(), offs))


def test_explain_and_quantized_linear_take_a_plan():
    a, up, _, offs = make()
    plan = GroupPlan(offs, M, group_alignment=1)
    assert str(explain(a, up, plan)) == str(explain(a, up, offs))
    layer = QuantizedGroupedLinear(quantize_weights(up.detach(), "fp8_rowwise"))
    assert torch.equal(layer(a.detach(), plan), layer(a.detach(), offs))


def test_calls_have_the_alignment_of_their_plan(monkeypatch):
    asked = []
    emulated = group_plan.get_backend(BackendKind.EMULATED)
    real = emulated.plan
    monkeypatch.setattr(emulated, "plan", lambda *args, **kw: asked.append(args[2]) or real(*args, **kw))
    a, up, _, _ = make(64)
    plan = GroupPlan(torch.tensor((16, 32, 32, 64), dtype=torch.int32), 64, group_alignment=16)
    with prefer("emulated"):
        grouped_mm(a, up, plan)
        grouped_mm(a, up, plan, group_alignment=16)
        with pytest.raises(
            ValueError, match="group_alignment: expected 16, the alignment of the GroupPlan in offs; found 8"
        ):
            grouped_mm(a, up, plan, group_alignment=8)
    assert asked == [16]


@pytest.mark.parametrize("call", (grouped_mm, explain), ids=lambda call: call.__name__)
def test_another_number_of_rows_is_an_error(call):
    a, up, _, offs = make()
    for _ in range(2):  # the second call uses a cached route
        call(a, up, GroupPlan(offs, M))
        with pytest.raises(ValueError, match=rf"offs\.num_rows: expected {M}, the rows of a; found {M + 1}; make a"):
            call(a, up, GroupPlan(offs, M + 1))


OFFS = make()[3]


@pytest.mark.parametrize(
    "arguments, error, message",
    (
        (([1, 2], 3), TypeError, "offs: expected a torch.Tensor; found list"),
        ((OFFS.long(), M), ValueError, "offs.dtype: expected int32"),
        ((OFFS[None], M), ValueError, "offs: expected a tensor of rank 1"),
        ((OFFS[:0], M), ValueError, "offs: expected at least one group"),
        ((OFFS, float(M)), TypeError, "num_rows: expected an int; found float"),
        ((OFFS, True), TypeError, "num_rows: expected an int; found bool"),
        ((OFFS, -1), ValueError, "num_rows: expected at least 0"),
        ((OFFS, M, 0), ValueError, "group_alignment: expected at least 1"),
    ),
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        GroupPlan(*arguments)


def test_values_are_checked_under_validation(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    a, up, _, offs = make()
    assert torch.equal(grouped_mm(a, up, GroupPlan(offs, M)), grouped_mm(a, up, offs))
    with pytest.raises(ValueError, match=r"offs\[0\]: expected a group size that is a multiple"):
        grouped_mm(a, up, GroupPlan(offs, M, group_alignment=16))
