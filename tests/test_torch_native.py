"""The Torch backend: its requirements on each machine, its use of torch's GEMMs, and, on a GPU, fp8.

tests/interpreter/test_torch_native.py tests its layouts, and whole fp8 calls on a CPU. GEMMs in mxfp8 need sm_100;
their quantizers do not.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch_checks import (
    BACKEND,
    GROUPS,
    MANY_GROUPS,
    check_activations,
    check_mx_activations,
    check_mx_weights,
    check_plan,
    check_zeros,
)

from grouped_gemm import (
    BackendKind,
    CallSpec,
    Explanation,
    KernelPreference,
    Machine,
    Pass,
    Recipe,
    grouped_mm,
    reference,
    testing,
)
from grouped_gemm.backends import Candidate, get_backend
from grouped_gemm.backends.torch_native import backend as torch_native
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.machine import machine_of
from grouped_gemm.selection.rules import decide
from grouped_gemm.testing import TRAINING, Case, Shape

TORCH, TRITON, EMULATED = (BackendKind[name] for name in ("TORCH", "TRITON", "EMULATED"))
TRITON_36 = (("triton", "3.6.0"),)
MSLK = (("mslk", "2.11.0"),)
H200 = Machine("nvidia", "sm_90", "NVIDIA H200", TRITON_36)
BARE = Machine("nvidia", "sm_90", "NVIDIA H200")
B200 = Machine("nvidia", "sm_100", "NVIDIA B200", TRITON_36 + MSLK)
B200_WITHOUT_MSLK = Machine("nvidia", "sm_100", "NVIDIA B200", (("torch", "2.10.0"), *TRITON_36))
B200_BARE = Machine("nvidia", "sm_100", "NVIDIA B200", MSLK)
B300 = Machine("nvidia", "sm_103", "NVIDIA B300", TRITON_36 + MSLK)
A100 = Machine("nvidia", "sm_80", "NVIDIA A100", TRITON_36)
MI300X = Machine("amd", "gfx942", "AMD Instinct MI300X", TRITON_36)
CPU = Machine("cpu", "cpu", "cpu")
NONE, ROWWISE, MXFP8 = Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.MXFP8
ROWWISE_RECIPES = (ROWWISE, Recipe.FP8_ROWWISE_POW2)


def spec(machine: Machine = H200, recipe: Recipe = NONE, **facts) -> CallSpec:
    facts = {"num_groups": 8, "k": 4096, "n": 2048, "passes": TRAINING} | facts
    return CallSpec(machine, rows=RowClass.LARGE, recipe=recipe, **facts)


SHAPES = (
    Shape("one_group", (300,), tail=5),
    Shape("mixed", (0, 37, 1, 130, 0, 700), tail=5),
    Shape("skewed", (4000, 3, 0, 1, 250, 0)),
    Shape("all_empty", (0, 0, 0), tail=4),
    Shape("no_rows", (0, 0)),
    Shape("one_row", (1,), k=16, n=16),
    Shape("k2880_n704", (3, 200), k=2880, n=704),
    Shape("k7168_n2048", (100, 0, 56), tail=3, k=7168, n=2048),
    Shape("1023_groups", tuple(i * 5 % 20 for i in range(1023)), k=32, n=48),
)


def case_on(recipe: Recipe, shape: Shape, device: torch.device, b_contiguous: str = "k") -> Case:
    """A case that the backend runs on ``device``, with K and N in whole blocks for mxfp8; skips if refused."""
    if recipe is MXFP8:
        shape = dataclasses.replace(shape, k=-(-shape.k // 32) * 32, n=-(-shape.n // 32) * 32)
    case = Case(TORCH, recipe, passes=TRAINING, shape=shape, b_contiguous=b_contiguous)
    if reason := testing.refusal(case, device):
        pytest.skip(reason)
    return case


@pytest.mark.parametrize(
    "facts, text",
    (
        ({}, ""),
        ({"recipe": ROWWISE}, ""),
        ({"recipe": Recipe.FP8_ROWWISE_POW2}, ""),
        ({"recipe": Recipe.FP8_BLOCKWISE}, "found fp8_blockwise"),
        ({"recipe": MXFP8}, "sm_100 for mxfp8; found sm_90"),
        ({"recipe": MXFP8, "machine": B200}, ""),
        ({"recipe": MXFP8, "machine": B200_WITHOUT_MSLK}, "MSLK for mxfp8; found torch 2.10.0 without MSLK"),
        ({"recipe": MXFP8, "machine": B200_BARE}, "found no triton"),
        ({"recipe": MXFP8, "machine": B200, "k": 2880, "n": 704}, ""),
        ({"recipe": MXFP8, "machine": B200, "k": 2896}, "K = 2896"),
        ({"recipe": MXFP8, "machine": B200, "n": 720}, "N = 720"),
        ({"recipe": MXFP8, "machine": B300}, "sm_100 for mxfp8; found sm_103"),
        ({"machine": B200}, ""),
        ({"machine": B200_WITHOUT_MSLK}, ""),
        ({"machine": B200, "recipe": ROWWISE}, "sm_90 for rowwise scales; found sm_100"),
        ({"machine": B300}, "found sm_103"),
        ({"machine": A100}, "loops over the groups, with a host sync"),
        ({"machine": MI300X}, "found gfx942"),
        ({"machine": BARE}, ""),
        ({"machine": BARE, "recipe": ROWWISE}, "found no triton"),
        ({"machine": CPU}, ""),
        ({"machine": CPU, "recipe": ROWWISE}, "found cpu"),
        ({"machine": CPU, "dtype": torch.float32, "out_dtype": torch.float32}, ""),
        ({"dtype": torch.float16, "out_dtype": torch.float16}, "found float16"),
        ({"out_dtype": torch.float32}, "output in the dtype of the operands; found bfloat16 to float32"),
        ({"has_bias": True}, "found a bias"),
        ({"k": 2880, "n": 704, "recipe": ROWWISE}, ""),
        ({"k": 2888}, ""),
        ({"k": 2888, "recipe": ROWWISE}, "K = 2888"),
        ({"n": 2052}, "N = 2052"),
        ({"is_aligned": False}, "strides in multiples of 16 bytes"),
        ({"is_aligned": False, "recipe": ROWWISE}, ""),
        ({"num_groups": 1023}, ""),
        ({"num_groups": 1024}, "E = 1024"),
        ({"num_groups": 1024, "machine": CPU}, ""),
        ({"host_sync": False}, ""),
    ),
    ids=str,
)
def test_what_it_refuses(facts, text):
    found = decide(spec(**facts), TORCH, [Candidate(BACKEND)])
    refusals = [f"{r.reason}. {r.fix}" for r in found.refusals if r.backend is TORCH]
    assert bool(refusals) == bool(text) and text in "; ".join(refusals)
    assert found.is_complete is not bool(text)
    assert Explanation(found).host_syncs == {}


@pytest.mark.parametrize("machine, chosen", ((BARE, TORCH), (H200, TRITON), (CPU, EMULATED)), ids=lambda x: str(x)[:9])
def test_auto_takes_it_where_triton_is_missing(machine, chosen):
    everyone = [Candidate(get_backend(kind)) for kind in (TORCH, TRITON, EMULATED)]
    found = decide(spec(machine), KernelPreference.AUTO, everyone)
    assert found.backends == (chosen,)


@pytest.mark.parametrize("ends, num_rows", (*GROUPS, MANY_GROUPS), ids=str)
def test_the_plan(ends, num_rows):
    check_plan(ends, num_rows)


def test_operands_of_a_gemm_start_at_multiples_of_16_bytes():
    wide = torch.arange(4 * 8 * 40, dtype=torch.bfloat16).view(4, 8, 40)
    for x in (wide, wide.mT, wide[0], wide[0, :, :24], wide[:1].expand(4, 8, 40)):
        assert torch_native._aligned(x) is x
    shifted = (wide[0, :, 1:33], wide[:, :, 3:35], wide[:, :, 3:35].mT, wide[0, :1].expand(8, 40))
    for x in (*shifted, wide.flatten()[: 8 * 36].view(8, 36)[:, :32]):
        found = torch_native._aligned(x)
        assert found.data_ptr() % 16 == 0 and torch.equal(found, x)
        lines = found if x.stride(-1) == 1 else found.mT
        assert lines.is_contiguous()


def test_bias_grad_serves_forward_passes_of_other_backends():
    offs = torch.tensor([3, 3, 20], dtype=torch.int32)
    dy = torch.randn(24, 16)
    found = BACKEND.bias_grad(dy, BACKEND.plan(offs, 24), torch.float32)
    assert torch.allclose(found, reference.group_sums(dy, offs.tolist(), torch.float32), atol=1e-6)


@pytest.mark.parametrize("recipe", (NONE, ROWWISE, MXFP8), ids=lambda r: r.value)
def test_compiles_once_for_any_number_of_rows(recipe, device):
    counter = CompileCounterWithBackend("aot_eager")
    case_on(recipe, SHAPES[0], device)
    b = torch.randn(3, 96, 64, device=device).bfloat16().requires_grad_()

    def layer(a: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        return grouped_mm(a, b.transpose(1, 2), offs, recipe=recipe, kernel_preference=TORCH)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for num_rows in (100, 130, 200, 300):
        a = torch.randn(num_rows, 64, device=device).bfloat16().requires_grad_()
        offs = torch.tensor([5, 5, num_rows - 3], dtype=torch.int32, device=device)
        results = [compiled(a, offs), layer(a, offs)]
        gradients = [torch.autograd.grad(y.float().square().sum(), (a, b)) for y in results]
        assert torch.equal(*results) and all(map(torch.equal, *gradients))
    assert counter.frame_count == 1


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("ends, num_rows", (*GROUPS, MANY_GROUPS), ids=str)
@pytest.mark.parametrize("recipe", ROWWISE_RECIPES, ids=lambda r: r.value)
def test_plan_quantizer_and_zeros_bit_for_bit(ends, num_rows, recipe, device):
    if not torch_native._has_triton(device):
        pytest.skip("needs Triton")
    case_on(recipe, SHAPES[0], device)
    check_plan(ends, num_rows, device)
    check_activations(ends, num_rows, recipe, device)
    check_zeros(ends, num_rows, device)


@pytest.fixture
def quantizing_device(device):
    """A GPU that the MX quantizers are for, or Hopper, which runs them as well."""
    if machine_of(device).arch not in ("sm_90", "sm_100") or not torch_native._has_triton(device):
        pytest.skip("needs sm_90 or sm_100, and Triton")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("ends, num_rows", (*GROUPS, MANY_GROUPS), ids=str)
def test_mx_activations_bit_for_bit(ends, num_rows, quantizing_device):
    check_mx_activations(ends, num_rows, quantizing_device)


@pytest.mark.gpu
@pytest.mark.parametrize("b_contiguous", "kn")
def test_mx_weights_bit_for_bit(b_contiguous, quantizing_device):
    check_mx_weights(b_contiguous, quantizing_device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("b_contiguous", "kn")
@pytest.mark.parametrize("recipe", (NONE, *ROWWISE_RECIPES, MXFP8), ids=lambda r: r.value)
def test_every_pass_against_the_reference(recipe, b_contiguous, shape, device):
    case = case_on(recipe, shape, device, b_contiguous)
    shape = case.shape
    inputs = testing.make_inputs(case, device)
    found = testing.run(case, inputs)
    # Tensor cores add up fp8 with 13 bits, and the error of that grows with the number of terms (docs/numerics.md).
    is_long = recipe.is_scaled and shape.k >= 7168
    bound = 8e-3 if is_long else testing.rounding_tolerance(torch.bfloat16, case, device)
    for pass_ in TRAINING:
        result = found.of(pass_)
        assert testing.worst_row_error(result, testing.expected(pass_, inputs, recipe)) <= 2 * bound, pass_
        if pass_ is not Pass.WGRAD:
            assert not result[sum(shape.sizes) :].any()


@pytest.mark.gpu
def test_without_triton_the_results_are_the_same(device, monkeypatch):
    case = case_on(NONE, SHAPES[1], device)
    inputs = testing.make_inputs(case, device)
    with_triton = testing.run(case, inputs)
    monkeypatch.setattr(torch_native, "_has_triton", lambda device: False)
    without = testing.run(case, inputs)
    for pass_ in TRAINING:
        assert torch.equal(with_triton.of(pass_), without.of(pass_)), pass_


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", (NONE, ROWWISE, MXFP8), ids=lambda r: r.value)
def test_a_graph_captures_a_training_step(recipe, device):
    """Captured on the groups of one call and replayed on those of another."""
    case = case_on(recipe, SHAPES[1], device)
    inputs = testing.make_inputs(case, device)
    a, b = inputs.a.nan_to_num(1).requires_grad_(), inputs.b.detach().requires_grad_()
    dy, offs = inputs.dy.nan_to_num(1), inputs.offs.clone()

    def step() -> tuple[torch.Tensor, ...]:
        y = grouped_mm(a, b, offs, recipe=recipe, kernel_preference=TORCH)
        return (y.detach(), *torch.autograd.grad(y, (a, b), dy))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    offs.copy_(torch.tensor([100, 100, 300, 301, 301, 600], dtype=torch.int32))
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", (ROWWISE, MXFP8), ids=lambda r: r.value)
def test_the_fp8_weight_gradient_op_passes_opcheck(recipe, device):
    case_on(recipe, SHAPES[0], device)
    offs = torch.tensor([3, 3, 140], dtype=torch.int32, device=device)
    plan = BACKEND.plan(offs, 150)
    a, dy = (torch.randn(150, d, device=device).bfloat16() for d in (96, 32))
    (_, lhs), (_, rhs) = (BACKEND.quantize_activations(x, plan, recipe, rows=False, columns=True) for x in (a, dy))
    arguments = lhs.data, lhs.scale, rhs.data, rhs.scale, plan.derived[1]
    op = torch.ops.grouped_gemm.torch_scaled_wgrad.default
    torch.library.opcheck(op, arguments, test_utils=("test_faketensor",))
