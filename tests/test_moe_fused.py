"""The fused experts layer on a Hopper GPU. tests/interpreter/test_moe_fused.py has what does not need its kernels.

Every call of these tests must run fused: a call of the composed layer fails.

If a test fails: where the errors of all outputs are a little too large, the tolerance or the order of roundings is
wrong. Where y is right and gradients are not, compare one by one: dtopk_weights and ddown need dh, h and the weights of
rows; dgate_up also dpre; dX also dgrad of gate-up. Where whole tiles or the last rows of experts are wrong, or NaN, an
address is wrong or a barrier is missing.

T, k, M, E: tokens, slots of a token, routed rows, experts. H, I: hidden and intermediate features.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from kernel_checks import assert_same_bits
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from grouped_gemm import KernelPreference, Recipe, WgradQueue, delay_wgrad, quantize_weights
from grouped_gemm.cli import demo
from grouped_gemm.core.machine import machine_of
from grouped_gemm.moe import Experts, experts, experts_forward, implementations
from grouped_gemm.testing import poisoned_memory, worst_row_error

pytestmark = pytest.mark.gpu

NAMES = ("y", "dX", "dtopk_weights", "dgate_up", "ddown")
FP8 = "fp8_blockwise"
FORMS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"recipe": FP8},
    "fp8, kept in fp8": {"recipe": FP8, "keep": "recipe"},
}
every_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


class Sizes(NamedTuple):
    num_tokens: int = 500
    top_k: int = 4
    num_experts: int = 8
    hidden: int = 2880
    inner: int = 704


# I: no whole blocks of 128; and whole ones, where the gate is in the first GEMM with a recipe too
SIZES = (Sizes(), Sizes(hidden=704, inner=2880), Sizes(inner=640))
WHOLE = Sizes(inner=640)
every_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"H{s.hidden}-I{s.inner}")
LARGE = Sizes(num_tokens=4096, inner=640)


@pytest.fixture(autouse=True)
def fused_alone(device, monkeypatch):
    """Skips where the fused kernels do not run, and fails where the composed layer runs in their place."""
    if machine_of(device).arch != "sm_90":
        pytest.skip(f"the fused kernels need sm_90; found {machine_of(device).arch}")

    def fail(*args: Any) -> Tensor:
        raise AssertionError("the composed layer ran: fused.can_run refused this call")

    monkeypatch.setattr(implementations, "run_composed", fail)


def random_ids(sizes: Sizes, device: torch.device) -> Tensor:
    """Experts of each slot, int64. Expert 1 gets no token; token 4 has one expert twice; about 2% are dropped."""
    ids = torch.randint(sizes.num_experts - 1, (sizes.num_tokens, sizes.top_k), device=device)
    ids += ids >= 1
    ids[torch.rand(ids.shape, device=device) < 0.02] = -1
    ids[4:5, :2] = 0
    return ids


class Inputs:
    """Operands of a layer in bf16; ``ids`` by default from `random_ids`."""

    def __init__(self, sizes: Sizes, device: torch.device, ids: Tensor | None = None) -> None:
        def leaf(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(shape, device=device)).bfloat16().requires_grad_()

        self.sizes, (num_tokens, top_k, num_experts, hidden, inner) = sizes, sizes
        self.ids = random_ids(sizes, device) if ids is None else ids
        self.x, self.weights = leaf(num_tokens, hidden, scale=1), torch.rand(num_tokens, top_k, device=device)
        self.weights.requires_grad_()
        self.gate_up = leaf(num_experts, 2 * inner, hidden, scale=hidden**-0.5)
        self.down = leaf(num_experts, hidden, inner, scale=inner**-0.5)
        self.dy = torch.randn(num_tokens, hidden, device=device).bfloat16()

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.weights, self.gate_up, self.down]

    def run(self, *leaves: Any, **options: Any) -> Tensor:
        x, weights, gate_up, down = leaves or self.leaves
        return experts_forward(x, self.ids, weights, gate_up, down, **{"implementation": "grouped_mm"} | options)

    def train(self, call: Callable[..., Tensor] | None = None, **options: Any) -> list[Tensor]:
        """y and the gradients of all leaves; ``call`` takes the leaves."""
        leaves = self.leaves
        y = (call or self.run)(*leaves, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def truth(self, **options: Any) -> list[Tensor]:
        """What `train` returns, of the loop over experts in fp32."""
        leaves = [leaf.detach().float().requires_grad_() for leaf in self.leaves]
        y = self.run(*leaves, **options | {"implementation": "eager"})
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy.float())]


def tolerance(options: dict[str, Any]) -> float:
    """As in tests/interpreter/test_moe_fused.py: six roundings to bf16 in a row, or the errors of eight fp8 operands,
    0.074 together, and two thirds more for the worst of several hundred tokens. Two more operands may be kept in fp8.
    """
    if not options:
        return 6 * 2.0**-9
    return 0.124 if options.get("keep") != "recipe" else 0.124 * 1.2


def errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    """The largest error of a token of y and dX, of dtopk_weights, and of an expert's weights.

    It is infinite where zeros are expected, or what was found is not finite.
    """
    flat = [x if name in ("y", "dX") else x.flatten(1 if x.dim() == 3 else 0) for name, x in zip(NAMES, truth)]
    flat = [x if x.dim() == 2 else x[None] for x in flat]
    return {name: worst_row_error(x.reshape(t.shape), t) for name, x, t in zip(NAMES, found, flat)}


def assert_near(found: Sequence[Tensor], truth: Sequence[Tensor], options: dict[str, Any]) -> None:
    worst = errors(found, truth)
    allowed = dict.fromkeys(worst, tolerance(options))
    if truth[2].numel() < 100:  # dot products, of which so few may all be small, because their terms cancel out
        allowed["dtopk_weights"] *= 3
    assert all(worst[name] <= allowed[name] for name in worst), f"errors: {worst}; allowed: {allowed}"


def assert_equal(found: Sequence[Tensor], wanted: Sequence[Tensor], what: str) -> None:
    for name, x, other in zip(NAMES, found, wanted, strict=True):
        assert_same_bits(x, other, f"{what}, {name}")


# Values


@every_size
@every_form
@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
def test_agrees_with_the_loop_over_experts(sizes, options, interleaved, device):
    inputs = Inputs(sizes, device)
    found = inputs.train(**options, interleaved=interleaved)
    assert_near(found, inputs.truth(interleaved=interleaved), options)


def test_scales_that_are_powers_of_two(device):
    inputs = Inputs(WHOLE, device)
    assert_near(inputs.train(recipe="fp8_blockwise_pow2"), inputs.truth(), FORMS["fp8"])


@every_form
@pytest.mark.parametrize("activation", ("geglu", "geglu_tanh", "reglu", "swiglu_clamped"))
def test_the_first_gemm_ends_with_each_activation(activation, options, device):
    """Outputs alone: gradients jump where fp8 moves a value across a clamp; their kernels are in test_moe_steps.py."""
    inputs = Inputs(WHOLE, device)
    with torch.no_grad():
        inputs.gate_up *= 4  # some values are clamped
        y = inputs.run(**options, activation=activation)
    error = worst_row_error(y, inputs.truth(activation=activation)[0])
    assert error <= tolerance(options), f"y: error {error:.3g} of {tolerance(options):.3g}"


def to_one_expert(sizes: Sizes) -> Tensor:
    return torch.full((sizes.num_tokens, sizes.top_k), sizes.num_experts - 1)


def to_few_experts(sizes: Sizes) -> Tensor:
    return torch.tensor([0, 5])[torch.randint(2, (sizes.num_tokens, sizes.top_k))]


def to_all_experts(sizes: Sizes) -> Tensor:
    return torch.rand(sizes.num_tokens, sizes.top_k).argsort(1)


def to_no_expert(sizes: Sizes) -> Tensor:
    return torch.full((sizes.num_tokens, sizes.top_k), -1)


ROUTINGS: dict[str, tuple[Sizes, Callable[[Sizes], Tensor]]] = {
    "one expert": (WHOLE, to_one_expert),
    "empty experts": (WHOLE, to_few_experts),
    "k = E": (WHOLE._replace(top_k=8), to_all_experts),
    "all slots dropped": (WHOLE, to_no_expert),
    "one token": (WHOLE._replace(num_tokens=1), to_few_experts),
    "no token": (WHOLE._replace(num_tokens=0), to_few_experts),
    "one expert in the layer": (WHOLE._replace(num_experts=1), to_one_expert),
    "an expert with 64 rows, one with 65": (WHOLE._replace(num_tokens=129, top_k=1), lambda s: torch.arange(129) // 65),
}


@every_form
@pytest.mark.parametrize("sizes, ids", ROUTINGS.values(), ids=ROUTINGS)
def test_agrees_with_the_loop_however_tokens_are_routed(sizes, ids, options, device):
    inputs = Inputs(sizes, device, ids(sizes).view(sizes.num_tokens, sizes.top_k).to(device))
    found = inputs.train(**options)
    assert [x.shape for x in found] == [inputs.x.shape, *(leaf.shape for leaf in inputs.leaves)]
    assert_near(found, inputs.truth(), options)


@every_form
@pytest.mark.parametrize("weighted", (False, True), ids=("no weights", "weights"))
def test_rows_in_expert_order_give_the_bits_of_their_tokens(weighted, options, device, monkeypatch):
    def fail(*args: Any) -> Tensor:
        raise AssertionError("sorted_experts ran composed: fused.can_run refused this call")

    monkeypatch.setattr(experts, "grouped", fail)
    sizes = WHOLE._replace(top_k=1)
    offs = torch.tensor([0, 63, 63, 128, 257, 258, 450, 490], dtype=torch.int32, device=device)  # 10 rows of no expert
    ids = torch.bucketize(torch.arange(sizes.num_tokens, device=device), offs, right=True)
    inputs = Inputs(sizes, device, ids.unsqueeze(1))
    if not weighted:
        inputs.weights = torch.ones(sizes.num_tokens, 1, device=device, requires_grad=True)
    y, dx, dweights, *others = inputs.train(**options)

    def sort(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        row_weights = weights[:, 0] if weighted else None
        result = experts.sorted_experts(x, offs, gate_up, down, row_weights=row_weights, **options)
        return result if weighted else result + 0 * weights.to(result.dtype)  # so that weights have a gradient

    sorted_y, sorted_dx, sorted_dweights, *sorted_others = inputs.train(sort)
    for name, x, wanted in zip(("y", "dX", *NAMES[3:]), (sorted_y, sorted_dx, *sorted_others), (y, dx, *others)):
        assert_same_bits(x + 0, wanted + 0, name)  # 0 has one sign
    if weighted:
        assert_same_bits(sorted_dweights + 0, dweights + 0, "dweights")


@every_form
def test_a_nan_reaches_only_its_token_and_its_experts(options, device):
    inputs, token, chosen = Inputs(WHOLE, device), 7, [0, 3, 3, -1]
    inputs.ids[token] = torch.tensor(chosen, device=device)
    before = inputs.train(**options)
    with torch.no_grad():
        inputs.x[token] = torch.nan
    after = inputs.train(**options)
    others = torch.arange(WHOLE.num_tokens, device=device) != token
    for name, x, other in zip(NAMES[:3], after, before):
        assert_same_bits(x[others], other[others], f"{name} of other tokens")
    assert after[0][token].isnan().all(), "y of the token is not NaN"
    others = torch.tensor([e not in chosen for e in range(WHOLE.num_experts)], device=device)
    for name, x, other in zip(NAMES[3:], after[3:], before[3:]):
        assert_same_bits(x[others], other[others], f"{name} of experts without the token")
        assert x[0].isnan().any() and x[3].isnan().any(), f"{name} of the token's experts has no NaN"


# Bits


@every_form
@pytest.mark.parametrize("sizes", (SIZES[0], WHOLE), ids=lambda s: f"I{s.inner}")
def test_bits_repeat(sizes, options, device):
    inputs = Inputs(sizes, device)
    first = inputs.train(**options)
    for i in range(5):
        assert_equal(inputs.train(**options), first, f"repetition {i}")


@every_form
@every_size
def test_every_value_that_is_read_was_written(sizes, options, device):
    inputs = Inputs(sizes, device)
    wanted = inputs.train(**options)
    with poisoned_memory():
        found = inputs.train(**options)
    assert_equal(found, wanted, "in memory that was NaN")


@every_form
def test_gradients_do_not_change_y(options, device):
    inputs = Inputs(WHOLE, device)
    with torch.no_grad():
        y = inputs.run(**options)
    assert_same_bits(y, inputs.run(**options).detach(), "y without pre-activations")


@every_form
@pytest.mark.parametrize("which", ("x", "dY"))
@pytest.mark.parametrize("form", ("odd offset", "odd row stride", "expanded"))
def test_operands_that_tma_cannot_read(form, which, options, device):
    inputs = Inputs(WHOLE, device)
    num_tokens, hidden = inputs.x.shape
    x = inputs.x.detach() if which == "x" else inputs.dy
    if form == "odd offset":
        placed = x.new_empty(x.numel() + 1)[1:].view(num_tokens, hidden).copy_(x)
        assert placed.data_ptr() % 16 == 2
    elif form == "odd row stride":
        placed = x.new_empty(num_tokens, hidden + 3)[:, :hidden].copy_(x)
    else:
        x.copy_(x[:1].expand_as(x).clone())
        placed = x[:1].expand_as(x)
    wanted = inputs.train(**options)
    if which == "x":
        inputs.x = placed.detach().requires_grad_()
    else:
        inputs.dy = placed
    assert_equal(inputs.train(**options), wanted, form)


@every_size
def test_quantized_weights_give_the_bits_of_weights(sizes, device):
    inputs = Inputs(sizes, device)
    quantized = [quantize_weights(w.detach().transpose(1, 2), FP8, dgrad=True) for w in (inputs.gate_up, inputs.down)]
    y = inputs.run(inputs.x, inputs.weights, *quantized)
    found = [y.detach(), *torch.autograd.grad(y, (inputs.x, inputs.weights), inputs.dy)]
    for name, x, wanted in zip(NAMES, found, inputs.train(recipe=FP8)):
        assert_same_bits(x, wanted, name)


# Graphs, compilers, checkpoints


@every_form
def test_no_host_sync(options, device):
    inputs = Inputs(WHOLE, device)
    inputs.train(**options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs.train(**options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_form
def test_a_graph_is_replayed_with_other_tokens_routing_and_weights(options, device):
    inputs, other = Inputs(WHOLE, device), Inputs(WHOLE, device)
    other.ids.copy_(to_few_experts(WHOLE))
    inputs.train(**options)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = inputs.train(**options)
    for wanted in (inputs.train(**options), other.train(**options)):
        graph.replay()
        assert_equal(found, wanted, "replayed")
        with torch.no_grad():
            for x, value in zip((*inputs.leaves, inputs.ids, inputs.dy), (*other.leaves, other.ids, other.dy)):
                x.copy_(value)


@every_form
@pytest.mark.parametrize("mode", ("default", "reduce-overhead", "max-autotune-no-cudagraphs"))
@pytest.mark.parametrize("sizes", (SIZES[0], WHOLE), ids=lambda s: f"I{s.inner}")
def test_a_compiled_layer_gives_the_same_bits(sizes, mode, options, device):
    torch._dynamo.reset()
    inputs = Inputs(sizes, device)
    wanted = inputs.train(**options)
    compiled = torch.compile(functools.partial(inputs.run, **options), fullgraph=True, mode=mode)
    for i in range(3):  # with CUDA graphs: warms up, records, replays
        torch.compiler.cudagraph_mark_step_begin()
        found = [x.clone() for x in inputs.train(compiled)]
        assert_equal(found, wanted, f"call {i}")
    torch._dynamo.reset()


def save_gemms(context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    is_gemm = str(op).startswith("grouped_gemm.") and "_mm" in str(op)
    return CheckpointPolicy.MUST_SAVE if is_gemm else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "recomputed": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "GEMMs are saved": {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, save_gemms),
    },
}


@every_form
@pytest.mark.parametrize("how", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_gives_the_same_bits(how, options, device):
    inputs = Inputs(WHOLE, device)
    wanted = inputs.train(**options)
    y = checkpoint(functools.partial(inputs.run, **options), *inputs.leaves, **how)
    y.backward(inputs.dy)  # a reentrant checkpoint does not allow torch.autograd.grad
    assert_equal([y.detach(), *(leaf.grad for leaf in inputs.leaves)], wanted, "checkpointed")


# Gradients in main_grad, and later


def weights_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.gate_up, inputs.down


def give_main_grads(*of: Inputs) -> list[Tensor]:
    """The same ``main_grad`` for each; NaN for expert 1, which gets no token: nothing may read or write it."""
    start = [torch.randn(w.shape, device=w.device) for w in weights_of(of[0])]
    for x in start:
        x[1] = torch.nan
    for inputs in of:
        for w, x in zip(weights_of(inputs), start):
            w.main_grad = x.clone()
    return start


def main_grads(inputs: Inputs) -> list[Tensor]:
    return [w.main_grad for w in weights_of(inputs)]


def copy_of(inputs: Inputs, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Inputs with the same values. Weights are in ``dtype``."""
    other = copy.copy(inputs)
    other.x, other.weights = (leaf.detach().clone().requires_grad_() for leaf in (inputs.x, inputs.weights))
    other.gate_up, other.down = (w.detach().to(dtype, copy=True).requires_grad_() for w in weights_of(inputs))
    return other


