"""Quantized weights keep their values when they are moved, sliced over experts, saved, loaded, or held by a module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grouped_gemm import (
    BackendKind,
    Quantized,
    QuantizedGroupedLinear,
    QuantizedWeights,
    Recipe,
    grouped_mm,
    quantize_weights,
    reference,
)
from grouped_gemm.backends import get_backend
from grouped_gemm.core import quantized
from grouped_gemm.core.call_spec import CallSpec, Pass, RowClass
from grouped_gemm.core.machine import ARCHS, PACKAGES, Machine
from grouped_gemm.kernels.quantize import layouts
from grouped_gemm.testing import DGRAD, Case, Shape, backend_kinds, cases, make_inputs

SCALED = tuple(recipe for recipe in Recipe if recipe.is_scaled)
SHAPE = Shape("whole_blocks", (0, 37, 1, 130, 8), tail=5, k=256, n=128)
EMULATED = Case(BackendKind.EMULATED, Recipe.FP8_BLOCKWISE, passes=DGRAD, shape=SHAPE)
EACH = pytest.mark.parametrize("case", cases(recipes=SCALED, passes=(DGRAD,), shapes=[SHAPE]), ids=str)
E, K, N = 4, 40, 24


def weights_for(case: Case, device: torch.device) -> QuantizedWeights:
    b = make_inputs(case, device).b
    return quantize_weights(b, case.recipe, dgrad=True, kernel_preference=case.backend)


def small(recipe: str = "mxfp8", seed: int = 0, **options: Any) -> QuantizedWeights:
    b = torch.randn(E, K, N, generator=torch.Generator().manual_seed(seed))
    return quantize_weights(b, recipe, **options)


def padded() -> QuantizedWeights:
    """Weights in Triton's layouts: lines of 40 and of 24 values, which start at multiples of 48 and of 32."""
    by_n, by_k, scale, dgrad_scale = layouts.weights(torch.zeros(E, K, N), Recipe.MXFP8, forward=True, dgrad=True)
    for x in (by_n, by_k, scale, dgrad_scale):
        x.view(torch.uint8).copy_(torch.arange(x.numel()).view(x.shape) % 127)
    forward = Quantized(by_n.transpose(1, 2), scale, Recipe.MXFP8, 1, "triton weights")
    dgrad = Quantized(by_k, dgrad_scale, Recipe.MXFP8, 2, "triton weights")
    triton = BackendKind.TRITON
    return QuantizedWeights(torch.Size((E, K, N)), torch.bfloat16, forward, dgrad, triton, triton)


def codes(x: Tensor) -> Tensor:
    return x.view(torch.uint8 if x.element_size() == 1 else torch.int32)


def assert_same(found: QuantizedWeights, wanted: QuantizedWeights) -> None:
    """Equal bit for bit, with equal strides, and with the same tensors shared."""
    assert found.form == wanted.form
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, x in found.tensors.items():
        assert x.stride() == wanted.tensors[name].stride(), name
        assert x.dtype == wanted.tensors[name].dtype, name
        assert torch.equal(codes(x), codes(wanted.tensors[name])), name


def both_ways(weights: QuantizedWeights | Callable[[Tensor, Tensor], Tensor], case: Case, inputs: Any) -> list[Tensor]:
    """The output and the gradient of ``a``."""
    a = inputs.a.nan_to_num().requires_grad_()
    y = weights(a, inputs.offs) if callable(weights) else grouped_mm(a, weights, inputs.offs)
    return [y.detach(), *torch.autograd.grad(y, a, inputs.dy.nan_to_num())]


# Slices over experts


