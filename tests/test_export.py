"""torch.export of a model that calls `grouped_mm`: one program for any M, saved and loaded."""

from __future__ import annotations

import contextlib
import io
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from grouped_gemm import BackendKind, Recipe, grouped_mm, override_torch
from grouped_gemm.testing import FORWARD, Case, Shape, cases, make_inputs

SHAPE = Shape("whole_blocks", (0, 7, 1, 30), tail=2, k=128, n=256)


of_cases = pytest.mark.parametrize(
    "case", cases(recipes=(Recipe.NONE, Recipe.FP8_BLOCKWISE), passes=(FORWARD,), shapes=[SHAPE]), ids=str
)


class Experts(torch.nn.Module):
    """An up and a down projection."""

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__()
        inputs = make_inputs(case, device)
        self.options = {"recipe": case.recipe, "kernel_preference": case.backend}
        self.up = torch.nn.Parameter(inputs.b.transpose(1, 2).contiguous())
        self.down = torch.nn.Parameter(inputs.b.contiguous())

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        y = grouped_mm(x, self.up.transpose(1, 2), offs, **self.options)
        return grouped_mm(torch.nn.functional.silu(y), self.down.transpose(1, 2), offs, **self.options)


def inputs_of(case: Case, device: torch.device, num_rows: int) -> tuple[Tensor, Tensor]:
    sizes = (0, num_rows // 3, 1, num_rows // 2)
    x = torch.randn(num_rows, case.shape.k, dtype=case.dtype, device=device)
    return x, torch.tensor(list(itertools.accumulate(sizes)), dtype=torch.int32, device=device)


BOUNDED = torch.export.Dim("rows", min=2, max=2**20)


def export(
    model: Experts, case: Case, device: torch.device, strict: bool, rows: Any = BOUNDED
) -> torch.export.ExportedProgram:
    return torch.export.export(model, inputs_of(case, device, 40), dynamic_shapes=({0: rows}, None), strict=strict)


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@of_cases
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_program_runs_every_row_class(case, strict, grad, device):
    """With gradients the graph differs: it writes the layouts for backward as well."""
    model = Experts(case, device).requires_grad_(False)
    if grad:
        model.up.requires_grad_(case.recipe is not Recipe.NONE)  # DeepGEMM has no wgrad without a recipe
    with torch.set_grad_enabled(grad):
        program = export(model, case, device, strict)
    for num_rows in (8, 64, 65, 1024, 1100):
        x, offs = inputs_of(case, device, num_rows)
        assert torch.equal(program.module()(x, offs), model(x, offs))


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("rows", [torch.export.Dim("rows"), torch.export.Dim.AUTO], ids=["unbounded", "auto"])
def test_unbounded_rows_are_not_narrowed(rows, strict):
    """Selection must not ask for the row class of the example."""
    case, device = Case(BackendKind.EMULATED, Recipe.FP8_BLOCKWISE, shape=SHAPE), torch.device("cpu")
    model = Experts(case, device).requires_grad_(False)
    program = export(model, case, device, strict, rows)
    for num_rows in (8, 65, 1100):
        x, offs = inputs_of(case, device, num_rows)
        assert torch.equal(program.module()(x, offs), model(x, offs))


@of_cases
def test_a_program_is_saved_and_loaded(case, device):
    model = Experts(case, device).requires_grad_(False)
    program = saved_and_loaded(export(model, case, device, strict=False))
    x, offs = inputs_of(case, device, 100)
    assert torch.equal(program.module()(x, offs), model(x, offs))


class Overridden(Experts):
    """Experts that call torch; an exported program has the ops of this package instead."""

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        y = torch.nn.functional.grouped_mm(x, self.up.transpose(1, 2), offs=offs)
        return torch.nn.functional.grouped_mm(torch.nn.functional.silu(y), self.down.transpose(1, 2), offs=offs)


class Decorated(Overridden):
    forward = override_torch("fp8_blockwise", kernel_preference="emulated")(Overridden.forward)


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", [Overridden, Decorated])
def test_override_torch_applies_to_a_program(kind, grad, strict):
    case, device = Case(BackendKind.EMULATED, Recipe.FP8_BLOCKWISE, shape=SHAPE), torch.device("cpu")
    model = kind(case, device).requires_grad_(grad)
    block = override_torch("fp8_blockwise", kernel_preference="emulated")
    with contextlib.nullcontext() if kind is Decorated else block, torch.set_grad_enabled(grad):
        program = export(model, case, device, strict)
    x, offs = inputs_of(case, device, 100)
    assert torch.equal(saved_and_loaded(program).module()(x, offs), Experts.forward(model, x, offs))


LOAD = """
import sys
import torch
import grouped_gemm

grouped_gemm.register_ops()
program, x, offs, wanted = sys.argv[1:]
found = torch.export.load(program).module()(*(torch.load(file) for file in (x, offs)))
assert torch.equal(found, torch.load(wanted))
"""


def test_another_process_loads_a_program(tmp_path):
    case, device = Case(BackendKind.EMULATED, Recipe.FP8_BLOCKWISE, shape=SHAPE), torch.device("cpu")
    model = Experts(case, device).requires_grad_(False)
    x, offs = inputs_of(case, device, 100)
    files = [str(tmp_path / name) for name in ("program.pt2", "x.pt", "offs.pt", "y.pt")]
    torch.export.save(export(model, case, device, strict=False), files[0])
    for tensor, file in zip((x, offs, model(x, offs)), files[1:]):
        torch.save(tensor, file)
    result = subprocess.run([sys.executable, "-c", LOAD, *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
