"""The fused experts layer on twins of its GEMMs and on interpreted kernels, against the loop over experts in fp32.

Tolerances are of Frobenius norms. In bf16, a value is rounded by at most 2^-9 of it, and at most six roundings are in a
row: of pre-activations, which enter as gate and as up, of h, dh, dpre and a result. In fp8, an operand has an error of
0.026 (`testing.quantization_tolerance`); those of eight operands reach dX, which are independent: sqrt(8) * 0.026 =
0.074, and a third more for small samples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from replay_checks import check_replayed_steps, count_programs, replay_ops_on_a_cpu
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from grouped_gemm import Recipe, WgradQueue, delay_wgrad, prefer, quantize_weights
from grouped_gemm.core.library import ops
from grouped_gemm.moe import experts, experts_forward, fused, sorted_experts
from grouped_gemm.moe.activation import ACTIVATIONS
from grouped_gemm.moe.expert_parallel import Tokens
from grouped_gemm.moe.tokens import QuantizedTokens
from grouped_gemm.selection import route
from grouped_gemm.testing import poisoned_memory, relative_error

E, T, K = 3, 10, 3
NAMES = ("x", "topk_weights", "gate_up", "down")
FP32, BF16, FP8 = 1e-5, 6 * 2.0**-9, 0.1
FP8_DOTS = 1.6  # times that for 30 dot products, which scatter: composed experts reach 0.124

# numpy says this of what padding holds, which nothing reads
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in")


@pytest.fixture(autouse=True)
def always_fused(monkeypatch):
    monkeypatch.setattr(fused, "can_run", lambda *call: True)


class Inputs:
    """Operands of a layer of I = ``inner`` and H = ``hidden``.

    Expert 1 gets no token; a token names one expert twice; two ids are dropped.
    """

    def __init__(self, inner: int, hidden: int = 72, dtype: torch.dtype = torch.bfloat16, num_tokens: int = T) -> None:
        def leaf(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(shape)).to(dtype).requires_grad_()

        torch.manual_seed(0)
        self.x, self.ids = leaf(num_tokens, hidden, scale=1), torch.tensor([0, 2])[torch.randint(2, (num_tokens, K))]
        if num_tokens > 8:
            self.ids[4] = torch.tensor([2, 2, 0])
            self.ids[7, 1], self.ids[8, 0] = -1, E
        self.weights = torch.rand(num_tokens, K).requires_grad_()
        self.gate_up, self.down = (
            leaf(E, 2 * inner, hidden, scale=hidden**-0.5),
            leaf(E, hidden, inner, scale=inner**-0.5),
        )
        self.dy = torch.randn(num_tokens, hidden).to(dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weights, self.gate_up, self.down]

    def run(self, leaves: Sequence[Any] | None = None, **options: Any) -> Tensor:
        x, weights, gate_up, down = leaves or self.leaves
        return experts_forward(x, self.ids, weights, gate_up, down, **{"implementation": "grouped_mm"} | options)

    def train(self, leaves: Sequence[Tensor] | None = None, **options: Any) -> list[Tensor]:
        """y and the gradients of all leaves."""
        leaves = leaves or self.leaves
        y = self.run(leaves, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy.to(y.dtype))]

    def truth(self, **options: Any) -> list[Tensor]:
        """What `train` returns, of the loop over experts in fp32."""
        leaves = [leaf.detach().float().requires_grad_() for leaf in self.leaves]
        return self.train(leaves, implementation="eager", **options)


def assert_near(found: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> None:
    for name, x, expected in zip(("y", *NAMES), found, truth, strict=True):
        error = relative_error(x, expected)
        limit = tolerance * FP8_DOTS if name == "topk_weights" and tolerance >= FP8 else tolerance
        assert error <= limit, f"{name}: error {error:.3g} of {limit:.3g}"


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str] = ("y", *NAMES)) -> None:
    for name, x, other in zip(names, found, expected, strict=True):
        assert x.dtype == other.dtype and torch.equal(x, other), f"{name} differs"


class Seen(TorchDispatchMode):
    """Records the names of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "grouped_gemm":
            self.names.append(op._opname)
        return op(*args, **kwargs or {})


FUSED = ["moe_gated_mm", "triton_grouped_mm", "moe_combine"]
AFTER = ["moe_gathered_wgrad", "moe_gathered_wgrad", "triton_grouped_mm", "moe_combine"]
BACKWARD = {
    None: ["moe_gathered_mm", "moe_activate_backward", *AFTER],
    "fp8_blockwise": ["moe_quantize_tokens", "moe_gathered_mm", "moe_activate_backward_quantize", *AFTER],
}


