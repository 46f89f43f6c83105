"""Padding of an expert's rows: each case of `moe.padding` on the backends that a CPU runs, and its place in the docs.

tests/interpreter/test_padding.py has Triton, and tests/interpreter/test_deepgemm.py has DeepGEMM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import fake_rocm
import padding_checks
import pytest
import torch
from padding_checks import T, layer, one_rank, plans_of, results
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from grouped_gemm import BackendKind, NoBackendError, prefer
from grouped_gemm.moe import experts_forward, explain_experts, group_alignment
from grouped_gemm.moe.padding import CASES

EMULATED, TORCH, HIPBLASLT = BackendKind.EMULATED, BackendKind.TORCH, BackendKind.HIPBLASLT


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    with one_rank():
        yield


@pytest.fixture
def mi355x(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_rocm.install(monkeypatch, "MI355X")
    yield
    fake_rocm.forget()


# each row of the table, on each backend that runs its recipe on a CPU
RUNS = [
    (kind, row)
    for kind in (EMULATED, TORCH, HIPBLASLT)
    for row in padding_checks.ALL
    if kind is not TORCH or row.recipe == "bf16"
]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind, row", RUNS, ids=padding_checks.name)
def test_a_case(kind, row, request):
    if kind is HIPBLASLT:
        request.getfixturevalue("mi355x")
    padding_checks.check(row, kind)


@pytest.mark.usefixtures("mi355x")
@pytest.mark.parametrize(
    "recipe, kernel_preference, training, multiple",
    (
        (None, "hipblaslt", True, 1),
        ("fp8_rowwise", "hipblaslt", True, 16),
        ("mxfp8", HIPBLASLT, True, 128),
        ("mxfp8", HIPBLASLT, False, 1),
        ("mxfp8", EMULATED, True, 1),
        ("fp8_rowwise", "auto", True, 16),  # this machine has no Triton, which AUTO would try first
        ("fp8_blockwise", "auto", True, 1),
    ),
    ids=str,
)
def test_the_multiple_of_a_dispatcher(recipe, kernel_preference, training, multiple):
    options = {"kernel_preference": kernel_preference, "device": "cpu", "training": training}
    assert group_alignment(recipe, **options) == multiple
    with prefer(kernel_preference):
        assert group_alignment(recipe, device="cpu", training=training) == multiple


def test_the_multiple_of_a_backend_that_does_not_run_is_an_error():
    with pytest.raises(NoBackendError, match=r"deepgemm  requires (deep_gemm; found none|sm_90 or sm_100; found cpu)"):
        group_alignment("fp8_blockwise", kernel_preference="deepgemm", device="cpu")
    with pytest.raises(TypeError, match="training: expected True or False"):
        group_alignment(training=1)


@pytest.mark.usefixtures("mi355x")
def test_inference_pads_nothing():
    operands = layer(256, 128)
    with plans_of(HIPBLASLT) as plans:
        results(operands, False, recipe="mxfp8", kernel_preference="hipblaslt")
    assert [plan.num_rows for plan in plans] == [operands[1].numel()]


@pytest.mark.usefixtures("mi355x")
def test_a_layer_without_tokens():
    x, ids, weights, *experts = layer(256, 128)
    operands = x[:0], ids[:0], weights[:0], *experts
    y, dx, _, *gradients = results(operands, True, recipe="mxfp8", kernel_preference="hipblaslt")
    assert y.shape == dx.shape == (0, 256) and not any(g.any() for g in gradients)


@pytest.mark.usefixtures("mi355x")
def test_an_explanation_says_that_rows_are_padded_while_they_are_gathered():
    operands = layer(256, 128)
    pads = "The gather pads each expert's rows to a multiple of {}."
    assert explain_experts(*operands, recipe="mxfp8", kernel_preference="hipblaslt").endswith(pads.format(128))
    with prefer("hipblaslt"):
        assert explain_experts(*operands, recipe="fp8_rowwise").endswith(pads.format(16))
    for options in ({"recipe": "mxfp8"}, {"kernel_preference": "hipblaslt"}):
        assert "The gather pads" not in explain_experts(*operands, **options)
    with torch.no_grad():
        assert "The gather pads" not in explain_experts(*operands, recipe="mxfp8", kernel_preference="hipblaslt")


@pytest.mark.usefixtures("mi355x")
def test_a_padded_layer_compiles_for_any_number_of_tokens():
    x, ids, weights, *experts = (operand.detach() for operand in layer(256, 128))
    experts = [w.requires_grad_() for w in experts]

    def run(tokens: int, layer: Callable[..., Tensor]) -> list[Tensor]:
        own = [operand[:tokens].clone() for operand in (x, ids, weights)]  # no views: their bases would be guarded
        y = layer(*own, *experts, recipe="mxfp8", kernel_preference="hipblaslt")
        return [y, *torch.autograd.grad(y, experts, torch.ones_like(y))]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(experts_forward, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (T, T - 5):
        assert all(map(torch.equal, run(tokens, compiled), run(tokens, experts_forward)))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_the_docs_show_the_table():
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    shown = re.findall(r"^\| (\d) \| (\w+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.M)
    columns = (lambda row: row.others, lambda row: row.deepgemm, lambda row: row.hipblaslt)
    expected = [
        (str(i), row.recipe, row.rows_from, *("-" if (pads := of(row)) is None else pads.value for of in columns))
        for i, row in enumerate(CASES, 1)
    ]
    assert shown == expected
