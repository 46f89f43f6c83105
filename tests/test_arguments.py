"""Error messages about bad arguments: they name the argument, what was expected and what was found."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from grouped_gemm import QuantizedWeights, Recipe, explain, grouped_mm, override_torch, prefer, quantize_weights, warmup
from grouped_gemm.core.preference import SWITCHES

M, E, K, N = 12, 3, 48, 32
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch in SWITCHES:
        monkeypatch.delenv(switch.name, raising=False)


def ones(*shape: int, dtype: torch.dtype = BF16, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def ends(*values: int, dtype: torch.dtype = torch.int32, device: str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def nested(*shape: int, layout: torch.layout = torch.strided) -> torch.Tensor:
    """A nested tensor of two tensors, the second with twice as many rows."""
    return torch.nested.nested_tensor([ones(*shape), ones(2 * shape[0], *shape[1:])], layout=layout)


def assert_named(error: type[Exception], function: Any, arguments: dict[str, Any], words: tuple[str, str, str]) -> None:
    """``function`` raises; the message has the name of the argument, what was expected and what was found."""
    argument, expected, found = words
    with pytest.raises(error) as raised:
        function(**arguments)
    text = str(raised.value)
    assert text.startswith(f"{argument}: expected ")
    assert expected in text.partition("; found ")[0]
    assert found in text.partition("; found ")[2]


GOOD = {"a": ones(M, K), "b": ones(E, K, N), "offs": ends(4, 4, 12)}

# what is wrong in an otherwise good call, the type of error, and the words of its message
BAD_CALLS = {
    "a is a list": ({"a": [[1.0]]}, TypeError, ("a", "torch.Tensor", "list")),
    "a has 3 dimensions": ({"a": ones(1, M, K)}, ValueError, ("a", "rank 2", "3, shape (1, 12, 48)")),
    "a is float64": (
        {"a": ones(M, K, dtype=torch.float64)},
        ValueError,
        ("a.dtype", "bfloat16, float16, float32", "float64"),
    ),
    "a is int8": ({"a": ones(M, K, dtype=torch.int8)}, ValueError, ("a.dtype", "bfloat16", "int8")),
    "a is on another device": (
        {"a": ones(M, K, device="meta")},
        ValueError,
        ("b.device", "meta, the device of a", "cpu"),
    ),
    "b is a list": ({"b": [[[1.0]]]}, TypeError, ("b", "torch.Tensor", "list")),
    "b is None": ({"b": None}, TypeError, ("b", "torch.Tensor", "NoneType")),
    "b has 1 dimension": ({"b": ones(K)}, ValueError, ("b", "rank 2 or 3", "1, shape (48,)")),
    "b has 4 dimensions": ({"b": ones(1, E, K, N)}, ValueError, ("b", "rank 2 or 3", "4, shape (1, 3, 48, 32)")),
    "b is of another dtype than a": (
        {"b": ones(E, K, N, dtype=torch.float16)},
        ValueError,
        ("b.dtype", "bfloat16", "float16"),
    ),
    "b is fp8": ({"b": ones(E, K, N).to(torch.float8_e4m3fn)}, ValueError, ("b.dtype", "bfloat16", "float8_e4m3fn")),
    "b has another K": ({"b": ones(E, K + 1, N)}, ValueError, ("b.shape[1]", "K = 48", "49")),
    "b is (E, N, K)": ({"b": ones(E, N, K)}, ValueError, ("b.shape[1]", "K = 48", "32")),
    "b has no groups": (
        {"b": ones(0, K, N), "offs": ends()},
        ValueError,
        ("b", "E, K and N of at least 1", "(0, 48, 32)"),
    ),
    "b has no columns": ({"b": ones(E, K, 0)}, ValueError, ("b", "E, K and N of at least 1", "(3, 48, 0)")),
    "K is 0": (
        {"a": ones(M, 0), "b": ones(E, 0, N)},
        ValueError,
        ("b", "E, K and N of at least 1", "(3, 0, 32)"),
    ),
    "b is on another device": ({"b": ones(E, K, N, device="meta")}, ValueError, ("b.device", "cpu", "meta")),
    "offs is a list": ({"offs": [4, 4, 12]}, TypeError, ("offs", "torch.Tensor", "list")),
    "offs is None": ({"offs": None}, TypeError, ("offs", "torch.Tensor", "NoneType")),
    "offs is int64": ({"offs": ends(4, 4, 12, dtype=torch.int64)}, ValueError, ("offs.dtype", "offs.int()", "int64")),
    "offs is sizes": (
        {"offs": ends(4, 0, 8, dtype=torch.int64)},
        ValueError,
        ("offs.dtype", "offs.cumsum(0, dtype=torch.int32) if they are group sizes", "int64"),
    ),
    "a is nested": ({"a": nested(M, K)}, ValueError, ("a", "a dense tensor", "nested")),
    "a is jagged": ({"a": nested(M, K, layout=torch.jagged)}, ValueError, ("a", "a dense tensor", "nested")),
    "b is nested": ({"b": nested(K, N)}, ValueError, ("b", "a dense tensor", "nested")),
    "b is jagged": ({"b": nested(K, N, layout=torch.jagged)}, ValueError, ("b", "a dense tensor", "nested")),
    "offs is nested": ({"offs": nested(2).int()}, ValueError, ("offs", "a dense tensor", "nested")),
    "bias is nested": ({"bias": nested(N)}, ValueError, ("bias", "a dense tensor", "nested")),
    "a is sparse": ({"a": ones(M, K).to_sparse()}, ValueError, ("a", "a dense tensor", "torch.sparse_coo")),
    "a is compressed": ({"a": ones(M, K).to_sparse_csr()}, ValueError, ("a", "a dense tensor", "torch.sparse_csr")),
    "b is sparse": ({"b": ones(E, K, N).to_sparse()}, ValueError, ("b", "a dense tensor", "torch.sparse_coo")),
    "offs is sparse": ({"offs": ends(4, 4, 12).to_sparse()}, ValueError, ("offs", "a dense tensor", "sparse_coo")),
    "bias is sparse": ({"bias": ones(E, N).to_sparse()}, ValueError, ("bias", "a dense tensor", "torch.sparse_coo")),
    "a is complex": ({"a": ones(M, K, dtype=torch.complex64)}, ValueError, ("a.dtype", "bfloat16", "complex64")),
    "offs is float32": ({"offs": ends(4, 4, 12, dtype=torch.float32)}, ValueError, ("offs.dtype", "int32", "float32")),
    "offs has 2 dimensions": (
        {"offs": ends(4, 4, 12).view(1, 3)},
        ValueError,
        ("offs", "rank 1", "2, shape (1, 3)"),
    ),
    "offs is a number": (
        {"offs": torch.tensor(12, dtype=torch.int32)},
        ValueError,
        ("offs", "rank 1", "0, shape ()"),
    ),
    "offs is too short": ({"offs": ends(4, 12)}, ValueError, ("offs", "3 entries", "2")),
    "offs begins with 0": ({"offs": ends(0, 4, 4, 12)}, ValueError, ("offs", "3 entries", "4")),
    "offs is on another device": ({"offs": ends(4, 4, 12, device="meta")}, ValueError, ("offs.device", "cpu", "meta")),
    "bias is a number": ({"bias": 1.0}, TypeError, ("bias", "torch.Tensor", "float")),
    "bias has 1 dimension": ({"bias": ones(N)}, ValueError, ("bias", "rank 2", "1, shape (32,)")),
    "bias is (E, K)": ({"bias": ones(E, K)}, ValueError, ("bias", "shape (E, N) = (3, 32)", "(3, 48)")),
    "bias has one row for all": ({"bias": ones(1, N)}, ValueError, ("bias", "shape (E, N) = (3, 32)", "(1, 32)")),
    "bias is int32": ({"bias": ones(E, N, dtype=torch.int32)}, ValueError, ("bias.dtype", "bfloat16", "int32")),
    "bias is on another device": ({"bias": ones(E, N, device="meta")}, ValueError, ("bias.device", "cpu", "meta")),
    "out_dtype is fp8": (
        {"out_dtype": torch.float8_e4m3fn},
        ValueError,
        ("out_dtype", "bfloat16, float16, float32", "float8_e4m3fn"),
    ),
    "out_dtype is a tensor": ({"out_dtype": torch.ones(2)}, ValueError, ("out_dtype", "bfloat16", "tensor([1., 1.])")),
    "out_dtype is a NumPy dtype": ({"out_dtype": numpy.float32}, ValueError, ("out_dtype", "bfloat16", "numpy")),
    "out_dtype is a name": ({"out_dtype": "float32"}, ValueError, ("out_dtype", "bfloat16", "float32")),
    "group_alignment is 0": ({"group_alignment": 0}, ValueError, ("group_alignment", "at least 1", "0")),
    "group_alignment is negative": ({"group_alignment": -16}, ValueError, ("group_alignment", "at least 1", "-16")),
    "group_alignment is too large": (
        {"group_alignment": 10**30},
        ValueError,
        ("group_alignment", "at most 2147483647", str(10**30)),
    ),
    "group_alignment is a NumPy number": (
        {"group_alignment": numpy.int64(16)},
        TypeError,
        ("group_alignment", "int", "int64"),
    ),
    "group_alignment is True": ({"group_alignment": True}, TypeError, ("group_alignment", "int", "bool")),
    "group_alignment is a float": ({"group_alignment": 16.0}, TypeError, ("group_alignment", "int", "float")),
    "group_alignment is None": ({"group_alignment": None}, TypeError, ("group_alignment", "int", "NoneType")),
    "recipe is unknown": ({"recipe": "fp4"}, ValueError, ("recipe", "none, fp8_rowwise", "'fp4'")),
    "recipe is a number": ({"recipe": 8}, ValueError, ("recipe", "Recipe", "8")),
    "kernel_preference is unknown": (
        {"kernel_preference": "cutlass"},
        ValueError,
        ("kernel_preference", "auto, emulated", "'cutlass'"),
    ),
}


@pytest.mark.parametrize("function", (grouped_mm, explain))
@pytest.mark.parametrize(("change", "error", "words"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_of_a_call_is_named(function, change, error, words):
    assert_named(error, function, GOOD | change, words)


@pytest.mark.parametrize(("change", "error", "words"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_is_named_after_a_good_call(change, error, words):
    grouped_mm(**GOOD | {"bias": ones(E, N)})
    grouped_mm(**GOOD)  # caches its route
    assert_named(error, grouped_mm, GOOD | change, words)


GOOD_CONTRACTION = {"a": ones(K, M), "b": ones(M, N), "offs": ends(4, 4, 12)}
BAD_CONTRACTIONS = {
    "the contraction differs": (
        {"b": ones(M + 1, N)},
        ValueError,
        ("b.shape[0]", "12, the number of columns of a", "13"),
    ),
    "a is not transposed": ({"a": ones(M, K)}, ValueError, ("b.shape[0]", "48, the number of columns of a", "12")),
    "a has no rows": ({"a": ones(0, M)}, ValueError, ("a and b", "at least one row of a", "((0, 12), (12, 32))")),
    "b has no columns": ({"b": ones(M, 0)}, ValueError, ("a and b", "one column of b", "((48, 12), (12, 0))")),
    "b is of another dtype": ({"b": ones(M, N, dtype=torch.float32)}, ValueError, ("b.dtype", "bfloat16", "float32")),
    "b is int8": ({"b": ones(M, N, dtype=torch.int8)}, ValueError, ("b.dtype", "bfloat16", "int8")),
    "b is on another device": ({"b": ones(M, N, device="meta")}, ValueError, ("b.device", "cpu", "meta")),
    "offs is empty": ({"offs": ends()}, ValueError, ("offs", "at least one group", "none")),
    "offs is int64": ({"offs": ends(12, dtype=torch.int64)}, ValueError, ("offs.dtype", "int32", "int64")),
    "offs is on another device": ({"offs": ends(12, device="meta")}, ValueError, ("offs.device", "cpu", "meta")),
    "there is a bias": ({"bias": ones(E, N)}, ValueError, ("bias", "None if b has 2 dimensions", "Tensor")),
}


@pytest.mark.parametrize(("change", "error", "words"), BAD_CONTRACTIONS.values(), ids=BAD_CONTRACTIONS)
def test_a_bad_argument_of_the_weight_gradient_form_is_named(change, error, words):
    grouped_mm(**GOOD_CONTRACTION)
    assert_named(error, grouped_mm, GOOD_CONTRACTION | change, words)


WEIGHTS = {"b": ones(E, K, N), "recipe": "mxfp8"}
CHECKPOINT = {"b": ones(E, 160, 130).to(torch.float8_e4m3fn), "recipe": "fp8_blockwise", "scale": torch.ones(E, 2, 2)}
BAD_WEIGHTS = {
    "b is a list": (WEIGHTS | {"b": [1.0]}, TypeError, ("b", "torch.Tensor", "list")),
    "b has 2 dimensions": (WEIGHTS | {"b": ones(K, N)}, ValueError, ("b", "rank 3", "2, shape (48, 32)")),
    "b is nested": (WEIGHTS | {"b": nested(K, N)}, ValueError, ("b", "a dense tensor", "nested")),
    "b is sparse": (WEIGHTS | {"b": ones(E, K, N).to_sparse()}, ValueError, ("b", "a dense tensor", "sparse_coo")),
    "dgrad is a word": (WEIGHTS | {"dgrad": "no"}, TypeError, ("dgrad", "True or False", "'no' of type str")),
    "dgrad is NumPy's": (
        WEIGHTS | {"dgrad": numpy.bool_(True)},
        TypeError,
        ("dgrad", "True or False", "of type numpy.bool"),
    ),
    "dgrad is a number": (WEIGHTS | {"dgrad": 1}, TypeError, ("dgrad", "True or False", "of type int")),
    "dtype is a name": (WEIGHTS | {"dtype": "bf16"}, ValueError, ("dtype", "bfloat16", "bf16")),
    "b has no groups": (WEIGHTS | {"b": ones(0, K, N)}, ValueError, ("b", "at least 1", "(0, 48, 32)")),
    "b is int8": (WEIGHTS | {"b": ones(E, K, N, dtype=torch.int8)}, ValueError, ("b.dtype", "bfloat16", "int8")),
    "b is fp8 without scale": (
        CHECKPOINT | {"scale": None},
        ValueError,
        ("scale", "the scales of the fp8 weights", "None"),
    ),
    "recipe is none": (WEIGHTS | {"recipe": "none"}, ValueError, ("recipe", "a recipe that quantizes", "none")),
    "recipe is unknown": (WEIGHTS | {"recipe": "mxfp4"}, ValueError, ("recipe", "mxfp8", "'mxfp4'")),
    "kernel_preference is unknown": (
        WEIGHTS | {"kernel_preference": "cutlass"},
        ValueError,
        ("kernel_preference", "auto, emulated", "'cutlass'"),
    ),
    "dtype is float64": (
        CHECKPOINT | {"dtype": torch.float64},
        ValueError,
        ("dtype", "bfloat16, float16, float32", "float64"),
    ),
    "b is bfloat16 with scale": (
        CHECKPOINT | {"b": ones(E, 160, 130)},
        ValueError,
        ("b.dtype", "float8_e4m3fn", "bfloat16"),
    ),
    "b is of another device's fp8 type": (
        CHECKPOINT | {"b": torch.zeros(E, 160, 130).to(torch.float8_e4m3fnuz)},
        ValueError,
        ("b.dtype", "float8_e4m3fn", "float8_e4m3fnuz"),
    ),
    "scale is a number": (CHECKPOINT | {"scale": 1.0}, TypeError, ("scale", "torch.Tensor", "float")),
    "scale is nested": (
        CHECKPOINT | {"scale": nested(2, 2).float()},
        ValueError,
        ("scale", "a dense tensor", "nested"),
    ),
    "scale has 2 dimensions": (
        CHECKPOINT | {"scale": torch.ones(2, 2)},
        ValueError,
        ("scale", "shape (3, 2, 2)", "(2, 2); scales have the axes of b"),
    ),
    "scale is a scalar": (CHECKPOINT | {"scale": torch.tensor(1.0)}, ValueError, ("scale", "rank 1 or 2 or 3", "0")),
    "scale is float64": (
        CHECKPOINT | {"scale": torch.ones(E, 2, 2, dtype=torch.float64)},
        ValueError,
        ("scale.dtype", "float32, float8_e8m0fnu for fp8_blockwise", "float64; use scale.float()"),
    ),
    "scale is uint8": (
        CHECKPOINT | {"scale": torch.full((E, 2, 2), 127, dtype=torch.uint8)},
        ValueError,
        ("scale.dtype", "bfloat16", "uint8; use scale.float() if these are values, or scale.view"),
    ),
    "scale is on another device": (
        CHECKPOINT | {"scale": torch.ones(E, 2, 2, device="meta")},
        ValueError,
        ("scale.device", "cpu", "meta; pass scale.to(b.device)"),
    ),
    "scale is not transposed": (
        CHECKPOINT | {"b": ones(E, 160, 300).to(torch.float8_e4m3fn), "scale": torch.ones(E, 3, 2)},
        ValueError,
        ("scale", "shape (3, 2, 3)", "(3, 3, 2); pass scale.transpose(1, 2)"),
    ),
    "scale has one value for each column, but no axis of size 1": (
        CHECKPOINT | {"recipe": "fp8_rowwise", "scale": torch.ones(E, 130)},
        ValueError,
        ("scale", "shape (3, 1, 130)", "(3, 130); pass scale.unsqueeze(1)"),
    ),
    "scale is that of gate and up, quantized separately": (
        CHECKPOINT | {"b": ones(E, 160, 384).to(torch.float8_e4m3fn), "scale": torch.ones(E, 2, 4)},
        ValueError,
        ("scale", "shape (3, 2, 3)", "quantized separately"),
    ),
}


@pytest.mark.parametrize(("arguments", "error", "words"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_a_bad_argument_of_quantize_weights_is_named(arguments, error, words):
    assert_named(error, quantize_weights, arguments, words)


SCALE_SHAPES = {
    Recipe.FP8_ROWWISE: (E, 1, 130),
    Recipe.FP8_ROWWISE_POW2: (E, 1, 130),
    Recipe.FP8_BLOCKWISE: (E, 2, 2),
    Recipe.FP8_BLOCKWISE_POW2: (E, 2, 2),
    Recipe.MXFP8: (E, 5, 130),
}


@pytest.mark.parametrize("recipe", SCALE_SHAPES, ids=lambda recipe: recipe.value)
def test_the_scales_of_a_checkpoint_fit_their_recipe(recipe):
    shape = SCALE_SHAPES[recipe]
    weights = CHECKPOINT["b"]
    good = torch.ones(shape).to(recipe.scale_dtype)
    assert quantize_weights(weights, recipe, scale=good).recipe is recipe
    for axis in range(3):
        found = tuple(size + (axis == i) for i, size in enumerate(shape))
        arguments = {"b": weights, "recipe": recipe, "scale": torch.ones(found).to(recipe.scale_dtype)}
        assert_named(ValueError, quantize_weights, arguments, ("scale", f"shape {shape}", str(found)))


def test_mxfp8_takes_scales_in_e8m0_only():
    arguments = {"b": CHECKPOINT["b"], "recipe": "mxfp8", "scale": torch.ones(SCALE_SHAPES[Recipe.MXFP8])}
    words = "scale.dtype", "float8_e8m0fnu", "float32; use scale.to(torch.float8_e8m0fnu)"
    assert_named(ValueError, quantize_weights, arguments, words)


def checkpoint(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """fp8 weights and scales that are different powers of two: exact in every dtype that scales may have."""
    generator = torch.Generator().manual_seed(0)
    shape = SCALE_SHAPES[recipe]
    data = torch.randn(E, 160, 130, generator=generator).to(torch.float8_e4m3fn)
    return data, 2.0 ** torch.randint(-9, -4, shape, generator=generator)


def assert_same(found: QuantizedWeights, wanted: QuantizedWeights) -> None:
    for ours, theirs in ((found.forward, wanted.forward), (found.dgrad, wanted.dgrad)):
        assert ours.form == theirs.form and ours.scale.dtype == theirs.scale.dtype
        assert ours.scale.shape == theirs.scale.shape and ours.scale.stride() == theirs.scale.stride()
        assert torch.equal(ours.data.float(), theirs.data.float())
        assert torch.equal(ours.scale.float(), theirs.scale.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("recipe", [recipe for recipe in SCALE_SHAPES if recipe is not Recipe.MXFP8], ids=str)
def test_the_scales_of_a_checkpoint_may_have_any_dtype_that_is_exact_in_fp32(recipe, dtype):
    data, scale = checkpoint(recipe)
    found = quantize_weights(data, recipe, scale=scale.to(dtype), dgrad=True)
    assert found.forward.scale.dtype == torch.float32
    assert_same(found, quantize_weights(data, recipe, scale=scale, dgrad=True))


def test_the_mx_scales_of_a_checkpoint_may_be_uint8():
    data, scale = checkpoint(Recipe.MXFP8)
    codes = scale.to(torch.float8_e8m0fnu)
    found = quantize_weights(data, "mxfp8", scale=codes.view(torch.uint8), dgrad=True)
    assert_same(found, quantize_weights(data, "mxfp8", scale=codes, dgrad=True))


@pytest.mark.parametrize("trailing_ones", range(3))
@pytest.mark.parametrize("recipe", SCALE_SHAPES, ids=lambda recipe: recipe.value)
def test_a_checkpoint_may_have_one_scale_for_each_expert(recipe, trailing_ones):
    data, scale = checkpoint(recipe)
    each = scale[:, 0, 0].clone()
    each, every = (x.to(recipe.scale_dtype) for x in (each, each[:, None, None].expand(scale.shape).contiguous()))
    found = quantize_weights(data, recipe, scale=each.view(E, *(1,) * trailing_ones), dgrad=True)
    assert_same(found, quantize_weights(data, recipe, scale=every, dgrad=True))


POW2 = [recipe for recipe in SCALE_SHAPES if recipe.power_of_two_scales and recipe is not Recipe.MXFP8]


@pytest.mark.parametrize("wrong", [1.3, 0.0, -0.5, math.inf])
@pytest.mark.parametrize("recipe", POW2, ids=lambda recipe: recipe.value)
def test_validation_finds_a_scale_that_is_no_power_of_two(recipe, wrong, monkeypatch):
    data, scale = checkpoint(recipe)
    scale[1, 0, 1] = wrong
    arguments = {"b": data, "recipe": recipe, "scale": scale}
    quantize_weights(**arguments)
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    found = f"{float(scale[1, 0, 1])}; use {recipe.value.removesuffix('_pow2')}, which"
    assert_named(ValueError, quantize_weights, arguments, ("scale[1, 0, 1]", "a power of two", found))
    each = arguments | {"scale": scale[:, 0, 1]}
    assert_named(ValueError, quantize_weights, each, ("scale[1]", "a power of two", found))
    quantize_weights(data, recipe.value.removesuffix("_pow2"), scale=scale)


@pytest.mark.parametrize("recipe", [*POW2, Recipe.MXFP8], ids=lambda recipe: recipe.value)
def test_validation_finds_a_scale_that_is_nan(recipe, monkeypatch):
    data, scale = checkpoint(recipe)
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    quantize_weights(data, recipe, scale=scale.to(torch.float8_e8m0fnu))
    scale[2, 0, 1] = math.nan
    arguments = {"b": data, "recipe": recipe, "scale": scale.to(torch.float8_e8m0fnu)}
    words = "scale[2, 0, 1]", "a power of two", "nan; it makes every value of its block NaN"
    assert_named(ValueError, quantize_weights, arguments, words)


def test_validation_accepts_the_smallest_and_the_largest_power_of_two(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    data, scale = checkpoint(Recipe.FP8_BLOCKWISE_POW2)
    scale[0, 0, :2] = torch.tensor([2.0**-127, 2.0**127])
    quantize_weights(data, "fp8_blockwise_pow2", scale=scale)


def test_weights_that_train_are_quantized_without_a_gradient():
    parameter = torch.nn.Parameter(GOOD["b"])
    weights = quantize_weights(parameter, "mxfp8", dgrad=True)
    assert not any(x.requires_grad for x in (weights.forward.data, weights.forward.scale, weights.dgrad.data))
    assert not grouped_mm(GOOD["a"], weights, GOOD["offs"]).requires_grad


QUANTIZED_CALLS = {
    "another recipe": ({"recipe": "fp8_rowwise"}, ("recipe", "mxfp8", "fp8_rowwise")),
    "no recipe": ({"recipe": Recipe.NONE}, ("recipe", "mxfp8", "none")),
    "a of another dtype": ({"a": ones(M, K, dtype=torch.float32)}, ("b.dtype", "float32", "bfloat16")),
    "a with another K": ({"a": ones(M, K + 16)}, ("b.shape[1]", "K = 64", "48")),
    "offs of another length": ({"offs": ends(4, 12)}, ("offs", "3 entries", "2")),
}


@pytest.mark.parametrize(("change", "words"), QUANTIZED_CALLS.values(), ids=QUANTIZED_CALLS)
def test_arguments_that_do_not_fit_quantized_weights_are_named(change, words):
    good = GOOD | {"b": quantize_weights(GOOD["b"], "mxfp8")}
    grouped_mm(**good)
    assert_named(ValueError, grouped_mm, good | change, words)


# Values, which are checked only under GROUPED_GEMM_VALIDATE=1

BAD_OFFS = {
    "out of order": (ends(4, 2, 12), 1, ("offs[1]", "at least offs[0] = 4", "2")),
    "past M": (ends(4, 8, 13), 1, ("offs[2]", "from 0 to M = 12", "13")),
    "sizes of groups": (ends(4, 0, 8), 4, ("offs", "offs.cumsum(0, dtype=torch.int32)", "whose sum is M = 12")),
    "negative, with a sum of M": (ends(20, -20, 12), 1, ("offs[0]", "from 0 to M = 12", "20")),
    "negative": (ends(-1, 4, 12), 1, ("offs[0]", "from 0 to M = 12", "-1")),
    "negative later": (ends(4, -4, 12), 1, ("offs[1]", "from 0 to M = 12", "-4")),
    "not aligned": (ends(4, 8, 11), 4, ("offs[2]", "multiple of group_alignment = 4", "3")),
}
every_bad_offs = pytest.mark.parametrize(("offs", "alignment", "words"), BAD_OFFS.values(), ids=BAD_OFFS)


@every_bad_offs
@pytest.mark.parametrize("good", (GOOD, GOOD_CONTRACTION), ids=("2D x 3D", "2D x 2D"))
def test_validation_names_bad_values_of_offs(monkeypatch, good, offs, alignment, words):
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    assert_named(ValueError, grouped_mm, good | {"offs": offs, "group_alignment": alignment}, words)


@every_bad_offs
@pytest.mark.parametrize("recipe", Recipe, ids=lambda recipe: recipe.value)
def test_without_validation_bad_offs_are_clamped_to_the_rows(offs, alignment, words, recipe):
    y = grouped_mm(**GOOD | {"offs": offs, "group_alignment": alignment, "recipe": recipe})
    assert ((y == K) | (y == 0)).all()


@pytest.mark.parametrize("good", (GOOD, GOOD_CONTRACTION), ids=("2D x 3D", "2D x 2D"))
def test_validation_does_not_change_the_result_of_a_good_call(monkeypatch, good):
    plain = grouped_mm(**good, group_alignment=4)
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    assert torch.equal(grouped_mm(**good, group_alignment=4), plain)


def test_validation_allows_rows_past_the_last_group_and_groups_without_rows(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    assert grouped_mm(**GOOD | {"offs": ends(0, 8, 8)})[8:].count_nonzero() == 0


OPTIONS = {
    "prefer": (prefer, {"host_sync": "no"}, ("host_sync", "True or False", "'no' of type str")),
    "prefer a number": (prefer, {"host_sync": 0}, ("host_sync", "True or False", "of type int")),
    "override_torch": (override_torch, {"group_alignment": "16"}, ("group_alignment", "int", "str")),
    "warmup": (warmup, {"b": GOOD["b"], "training": "no"}, ("training", "True or False", "'no' of type str")),
}


@pytest.mark.parametrize(("function", "arguments", "words"), OPTIONS.values(), ids=OPTIONS)
def test_an_option_of_another_type_is_named(function, arguments, words):
    def enter(**arguments: Any) -> None:
        with function(**arguments):
            pass

    assert_named(TypeError, enter, arguments, words)


@pytest.mark.parametrize("function", (override_torch, warmup))
def test_override_and_warmup_name_an_alignment_that_is_too_large(function):
    def enter(**arguments: Any) -> None:
        with function(**arguments):
            pass

    arguments = {"group_alignment": 2**31} | ({"b": GOOD["b"]} if function is warmup else {})
    assert_named(ValueError, enter, arguments, ("group_alignment", "at most 2147483647", "2147483648"))


def test_the_largest_alignment_is_accepted():
    assert not grouped_mm(**GOOD | {"offs": ends(0, 0, 0)}, group_alignment=2**31 - 1).any()


def test_forward_mode_derivatives_are_refused():
    a, b = torch.randn(4, 32), torch.randn(2, 32, 16)
    offs = torch.tensor([1, 4], dtype=torch.int32)
    grouped_mm(a, b, offs)  # caches its route
    with pytest.raises(ValueError, match="a: expected a tensor without a tangent"):
        torch.func.jvp(lambda a: grouped_mm(a, b, offs), (a,), (torch.ones_like(a),))
    with forward_ad.dual_level():
        with pytest.raises(ValueError, match="b: expected a tensor without a tangent"):
            grouped_mm(a, forward_ad.make_dual(b, torch.ones_like(b)), offs)
        assert grouped_mm(a, b, offs).shape == (4, 16)