@pytest.mark.parametrize("recipe", BACKWARD)
def test_these_ops_run(recipe):
    with Seen() as seen:
        Inputs(128).train(recipe=recipe)
    aside = ("moe_route", "triton_token_blocks", "triton_quantize_weights")
    before = [] if recipe is None else ["moe_quantize_tokens"]
    assert [name for name in seen.names if name not in aside] == before + FUSED + BACKWARD[recipe]


@pytest.mark.parametrize(
    "options", ({}, {"recipe": "fp8_blockwise"}, {"recipe": "fp8_blockwise", "keep": "recipe", "interleaved": True})
)
def test_replayed_layers(options, monkeypatch):
    """One program of forward and one of backward. Other ops, in plain torch, are not replayed here."""
    inputs, new_input = Inputs(128), lambda: torch.randn(T, 72).bfloat16().requires_grad_()
    replay_ops_on_a_cpu(monkeypatch)
    check_replayed_steps(
        lambda x: inputs.run([x, *inputs.leaves[1:]], **options), new_input, tuple(inputs.leaves[1:]), monkeypatch, 2
    )


def test_a_tangent_is_refused_by_a_replayed_layer_too(monkeypatch):
    inputs = Inputs(128)
    replay_ops_on_a_cpu(monkeypatch)
    ran = count_programs(monkeypatch)
    with torch.no_grad():
        for _ in range(3):
            inputs.run()
        assert len(ran) == 1
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            inputs.run([forward_ad.make_dual(inputs.x.detach(), torch.ones_like(inputs.x)), *inputs.leaves[1:]])


# Calls that are alike are checked once


@pytest.fixture
def checked(monkeypatch):
    """The x of each call that is checked; the list grows as calls are made."""
    seen, prepared = [], experts.prepared
    monkeypatch.setattr(experts, "prepared", lambda x, *rest: seen.append(x) or prepared(x, *rest))
    return seen


def test_calls_that_are_alike_are_checked_once(checked):
    inputs = Inputs(128)
    expected = inputs.train()
    for recipe in (None, "fp8_blockwise"):
        checked.clear()
        for _ in range(3):
            found = inputs.train([leaf.detach().clone().requires_grad_() for leaf in inputs.leaves], recipe=recipe)
        assert len(checked) == (0 if recipe is None else 1)
        if recipe is None:
            assert_equal(found, expected)


def changed(i, change):
    """A call of the layer with one operand changed."""
    return lambda inputs: inputs.run([change(x) if j == i else x for j, x in enumerate(inputs.leaves)])


def with_ids(change):
    def call(inputs):
        inputs.ids = change(inputs.ids)
        inputs.run()

    return call


def under(context):
    def call(inputs):
        with context():
            inputs.run()

    return call


def adding(inputs):
    for parameter in inputs.leaves[2:]:
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    inputs.run(accumulate_main_grad=True)


class Other(Tensor):
    pass