def step(inputs: Inputs, run: Callable[..., Tensor] | None = None, **options: Any) -> list[Tensor]:
    """y, and the gradients of x and of topk_weights; those of weights are added where ``options`` say."""
    inputs.x.grad = inputs.weights.grad = None
    y = (run or inputs.run)(**options)
    y.backward(inputs.dy)
    return [y.detach(), inputs.x.grad, inputs.weights.grad]


def assert_equal_weight_gradients(found: Inputs, wanted: Inputs, what: str) -> None:
    for name, w, other in zip(NAMES[3:], weights_of(found), weights_of(wanted)):
        assert_same_bits(w.main_grad, other.main_grad, f"{what}, main_grad of {name}")
        assert (w.grad is None) == (other.grad is None), f"{what}, {name}"
        if w.grad is not None:
            assert_same_bits(w.grad, other.grad, f"{what}, {name}")


@every_size
@every_form
def test_main_grads_get_the_gradients_of_two_micro_batches(sizes, options, device):
    inputs = Inputs(sizes, device)
    before, wanted, truth = give_main_grads(inputs), inputs.train(**options), inputs.truth()
    for i in range(2):
        found = step(inputs, accumulate_main_grad=True, **options)
        for name, x, other in zip(NAMES, found, wanted):
            assert_same_bits(x, other, f"micro-batch {i}, {name}")
    added = []
    for name, x, start in zip(NAMES[3:], main_grads(inputs), before):
        assert_same_bits(x[1], start[1], f"{name} of an expert without tokens")
        added.append((x - start).div_(2))
        added[-1][1] = 0
    assert_near([*found, *added], truth, options)
    assert all(w.grad is None and w.grad_added_to_main_grad for w in weights_of(inputs))


