"""The decode kernels of a MoE layer, batch invariance, and weights alone in fp8.

On a CPU the op `moe_decode` is plain torch; tests/interpreter/test_moe_decode.py has the kernels.

T, k, M = T * k, E: tokens, slots of a token, slots, experts. H, I: hidden and intermediate features.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import decode_checks as checks
import pytest
import torch
from decode_checks import SMALL, Call, Layer, Sizes
from kernel_checks import assert_same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from grouped_gemm import QuantizedWeights, Recipe, quantize_weights
from grouped_gemm.core.library import ops
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.moe import Experts, decode, experts_forward, explain_experts, fused, implementations, sorted_experts
from grouped_gemm.testing import worst_row_error

RUNS_ON, IS_MEASURED = decode._runs_on, decode._is_measured
WEIGHT_ONLY = "fp8_weight_only"
LARGE = Sizes(num_tokens=16, top_k=4, num_experts=8, hidden=2880, inner=704)  # as served, except for E
GPU_SIZES = (LARGE, LARGE._replace(num_tokens=1), LARGE._replace(num_tokens=200, hidden=2048, inner=768))


@pytest.fixture
def on_twins(monkeypatch):
    """Takes a CPU for a device where the kernels run, and the op runs as plain torch.

    Weights that a call quantizes are in the form of the Emulated backend, which is the same.
    """
    monkeypatch.setattr(decode, "_runs_on", lambda device: True)
    monkeypatch.setattr(decode, "_is_measured", lambda device: True)
    of_kind = fused.get_backend
    monkeypatch.setattr(fused, "get_backend", lambda kind: of_kind(BackendKind.EMULATED))


@pytest.fixture(autouse=True)
def runs_here(request, device):
    if device.type == "cpu":
        request.getfixturevalue("on_twins")
    elif machine_of(device).arch != "sm_90":
        pytest.skip(f"the kernels need sm_90; found {machine_of(device).arch}")


every_recipe = pytest.mark.parametrize("recipe", checks.RECIPES, ids=str)


# Values


@pytest.mark.parametrize(
    "call", [call for recipe in checks.RECIPES for call in checks.each_activation(recipe)], ids=str
)
def test_a_call_is_the_loop_in_fp64(call, device):
    checks.check_call(call, device)


@every_recipe
@pytest.mark.parametrize("form", checks.FORMS)
def test_each_form_of_gate_and_up(form, recipe, device):
    checks.check_call(Call(recipe, form=form, biases=True, sizes=checks.BY_SLOT), device)


@pytest.mark.parametrize("form", ("interleaved", "pair"))
def test_an_intermediate_size_of_no_whole_tile(form, device):
    for recipe in checks.RECIPES:
        checks.check_call(Call(recipe, form=form, sizes=Sizes(inner=136)), device)
    checks.check_call(Call(sizes=Sizes(inner=136)), device)


@every_recipe
@pytest.mark.parametrize("name", checks.ROUTINGS)
def test_however_tokens_are_routed(name, recipe, device):
    sizes, ids = checks.ROUTINGS[name]
    checks.check_call(Call(recipe, form="pair", sizes=sizes), device, ids)


@pytest.mark.gpu
@every_recipe
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("sizes", GPU_SIZES, ids=str)
def test_sizes_of_models(sizes, dtype, recipe, device):
    checks.check_call(Call(recipe, dtype=dtype, sizes=sizes), device)


@every_recipe
def test_operands_of_any_strides(recipe, device):
    checks.check_operands_of_any_strides(Call(recipe, biases=True), device)


@every_recipe
def test_nan_stays_in_its_token(recipe, device):
    checks.check_nan_stays_in_its_token(Call(recipe), device)


@pytest.mark.parametrize("recipe", checks.RECIPES[1:])
def test_dense_weights_give_the_bits_of_quantized_ones(recipe, device):
    checks.check_dense_weights(Call(recipe, biases=True), device)


@every_recipe
def test_rows_in_expert_order(recipe, device):
    sizes = Sizes(num_tokens=9, top_k=1)
    layer = Layer(Call(recipe, sizes=sizes), device, torch.tensor([0, 0, 2, 2, 2, 3, 3, 4, 4])[:, None])
    offs = torch.tensor([2, 2, 5, 7], dtype=torch.int32, device=device)
    x, _, weights, *matrices = layer.arguments()
    y = sorted_experts(
        x, offs, *matrices, row_weights=weights[:, 0], recipe=recipe, implementation="decode"
    )  # fmt: skip
    checks.assert_right(layer, y)
    layer.weights = torch.ones_like(weights)
    y = sorted_experts(x, offs, *matrices, recipe=recipe, implementation="decode")
    checks.assert_right(layer, y)


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise", WEIGHT_ONLY))
def test_the_module_runs_them(recipe, device):
    layer = Layer(Call(recipe, biases=True), device)
    *_, hidden, inner = layer.call.sizes
    options = {"bias": True, "recipe": recipe, "device": device, "dtype": torch.bfloat16}
    module = Experts(len(layer.down), hidden, inner, implementation="decode", **options)
    names = {"gate_up": layer.first[0], "down": layer.down, "gate_up_bias": layer.first_biases[0]}
    module.load_state_dict(names | {"down_bias": layer.down_bias})
    assert f"recipe={recipe or 'none'}," in str(module)
    with torch.no_grad():
        assert_same_bits(module(layer.x, layer.ids, layer.weights), layer.run_dense(), "y")


@every_recipe
def test_autocast_casts_the_operands(recipe, device):
    layer = Layer(Call(recipe, biases=True), device)
    y, (_, *others) = layer.run_dense(), quantized_operands(layer)
    for name in ("x", "down", "down_bias"):
        setattr(layer, name, getattr(layer, name).float())
    layer.first, layer.first_biases = [w.float() for w in layer.first], [b.float() for b in layer.first_biases]
    with torch.autocast(device.type, torch.bfloat16):
        assert_same_bits(layer.run_dense(), y, "y")
        assert_same_bits(experts_forward(layer.x, *others, **layer.options()), y, "y of quantized weights")


# Which calls they run

Change = dict[str, Any]


def operands(num_tokens: int = 3, top_k: int = 2, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Change:
    """Arguments of a call on zeros, E = 4, H = 64, I = 32, by name."""
    x, gate_up, down = (torch.zeros(shape, dtype=dtype) for shape in ((num_tokens, 64), (4, 64, 64), (4, 64, 32)))
    ids, weights = torch.zeros(num_tokens, top_k, dtype=torch.int64), torch.ones(num_tokens, top_k)
    given = {"x": x, "topk_ids": ids, "topk_weights": weights, "gate_up": gate_up, "down": down}
    return given | {"implementation": "decode"} | changes


def wide(*shape: int) -> Tensor:
    """Zeros in rows that are wider by 8."""
    return torch.zeros(*shape[:-1], shape[-1] + 8, dtype=torch.bfloat16)[..., : shape[-1]]


def quantized(w: Tensor, recipe: str = "fp8_blockwise") -> QuantizedWeights:
    return checks.quantize(w, Recipe.parse(recipe))


class Wrapped(Tensor):
    pass


def refused() -> dict[str, tuple[Change, str]]:
    """Changes of `operands`, and what the message says."""
    plain, half = operands(), torch.zeros(4, 32, 64, dtype=torch.bfloat16)
    gate_up, down = plain["gate_up"], plain["down"]
    odd = torch.zeros(4, 80, 64, dtype=torch.bfloat16), torch.zeros(4, 64, 40, dtype=torch.bfloat16)
    emulated = quantize_weights(down.transpose(1, 2), "fp8_blockwise", kernel_preference="emulated")
    one_recipe = "expected quantized weights of one recipe, that of the call, and of the dtype of x; found others"
    return {
        "float32": (operands(dtype=torch.float32), "expected x in bfloat16 or float16; found float32"),
        "slots": (operands(513), "expected at most 1024 slots, T \\* k; found 1026"),
        "preference": ({"kernel_preference": "torch"}, "expected kernel_preference auto or triton; found torch"),
        "recipe": ({"recipe": "mxfp8"}, "expected recipe none, fp8_blockwise, fp8_blockwise_pow2; found mxfp8"),
        "gradient of x": ({"x": plain["x"].clone().requires_grad_()}, "expected no gradients, as under torch.no_grad"),
        "gradient of weights of slots": (
            {"topk_weights": plain["topk_weights"].clone().requires_grad_()}, "expected no gradients",
        ),
        "gradient of down": ({"down": down.clone().requires_grad_()}, "expected no gradients"),
        "gradient of a bias": (
            {"down_bias": torch.zeros(4, 64, dtype=torch.bfloat16, requires_grad=True)}, "expected no gradients",
        ),
        "subclass": ({"down": down.as_subclass(Wrapped)}, "expected plain tensors; found a subclass"),
        "strides of a pair": ({"gate_up": (half, wide(4, 32, 64))}, "expected gate and up with the same strides"),
        "another backend": (
            {"gate_up": quantized(gate_up), "down": emulated},
            "expected weights in bfloat16, or quantized for it and Triton; found others",
        ),
        "two recipes": (
            {"gate_up": quantized(gate_up), "down": quantized(down, "fp8_blockwise_pow2")}, one_recipe,
        ),
        "another recipe": (
            {"gate_up": quantized(gate_up), "down": quantized(down), "recipe": "fp8_blockwise_pow2"}, one_recipe,
        ),
        "half quantized": ({"gate_up": gate_up, "down": quantized(down)}, one_recipe),
        "up inside of a tile": (
            {"gate_up": odd[0], "down": odd[1], "recipe": "fp8_blockwise"},
            "expected I a multiple of 32, where scales of up start; found 40",
        ),
    }  # fmt: skip


REFUSED = refused()


@pytest.mark.usefixtures("on_twins")
@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_a_call_that_they_do_not_run_says_why(changes, message):
    call = operands() | changes
    for function in (experts_forward, explain_experts):
        with pytest.raises(ValueError, match=f"^implementation decode: {message}"):
            function(**call)
    assert not explain_experts(**call | {"implementation": "auto"}).startswith("implementation decode")


@pytest.mark.usefixtures("on_twins")
def test_weights_that_offsets_of_32_bits_do_not_reach():
    call = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in operands().items()}
    assert explain_experts(**call).startswith("implementation decode")
    call["down"] = torch.empty_strided((4, 64, 32), (0, 0, 2**26), dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=r"expected weights whose rows span less than 2\^31 values; found others"):
        explain_experts(**call)


@pytest.mark.usefixtures("on_twins")
def test_without_gradients_a_parameter_is_fine():
    call = operands(x=torch.zeros(3, 64, dtype=torch.bfloat16, requires_grad=True))
    with torch.no_grad():
        assert explain_experts(**call).startswith("implementation decode, fused:")
    with torch.inference_mode():
        assert not experts_forward(**call).any()


def test_a_cpu_has_no_such_kernels(monkeypatch):
    monkeypatch.setattr(decode, "_runs_on", RUNS_ON)
    monkeypatch.setattr(decode, "_is_measured", IS_MEASURED)
    message = "implementation decode: expected a Hopper GPU where Triton works, or Triton's interpreter; found cpu"
    with pytest.raises(ValueError, match=message):
        experts_forward(**operands())
    assert explain_experts(**operands(implementation="auto")).startswith("implementation grouped_mm")


@pytest.mark.parametrize("option", ("batch_invariant", "accumulate_main_grad"))
def test_options_that_exclude_them(option):
    message = f"implementation: expected grouped_mm or auto, because of {option}; found decode"
    with pytest.raises(ValueError, match=message):
        experts_forward(**operands(), **{option: True})
    with pytest.raises(ValueError, match=message):
        Experts(4, 64, 32, implementation="decode", **{option: True})


@pytest.mark.usefixtures("on_twins")
def test_the_op_checks_a_number_of_slots_that_only_it_knows():
    x, gate_up, down = (operands(513)[name] for name in ("x", "gate_up", "down"))
    ids = torch.zeros(513, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"topk_ids: expected at most 1024 slots, T \* k, .*; found 1026"):
        ops.moe_decode(
            x, ids, ids.float(), gate_up, None, None, None, None, None, down, None, None, "16 bit", "none", "swiglu",
            False,
        )  # fmt: skip


# "auto"


@every_recipe
def test_auto_takes_them_for_few_tokens(recipe, device):
    layer = Layer(Call(recipe, sizes=SMALL), device)
    explained = explain_experts(*layer.arguments(), **layer.options(implementation="auto"))
    lines = {"16 bit": "gate-up applies swiglu; down; sum of slots"}
    lines["rows"] = "quantize x; gate-up applies swiglu; quantize h; down; sum of slots"
    line = lines["16 bit" if recipe in (None, WEIGHT_ONLY) else "rows"]
    assert explained == f"implementation decode, fused:\n  forward   {line}"
    assert_same_bits(layer.run(implementation="auto"), layer.run(), "y")


@pytest.mark.parametrize("recipe, num_experts, most", (
    (None, 256, 512), (None, 8, 32), ("fp8_blockwise", 256, 128), (WEIGHT_ONLY, 256, 128), (WEIGHT_ONLY, 4, 16),
))  # fmt: skip
def test_auto_takes_them_up_to_a_number_of_slots(recipe, num_experts, most, device):
    def explained(num_slots: int) -> str:
        ids = torch.zeros(num_slots, 1, dtype=torch.int32, device=device)
        x = torch.zeros(num_slots, 32, dtype=torch.bfloat16, device=device)
        gate_up, down = x.new_zeros(num_experts, 64, 32), x.new_zeros(num_experts, 32, 32)
        return explain_experts(x, ids, ids.float(), gate_up, down, recipe=recipe)

    for num_slots in (0, 1, most):
        assert explained(num_slots).startswith("implementation decode, fused:")
    for num_slots in (most + 1, 1100):
        assert explained(num_slots).startswith("implementation grouped_mm")


def test_auto_trains_with_other_kernels(device):
    layer = Layer(Call(sizes=SMALL), device)
    for operand in (layer.x, layer.weights, layer.first[0], layer.down):
        operand.requires_grad_()
        assert "implementation decode" not in explain_experts(*layer.arguments())
        y = layer.run(implementation="auto")
        assert y.requires_grad and torch.autograd.grad(y.float().sum(), operand)[0].any()
        with torch.no_grad():
            assert "implementation decode" in explain_experts(*layer.arguments())
        operand.requires_grad_(False)


@pytest.mark.gpu
@every_recipe
def test_no_host_sync(recipe, device):
    layer = Layer(Call(recipe, sizes=LARGE), device)
    layer.run()  # compiles
    arguments = quantized_operands(layer)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts_forward(*arguments, **layer.options())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def quantized_operands(layer: Layer) -> tuple[Any, ...]:
    """The arguments of a call, with weights that are quantized if there is a recipe."""
    recipe, _ = checks.parse_recipe(layer.call.recipe)
    if recipe is None:
        return layer.arguments()
    return layer.arguments([checks.quantize(w, recipe) for w in layer.first], checks.quantize(layer.down, recipe))


@pytest.mark.gpu
@every_recipe
@pytest.mark.parametrize("num_tokens", (1, 16), ids=("by slot", "by expert"))
def test_a_graph_is_replayed_with_other_routing(num_tokens, recipe, device):
    layer = Layer(Call(recipe, biases=True, sizes=LARGE._replace(num_tokens=num_tokens)), device)
    arguments = quantized_operands(layer)
    call = functools.partial(experts_forward, *arguments, **layer.options())
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for ids in (layer.ids.clone(), torch.full_like(layer.ids, 2), torch.full_like(layer.ids, -1)):
        layer.ids.copy_(ids)
        layer.x.copy_(torch.randn_like(layer.x))
        graph.replay()
        found = y.clone()
        assert_same_bits(found, call(), "replayed")
        checks.assert_right(layer, found)


@pytest.mark.gpu
@every_recipe
def test_kernels_that_overlap_see_what_the_ones_before_wrote(recipe, device):
    """Many calls in a row, each with the result of the one before: a kernel that starts too early reads old values."""
    layer = Layer(Call(recipe, sizes=LARGE), device)
    arguments = quantized_operands(layer)

    def chain(synchronizes: bool) -> Tensor:
        x = layer.x
        for _ in range(50):
            x = 16 * torch.nn.functional.normalize(x)
            x = experts_forward(x, *arguments[1:], **layer.options())
            if synchronizes:
                torch.cuda.synchronize()
        return x

    expected = chain(True)
    for i in range(5):
        assert_same_bits(chain(False), expected, f"chain {i}")


@pytest.mark.gpu
@every_recipe
def test_kernels_by_name(recipe, device):
    layer = Layer(Call(recipe, sizes=LARGE), device)
    call = functools.partial(experts_forward, *quantized_operands(layer), **layer.options())
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    quantizer = [] if recipe in (None, WEIGHT_ONLY) else ["_quantize_tokens"]
    assert names == [*quantizer, "_mm", *quantizer, "_mm", "_sum"]


# Compiled


@pytest.fixture
def compiler(device):
    """A counter of compilations."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("inductor" if device.type == "cuda" else "aot_eager")
    torch._dynamo.reset()


