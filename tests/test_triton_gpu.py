"""The Triton backend on a GPU, beyond what `test_backends` tests of every backend: calls of the large row class in
graphs and on streams, the quantizers bit for bit, out-of-bounds accesses, and compilations after `warmup`.

The last two run in processes of their own, which start with the first test here; the last tests wait for them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from kernel_checks import BACKEND, activations, assert_same_bits, check_activations, check_weights
from large import (
    RAGGED,
    RECIPES,
    TRITON,
    Passes,
    cases_of,
    compile_in_parallel,
    layer,
    tests_of_module,
    train,
    training,
    with_sizes,
)

from grouped_gemm import Pass, Recipe
from grouped_gemm.testing import TRAINING, Case, Inputs, Shape, make_inputs

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parent
SCALED = tuple(recipe for recipe in Recipe if recipe.is_scaled)
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


class Started:
    """A script of this folder in a process of its own."""

    def __init__(self, script: str, folder: Path, limit: float, *before: str, **environment: str) -> None:
        variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.log = folder / f"{script}.txt"  # unlike a pipe, it never fills up
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*before, sys.executable, str(TESTS / script)],
                env=variables | {"PYTHONPATH": str(TESTS.parent)} | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.limit, self.deadline = limit, time.monotonic() + limit

    def stop(self) -> None:
        """Kills the process and its children, if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def output(self) -> str:
        """Waits for the process to succeed, and returns what it printed."""
        state = ""
        try:
            if self.process.wait(max(1.0, self.deadline - time.monotonic())):
                state = f"exit code {self.process.returncode}"
        except subprocess.TimeoutExpired:
            self.stop()
            state = f"not done after {self.limit:.0f} s"
        text = self.log.read_text(errors="replace")
        shown = text if len(text) < 9000 else f"{text[:6000]}\n[...]\n{text[-3000:]}"
        assert not state, f"{state}:\n{shown}"
        return text