def test_main_grads_are_not_rounded_to_bf16(device):
    inputs = Inputs(WHOLE, device)
    *_, gate_up, down = inputs.train()
    for w in weights_of(inputs):
        w.main_grad = torch.zeros_like(w, dtype=torch.float32)
    step(inputs, accumulate_main_grad=True)
    for name, x, rounded in zip(NAMES[3:], main_grads(inputs), (gate_up, down)):
        assert_same_bits(x.bfloat16(), rounded, f"{name}, rounded")
        assert not torch.equal(x, rounded.float()), f"{name} has no more bits than bf16"


def test_without_tokens_main_grads_stay(device):
    for sizes, ids in (ROUTINGS["no token"], ROUTINGS["all slots dropped"]):
        inputs = Inputs(sizes, device, ids(sizes).view(sizes.num_tokens, sizes.top_k).to(device))
        before = give_main_grads(inputs)
        step(inputs, accumulate_main_grad=True)
        for name, x, start in zip(NAMES[3:], main_grads(inputs), before):
            assert_same_bits(x, start, name)


@every_form
@pytest.mark.parametrize("accumulates", (False, True), ids=("into grad", "into main_grad"))
def test_gradients_that_wait_have_the_same_bits(accumulates, options, device):
    inputs = Inputs(WHOLE, device)
    later, queue = copy_of(inputs), WgradQueue()
    give_main_grads(inputs, later)
    for i in range(2):
        wanted = step(inputs, accumulate_main_grad=accumulates, **options)
        with delay_wgrad(queue):
            found = step(later, accumulate_main_grad=accumulates, **options)
        assert len(queue) == 2 * (i + 1)
        for name, x, other in zip(NAMES, found, wanted):
            assert_same_bits(x, other, f"step {i}, {name}")
    assert all(w.grad is None for w in weights_of(later))
    queue.backward_dw()
    assert_equal_weight_gradients(later, inputs, "later")