@every_recipe
@pytest.mark.parametrize("implementation", ("auto", "decode"))
def test_compiles_as_a_whole(implementation, recipe, device, compiler):
    layer = Layer(Call(recipe, biases=True, sizes=SMALL), device)
    compiled = torch.compile(layer.run_dense, fullgraph=True, backend=compiler)
    assert_same_bits(compiled(implementation=implementation), layer.run_dense(), "y")
    assert compiler.frame_count == 1


@every_recipe
def test_compiles_once_on_either_side_of_the_limit(recipe, device, compiler):
    sizes = SMALL._replace(num_tokens=40, top_k=1, num_experts=5)
    layer = Layer(Call(recipe, sizes=sizes), device)
    x, ids, weights, *matrices = layer.arguments()

    def call(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts_forward(x, ids, weights, *matrices, recipe=recipe)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=compiler)
    for num_tokens, count in ((3, 1), (20, 1), (7, 1), (21, 2), (40, 2), (5, 2)):
        few = [operand[:num_tokens] for operand in (x, ids, weights)]
        found, expected = compiled(*few), call(*few)
        assert worst_row_error(found, expected) <= checks.tolerances(layer.call)[1]
        assert compiler.frame_count == count, f"T = {num_tokens}"
        is_decode = explain_experts(*few, *matrices, recipe=recipe).startswith("implementation decode")
        assert is_decode == (num_tokens <= 20)


