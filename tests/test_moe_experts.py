"""The experts layer: every implementation, activation and form of weights against a loop in fp64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from grouped_gemm import GroupPlan, Recipe, WgradQueue, delay_wgrad, gemm_ops, quantize_weights
from grouped_gemm.moe import Experts, experts_forward, explain_experts, fused, sorted_experts
from grouped_gemm.moe.activation import ACTIVATIONS, activate
from grouped_gemm.moe.composed import ExpertWeights
from grouped_gemm.moe.implementations import IMPLEMENTATIONS

E, HIDDEN, INNER, T, K = 5, 24, 16, 11, 3
DIFFERENTIABLE = tuple(name for name in IMPLEMENTATIONS if name != "decode")  # test_moe_decode.py has that one


class Inputs:
    """Operands of a layer. Expert 3 gets no token; a token names one expert twice; two ids are dropped."""

    def __init__(self, dtype: torch.dtype = torch.float32, gated: bool = True, biases: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape: int, scale: float = 0.3) -> Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

        self.x = leaf(T, HIDDEN, scale=1)
        self.ids = torch.randint(0, 3, (T, K), generator=generator)
        self.ids[4] = torch.tensor([4, 4, 0])
        self.ids[7, 1], self.ids[8, 0] = -1, E
        self.weights = torch.rand(T, K, generator=generator).requires_grad_()
        self.gate_up, self.down = leaf(E, (2 if gated else 1) * INNER, HIDDEN), leaf(E, HIDDEN, INNER)
        self.gate_up_bias = leaf(E, self.gate_up.shape[1]) if biases else None
        self.down_bias = leaf(E, HIDDEN) if biases else None

    @property
    def leaves(self) -> list[Tensor]:
        leaves = (self.x, self.weights, self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return [x for x in leaves if x is not None]

    def run(self, **options: Any) -> Tensor:
        biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        return experts_forward(self.x, self.ids, self.weights, self.gate_up, self.down, **(biases | options))

    def truth(self, activation: str, interleaved: bool = False) -> Tensor:
        """The layer in fp64, token by token."""
        kind, x, weights = ACTIVATIONS[activation], self.x.double(), self.weights.double()
        rows = []
        for t in range(T):
            y = torch.zeros(HIDDEN, dtype=torch.float64)
            for j, e in enumerate(self.ids[t].tolist()):
                if 0 <= e < E:
                    pre = self.gate_up[e].double() @ x[t]
                    pre = pre if self.gate_up_bias is None else pre + self.gate_up_bias[e].double()
                    halves = (pre[0::2], pre[1::2]) if interleaved else pre.chunk(2)
                    out = self.down[e].double() @ kind.value(*(halves if kind.is_gated else (pre,)))
                    y = y + weights[t, j] * (out if self.down_bias is None else out + self.down_bias[e].double())
            rows.append(y)
        return torch.stack(rows)


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    return list(torch.autograd.grad(y, leaves, dy.to(y.dtype)))


def assert_near(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for x, truth in zip(found, expected, strict=True):
        assert (x.double() - truth.double()).norm() <= tolerance * truth.double().norm()


@pytest.mark.parametrize("implementation", DIFFERENTIABLE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_implementation_is_the_loop_in_fp64(implementation, activation):
    inputs = Inputs(gated=ACTIVATIONS[activation].is_gated)
    y, truth = inputs.run(implementation=implementation, activation=activation), inputs.truth(activation)
    assert_near([y, *gradients(y, inputs.leaves)], [truth, *gradients(truth, inputs.leaves)], 1e-6)


@pytest.mark.parametrize("implementation", DIFFERENTIABLE)
@pytest.mark.parametrize("form", ("interleaved", "pair", "without biases"))
def test_gate_and_up_come_in_any_form(implementation, form):
    inputs = Inputs(biases=form != "without biases")
    truth = inputs.truth("swiglu", interleaved=form == "interleaved")
    options: dict[str, Any] = {"interleaved": form == "interleaved", "implementation": implementation}
    y = inputs.run(**options)
    if form == "pair":
        y = experts_forward(
            inputs.x, inputs.ids, inputs.weights, inputs.gate_up.chunk(2, 1), inputs.down,
            gate_up_bias=inputs.gate_up_bias.chunk(2, 1), down_bias=inputs.down_bias, implementation=implementation,
        )  # fmt: skip
    assert_near([y, *gradients(y, inputs.leaves)], [truth, *gradients(truth, inputs.leaves)], 1e-6)


@pytest.mark.parametrize("recipe", ("fp8_rowwise", "fp8_blockwise", "mxfp8"))
@pytest.mark.parametrize("implementation", ("grouped_mm", "batched_mm", "eager_fused", "eager"))
def test_a_recipe_quantizes_the_gemms(implementation, recipe):
    inputs = Inputs(torch.bfloat16)
    y, truth = inputs.run(implementation=implementation, recipe=recipe), inputs.truth("swiglu")
    assert_near([y], [truth], 0.08)
    assert_near(gradients(y, inputs.leaves), gradients(truth, inputs.leaves), 0.12)
    assert not torch.equal(y, inputs.run(implementation=implementation))


@pytest.mark.parametrize("recipe", ("fp8_rowwise", "fp8_rowwise_pow2", "fp8_blockwise", "fp8_blockwise_pow2", "mxfp8"))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_recipe_with_every_activation(activation, recipe):
    inputs = Inputs(torch.bfloat16, gated=ACTIVATIONS[activation].is_gated)
    options: dict[str, Any] = {"implementation": "grouped_mm", "activation": activation}
    y, truth = inputs.run(recipe=recipe, **options), inputs.truth(activation)
    assert_near([y], [truth], 0.08)
    # Quantized, a pre-activation near zero may change its sign, which switches a rectifier.
    tolerance = 0.5 if activation in ("relu", "reglu") else 0.12
    assert_near(gradients(y, inputs.leaves), gradients(truth, inputs.leaves), tolerance)


def test_grouped_mm_and_the_loop_over_sorted_rows_give_the_same_bits():
    inputs = Inputs(torch.bfloat16)
    one, other = (inputs.run(implementation=name, recipe="fp8_blockwise") for name in ("grouped_mm", "eager_fused"))
    assert torch.equal(one, other)
    assert all(map(torch.equal, *(gradients(y, inputs.leaves[:2]) for y in (one, other))))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_an_activation_rounds_once(dtype):
    gate, up = (torch.randn(64, 8).to(dtype) for _ in range(2))
    expected = (torch.nn.functional.silu(gate.float()) * up.float()).to(dtype)
    assert torch.equal(activate(ACTIVATIONS["swiglu"], gate, up), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_derivatives_are_those_of_autograd(activation):
    kind = ACTIVATIONS[activation]
    pre = [(4 * torch.randn(200, dtype=torch.float64)).requires_grad_() for _ in range(1 + kind.is_gated)]
    dh = torch.randn(200, dtype=torch.float64)
    assert_near(list(kind.gradient(*pre, dh)), list(torch.autograd.grad(kind.value(*pre), pre, dh)), 1e-12)


def test_sorted_experts_take_rows_in_expert_order():
    inputs = Inputs()
    offs = torch.tensor([2, 2, 5, 9, 9], dtype=torch.int32)  # the last two rows belong to no expert
    inputs.ids = torch.searchsorted(offs, torch.arange(T), right=True).unsqueeze(1)
    inputs.weights = torch.rand(T, 1).requires_grad_()
    biases = {"gate_up_bias": inputs.gate_up_bias, "down_bias": inputs.down_bias}
    truth = inputs.truth("swiglu")
    expected = [truth, *gradients(truth, inputs.leaves)]
    for groups in (offs, GroupPlan(offs, T)):
        weights = {"row_weights": inputs.weights[:, 0]}
        y = sorted_experts(inputs.x, groups, inputs.gate_up, inputs.down, **weights, **biases)
        assert_near([y, *gradients(y, inputs.leaves)], expected, 1e-6)
        assert (y[9:] == 0).all()


def test_quantized_weights_serve_both_gemms():
    inputs = Inputs(torch.bfloat16)
    quantized = [quantize_weights(w.detach().transpose(1, 2), "fp8_rowwise") for w in (inputs.gate_up, inputs.down)]
    biases = {"gate_up_bias": inputs.gate_up_bias, "down_bias": inputs.down_bias}
    with torch.no_grad():
        y = experts_forward(inputs.x, inputs.ids, inputs.weights, *quantized, **biases)
        assert torch.equal(y, inputs.run(implementation="grouped_mm", recipe="fp8_rowwise"))


@pytest.mark.parametrize("implementation", DIFFERENTIABLE)
def test_nan_in_one_token_reaches_only_its_output_and_its_experts(implementation):
    inputs = Inputs(torch.bfloat16)
    before = inputs.run(implementation=implementation)
    dbefore = gradients(before, [inputs.gate_up, inputs.down])
    with torch.no_grad():
        inputs.x[6] = float("nan")
    after = inputs.run(implementation=implementation)
    assert after[6].isnan().all()
    others = torch.arange(T) != 6
    assert torch.equal(after[others], before[others])
    is_its_own = torch.isin(torch.arange(E), inputs.ids[6])
    for one, other in zip(gradients(after, [inputs.gate_up, inputs.down]), dbefore):
        assert one[is_its_own].isnan().flatten(1).any(1).all()
        assert torch.equal(one[~is_its_own], other[~is_its_own])


@pytest.mark.parametrize("implementation", DIFFERENTIABLE)
def test_rows_in_expert_order_by_each_implementation(implementation):
    inputs = Inputs()
    offs, options = torch.tensor([2, 2, 5, 9, 9], dtype=torch.int32), {"row_weights": inputs.weights[:, 0]}
    results = [
        sorted_experts(inputs.x, offs, inputs.gate_up, inputs.down, implementation=name, **options)
        for name in ("grouped_mm", implementation)
    ]
    assert not results[1][9:].any()
    leaves = inputs.x, inputs.weights, inputs.gate_up, inputs.down
    assert_near([results[1], *gradients(results[1], leaves)], [results[0], *gradients(results[0], leaves)], 1e-6)


@pytest.mark.parametrize("implementation", ("grouped_mm", "batched_mm", "eager_fused"))
def test_batched_gradients_are_those_of_each_sample(implementation):
    inputs = Inputs()
    y = inputs.run(implementation=implementation)
    dy = torch.randn(3, *y.shape, device=y.device)
    batched = torch.autograd.grad(y, inputs.leaves, dy, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        expected = torch.autograd.grad(y, inputs.leaves, dy[i], retain_graph=True)
        assert_near([grad[i] for grad in batched], expected, 1e-6)


def test_transforms_are_refused():
    inputs = Inputs()
    with pytest.raises(RuntimeError, match=r"expected no torch\.func transform; found vmap"):
        torch.func.vmap(lambda x: experts_forward(x, inputs.ids, inputs.weights, inputs.gate_up, inputs.down))(
            inputs.x.detach().expand(2, -1, -1)
        )


@pytest.mark.parametrize("implementation", ("auto", "batched_mm"))
def test_a_program_with_any_number_of_tokens(implementation):
    experts = Experts(E, HIDDEN, INNER, implementation=implementation).requires_grad_(False)
    inputs = Inputs()
    tokens = torch.export.Dim("T", min=2, max=4096)
    operands = inputs.x.detach().cpu(), inputs.ids.cpu(), inputs.weights.detach().cpu()
    program = torch.export.export(experts, operands, dynamic_shapes=({0: tokens},) * 3)
    for num_tokens in (2, T):
        few = [x[:num_tokens] for x in operands]
        torch.testing.assert_close(program.module()(*few), experts(*few))


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise"))
@pytest.mark.parametrize("implementation", DIFFERENTIABLE)
@pytest.mark.parametrize("tokens, k", ((0, 2), (2, 0)))
def test_no_routed_rows(implementation, tokens, k, recipe):
    inputs = Inputs(torch.bfloat16, biases=False)
    inputs.x = inputs.x.detach()[:tokens].requires_grad_()
    ids, weights = torch.zeros(tokens, k, dtype=torch.int64), torch.rand(tokens, k)
    options: dict[str, Any] = {"implementation": implementation, "recipe": recipe}
    y = experts_forward(
        inputs.x, ids.to(inputs.x.device), weights.to(inputs.x.device), inputs.gate_up, inputs.down, **options
    )
    assert y.shape == (tokens, HIDDEN) and not y.any()
    assert not torch.autograd.grad(y.sum(), inputs.gate_up)[0].any()


@pytest.mark.parametrize("implementation", DIFFERENTIABLE)
@pytest.mark.parametrize("tokens, k", ((0, 2), (1, 1), (3, E)))
def test_few_tokens(implementation, tokens, k):
    inputs = Inputs()
    inputs.x = inputs.x.detach()[:tokens].requires_grad_()
    inputs.ids, inputs.weights = torch.arange(k).expand(tokens, k), torch.rand(tokens, k, requires_grad=True)
    y = inputs.run(implementation=implementation)
    assert y.shape == (tokens, HIDDEN)
    assert all(grad.shape == leaf.shape for grad, leaf in zip(gradients(y, inputs.leaves), inputs.leaves))


@pytest.mark.parametrize("implementation", ("grouped_mm", "batched_mm", "auto"))
def test_compiles_as_a_whole(implementation):
    torch._dynamo.reset()
    inputs, counter = Inputs(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(inputs.run, fullgraph=True, backend=counter)
    y, eager = compiled(implementation=implementation), inputs.run(implementation=implementation)
    assert_near([y, *gradients(y, inputs.leaves)], [eager, *gradients(eager, inputs.leaves)], 1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("activation, bias", (("swiglu", False), ("relu", True)))
def test_the_module_is_the_function_with_its_parameters(activation, bias):
    torch.manual_seed(0)
    inputs, layer = Inputs(), Experts(E, HIDDEN, INNER, activation=activation, bias=bias)
    biases = {"gate_up_bias": layer.gate_up_bias, "down_bias": layer.down_bias}
    y = experts_forward(
        inputs.x, inputs.ids, inputs.weights, layer.gate_up, layer.down, activation=activation, **biases
    )  # fmt: skip
    assert torch.equal(layer(inputs.x, inputs.ids, inputs.weights), y)
    other = Experts(E, HIDDEN, INNER, activation=activation, bias=bias)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(inputs.x, inputs.ids, inputs.weights), y)
    assert f"{E}, hidden={HIDDEN}, intermediate={INNER}, {activation}, recipe=none, bias={bias}" in str(layer)


def test_the_module_trains():
    torch.manual_seed(0)
    inputs, layer = Inputs(), Experts(E, HIDDEN, INNER, recipe="fp8_rowwise", dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    x, target = inputs.x.detach().bfloat16(), torch.randn(T, HIDDEN)
    losses = []
    for _ in range(20):
        loss = (layer(x, inputs.ids, inputs.weights.detach()).float() - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize("implementation", DIFFERENTIABLE)
def test_autocast_casts_the_operands(implementation):
    inputs = Inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = inputs.run(implementation=implementation)
    assert y.dtype == torch.bfloat16
    truth = inputs.truth("swiglu")
    assert_near([y], [truth], 0.02)
    found = gradients(y, inputs.leaves)
    assert all(x.dtype == leaf.dtype for x, leaf in zip(found, inputs.leaves))
    assert_near(found, gradients(truth, inputs.leaves), 0.03)


@pytest.mark.parametrize("implementation", DIFFERENTIABLE)
def test_gradients_that_wait_under_autocast(implementation):
    inputs, queue = Inputs(), WgradQueue()
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(inputs.run(implementation=implementation), inputs.leaves)
        with delay_wgrad(queue):
            y = inputs.run(implementation=implementation)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype))
    assert (inputs.down.grad is None) == (implementation in ("auto", "grouped_mm")) == (len(queue) > 0)
    queue.backward_dw()
    assert_near([leaf.grad for leaf in inputs.leaves], expected, 1e-2)


def test_main_grad_gets_the_gradient_of_weights_that_autocast_casts():
    inputs = Inputs()
    inputs.down.main_grad, inputs.gate_up.main_grad = (torch.zeros_like(w) for w in (inputs.down, inputs.gate_up))
    truth = gradients(inputs.truth("swiglu"), [inputs.gate_up, inputs.down])
    with torch.autocast("cpu", torch.bfloat16):
        y = inputs.run(accumulate_main_grad=True)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype))
    assert_near([inputs.gate_up.main_grad, inputs.down.main_grad], truth, 0.03)


def test_an_explanation_names_the_implementation_and_why_nothing_is_fused():
    inputs = Inputs(biases=False)
    arguments = inputs.x, inputs.ids, inputs.weights, inputs.gate_up, inputs.down
    assert explain_experts(*arguments, implementation="batched_mm") == "implementation batched_mm"
    text = explain_experts(*arguments, implementation="grouped_mm", kernel_preference="emulated")
    assert text.startswith("implementation grouped_mm, not fused: expected ")
    if inputs.x.is_cpu:
        assert "expected a Hopper GPU where Triton works; found cpu" in text
    with pytest.raises(ValueError, match="recipe: expected"):
        explain_experts(*arguments, recipe="fp4")


def test_auto_gathers_weights_for_a_few_rows_where_nothing_is_fused(monkeypatch):
    def explained(rows: int) -> str:
        x, weights = torch.zeros(rows, 64, dtype=torch.bfloat16), torch.zeros(2, 128, 64, dtype=torch.bfloat16)
        return explain_experts(x, torch.zeros(rows, 1).long(), torch.ones(rows, 1), weights, weights[:, :64])

    assert explained(1) == "implementation batched_mm"
    assert explained(64).startswith("implementation grouped_mm, not fused")
    monkeypatch.setattr(fused, "runs_fused", lambda device: True)
    monkeypatch.setattr(fused, "_is_readable", lambda w: True)
    assert explained(1).startswith("implementation grouped_mm, fused")


def test_layers_are_fused_where_weight_gradients_go_elsewhere_or_wait(monkeypatch):
    monkeypatch.setattr(fused, "runs_fused", lambda device: True)
    ids, options = torch.zeros(3, 2, dtype=torch.int64), {"implementation": "grouped_mm"}
    operands = torch.zeros(3, 64), ids, torch.zeros(3, 2), torch.zeros(2, 64, 64), torch.zeros(2, 64, 32)
    narrow = [x.bfloat16() if x.is_floating_point() else x for x in operands]
    assert "wgrads gather their rows; dgrad" in explain_experts(*narrow, **options)
    assert "wgrads gather their rows and add to main_grad;" in explain_experts(*narrow, accumulate_main_grad=True)
    with delay_wgrad():
        assert explain_experts(*narrow, **options).startswith("implementation grouped_mm, fused")
    assert "expected x in bfloat16; found Tensor in float32" in explain_experts(*operands, accumulate_main_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert "add to main_grad" in explain_experts(*operands, accumulate_main_grad=True)
    with torch.autocast("cpu", torch.float16):
        assert "expected x in bfloat16; found Tensor in float16" in explain_experts(
            *operands, accumulate_main_grad=True
        )


@pytest.mark.parametrize("recipe, forward, backward", (
    (None, "route; gate-up gathers its rows and applies swiglu; down; combine", "wgrads gather their rows;"),
    ("fp8_blockwise", "route; quantize x once per token; gate-up gathers its rows; swiglu quantizes h;", "in bf16;"),
))  # fmt: skip
def test_an_explanation_says_what_is_fused(recipe, forward, backward):
    inputs = Inputs(biases=False)
    parsed = None if recipe is None else Recipe.parse(recipe)
    kind = ACTIVATIONS["swiglu"]
    text = fused.explain(ExpertWeights((inputs.gate_up,), (None,), inputs.down, None, kind, False, parsed, "auto"))
    assert forward in text and backward in text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "None"),
    "recipe": ({"recipe": Recipe.MXFP8}, "expected recipe none, fp8_blockwise, fp8_blockwise_pow2; found mxfp8"),
    "backend": ({"kernel_preference": "torch"}, "expected kernel_preference auto or triton; found torch"),
    "activation": ({"activation": ACTIVATIONS["relu"]}, "expected a gated activation; found relu"),
    "bias": ({"down_bias": torch.zeros(2, 64)}, "expected no biases"),
    "dtype": ({"down": torch.zeros(2, 64, 32)}, "expected down contiguous in bfloat16, or quantized for Triton; found"),
    "order": ({"down": torch.zeros(2, 32, 64, dtype=torch.bfloat16).transpose(1, 2)}, "expected down contiguous in"),
    "sizes": ({"down": torch.zeros(2, 64, 36, dtype=torch.bfloat16)}, "expected H a multiple of 64 and I of 8"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_fused_kernels_say_what_they_do_not_run(changes, message, monkeypatch):
    monkeypatch.setattr(fused, "runs_fused", lambda device: True)
    weights = torch.zeros(2, 64, 64, dtype=torch.bfloat16), torch.zeros(2, 64, 32, dtype=torch.bfloat16)
    experts = ExpertWeights((weights[0],), (None,), weights[1], None, ACTIVATIONS["swiglu"], False, None, "auto")
    x = torch.zeros(3, 64, dtype=torch.bfloat16)
    assert str(fused.refusal(x, None, replace(experts, **changes))).startswith(message)


def test_fused_kernels_take_quantized_weights_of_one_recipe(monkeypatch):
    monkeypatch.setattr(fused, "runs_fused", lambda device: True)
    monkeypatch.setattr(fused, "_is_readable", lambda w: True)
    gate_up, down = torch.randn(2, 64, 64).bfloat16(), torch.randn(2, 64, 32).bfloat16()
    weights = {}
    for recipe in ("fp8_blockwise", "fp8_blockwise_pow2"):
        weights[recipe] = [quantize_weights(w.transpose(1, 2), recipe, dgrad=True) for w in (gate_up, down)]
    one, other = weights.values()
    x, kind = torch.zeros(3, 64, dtype=torch.bfloat16), ACTIVATIONS["swiglu"]

    def refusal(gate_up: Any, down: Any, recipe: Recipe | None) -> str:
        return str(fused.refusal(x, None, ExpertWeights((gate_up,), (None,), down, None, kind, False, recipe, "auto")))

    assert refusal(*one, None) == refusal(*one, Recipe.FP8_BLOCKWISE) == "None"
    for given in ((*one, Recipe.FP8_BLOCKWISE_POW2), (one[0], other[1], None), (one[0], down, None)):
        assert refusal(*given).startswith("expected quantized weights of one recipe")
    without = [quantize_weights(w.transpose(1, 2), "fp8_blockwise") for w in (gate_up, down)]
    assert refusal(*without, None) == "None"  # nothing needs a gradient
    x.requires_grad_()
    assert refusal(*without, None).startswith("expected quantized weights with a layout for dgrad")
    with torch.no_grad():
        assert refusal(*without, None) == "None"


@pytest.mark.parametrize("accumulates", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_the_module_computes_weight_gradients_later(accumulates, bias):
    inputs, options = Inputs(), {"implementation": "grouped_mm", "bias": bias}
    plain = Experts(E, HIDDEN, INNER, **options)
    layer = Experts(E, HIDDEN, INNER, accumulate_main_grad=accumulates, delay_wgrad=True, **options)
    layer.load_state_dict(plain.state_dict())
    weights = {"gate_up": layer.gate_up, "down": layer.down}
    for w in weights.values():
        w.main_grad = torch.zeros_like(w)
    (right,) = torch.autograd.grad(plain(inputs.x, inputs.ids, inputs.weights).sum(), inputs.x, retain_graph=True)
    for module in (plain, layer):
        for _ in range(2):
            module(inputs.x, inputs.ids, inputs.weights).sum().backward()
    assert torch.equal(inputs.x.grad, 4 * right)
    assert all(w.grad is None for w in weights.values())
    layer.backward_dw()
    for name, w in layer.named_parameters():
        expected = plain.get_parameter(name).grad
        assert torch.equal(w.main_grad if accumulates and name in weights else w.grad, expected)
        assert not accumulates or name not in weights or w.grad is None
    plain.backward_dw()  # nothing waits


@pytest.mark.parametrize("is_pair", (False, True))
def test_experts_add_to_main_grad(is_pair):
    inputs = Inputs()
    gate_up = (Inputs(gated=False).gate_up, Inputs(gated=False).gate_up) if is_pair else inputs.gate_up
    weights = [*gate_up, inputs.down] if is_pair else [gate_up, inputs.down]
    options: dict[str, Any] = {"gate_up_bias": None, "down_bias": None}
    expected = gradients(
        experts_forward(inputs.x[:1], inputs.ids[:1], inputs.weights[:1], gate_up, inputs.down, **options), weights
    )
    for w in weights:
        w.main_grad = torch.zeros_like(w)
    y = experts_forward(
        inputs.x[:1], inputs.ids[:1], inputs.weights[:1], gate_up, inputs.down, accumulate_main_grad=True, **options
    )  # few rows, for which "auto" would pick batched_mm
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).float())
    assert_near([w.main_grad for w in weights], expected, 1e-6)
    assert all(w.grad is None for w in weights)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "swish"}, "activation: expected one of swiglu, .*; found 'swish'"),
    "implementation": ({"implementation": "fast"}, "implementation: expected one of auto, .*; found 'fast'"),
    "no gate": ({"activation": "relu"}, r"gate_up.shape: expected \(5, 16, 24\).*; found \(5, 32, 24\)"),
    "interleaved": ({"activation": "relu", "interleaved": True}, "interleaved: expected False"),
    "bias": ({"down_bias": torch.zeros(E, HIDDEN + 1)}, r"down_bias.shape: expected \(5, 24\); found \(5, 25\)"),
    "recipe": ({"recipe": "fp4"}, "recipe: expected"),
    "main_grad": (
        {"accumulate_main_grad": True, "implementation": "batched_mm"},
        "implementation: expected grouped_mm or auto, because of accumulate_main_grad; found batched_mm",
    ),
    "keep": ({"keep": "nothing"}, "keep: expected full or recipe; found 'nothing'"),
    "backend": ({"kernel_preference": "cutlass", "implementation": "eager"}, "kernel_preference: expected"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_a_bad_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Inputs().run(**options)
    if "shape" not in message:
        with pytest.raises(ValueError, match=message):
            Experts(E, HIDDEN, INNER, **options)


@pytest.mark.parametrize(
    "name, value, message",
    (
        ("ids", torch.zeros(T, K), "topk_ids.dtype: expected int32 or int64"),
        ("ids", torch.zeros(T, K + 1, dtype=torch.int64), r"topk_weights.shape: expected \(11, 4\)"),
        ("weights", torch.zeros(T, K, dtype=torch.int64), "topk_weights.dtype: expected a float dtype"),
        ("down", torch.zeros(E, HIDDEN + 1, INNER), r"down.shape: expected \(E, H, I\) with H = 24"),
        ("gate_up", torch.zeros(E + 1, 2 * INNER, HIDDEN), r"gate_up.shape: expected \(5, 32, 24\)"),
        ("x", torch.zeros(T), "x: expected a tensor of rank 2"),
        ("down", torch.zeros(E, HIDDEN, INNER).half(), "down.dtype: expected float32, the dtype of x; found float16"),
        ("down", torch.zeros(E, HIDDEN, 0), "down.shape: expected .* at least 1; found"),
    ),
)
def test_an_operand_that_does_not_fit_is_named(name, value, message):
    inputs = Inputs()
    setattr(inputs, name, value)
    with pytest.raises(ValueError, match=message):
        inputs.run()


@pytest.mark.filterwarnings("ignore:(Sparse CSR|The PyTorch API of nested)")
@pytest.mark.parametrize("name", ("x", "gate_up", "down"))
@pytest.mark.parametrize(
    "change", (Tensor.to_sparse_csr, lambda w: torch.nested.nested_tensor(list(w))), ids=("sparse", "nested")
)
def test_an_operand_without_strides_is_named(name, change):
    inputs = Inputs(biases=False)
    setattr(inputs, name, change(getattr(inputs, name).detach()))
    with pytest.raises(ValueError, match=f"^{name}: expected a dense tensor"):
        inputs.run()


def test_half_a_pair_of_biases_is_refused():
    inputs = Inputs()
    gate_up, bias = inputs.gate_up.chunk(2, 1), inputs.gate_up_bias.chunk(2, 1)[0]
    for biases in ((bias, None), (None, bias)):
        with pytest.raises(TypeError, match=r"^gate_up_bias: expected a torch.Tensor; found NoneType"):
            experts_forward(inputs.x, inputs.ids, inputs.weights, gate_up, inputs.down, gate_up_bias=biases)


def test_quantized_weights_are_for_grouped_mm():
    inputs = Inputs(torch.bfloat16)
    inputs.down = quantize_weights(inputs.down.detach().transpose(1, 2), "fp8_rowwise")
    message = "implementation: expected auto, grouped_mm or decode, because down is quantized; found eager"
    with pytest.raises(ValueError, match=message):
        inputs.run(implementation="eager")


def test_decode_says_why_it_does_not_run():
    message = "^implementation decode: expected (a Hopper GPU|no gradients).*; found"
    with pytest.raises(ValueError, match=message):
        Inputs(torch.bfloat16).run(implementation="decode")


def test_policies_of_checkpointing_find_the_gemms_of_the_layer():
    names = {op.__name__.removesuffix(".default") for op in gemm_ops()}
    assert {"moe_gated_mm", "moe_gathered_mm", "moe_gathered_wgrad"} <= names


def test_row_weights_past_the_last_group_reach_nothing():
    inputs, offs = Inputs(), torch.tensor([2, 2, 5, 9, 9], dtype=torch.int32)
    weights = torch.rand(T)
    weights[9:] = float("nan")
    weights.requires_grad_()
    y = sorted_experts(inputs.x, offs, inputs.gate_up, inputs.down, row_weights=weights)
    assert not y[9:].any()
    leaves = [inputs.x, weights, inputs.gate_up, inputs.down]
    assert all(gradient.isfinite().all() for gradient in gradients(y, leaves))


SORTED: dict[str, tuple[dict[str, Any], str]] = {
    "ends": ({"offs": torch.tensor([T], dtype=torch.int32)}, "offs: expected 5 entries"),
    "dtype of weights": (
        {"row_weights": torch.ones(T, dtype=torch.int64)},
        "row_weights.dtype: expected a float dtype",
    ),
    "device of weights": ({"row_weights": torch.ones(T, device="meta")}, "row_weights.device"),
    "device of down": ({"down": torch.zeros(E, HIDDEN, INNER, device="meta")}, "down.device"),
}


@pytest.mark.parametrize("changes, message", SORTED.values(), ids=SORTED)
def test_an_operand_of_sorted_experts_that_does_not_fit_is_named(changes, message):
    inputs = Inputs()
    arguments = {"rows": inputs.x, "offs": torch.full((E,), T, dtype=torch.int32), "gate_up": inputs.gate_up}
    with pytest.raises(ValueError, match=message):
        sorted_experts(**{**arguments, "down": inputs.down, **changes})
