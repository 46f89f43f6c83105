"""The decode kernels of a MoE layer, interpreted."""

from __future__ import annotations

import decode_checks as checks
import pytest
import torch
from decode_checks import Call
from kernel_checks import assert_same

from grouped_gemm.backends import runs_kernels
from grouped_gemm.core.library import ops
from grouped_gemm.kernels.moe import decode as kernel
from grouped_gemm.moe import decode, explain_experts
from grouped_gemm.testing import worst_row_error

# numpy says this of memory that was NaN, and of exp(-x), which is Inf as on a GPU
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered in")
CPU = torch.device("cpu")
# Of 16 bit each activation. With fp8: up in a scale's block of its own, in that of gate, and in another tensor.
CALLS = (
    *checks.each_activation(None),
    Call("fp8_blockwise", "swiglu", "halves", biases=True),
    Call("fp8_blockwise_pow2", "geglu", "interleaved", torch.float16),
    Call("fp8_blockwise", "swiglu_clamped", "pair", sizes=checks.BY_SLOT),
    Call("fp8_weight_only", "swiglu", "halves", torch.float16),
    Call("fp8_weight_only", "swiglu", "pair", biases=True, sizes=checks.BY_SLOT),
    Call("fp8_weight_only", "relu"),
)


def test_kernels_run_here():
    assert runs_kernels(CPU)
    layer = checks.Layer(Call(), CPU)
    assert explain_experts(*layer.arguments(), implementation="decode").startswith("implementation decode, fused:")
    assert explain_experts(*layer.arguments()).startswith("implementation grouped_mm")  # "auto" is for GPUs


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_call_is_the_loop_in_fp64(call):
    layer = checks.Layer(call, CPU)
    checks.assert_right(layer, layer.run())


@pytest.mark.parametrize("name", checks.ROUTINGS)
def test_however_tokens_are_routed(name):
    sizes, ids = checks.ROUTINGS[name]
    checks.check_call(Call(sizes=sizes), CPU, ids)


def test_rows_of_an_expert_in_several_tiles_with_scales():
    sizes, ids = checks.ROUTINGS["one expert has more rows than a tile"]
    checks.check_call(Call("fp8_blockwise", form="pair", sizes=sizes), CPU, ids)


@pytest.mark.parametrize("splits", (1, 2))
def test_down_is_split_or_not(splits, monkeypatch):
    """The contraction has two blocks of 128, of which the last is short."""
    calls, launch = [], kernel.launch

    def record(function, *arguments, constants, **options):
        calls.append(constants.get("PARTS"))
        launch(function, *arguments, constants=constants, **options)

    monkeypatch.setattr(kernel, "splits_of", lambda *sizes: (splits, 3 - splits))
    monkeypatch.setattr(kernel, "launch", record)
    for recipe in (None, "fp8_blockwise"):
        checks.check_call(Call(recipe, biases=True, sizes=checks.BY_SLOT), CPU)
    assert set(calls) - {None} == {splits}


@pytest.mark.parametrize("recipe, form", ((None, "halves"), (None, "pair"), ("fp8_weight_only", "halves")))
def test_operands_of_any_strides(recipe, form):
    checks.check_operands_of_any_strides(Call(recipe, form=form, biases=recipe is None, sizes=checks.SMALL), CPU)


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise", "fp8_weight_only"))
def test_nan_stays_in_its_token(recipe):
    checks.check_nan_stays_in_its_token(Call(recipe, sizes=checks.SMALL._replace(hidden=136)), CPU)


@pytest.mark.parametrize("recipe", checks.RECIPES[1:])
def test_dense_weights_give_the_bits_of_quantized_ones(recipe):
    checks.check_dense_weights(Call(recipe, dtype=torch.float16, sizes=checks.SMALL), CPU)


def test_quantizing_tokens_leaves_the_constants_of_other_quantizers_alone():
    w = torch.randn(1, 32, 32).bfloat16()
    before = ops.triton_quantize_weights(w, "fp8_blockwise", True, False)
    ops.moe_quantize_tokens(w[0], "fp8_blockwise")
    for one, other in zip(ops.triton_quantize_weights(w, "fp8_blockwise", True, False), before):
        assert_same(one, other, "quantized weights")


@pytest.mark.parametrize("recipe", (None, "fp8_blockwise", "fp8_weight_only"))
def test_the_twin_computes_the_same(recipe, monkeypatch):
    layer = checks.Layer(Call(recipe, "swiglu_clamped", "interleaved", sizes=checks.SMALL), CPU)
    by_kernels = layer.run()
    monkeypatch.setattr(decode, "_runs_on", lambda device: True)
    monkeypatch.setattr(decode, "runs_kernels", lambda device: False)
    assert worst_row_error(layer.run(), by_kernels) <= checks.tolerances(layer.call)[1]