@pytest.mark.usefixtures("on_twins")
def test_a_compiled_call_that_they_do_not_run_says_why():
    torch._dynamo.reset()
    compiled = torch.compile(experts_forward, fullgraph=True, dynamic=True, backend="aot_eager")
    assert not compiled(**operands(500)).any()
    with pytest.raises(Exception, match=r"expected at most 1024 slots, T \* k; found 1026"):
        compiled(**operands(513))
    torch._dynamo.reset()


def test_exported_programs_take_other_kernels(device):
    layer = Layer(Call(sizes=SMALL), device)
    *_, hidden, inner = SMALL
    module = Experts(len(layer.down), hidden, inner, device=device, dtype=torch.bfloat16).requires_grad_(False)
    arguments = layer.arguments()[:3]
    program = torch.export.export(module, arguments)
    names = [str(node.target) for node in program.graph.nodes]
    assert not [name for name in names if "moe_decode" in name] and [name for name in names if "moe_route" in name]


# Weights alone in fp8


def dequantized(layer: Layer) -> list[Tensor]:
    """All weights of ``layer``, quantized and not any more, in its dtype."""
    recipe, _ = checks.parse_recipe("fp8_blockwise")
    return [checks.values_of_weights(w, recipe).to(layer.x.dtype) for w in (*layer.first, layer.down)]