@every_form
@pytest.mark.parametrize("how", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("inside", (False, True), ids=("block around it", "block inside of it"))
def test_a_checkpoint_of_gradients_that_wait(inside, how, options, device):
    """A reentrant checkpoint builds the graph in backward, outside of a block that is around the checkpoint."""
    inputs = Inputs(WHOLE, device)
    later, queue = copy_of(inputs), WgradQueue()
    give_main_grads(inputs, later)
    wanted = step(inputs, accumulate_main_grad=True, **options)

    def run(x: Tensor, weights: Tensor) -> Tensor:
        with delay_wgrad(queue) if inside else nullcontext():
            return later.run(x, weights, *weights_of(later), accumulate_main_grad=True, **options)

    with nullcontext() if inside else delay_wgrad(queue):
        y = checkpoint(run, later.x, later.weights, **how)
    y.backward(later.dy)
    assert len(queue) == (0 if how["use_reentrant"] and not inside else 2)
    queue.backward_dw()
    for name, x, other in zip(NAMES, (y.detach(), later.x.grad, later.weights.grad), wanted):
        assert_same_bits(x, other, name)
    assert_equal_weight_gradients(later, inputs, "checkpointed")


@every_form
@pytest.mark.parametrize("delays", (False, True))
def test_autocast_weights_give_the_bits_of_weights_in_bf16(delays, options, device):
    inputs = Inputs(WHOLE, device)
    wide = copy_of(inputs, torch.float32)
    give_main_grads(inputs, wide)
    wanted, queue = step(inputs, accumulate_main_grad=True, **options), WgradQueue()
    with torch.autocast("cuda", torch.bfloat16), delay_wgrad(queue) if delays else nullcontext():
        found = step(wide, accumulate_main_grad=True, **options)
    queue.backward_dw()
    for name, x, other in zip(NAMES, found, wanted):
        assert_same_bits(x, other, name)
    assert_equal_weight_gradients(wide, inputs, "autocast")


@every_form
@pytest.mark.parametrize("delays", (False, True))
def test_a_compiled_layer_whose_gradients_go_elsewhere_gives_the_same_bits(delays, options, device):
    torch._dynamo.reset()
    inputs = Inputs(WHOLE, device)
    compiled, queue = copy_of(inputs), WgradQueue()
    give_main_grads(inputs, compiled)
    call = torch.compile(functools.partial(compiled.run, accumulate_main_grad=not delays, **options))
    for i in range(2):
        wanted = step(inputs, accumulate_main_grad=not delays, **options)
        with delay_wgrad(queue) if delays else nullcontext():
            found = step(compiled, call)
        for name, x, other in zip(NAMES, found, wanted):
            assert_same_bits(x, other, f"call {i}, {name}")
    assert len(queue) == 4 * delays
    queue.backward_dw()
    assert_equal_weight_gradients(compiled, inputs, "compiled")
    torch._dynamo.reset()


@every_form
def test_each_replay_of_a_graph_adds_to_main_grads(options, device):
    inputs = Inputs(WHOLE, device)
    eager = copy_of(inputs)
    give_main_grads(inputs, eager)

    def train() -> None:
        y = inputs.run(accumulate_main_grad=True, **options)
        torch.autograd.grad(y, (inputs.x, inputs.weights), inputs.dy)

    train()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        step(eager, accumulate_main_grad=True, **options)
    assert_equal_weight_gradients(inputs, eager, "replayed")


def test_rows_in_expert_order_add_to_main_grads(device, monkeypatch):
    def fail(*args: Any) -> Tensor:
        raise AssertionError("sorted_experts ran composed: fused.can_run refused this call")

    monkeypatch.setattr(experts, "grouped", fail)
    sizes = WHOLE._replace(top_k=1)
    offs = torch.tensor([63, 63, 128, 257, 258, 450, 480, 490], dtype=torch.int32, device=device)
    ids = torch.bucketize(torch.arange(sizes.num_tokens, device=device), offs, right=True)
    inputs = Inputs(sizes, device, ids.unsqueeze(1))
    rows = copy_of(inputs)
    give_main_grads(inputs, rows)
    step(inputs, accumulate_main_grad=True)
    y = experts.sorted_experts(
        rows.x, offs, *weights_of(rows), row_weights=rows.weights[:, 0], accumulate_main_grad=True
    )
    y.backward(rows.dy)
    assert_equal_weight_gradients(rows, inputs, "rows in expert order")


# Memory and kernels

SLACK = 8 * 2**20  # the allocator rounds each large tensor up, by at most 1 MiB


def weight_bytes(sizes: Sizes) -> int:
    """Of one layout of all weights in fp8, with scales."""
    _, _, num_experts, hidden, inner = sizes
    blocks = -(-hidden // 128) * (-(-2 * inner // 128) + -(-inner // 128))
    return num_experts * (3 * inner * hidden + 4 * blocks)


def fp8_bytes(num_rows: int, features: int) -> int:
    """Of rows in fp8 with their scales."""
    return num_rows * (features + 4 * -(-features // 128))


def kept_bytes(sizes: Sizes, options: dict[str, Any]) -> int:
    """Pre-activations and the integers of the routing; with a recipe, also weights for dgrad; in fp8, also tokens."""
    num_tokens, top_k, num_experts, hidden, inner = sizes
    num_rows = num_tokens * top_k
    integers = 4 * (num_experts + 2 * num_rows)
    if options.get("keep") == "recipe":
        pre = fp8_bytes(num_rows, 2 * inner) + fp8_bytes(num_tokens, hidden)
    else:
        pre = 2 * num_rows * 2 * inner
    return pre + integers + (weight_bytes(sizes) if options else 0)


def token_bytes(sizes: Sizes, options: dict[str, Any]) -> int:
    """(T, H) in bf16; and with a recipe, also in fp8 with scales."""
    values = sizes.num_tokens * sizes.hidden
    return 2 * values + (fp8_bytes(sizes.num_tokens, sizes.hidden) if options else 0)


def h_bytes(sizes: Sizes) -> int:
    """(M, I) in bf16."""
    return 2 * sizes.num_tokens * sizes.top_k * sizes.inner


def row_bytes(sizes: Sizes) -> int:
    """(M, H) in bf16: rows of the down GEMM, of dX, or a gathered copy, which must not be."""
    return 2 * sizes.num_tokens * sizes.top_k * sizes.hidden


def mebibytes(**sizes: int) -> str:
    return ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())


@every_form
def test_what_is_kept_for_backward(options, device):
    inputs = Inputs(LARGE, device)
    inputs.run(**options)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    y = inputs.run(**options)
    kept = torch.cuda.memory_allocated(device) - before - y.nbytes
    expected = kept_bytes(LARGE, options)
    h = h_bytes(LARGE)
    assert min(h, row_bytes(LARGE)) > SLACK, "this test could not see a tensor that is kept"
    assert abs(kept - expected) <= SLACK, mebibytes(kept=kept, expected=expected, h=h, rows=row_bytes(LARGE))


def test_a_model_learns_as_well_if_backward_reads_fp8(device, monkeypatch):
    def trained(keep: str) -> demo.Curve:
        monkeypatch.setattr(demo, "Experts", functools.partial(Experts, keep=keep))
        return demo.train(Recipe.parse(FP8), KernelPreference.TRITON, steps=120, device=device, progress=False)

    full, in_fp8 = trained("full"), trained("recipe")
    assert not in_fp8.losses.equal(full.losses)  # else nothing was kept in fp8
    assert in_fp8.is_close_to(full), (in_fp8.final, full.final)


@every_form
def test_forward_allocates_no_gathered_rows(options, device):
    inputs = Inputs(LARGE, device)
    inputs.run(**options)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    inputs.run(**options)
    peak = torch.cuda.max_memory_allocated(device) - before
    h = h_bytes(LARGE)
    weights = weight_bytes(LARGE) if options else 0
    # rows of the down GEMM, y, quantized tokens
    bound = kept_bytes(LARGE, options) + h + weights + row_bytes(LARGE) + token_bytes(LARGE, options) + SLACK
    assert peak <= bound, mebibytes(peak=peak, bound=bound, rows=row_bytes(LARGE), h=h)


@every_form
@pytest.mark.parametrize("accumulates", (False, True), ids=("into grad", "into main_grad"))
def test_backward_allocates_no_gathered_rows(accumulates, options, device):
    inputs = Inputs(LARGE, device)
    give_main_grads(inputs)
    inputs.train(**options)
    y = inputs.run(accumulate_main_grad=accumulates, **options)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    torch.autograd.grad(y, inputs.leaves[: 2 if accumulates else 4], inputs.dy)
    peak = torch.cuda.max_memory_allocated(device) - before
    h = h_bytes(LARGE)
    num_rows = LARGE.num_tokens * LARGE.top_k
    between = 4 * h + (fp8_bytes(num_rows, 2 * LARGE.inner) if options else 0)  # dh, h and dpre; dpre in fp8
    weights = 0 if accumulates else inputs.gate_up.nbytes + inputs.down.nbytes
    # both gradients of weights if not in main_grad; rows of dX, dX, quantized tokens, and x again if kept in fp8
    bound = between + weights + row_bytes(LARGE) + token_bytes(LARGE, options) + inputs.x.nbytes + SLACK
    assert peak <= bound, mebibytes(peak=peak, bound=bound, rows=row_bytes(LARGE), h=h)


def kernels_of(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that ``call`` launches, and of its copies."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type.name == "CUDA"]


MOVES = ("gather", "copy", "memcpy", "index", "catarray", "scatter_")  # of rows, by a kernel of its own


@every_form
@pytest.mark.parametrize("training", (False, True), ids=("forward", "training"))
@pytest.mark.parametrize("sizes", (SIZES[0], WHOLE), ids=lambda s: f"I{s.inner}")
def test_no_kernel_moves_rows(sizes, training, options, device):
    inputs = Inputs(sizes, device)
    grad: AbstractContextManager[object] = nullcontext() if training else torch.no_grad()
    with grad:
        names = kernels_of(lambda: inputs.train(**options) if training else inputs.run(**options))
    assert "_combine" in names, f"the profiler saw no kernel of this layer: {names}"
    assert not [name for name in names if any(word in name.lower() for word in MOVES)], names


@pytest.mark.parametrize(
    "form, sizes, has_gate",
    (("bf16", SIZES[0], False), ("bf16", WHOLE, False), ("fp8", SIZES[0], True), ("fp8", WHOLE, False)),
    ids=("bf16, I704", "bf16, I640", "fp8, I704", "fp8, I640"),
)
def test_forward_has_a_kernel_for_the_gate_only_where_blocks_of_gate_and_up_meet(form, sizes, has_gate, device):
    inputs = Inputs(sizes, device)
    names = kernels_of(lambda: inputs.run(**FORMS[form]))
    assert "_combine" in names, f"the profiler saw no kernel of this layer: {names}"
    assert [name for name in names if "activate" in name] == ["_activate_quantize"] * has_gate, names