OTHERS = {
    "tokens": lambda inputs: Inputs(128, num_tokens=9).run(),
    "strides of x": changed(0, lambda x: x.t().contiguous().t()),
    "strides of weights": changed(3, lambda w: w.transpose(1, 2).contiguous().transpose(1, 2)),
    "dtype of ids": with_ids(Tensor.int),
    "strides of ids": with_ids(lambda ids: ids.t().contiguous().t()),
    "dtype of topk_weights": changed(1, Tensor.double),
    "no gradient": changed(2, Tensor.detach),
    "negated": changed(0, lambda x: torch._neg_view(x.detach())),
    "a subclass": changed(1, lambda x: x.detach().as_subclass(Other)),
    "grad mode": under(torch.no_grad),
    "autocast": under(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "a mode": under(Seen),
    "preference": under(lambda: prefer("triton")),
    "host sync": under(lambda: prefer(host_sync=False)),
    "activation": lambda inputs: inputs.run(activation="geglu"),
    "interleaved": lambda inputs: inputs.run(interleaved=True),
    "recipe": lambda inputs: inputs.run(recipe="fp8_blockwise"),
    "keep": lambda inputs: inputs.run(keep="recipe"),
    "implementation": lambda inputs: inputs.run(implementation="auto"),
    "kernel_preference": lambda inputs: inputs.run(kernel_preference="triton"),
    "batch_invariant": lambda inputs: inputs.run(batch_invariant=True),
    "accumulate_main_grad": adding,
    "dtype": lambda inputs: inputs.run([leaf.detach().float() for leaf in inputs.leaves]),
    "capture": under(lambda: mock.patch.object(experts, "is_capturing", lambda x: True)),
    "dual level": under(forward_ad.dual_level),
}


@pytest.mark.parametrize("call", OTHERS.values(), ids=OTHERS)
def test_calls_that_differ_are_checked(call, checked, monkeypatch):
    monkeypatch.setattr(experts, "_can_replay", lambda *call: False)
    inputs = Inputs(128)
    for _ in range(2):
        inputs.run()
    assert len(checked) == 1
    call(inputs)
    assert len(checked) == 2


def test_the_environment_and_forgotten_decisions_are_noticed(checked, monkeypatch):
    inputs = Inputs(128)
    inputs.run()
    monkeypatch.setenv("GROUPED_GEMM_LOG", "1")
    inputs.run()
    route.forget()
    inputs.run()
    assert len(checked) == 3


@pytest.mark.parametrize("option", ({"interleaved": 0}, {"accumulate_main_grad": 0}, {"keep": []}, {"recipe": {}}))
def test_a_bad_option_after_a_good_call_is_named(option):
    inputs = Inputs(128)
    inputs.run()
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(option))}: expected"):
        inputs.run(**option)


def test_the_number_of_known_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(experts, "_MOST_KNOWN", 3)
    for num_tokens in range(9, 16):
        Inputs(128, num_tokens=num_tokens).run()
        assert len(experts._known) <= 3


# Values


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("dtype, inner, tolerance", ((torch.float32, 72, FP32), (torch.bfloat16, 128, BF16)), ids=str)
def test_without_a_recipe(dtype, inner, tolerance, interleaved):
    inputs = Inputs(inner, dtype=dtype)
    assert_near(inputs.train(interleaved=interleaved), inputs.truth(interleaved=interleaved), tolerance)


@pytest.mark.parametrize("activation", [name for name, kind in ACTIVATIONS.items() if kind.is_gated])
def test_each_activation(activation):
    inputs = Inputs(72, dtype=torch.float32)
    assert_near(inputs.train(activation=activation), inputs.truth(activation=activation), FP32)


# I: a whole block, where the first GEMM ends with the gate; or not
FORMS = ((128, False), (128, True), (80, False), (80, True))


@pytest.mark.parametrize("inner, interleaved", FORMS)
def test_with_a_recipe(inner, interleaved):
    inputs, options = Inputs(inner, 136), {"interleaved": interleaved}
    assert_near(inputs.train(recipe="fp8_blockwise", **options), inputs.truth(**options), FP8)


def test_scales_that_are_powers_of_two():
    inputs = Inputs(128)
    assert_near(inputs.train(recipe="fp8_blockwise_pow2"), inputs.truth(), FP8)


@pytest.mark.parametrize(
    "recipe, inner, interleaved", (("fp8_blockwise", 80, True), ("fp8_blockwise_pow2", 128, False))
)
def test_a_recipe_quantizes_as_in_the_composed_layer(recipe, inner, interleaved, monkeypatch):
    """Much closer than two ways to quantize are, 0.06 * sqrt(2).

    Operands differ in h alone: the composed layer rounds pre-activations to bf16. So 3 of 100 values of h are rounded
    to the other fp8 neighbor, 2^-4 to 2^-3 of the value away.
    """
    inputs, options = Inputs(inner, 136), {"recipe": recipe, "interleaved": interleaved}
    y = inputs.run(**options)
    monkeypatch.setattr(fused, "can_run", lambda *call: False)
    assert relative_error(y, inputs.run(**options)) <= 0.03


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
@pytest.mark.parametrize("num_tokens", (0, 1))
def test_few_tokens(num_tokens, recipe):
    inputs = Inputs(128, num_tokens=num_tokens)
    found = inputs.train(recipe=recipe)
    if num_tokens:
        assert_near(found, inputs.truth(), FP8 if recipe else BF16)
    else:
        assert [x.shape for x in found] == [inputs.x.shape, *(leaf.shape for leaf in inputs.leaves)]
        assert not any(x.any() for x in found)


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_no_token_is_kept(recipe):
    inputs = Inputs(128)
    inputs.ids.fill_(-1)
    for name, x in zip(("y", *NAMES), inputs.train(recipe=recipe)):
        assert not x.any(), f"{name}: expected zeros; found {x}"