@pytest.mark.parametrize("implementation", [name for name in implementations.IMPLEMENTATIONS if name != "decode"])
@pytest.mark.parametrize("form", checks.FORMS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_weights_in_fp8_are_those_weights_rounded(dtype, form, implementation, device):
    """Every implementation but "decode" runs on dense copies, and so does "auto" for this many tokens."""
    sizes = Sizes(num_tokens=9, inner=136)
    layer = Layer(Call(WEIGHT_ONLY, form=form, dtype=dtype, biases=True, sizes=sizes), device)
    y = layer.run_dense(implementation=implementation)
    assert_same_bits(layer.run(implementation=implementation), y, "weights from quantize_weights")
    *layer.first, layer.down = dequantized(layer)
    expected = layer.run_dense(implementation=implementation, recipe=None)
    assert_same_bits(y, expected, "dense copies")


def test_weights_quantized_for_emulated_too(device):
    layer = Layer(Call(WEIGHT_ONLY, form="pair"), device)
    *pair, down = (
        quantize_weights(w.transpose(1, 2), "fp8_blockwise", kernel_preference="emulated")
        for w in (*layer.first, layer.down)
    )
    y = experts_forward(*layer.arguments(pair, down), **layer.options(implementation="grouped_mm"))
    assert_same_bits(y, layer.run(implementation="grouped_mm"), "y")


def test_an_explanation_says_that_weights_are_dequantized(device):
    layer = Layer(Call(WEIGHT_ONLY), device)
    note = "\n  Before that, the weights are dequantized."
    for name in ("eager", "grouped_mm"):
        text = explain_experts(*layer.arguments(), **layer.options(implementation=name))
        assert text.startswith(f"implementation {name}") and text.endswith(note)
    assert note not in explain_experts(*layer.arguments(), **layer.options())


BAD_WEIGHTS: dict[str, tuple[Change, str]] = {
    "gradients": (
        {"down": torch.zeros(4, 64, 32, dtype=torch.bfloat16, requires_grad=True)},
        "recipe: expected one with gradients, or torch.no_grad\\(\\); found fp8_weight_only, which is for forward only",
    ),
    "main_grad": ({"accumulate_main_grad": True}, "recipe: expected one with gradients"),
    "another recipe": (
        {"down": quantized(torch.zeros(4, 64, 32), "fp8_rowwise")},
        "down.recipe: expected fp8_blockwise, because of fp8_weight_only; found fp8_rowwise",
    ),
}


@pytest.mark.usefixtures("on_twins")
@pytest.mark.parametrize("changes, message", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_what_weights_in_fp8_do_not_take(changes, message):
    dtype = changes["down"].dtype if "down" in changes else torch.bfloat16
    for implementation in ("auto", "grouped_mm"):
        with pytest.raises(ValueError, match=message):
            experts_forward(**operands(dtype=dtype, implementation=implementation, recipe=WEIGHT_ONLY) | changes)


@pytest.mark.usefixtures("on_twins")
def test_layouts_of_another_backend_cannot_be_dequantized():
    weights = quantized(torch.zeros(4, 64, 32, dtype=torch.bfloat16))
    other = replace(weights, forward_backend=BackendKind.DEEPGEMM)
    message = "recipe fp8_weight_only: expected weights quantized for triton or emulated; found deepgemm"
    with pytest.raises(ValueError, match=message):
        experts_forward(**operands(down=other, recipe=WEIGHT_ONLY, implementation="grouped_mm"))


def test_the_recipe_is_one_of_a_layer_and_no_other():
    with pytest.raises(ValueError, match=r"recipe: expected a Recipe or one of none, .*, fp8_weight_only; found 'fp4'"):
        experts_forward(**operands(recipe="fp4"))
    with pytest.raises(ValueError, match="recipe: expected"):
        quantize_weights(torch.zeros(1, 32, 32), WEIGHT_ONLY)


# Batch invariance


def invariant_calls(device: torch.device) -> list[Call]:
    if device.type == "cuda":
        sizes = Sizes(num_tokens=2048, top_k=2, num_experts=8, hidden=704, inner=640)
        return [Call(recipe, sizes=sizes) for recipe in checks.RECIPES]
    forms, sizes = (*checks.FORMS, "halves"), SMALL._replace(num_tokens=64, top_k=2)
    return [Call(recipe, form=form, biases=True, sizes=sizes) for recipe, form in zip(checks.RECIPES, forms)]


@pytest.mark.parametrize("implementation", ("auto", "grouped_mm"))
def test_a_token_has_the_same_bits_in_any_batch(implementation, device):
    for call in invariant_calls(device):
        layer = Layer(call, device)
        options = layer.options(implementation=implementation, batch_invariant=True)
        x, ids, weights, *matrices = layer.arguments()
        whole = experts_forward(x, ids, weights, *matrices, **options)
        if device.type == "cpu":  # row by row, and pre-activations are rounded; test_moe_fused.py has the fused kernels
            assert worst_row_error(whole, layer.truth()) <= 2 * checks.tolerances(call)[1]
        for tokens in ([5], [0, 5, 9], [*range(5, 5 + 64)] if len(x) > 69 else [9, 5, 3]):
            part = experts_forward(x[tokens], ids[tokens], weights[tokens], *matrices, **options)
            assert_same_bits(part, whole[tokens], f"{call}, tokens {tokens[:3]}")
        if call.recipe != WEIGHT_ONLY:
            x.requires_grad_()
            y = experts_forward(x[:64], ids[:64], weights[:64], *matrices, **options)
            assert y.requires_grad
            assert_same_bits(y.detach(), whole[:64], f"{call}, with gradients")


@pytest.mark.parametrize("recipe", ("fp8_blockwise", "fp8_blockwise_pow2"))
def test_quantized_weights_are_batch_invariant(recipe, device):
    layer = Layer(Call(recipe, sizes=Sizes(num_tokens=9, hidden=64, inner=128)), device)
    y = layer.run_dense(implementation="auto", batch_invariant=True)
    preference = "triton" if device.type == "cuda" else "emulated"
    weights = [
        quantize_weights(w.transpose(1, 2), recipe, kernel_preference=preference) for w in (layer.first[0], layer.down)
    ]
    for given in (recipe, None):
        options = {"recipe": given, "batch_invariant": True}
        assert_same_bits(experts_forward(layer.x, layer.ids, layer.weights, *weights, **options), y, str(given))


@pytest.mark.parametrize("rows", ("some", "all dropped", "no tokens"))
def test_gradients_of_a_batch_invariant_layer(rows, device):
    """Without any row they are zero, not None: under expert parallelism, other ranks wait for those of tokens."""
    layer, found = Layer(Call(sizes=SMALL._replace(num_tokens=9, hidden=64)), device), []
    num_tokens = 0 if rows == "no tokens" else 9
    ids = torch.full_like(layer.ids, -1) if rows == "all dropped" else layer.ids[:num_tokens]
    for options in ({"batch_invariant": True}, {"implementation": "eager"}):
        tokens = layer.x[:num_tokens], layer.weights[:num_tokens]
        leaves = [x.detach().requires_grad_() for x in (*tokens, layer.first[0], layer.down)]
        y = experts_forward(leaves[0], ids, *leaves[1:], **options)
        found.append(torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view_as(y).to(y)))
    for one, other in zip(*found):
        assert (one.double() - other.double()).norm() <= 0.02 * other.double().norm()


def test_rows_in_expert_order_are_batch_invariant(device):
    sizes = SMALL._replace(num_tokens=9, top_k=1, hidden=64)
    layer = Layer(Call(sizes=sizes), device, torch.tensor([0, 0, 2, 2, 2, 3, 3, 4, 4])[:, None])
    x, ids, weights, *matrices = layer.arguments()
    y = experts_forward(x, ids, weights, *matrices, batch_invariant=True)
    offs = torch.tensor([2, 2, 5, 7], dtype=torch.int32, device=device)
    found = sorted_experts(x, offs, *matrices, row_weights=weights[:, 0], batch_invariant=True)
    assert_same_bits(found, y, "y")


def test_batch_invariance_is_never_dropped(device):
    """Where no kernels are batch-invariant, the call raises."""
    call = operands(implementation="auto", batch_invariant=True)
    for implementation in ("batched_mm", "eager", "eager_fused", "decode"):
        message = f"implementation: expected grouped_mm or auto, because of batch_invariant; found {implementation}"
        with pytest.raises(ValueError, match=message):
            experts_forward(**call | {"implementation": implementation})
    with pytest.raises(TypeError, match="batch_invariant: expected True or False; found 1"):
        experts_forward(**call | {"batch_invariant": 1})
    with pytest.raises(ValueError, match=r"^batch_invariant: the kernels .* do not run: expected a Hopper GPU"):
        experts_forward(**call, accumulate_main_grad=True)
    if device.type == "cpu":
        assert explain_experts(**call) == "implementation row by row"
        return
    layer = Layer(Call(biases=True, sizes=SMALL), device)
    with pytest.raises(
        ValueError, match=r"^batch_invariant: the kernels .* do not run: expected no biases; found some"
    ):
        layer.run(implementation="auto", batch_invariant=True)
    layer = Layer(Call(sizes=LARGE), device)
    text = explain_experts(*layer.arguments(), batch_invariant=True)
    assert text.startswith("implementation grouped_mm, fused:")


def test_the_module_is_batch_invariant(device):
    module = Experts(4, 64, 32, batch_invariant=True, device=device, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(5, 64, device=device).bfloat16()
    ids, weights = torch.randint(4, (5, 2), device=device), torch.rand(5, 2, device=device)
    y = module(x, ids, weights)
    assert_same_bits(module(x[1:2], ids[1:2], weights[1:2]), y[1:2], "one token")