@EACH
def test_a_slice_gives_the_output_of_weights_sliced_before_quantization(case, device):
    inputs, weights = make_inputs(case, device), weights_for(case, device)
    options = {"dgrad": True, "kernel_preference": case.backend}
    for experts in (slice(1, 4), slice(None), slice(-2, None), 3, -5):
        part = weights[experts]
        first, last = (experts % 5, experts % 5 + 1) if isinstance(experts, int) else experts.indices(5)[:2]
        wanted = quantize_weights(inputs.b[first:last], case.recipe, **options)
        assert part.shape == wanted.shape == (last - first, 256, 128)
        offs = torch.arange(1, last - first + 1, dtype=torch.int32, device=device) * 16
        a = inputs.a.nan_to_num()
        assert torch.equal(grouped_mm(a, part, offs), grouped_mm(a, wanted, offs))


def runs_somewhere(kind: BackendKind, recipe: Recipe) -> bool:
    """Whether the backend runs ``recipe`` on some machine with all packages."""
    versions = dict.fromkeys(PACKAGES, "9.0") | {"rocm": "7.0"}  # whose later versions lack mxfp8
    vendors = {"s": "nvidia", "g": "amd", "c": "cpu"}
    machines = [Machine(vendors[arch[0]], arch, arch, tuple(versions.items())) for arch in ARCHS]
    specs = [CallSpec(machine, E, 256, 256, RowClass.LARGE, recipe) for machine in machines]
    return any(all(r.holds(spec) for r in get_backend(kind).requirements if Pass.FORWARD in r.passes) for spec in specs)


ADOPTED = [(kind, recipe) for kind in backend_kinds() for recipe in SCALED if runs_somewhere(kind, recipe)]


def test_every_backend_runs_a_scaled_recipe_on_some_machine():
    assert len({kind for kind, _ in ADOPTED}) >= 5  # each adopts weights of some scaled recipe


@pytest.mark.parametrize("kind, recipe", ADOPTED)
def test_a_slice_has_the_layout_of_weights_sliced_before_quantization(kind, recipe):
    """Adopting a checkpoint's weights needs no kernel, so this covers the layouts of every backend on a CPU."""
    b = (
        torch.randn(E, 256, 128, generator=torch.Generator().manual_seed(0))
        .transpose(1, 2)
        .contiguous()
        .transpose(1, 2)
    )
    data, scale = reference.quantize(b, reference.weight_blocks(recipe, 1), recipe, torch.float8_e4m3fn)

    def adopted(data: Tensor, scale: Tensor) -> QuantizedWeights:
        forward, _ = get_backend(kind).adopt_weights(data, scale, recipe, forward=True, dgrad=False)
        return QuantizedWeights(data.shape, torch.bfloat16, forward, None, kind, None)

    part = adopted(data, scale)[1:3]
    assert_same(part, adopted(data[1:3], scale[1:3]))


def test_a_slice_shares_memory():
    weights = small("fp8_blockwise", dgrad=True)
    part = weights[1:3]
    assert part.forward.data.data_ptr() == weights.forward.data[1].data_ptr()
    assert part.dgrad.scale is part.forward.scale  # as before
    assert part.nbytes == weights.nbytes // 2


def test_iterating_over_weights_gives_single_experts():
    weights = small()
    assert [part.shape for part in weights] == [(1, K, N)] * E
    assert_same(weights[-1], weights[3:])


BAD_SLICES = {
    "past the end": (4, IndexError, "4 experts; found 4"),
    "before the start": (-5, IndexError, "4 experts; found -5"),
    "empty": (slice(2, 2), ValueError, "at least one of 4"),
    "every other": (slice(0, 4, 2), ValueError, "step 1"),
    "over K too": ((slice(1, 2), slice(0, 8)), TypeError, "an index or a slice; found tuple"),
    "a list": ([1, 2], TypeError, "found list"),
}


@pytest.mark.parametrize(("experts", "error", "words"), BAD_SLICES.values(), ids=BAD_SLICES)
def test_a_bad_slice_is_named(experts, error, words):
    with pytest.raises(error, match="^experts: expected .*" + words):
        small()[experts]