# Which gradients


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_gradients_of_some_inputs_are_those_of_all(recipe):
    inputs = Inputs(128)
    _, *expected = inputs.train(recipe=recipe)
    for wanted in ((0,), (1, 2), (3,)):
        leaves = [leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(inputs.leaves)]
        found = torch.autograd.grad(inputs.run(leaves, recipe=recipe), [leaves[i] for i in wanted], inputs.dy)
        assert_equal(found, [expected[i] for i in wanted], [NAMES[i] for i in wanted])


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_without_gradients_y_has_the_same_bits(recipe):
    inputs = Inputs(128)
    with torch.no_grad():
        y = inputs.run(recipe=recipe)
    assert not y.requires_grad and torch.equal(y, inputs.run(recipe=recipe))


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
def test_kept_for_backward_are_pre_activations_routing_and_weights(recipe):
    inputs, inner, hidden, num_rows = Inputs(128), 128, 72, T * K
    known = {x.untyped_storage().data_ptr() for x in inputs.leaves}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        inputs.run(recipe=recipe)
    expected = [2 * num_rows * 2 * inner, 4 * E, 4 * num_rows, 4 * num_rows]
    if recipe is not None:  # dgrad layouts, in which lines have 16 * n bytes, and the scales of both
        expected += [E * hidden * 2 * inner, E * inner * 80, E * 2 * 4, E * 4]
    assert sorted(kept.values()) == sorted(expected)


def test_second_derivatives():
    inputs, options = Inputs(72, dtype=torch.float32), {"interleaved": True}

    def second(implementation: str) -> tuple[Tensor, ...]:
        y = inputs.run(implementation=implementation, **options)
        first = torch.autograd.grad(y, inputs.leaves, inputs.dy, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs.leaves)

    for name, x, truth in zip(NAMES, second("grouped_mm"), second("eager")):
        assert relative_error(x, truth) <= FP32, name


def test_a_recipe_has_no_second_derivatives():
    inputs = Inputs(128)
    y = inputs.run(recipe="fp8_blockwise")
    with pytest.raises(RuntimeError, match="expected create_graph=False with recipe fp8_blockwise; found True"):
        torch.autograd.grad(y, inputs.leaves, inputs.dy, create_graph=True)


# Compiled, and with quantized weights


@pytest.mark.parametrize("recipe, inner", ((None, 72), ("fp8_blockwise", 80)))
def test_a_compiled_layer_gives_the_same_bits(recipe, inner):
    torch._dynamo.reset()
    inputs, counter = Inputs(inner), CompileCounterWithBackend("aot_eager")
    run = torch.compile(functools.partial(inputs.run, recipe=recipe), fullgraph=True, backend=counter)
    y = run()
    found = [y.detach(), *torch.autograd.grad(y, inputs.leaves, inputs.dy)]
    assert counter.frame_count == 1
    assert_equal(found, inputs.train(recipe=recipe))
    torch._dynamo.reset()


def quantized(inputs: Inputs, dgrad: bool = True) -> list[Any]:
    weights = inputs.gate_up, inputs.down
    return [quantize_weights(w.detach().transpose(1, 2), "fp8_blockwise", dgrad=dgrad) for w in weights]


@pytest.mark.parametrize("inner, interleaved", (FORMS[0], FORMS[-1]))
def test_quantized_weights_give_the_bits_of_weights(inner, interleaved):
    inputs = Inputs(inner)
    leaves = [inputs.x, inputs.weights, *quantized(inputs)]
    y = inputs.run(leaves, interleaved=interleaved)
    found = [y.detach(), *torch.autograd.grad(y, leaves[:2], inputs.dy)]
    assert_equal(found, inputs.train(recipe="fp8_blockwise", interleaved=interleaved)[:3], ("y", *NAMES[:2]))


def test_weights_quantized_for_forward_alone_run_without_gradients():
    inputs = Inputs(128)
    with torch.no_grad():
        y = inputs.run([inputs.x, inputs.weights, *quantized(inputs, dgrad=False)])
        assert torch.equal(y, inputs.run(recipe="fp8_blockwise"))


# What is kept, and rows in expert order