@pytest.fixture(scope="module", autouse=True)
def processes(request, tmp_path_factory) -> Iterator[dict[str, Started]]:
    """The processes of the selected tests, by script."""
    selected = {item.originalname for item in tests_of_module(request)}
    started, folder = {}, tmp_path_factory.mktemp("processes")
    if test_no_kernel_reads_or_writes_out_of_bounds.__name__ in selected and shutil.which("compute-sanitizer"):
        sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99")
        started["sanitized.py"] = Started("sanitized.py", folder, 100, *sanitizer, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if test_a_call_after_warmup_compiles_nothing.__name__ in selected:
        started["warmed_up.py"] = Started("warmed_up.py", folder, 100, TRITON_CACHE_DIR=str(folder / "triton"))
    yield started
    for one in started.values():
        one.stop()


@pytest.fixture(scope="module", autouse=True)
def compiled(request, device, processes):
    """Compiles in parallel what the tests of this module would compile one after the other."""
    items = tests_of_module(request)
    quantized = [item for item in items if item.originalname.startswith("test_quantized")]
    called = cases_of([item for item in items if item.originalname.startswith(("test_a_graph", "test_two_streams"))])
    checks = [partial(check, case, device) for check, case in product(QUANTIZER_CHECKS, cases_of(quantized))]
    passes = [Passes(case, make_inputs(case, device)) for case in called]
    compile_in_parallel([*checks, *(one.quantize for one in passes)])
    compile_in_parallel([run for one in passes for run in one.gemms()])
    torch.cuda.synchronize()


# 3. There is no host sync: a graph captures a call with all its gradients, and replays it for any offs.
REPLAYED = (
    ((434, 434, 434, 434, 434, 434), 0),
    ((2604, 0, 0, 0, 0, 0), 0),
    ((3, 0, 129, 0, 1, 700), 1771),
    ((0, 0, 0, 0, 0, 0), 2604),
    (RAGGED.sizes, RAGGED.tail),
)


@training()
def test_a_graph_replays_a_call_with_other_offs(case, device):
    inputs = make_inputs(case, device)
    train(layer(case), inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = train(layer(case), inputs)
    for seed, (sizes, tail) in enumerate(REPLAYED):
        others = make_inputs(with_sizes(case, sizes, tail), device, seed=seed)
        wanted = train(layer(case), others)
        for name in ("a", "b", "dy", "offs"):
            getattr(inputs, name).copy_(getattr(others, name))
        for x in found:
            x.fill_(torch.nan)
        graph.replay()
        for pass_, x, truth in zip(Pass, found, wanted):
            assert_same_bits(x, truth, f"{pass_.value} of groups {sizes}")


# More groups than kernels handle in one step, and than a grid has programs along its second axis.


@pytest.mark.parametrize("num_groups", (5000, 70_000))
@pytest.mark.parametrize("case", [Case(TRITON, recipe, passes=TRAINING) for recipe in RECIPES], ids=str)
def test_thousands_of_groups_give_the_bits_of_the_groups_with_rows(case, num_groups, device):
    a, b = torch.randn(700, 128, device=device), torch.randn(num_groups, 64, 128, device=device)
    a, b, dy = a.bfloat16(), b.bfloat16(), torch.randn(700, 64, device=device).bfloat16()
    offs = torch.randint(0, 701, (num_groups,), dtype=torch.int32, device=device).sort().values
    has_rows = offs.diff(prepend=offs.new_zeros(1)) > 0
    y, da, db = train(layer(case), Inputs(a, b.transpose(1, 2), None, offs, dy, []))
    few = train(layer(case), Inputs(a, b[has_rows].transpose(1, 2), None, offs[has_rows], dy, []))
    for pass_, found, expected in zip(Pass, (y, da, db[has_rows]), few):
        assert_same_bits(found, expected, pass_.value)
    assert not db[~has_rows].any()


# 11. One process may use several streams.


@training()
def test_two_streams_do_not_affect_each_other(case, device):
    several = [make_inputs(case, device, seed) for seed in range(2)]
    alone = [train(layer(case), inputs) for inputs in several]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(device) for _ in several]
    found = []
    for _ in range(8):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append((i, train(layer(case), several[i])))
    torch.cuda.synchronize()
    for turn, (i, results) in enumerate(found):
        for pass_, x, truth in zip(Pass, results, alone[i]):
            assert_same_bits(x, truth, f"{pass_.value} on stream {i}, call {turn // 2}")


# The quantizers give the bits of `reference`. The interpreter rounds as torch does; here the GPU's instructions do it.


def quantized(recipe: Recipe, dtype: torch.dtype, d: int) -> Case:
    shape = Shape(f"d{d}", RAGGED.sizes, tail=RAGGED.tail, k=d, n=296)
    return Case(TRITON, recipe, dtype, TRAINING, shape)


def check_rows(case: Case, device: torch.device) -> None:
    x = activations(case.shape.num_rows, case.shape.k, case.dtype, device)
    offs = torch.tensor(case.shape.ends, dtype=torch.int32, device=device)
    check_activations(x, BACKEND.plan(offs, len(x)), case.recipe)


def check_matrices(case: Case, device: torch.device) -> None:
    b = torch.randn(2, case.shape.n, case.shape.k, device=device).to(case.dtype)
    b[0, 3, 4], b[1, 7, 8] = torch.nan, torch.inf
    check_weights(b.transpose(1, 2), case.recipe)
    check_weights(b.transpose(1, 2).contiguous(), case.recipe)


QUANTIZER_CHECKS = (check_rows, check_matrices)
QUANTIZED = (
    *(quantized(recipe, BFLOAT16, 7168) for recipe in SCALED),
    *(quantized(recipe, FLOAT32, 300) for recipe in SCALED),
    quantized(Recipe.FP8_BLOCKWISE, FLOAT32, 7168),
    quantized(Recipe.FP8_BLOCKWISE, BFLOAT16, 300),
    quantized(Recipe.FP8_ROWWISE, BFLOAT16, 16640),  # rows that do not fit the registers of a program
)


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_quantized_activations_are_those_of_the_reference(case, device):
    check_rows(case, device)


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_quantized_weights_are_those_of_the_reference(case, device):
    check_matrices(case, device)


# Tests that wait for a process of their own. They are last, because the processes run during the other tests.


@pytest.mark.parametrize("case", [Case(TRITON, Recipe.FP8_BLOCKWISE, passes=TRAINING)], ids=str)
def test_a_call_after_warmup_compiles_nothing(case, processes):
    """The script counts files in Triton's cache; a name there says which kernel, `.json` what it was compiled for."""
    found = json.loads(processes["warmed_up.py"].output().splitlines()[-1])
    assert found["known"] > 10, "warmup itself compiled nothing: Triton's cache is elsewhere, or not of files"
    assert not any(found["new"].values()), json.dumps(found, indent=1)


@pytest.mark.parametrize("case", [Case(TRITON, passes=TRAINING)], ids=str)
def test_no_kernel_reads_or_writes_out_of_bounds(case, processes):
    if "sanitized.py" not in processes:
        pytest.skip("compute-sanitizer is not in PATH")
    text = processes["sanitized.py"].output()
    assert "ERROR SUMMARY: 0 errors" in text, text[:6000]
    assert "done" in text.splitlines(), text[-3000:]