def test_a_layout_without_a_leading_expert_axis_is_not_sliced():
    weights = small()
    shared = Quantized(weights.forward.data, weights.forward.scale.transpose(0, 1), Recipe.MXFP8, 1, "by blocks")
    kind = BackendKind.EMULATED
    mixed = QuantizedWeights(weights.shape, weights.dtype, shared, None, kind, None)
    with pytest.raises(ValueError, match=r"by blocks, whose forward_scale .*; slice the weights before"):
        mixed[1:3]


# Other devices


@EACH
def test_weights_move_to_a_device_and_back(case, device):
    inputs, weights = make_inputs(case, device), weights_for(case, device)
    moved = weights.to("cpu")
    assert moved.device == torch.device("cpu")
    back = moved.to(device)
    assert_same(back, weights)
    for found, wanted in zip(both_ways(back, case, inputs), both_ways(weights, case, inputs)):
        assert torch.equal(found, wanted)


def test_weights_already_on_the_device_are_not_copied():
    weights = small(dgrad=True)
    assert all(x is y for x, y in zip(weights.to("cpu").tensors.values(), weights.tensors.values()))


def test_the_padding_of_lines_survives_a_move():
    moved = padded().to("meta")
    assert moved.device.type == "meta" and moved.forward.data.stride() == (N * 48, 1, 48)
    assert moved.dgrad.data.stride() == (K * 32, 32, 1)


@pytest.mark.parametrize("device", [torch.bfloat16, torch.zeros(1)], ids=["dtype", "tensor"])
def test_quantized_weights_keep_their_dtypes(device):
    with pytest.raises(TypeError, match=r"device: expected a torch.device, .*; found .*keep their dtypes"):
        small().to(device)


# Files and copies