@pytest.mark.parametrize("inner, interleaved", (FORMS[0], FORMS[3]))
def test_what_is_kept_in_fp8_costs_the_gradients_little(inner, interleaved):
    inputs, options = Inputs(inner, 136), {"recipe": "fp8_blockwise", "interleaved": interleaved}
    full, kept = inputs.train(**options), inputs.train(keep="recipe", **options)
    assert_equal(full[:1], kept[:1], ("y",))
    assert not torch.equal(full[3], kept[3])
    # Two more operands are rounded, those of the gradients of gate and up.
    assert_near(kept, inputs.truth(interleaved=interleaved), 1.2 * FP8)


def test_less_is_kept_in_fp8():
    def kept_bytes(keep: str) -> int:
        inputs, total = Inputs(128), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            inputs.run(recipe="fp8_blockwise", keep=keep)
        return total

    rows, features = T * K, 2 * 128  # a byte less for each pre-activation, 4 bytes for 128 of them; and so for x
    saved = rows * features * (1 - 4 / 128) + T * (72 - 4)
    assert kept_bytes("full") - kept_bytes("recipe") == saved


@pytest.mark.parametrize("recipe, tolerance", ((None, BF16), ("fp8_blockwise", FP8)))
@pytest.mark.parametrize("weighted", (True, False))
def test_rows_in_expert_order(recipe, tolerance, weighted):
    inputs = Inputs(128, num_tokens=40)
    offs = torch.tensor([13, 13, 37], dtype=torch.int32)  # three rows belong to no expert
    inputs.ids = torch.searchsorted(offs, torch.arange(40), right=True).unsqueeze(1)
    inputs.weights = (torch.rand(40, 1) if weighted else torch.ones(40, 1)).requires_grad_()
    row_weights = inputs.weights.detach()[:, 0].requires_grad_() if weighted else None
    y = sorted_experts(inputs.x, offs, inputs.gate_up, inputs.down, row_weights=row_weights, recipe=recipe)
    leaves = [inputs.x, row_weights, inputs.gate_up, inputs.down]
    found = dict(zip(NAMES, leaves))
    wanted = [name for name, leaf in found.items() if leaf is not None]
    gradients = torch.autograd.grad(y, [found[name] for name in wanted], inputs.dy)
    truth, *expected = inputs.truth()
    assert relative_error(y.detach(), truth) <= tolerance
    assert not y[37:].any()
    for name, gradient in zip(wanted, gradients):
        other = expected[NAMES.index(name)].view(gradient.shape)
        assert relative_error(gradient, other) <= tolerance * (FP8_DOTS if recipe else 1), name


def test_weights_of_slots_in_any_layout():
    inputs = Inputs(128)
    y, wide = inputs.run(), torch.rand(T, 2 * K)
    wide[:, ::2] = inputs.weights.detach()
    for weights in (inputs.weights.detach().t().contiguous().t(), wide[:, ::2]):
        assert_equal([inputs.run([inputs.x, weights, inputs.gate_up, inputs.down])], [y], ("y",))


def test_weights_of_slots_with_a_pending_negation():
    inputs, given = Inputs(128), Inputs(128)
    given.weights = torch._neg_view(-inputs.weights.detach()).requires_grad_()
    assert_equal(given.train(), inputs.train())


# Gradients in main_grad, and later

KEPT: dict[str, tuple[dict[str, Any], float]] = {
    "bf16": ({}, BF16),
    "fp8": ({"recipe": "fp8_blockwise"}, FP8),
    "fp8, kept in fp8": ({"recipe": "fp8_blockwise", "keep": "recipe"}, 1.2 * FP8),
}


def give_main_grads(inputs: Inputs) -> None:
    """Expert 1, which gets no token, has NaN in its ``main_grad``: nothing may read or write it."""
    generator = torch.Generator().manual_seed(1)
    for w in (inputs.gate_up, inputs.down):
        w.main_grad = torch.randn(w.shape, generator=generator)
        w.main_grad[1] = torch.nan


def main_grads(inputs: Inputs) -> list[Tensor]:
    return [w.main_grad.nan_to_num(nan=-7.0) for w in (inputs.gate_up, inputs.down)]


def step(inputs: Inputs, **options: Any) -> list[Tensor]:
    """y, and the gradients of x and of the weights of slots, of a backward into ``grad``."""
    inputs.x.grad = inputs.weights.grad = None
    y = inputs.run(**options)
    y.backward(inputs.dy.to(y.dtype))
    return [y.detach(), inputs.x.grad, inputs.weights.grad]


@pytest.mark.parametrize("options, tolerance", KEPT.values(), ids=KEPT)
def test_main_grads_get_the_gradients_of_two_micro_batches(options, tolerance):
    inputs = Inputs(128)
    give_main_grads(inputs)
    weights, before = (inputs.gate_up, inputs.down), main_grads(inputs)
    versions = [w.main_grad._version for w in weights]
    with Seen() as seen:
        results = [step(inputs, accumulate_main_grad=True, **options) for _ in range(2)]
    assert seen.names.count("moe_gathered_wgrad_add") == 4 and "moe_gathered_wgrad" not in seen.names
    added = [found - start for found, start in zip(main_grads(inputs), before)]
    assert not any(x[1].any() for x in added)
    for result in results:
        assert_near([*result, *(x / 2 for x in added)], inputs.truth(), tolerance)
    for w, version in zip(weights, versions):
        assert w.grad is None and w.grad_added_to_main_grad and w.main_grad._version > version


def test_main_grads_are_not_rounded_to_the_dtype_of_the_weights():
    inputs = Inputs(128)
    give_main_grads(inputs)
    for w in (inputs.gate_up, inputs.down):
        w.main_grad.zero_()
    *expected, gate_up, down = inputs.train()
    assert_equal(step(inputs, accumulate_main_grad=True), expected, ("y", *NAMES[:2]))
    for w, gradient in zip((inputs.gate_up, inputs.down), (gate_up, down)):
        assert torch.equal(w.main_grad.bfloat16(), gradient) and not torch.equal(w.main_grad, gradient.float())


@pytest.mark.parametrize(
    "options, accumulates",
    [({}, False), *((options, True) for options, _ in KEPT.values())],
    ids=("bf16, into grad", *KEPT),
)
def test_gradients_that_wait_have_the_same_bits(options, accumulates):
    inputs, later = Inputs(128), Inputs(128)
    for one in (inputs, later):
        give_main_grads(one)
    options = {**options, "accumulate_main_grad": accumulates}
    expected = step(inputs, **options)
    with delay_wgrad() as queue:
        found = step(later, **options)
    assert_equal(found, expected, ("y", *NAMES[:2]))
    assert later.gate_up.grad is None and later.down.grad is None and len(queue) == 2
    assert not hasattr(later.down, "grad_added_to_main_grad")
    queue.backward_dw()
    assert_equal(main_grads(later), main_grads(inputs), NAMES[2:])
    if not accumulates:
        assert_equal([later.gate_up.grad, later.down.grad], [inputs.gate_up.grad, inputs.down.grad], NAMES[2:])


def test_what_waits_keeps_x_in_fp8_and_no_context():
    inputs, kept = Inputs(128), []

    class Watched(WgradQueue):
        def append(self, destination: Any, compute: Any) -> None:
            kept.append({name: cell.cell_contents for name, cell in zip(compute.__code__.co_freevars, cells(compute))})
            super().append(destination, compute)

    def cells(function: Any) -> tuple[Any, ...]:
        return function.__closure__ or ()

    with delay_wgrad(Watched()):
        step(inputs, recipe="fp8_blockwise", keep="recipe")
    assert [sorted(names) for names in kept] == [["dy", "h", "wgrad"], ["dpre", "dtype", "wgrad", "x", "x_scale"]]
    assert kept[1]["x"].dtype == torch.float8_e4m3fn
    assert sorted(kept[0]["wgrad"].__code__.co_freevars) == ["dtype", "offs", "source"]


CHECKPOINTED: dict[str, tuple[bool, bool, dict[str, Any]]] = {
    "block around it": (False, False, {}),
    "block around it, reentrant": (False, True, {"accumulate_main_grad": True}),
    "block inside of it": (True, False, {"accumulate_main_grad": True}),
    "block inside of it, reentrant": (True, True, {}),
    "fp8": (False, False, {"accumulate_main_grad": True, "recipe": "fp8_blockwise", "keep": "recipe"}),
}