def saved(x: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return file


MAKERS = {recipe.value: (lambda recipe=recipe: small(recipe, dgrad=True)) for recipe in SCALED}
MAKERS |= {"forward alone": small, "padded": padded, "slice": lambda: padded()[1:3]}
every_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_kind
def test_weights_are_loaded_without_naming_classes(make):
    weights = make()
    found = torch.load(saved({"w": weights}), weights_only=True)["w"]
    assert_same(found, weights)
    assert found.nbytes == weights.nbytes


@every_kind
def test_a_deep_copy_has_memory_of_its_own(make):
    weights = make()
    found = copy.deepcopy(weights)
    assert_same(found, weights)
    assert found.nbytes == weights.nbytes
    assert not {x.data_ptr() for x in found.tensors.values()} & {x.data_ptr() for x in weights.tensors.values()}


def test_a_slice_is_saved_without_the_other_experts():
    weights = quantize_weights(torch.randn(16, 256, 256), "fp8_rowwise")
    assert len(saved(weights[3:5]).getvalue()) < len(saved(weights).getvalue()) / 4


def test_another_version_of_the_layouts_is_refused(monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(quantized, "LAYOUT_VERSION", quantized.LAYOUT_VERSION + 1)
        file = saved(small())
    with pytest.raises(ValueError, match="expected layout version 1; found 2; quantize the weights again"):
        torch.load(file, weights_only=True)


def cut(x: Tensor) -> Tensor:
    return x[..., :-1].contiguous()


DAMAGES = {
    "experts": (
        "form",
        "shape",
        (E + 1, K, N),
        r"forward_data of shape \(5, 40, 24\) in .*; found shape \(4, 40, 24\)",
    ),
    "features": ("form", "shape", (E, K, N + 8), r"forward_data of shape \(4, 40, 32\)"),
    "data": ("tensors", "forward_data", cut, r"forward_data of shape .*; found shape \(4, 40, 23\)"),
    "dgrad's data": ("tensors", "dgrad_data", cut, r"dgrad_data of shape .*; found shape \(4, 40, 23\)"),
    "scales": ("tensors", "forward_scale", cut, r"forward_scale of at least 192 values"),
    "dgrad's scales": ("tensors", "dgrad_scale", lambda x: x[:2], r"dgrad_scale of at least 160 values"),
    "no scales": ("tensors", "forward_scale", None, "forward_scale of .*; found none"),
    "codes": (
        "tensors",
        "forward_data",
        lambda x: x.view(torch.uint8),
        "in torch.float8_e4m3fn; found .* in torch.uint8",
    ),
    "a recipe": ("form", "recipe", "fp8_rowwise", "forward_scale of at least 96 values in torch.float32"),
}


@pytest.mark.parametrize(("part", "name", "value", "words"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_refused(part, name, value, words):
    make, (form, tensors) = small("mxfp8", dgrad=True).__reduce__()
    if part == "form":
        form[name] = value
    elif value is None:
        del tensors[name]
    else:
        tensors[name] = value(tensors[name])
    with pytest.raises(ValueError, match=f"quantized weights: expected .*{words}.*; the file is damaged"):
        make(form, tensors)


@every_kind
def test_a_repr_fits_a_line(make):
    weights = make()
    for text in (repr(weights), repr(QuantizedGroupedLinear(weights))):
        assert "\n" not in text and len(text) < 300
        assert str(tuple(weights.shape)) in text and weights.recipe.value in text


# The module


@EACH
def test_a_module_gives_the_results_of_its_weights(case, device):
    inputs, weights = make_inputs(case, device), weights_for(case, device)
    for found, wanted in zip(
        both_ways(QuantizedGroupedLinear(weights), case, inputs), both_ways(weights, case, inputs)
    ):
        assert torch.equal(found, wanted)


A, OFFS = torch.linspace(-1, 1, 12 * K).view(12, K), torch.tensor([3, 3, 8, 12], dtype=torch.int32)


@pytest.mark.parametrize("recipe", SCALED, ids=lambda recipe: recipe.value)
def test_a_state_is_loaded_into_another_module(recipe):
    weights, others = small(recipe, dgrad=True), small(recipe, seed=1, dgrad=True)
    module, other = QuantizedGroupedLinear(weights, torch.ones(E, N)), QuantizedGroupedLinear(others, torch.zeros(E, N))
    before = other(A, OFFS)
    other.load_state_dict(torch.load(saved(module.state_dict()), weights_only=True))
    assert_same(other.weights, weights)
    assert torch.equal(other(A, OFFS), grouped_mm(A, weights, OFFS, bias=torch.ones(E, N)))
    assert not torch.equal(other(A, OFFS), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_whose_lines_are_not_padded_is_loaded(assign):
    """A file format without strides loads such a state."""
    weights, module = padded(), QuantizedGroupedLinear(padded())
    dense = {name: x.clone(memory_format=torch.contiguous_format) for name, x in module.named_buffers()}
    for buffer in module.buffers():
        buffer.zero_()
    module.load_state_dict(module.state_dict() | dense, assign=assign)
    assert_same(module.weights, weights)
    assert all(x.stride() == codes(weights.tensors[name]).stride() for name, x in module.named_buffers())


def test_a_module_that_moves_keeps_the_padding_of_lines():
    module = QuantizedGroupedLinear(padded()).to("meta")
    assert module.weights.device.type == "meta" and module.weights.forward.data.stride() == (N * 48, 1, 48)


@pytest.mark.parametrize("convert", ["half", "double", "bfloat16"])
def test_a_module_that_is_converted_keeps_its_weights(convert):
    weights = small(dgrad=True)
    module = getattr(QuantizedGroupedLinear(weights, torch.ones(E, N)), convert)()
    assert_same(module.weights, weights)
    assert module.bias.dtype == getattr(torch.ones(1), convert)().dtype


def test_a_module_follows_changes_of_its_buffers():
    weights, others = small(), small(seed=1)
    module, other = QuantizedGroupedLinear(weights), QuantizedGroupedLinear(others)
    module(A, OFFS)
    for name in list(module.state_dict())[:-1]:
        module.get_buffer(name).data = other.get_buffer(name)
    assert_same(module.weights, others)
    module.load_state_dict(QuantizedGroupedLinear(weights).state_dict())
    assert_same(module.weights, weights)


def test_a_shard_keeps_and_saves_its_own_experts_only():
    weights = small(dgrad=True)
    module = QuantizedGroupedLinear(weights[1:3], torch.ones(E, N)[1:3])
    assert sum(x.untyped_storage().nbytes() for x in module.buffers()) < weights.nbytes * 0.7
    offs = torch.tensor([5, 12], dtype=torch.int32)
    assert torch.equal(module(A, offs), grouped_mm(A, weights[1:3], offs, bias=torch.ones(2, N)))


def test_tensors_that_passes_share_are_held_once():
    weights = small("fp8_blockwise", dgrad=True)
    module = QuantizedGroupedLinear(weights)
    assert sum(x.nbytes for x in module.state_dict().values() if isinstance(x, Tensor)) == weights.nbytes
    assert copy.deepcopy(module).weights.nbytes == weights.nbytes


OTHERS = {
    "recipe": (lambda: small("fp8_rowwise"), "mxfp8.*fp8_rowwise"),
    "experts": (lambda: small()[:2], r"\(4, 40, 24\).*\(2, 40, 24\)"),
    "dgrad": (lambda: small(dgrad=True), "'dgrad': None.*'emulated'"),
    "backend": (padded, "emulated.*triton"),
    "dtype": (lambda: small(dtype=torch.bfloat16), "float32.*bfloat16"),
}


@pytest.mark.parametrize(("make", "words"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("strict", [False, True])
def test_a_state_of_another_form_is_refused_and_changes_nothing(make, words, strict):
    weights = small()
    module = torch.nn.Sequential(QuantizedGroupedLinear(weights))
    state = torch.nn.Sequential(QuantizedGroupedLinear(make())).state_dict()
    with pytest.raises(RuntimeError, match=f"0.weights: expected .*{words}.*same experts, recipe"):
        module.load_state_dict(state, strict=strict)
    assert_same(module[0].weights, weights)


@pytest.mark.parametrize("version", [0, "1", None])
def test_a_state_of_another_layout_version_is_refused(version):
    module = QuantizedGroupedLinear(small())
    state = module.state_dict()
    state["_extra_state"]["layout_version"] = version
    with pytest.raises(RuntimeError, match=f"expected layout version 1; found {version!r}; quantize the weights again"):
        module.load_state_dict(state)


@pytest.mark.parametrize("strict", [False, True])
def test_a_state_without_a_form_is_refused(strict):
    """Weights of another recipe may have the same shapes."""
    weights = small("fp8_rowwise")
    module = torch.nn.Sequential(QuantizedGroupedLinear(weights))
    state = torch.nn.Sequential(QuantizedGroupedLinear(small("fp8_rowwise_pow2", seed=1))).state_dict()
    del state["0._extra_state"]
    with pytest.raises(
        RuntimeError, match=r"0\._extra_state: expected the form of forward_data, forward_scale; found none"
    ):
        module.load_state_dict(state, strict=strict)
    assert_same(module[0].weights, weights)


@pytest.mark.parametrize("strict", [False, True])
def test_data_are_not_loaded_without_their_scales(strict):
    weights = small()
    module = QuantizedGroupedLinear(weights)
    state = QuantizedGroupedLinear(small(seed=1)).state_dict()
    del state["forward_scale"]
    with pytest.raises(RuntimeError, match="forward_scale: expected it together with forward_data; found none"):
        module.load_state_dict(state, strict=strict)
    assert_same(module.weights, weights)


def test_a_state_with_only_a_bias_may_be_loaded():
    weights = small()
    module = QuantizedGroupedLinear(weights, torch.zeros(E, N))
    found = module.load_state_dict({"bias": torch.ones(E, N)}, strict=False)
    assert found.missing_keys == ["forward_data", "forward_scale", "_extra_state"]
    assert module.bias.eq(1).all()
    assert_same(module.weights, weights)
    with pytest.raises(RuntimeError, match=r"Missing key.*forward_data"):
        module.load_state_dict({"bias": torch.ones(E, N)})


@pytest.mark.parametrize("form", [None, "mxfp8", torch.zeros(3)], ids=["None", "str", "Tensor"])
def test_a_form_that_is_no_dict_is_refused(form):
    module = QuantizedGroupedLinear(small())
    found = type(form).__name__
    with pytest.raises(
        RuntimeError, match=f"_extra_state: expected a dict, as get_extra_state returns it; found {found}"
    ):
        module.load_state_dict(module.state_dict() | {"_extra_state": form})


@pytest.mark.parametrize(
    ("bias", "error", "words"),
    [
        (torch.zeros(E, K), ValueError, r"bias: expected shape \(E, N\) = \(4, 24\); found \(4, 40\)"),
        (torch.zeros(N), ValueError, "bias: expected a tensor of rank 2; found 1"),
        (torch.zeros(E, N, dtype=torch.int32), ValueError, "bias.dtype: expected one of bfloat16"),
        (0.0, TypeError, "bias: expected a torch.Tensor; found float"),
    ],
)
def test_a_bias_that_does_not_fit_is_named(bias, error, words):
    with pytest.raises(error, match=words):
        QuantizedGroupedLinear(small(), bias)


def test_a_module_is_pickled_without_its_cached_weights():
    """They are views of its buffers, which they identify by their addresses."""
    module = QuantizedGroupedLinear(small())
    before = pickle.dumps(module)
    made = module.weights
    assert len(pickle.dumps(module)) == len(before)
    assert_same(pickle.loads(pickle.dumps(module)).weights, made)


def test_a_bias_that_is_a_parameter_trains():
    module = QuantizedGroupedLinear(small(), torch.nn.Parameter(torch.zeros(E, N)))
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    module(A, OFFS).sum().backward()
    assert module.bias.grad[:, 0].tolist() == [3, 0, 5, 4]


def test_plain_weights_are_refused():
    with pytest.raises(TypeError, match="weights: expected QuantizedWeights, from quantize_weights; found Tensor"):
        QuantizedGroupedLinear(torch.ones(E, K, N))


def test_a_module_compiles():
    module = QuantizedGroupedLinear(small("fp8_blockwise", dgrad=True), torch.ones(E, N))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    a = A.clone().requires_grad_()
    found, wanted = compiled(a, OFFS), module(A, OFFS)
    assert torch.equal(found, wanted)
    found.sum().backward()
    assert a.grad.abs().sum() > 0


def test_a_state_whose_codes_have_another_dtype_is_refused():
    layer = QuantizedGroupedLinear(quantize_weights(torch.randn(2, 32, 48), "fp8_rowwise"))
    state = layer.state_dict()
    state["forward_scale"] = state["forward_scale"].view(torch.float32)
    with pytest.raises(RuntimeError, match=r"forward_scale: expected the bits as torch\.int32; found torch\.float32"):
        layer.load_state_dict(state)


def test_a_checkpoint_is_taken_over_in_compiled_code():
    w, scale = torch.randn(3, 128, 256).to(torch.float8_e4m3fn), torch.rand(3, 1, 2) + 0.5

    def multiply(a: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        weights = quantize_weights(w.transpose(1, 2), "fp8_blockwise", scale=scale.transpose(1, 2))
        return grouped_mm(a, weights, torch.tensor([5, 5, 9], dtype=torch.int32))

    a = torch.randn(9, 256, dtype=torch.bfloat16)
    compiled = torch.compile(multiply, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, w, scale), multiply(a, w, scale))