@pytest.mark.parametrize("inside, use_reentrant, options", CHECKPOINTED.values(), ids=CHECKPOINTED)
def test_a_checkpointed_layer(inside, use_reentrant, options):
    """A reentrant checkpoint builds the graph in backward, outside of a block that is around the checkpoint."""
    inputs, later, queue = Inputs(128), Inputs(128), WgradQueue()
    for one in (inputs, later):
        give_main_grads(one)
    expected = step(inputs, **options)

    def run(x: Tensor, weights: Tensor) -> Tensor:
        with delay_wgrad(queue) if inside else nullcontext():
            return later.run([x, weights, later.gate_up, later.down], **options)

    with nullcontext() if inside else delay_wgrad(queue):
        y = checkpoint(run, later.x, later.weights, use_reentrant=use_reentrant)
    y.backward(later.dy)
    assert len(queue) == (0 if use_reentrant and not inside else 2)
    queue.backward_dw()
    assert_equal([y.detach(), later.x.grad, later.weights.grad], expected, ("y", *NAMES[:2]))
    assert_equal(main_grads(later), main_grads(inputs), NAMES[2:])
    if "accumulate_main_grad" not in options:
        assert_equal([later.gate_up.grad, later.down.grad], [inputs.gate_up.grad, inputs.down.grad], NAMES[2:])


@pytest.mark.parametrize("delays", (False, True))
def test_autocast_casts_weights_whose_main_grad_gets_the_gradient(delays):
    inputs, wide = Inputs(128), Inputs(128)
    wide.gate_up, wide.down = (w.detach().float().requires_grad_() for w in (wide.gate_up, wide.down))
    for one in (inputs, wide):
        give_main_grads(one)
    expected = step(inputs, accumulate_main_grad=True)
    with torch.autocast("cpu", torch.bfloat16), delay_wgrad() if delays else nullcontext(WgradQueue()) as queue:
        found = step(wide, accumulate_main_grad=True)
    assert_equal(found, expected, ("y", *NAMES[:2]))
    queue.backward_dw()
    assert_equal(main_grads(wide), main_grads(inputs), NAMES[2:])
    assert wide.down.grad is None


def test_autocast_weights_that_wait():
    inputs, wide = Inputs(128), Inputs(128)
    wide.gate_up, wide.down = (w.detach().float().requires_grad_() for w in (wide.gate_up, wide.down))
    _, _, _, *expected = inputs.train()
    with torch.autocast("cpu", torch.bfloat16), delay_wgrad() as queue:
        step(wide)
    queue.backward_dw()
    assert_equal([wide.gate_up.grad, wide.down.grad], [x.float() for x in expected], NAMES[2:])


@pytest.mark.parametrize("delays", (False, True))
def test_a_compiled_layer_whose_gradients_go_elsewhere_runs_outside_of_graphs(delays):
    torch._dynamo.reset()
    inputs, compiled, queue = Inputs(72), Inputs(72), WgradQueue()
    for one in (inputs, compiled):
        give_main_grads(one)
    options = {"accumulate_main_grad": not delays}
    expected = step(inputs, **options)

    def layer(fullgraph: bool = False) -> Tensor:
        run = functools.partial(compiled.run, **options)
        with delay_wgrad(queue) if delays else nullcontext():
            return torch.compile(lambda: 2 * run(), backend="aot_eager", fullgraph=fullgraph)()

    y = layer()
    y.backward(compiled.dy / 2)
    assert len(queue) == 2 * delays
    queue.backward_dw()
    assert_equal([y.detach() / 2, compiled.x.grad, compiled.weights.grad], expected, ("y", *NAMES[:2]))
    assert_equal(main_grads(compiled), main_grads(inputs), NAMES[2:])
    if delays:
        assert_equal([compiled.gate_up.grad, compiled.down.grad], [inputs.gate_up.grad, inputs.down.grad], NAMES[2:])
    torch._dynamo.reset()
    with pytest.raises(Exception, match="accumulate_main_grad or in delay_wgrad runs outside of graphs"):
        layer(fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("delays", (False, True))
def test_gradients_of_gradients_and_batched_gradients_have_no_destination(delays):
    inputs, queue = Inputs(72), WgradQueue()
    give_main_grads(inputs)
    before = main_grads(inputs)
    with delay_wgrad(queue) if delays else nullcontext():
        y = inputs.run(accumulate_main_grad=not delays)
    with pytest.raises(RuntimeError, match="found create_graph=True"):
        torch.autograd.grad(y.sum(), inputs.leaves, create_graph=True)
    batch = torch.stack((inputs.dy, inputs.dy))
    with pytest.raises(RuntimeError, match="found batched gradients"):
        torch.autograd.grad(y, inputs.x, batch, is_grads_batched=True, retain_graph=True)
    assert len(queue) == 0
    assert_equal(main_grads(inputs), before, NAMES[2:])


@pytest.mark.parametrize("name", NAMES[2:])
def test_weights_without_a_main_grad_are_named(name):
    inputs = Inputs(72)
    give_main_grads(inputs)
    del getattr(inputs, name).main_grad
    with pytest.raises(ValueError, match=f"main_grad of {name}: expected float32, contiguous, .*; found none"):
        inputs.run(accumulate_main_grad=True)
    setattr(inputs, name, 2 * getattr(inputs, name))
    with pytest.raises(ValueError, match=f"^{name}: expected all of a contiguous leaf parameter"):
        inputs.run(accumulate_main_grad=True)


def test_computed_weights_do_not_wait():
    inputs = Inputs(72)
    with delay_wgrad() as queue:
        y = inputs.run([inputs.x, inputs.weights, 2 * inputs.gate_up, inputs.down])
    y.backward(inputs.dy)
    assert inputs.gate_up.grad.any() and inputs.down.grad is None and len(queue) == 1


def test_views_of_parameters_and_rows_in_expert_order():
    inputs, offs = Inputs(128, num_tokens=40), torch.tensor([13, 13, 37], dtype=torch.int32)
    gate_up, down = (torch.nn.Parameter(w.detach().flatten()) for w in (inputs.gate_up, inputs.down))
    weights = gate_up.view(inputs.gate_up.shape), down.view(inputs.down.shape)
    right = torch.autograd.grad(sorted_experts(inputs.x, offs, *weights), (gate_up, down), inputs.dy)
    for w in (gate_up, down):
        w.main_grad = torch.zeros(w.shape)
    with delay_wgrad() as queue:
        y = sorted_experts(inputs.x, offs, *weights, accumulate_main_grad=True)
    y.backward(inputs.dy)
    assert not gate_up.main_grad.any() and len(queue) == 2
    queue.backward_dw()
    for w, gradient in zip((gate_up, down), right):
        assert relative_error(w.main_grad, gradient.float()) <= 2.0**-8


# Tokens that have arrived in fp8


class Arrived(NamedTuple):
    """A dispatcher of one rank, whose tokens arrive in fp8."""

    quantized: QuantizedTokens

    def dispatch(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tokens:
        return Tokens(x, ids, weights, None, int(((ids >= 0) & (ids < E)).sum()), self.quantized)

    def combine(self, y: Tensor, handle: None) -> Tensor:
        return y


@pytest.mark.parametrize("keep", ("full", "recipe"))
def test_tokens_in_fp8_are_read_as_they_are(keep):
    """x has no values then. What is kept of it are the rounded values, whatever ``keep`` is."""
    inputs, recipe = Inputs(128), Recipe.FP8_BLOCKWISE
    inputs.ids[-1] = -1
    quantized = QuantizedTokens(*ops.moe_quantize_tokens(inputs.x.detach(), recipe.value), recipe)
    x = torch.full((1, 1), torch.nan).to(inputs.x).expand(inputs.x.shape).requires_grad_()
    with Seen() as seen, poisoned_memory():
        found = inputs.train([x, *inputs.leaves[1:]], recipe=recipe, keep=keep, mesh=Arrived(quantized))
    assert seen.names.count("moe_quantize_tokens") == 1  # of dY
    expected, rounded = (inputs.train(recipe=recipe, keep=k) for k in (keep, "recipe"))
    is_exact = [name for name in ("y", *NAMES) if name != "gate_up" or keep == "recipe"]
    by_name = [dict(zip(("y", *NAMES), tensors)) for tensors in (found, expected)]
    assert_equal(*([tensors[name] for name in is_exact] for tensors in by_name), is_exact)
    assert relative_error(found[3], rounded[3]) <= FP8  # with keep="full", dpre is that of exact pre-activations


def test_tokens_in_fp8_of_another_recipe_are_dequantized():
    inputs = Inputs(128)
    recipe = Recipe.FP8_BLOCKWISE_POW2
    quantized = QuantizedTokens(*ops.moe_quantize_tokens(inputs.x.detach(), recipe.value), recipe)
    values = ops.moe_dequantize_tokens(*quantized[:2], inputs.x.dtype).requires_grad_()
    x = torch.full((1, 1), torch.nan).to(inputs.x).expand(inputs.x.shape).requires_grad_()
    for options in ({}, {"recipe": "fp8_blockwise"}, {"implementation": "eager"}):
        found = inputs.train([x, *inputs.leaves[1:]], mesh=Arrived(quantized), **options)
        assert_equal(found, inputs.train([values, *inputs.leaves[1:]], **options))
