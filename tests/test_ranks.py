"""FSDP2 and experts sharded over ranks, in two processes: see ranks.py for what they check."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from grouped_gemm import BackendKind, Recipe
from grouped_gemm.testing import TRAINING, Case, Shape, cases, refusal

SCRIPT = Path(__file__).with_name("ranks.py")
RANKS = 2
RECIPES = (Recipe.NONE, Recipe.FP8_BLOCKWISE)
SHAPE = Shape("ranks", (40, 0, 30, 26), tail=4, k=128, n=256)  # as in ranks.py


@pytest.fixture(scope="module")
def found(request, tmp_path_factory) -> Callable[[str, tuple[str, ...]], dict[str, dict[str, str]]]:
    """What went wrong in two ranks that go through several cases: starting two processes takes longer than a case."""

    @functools.cache
    def run(device_type: str, pairs: tuple[str, ...]) -> dict[str, dict[str, str]]:
        meeting = tmp_path_factory.mktemp("ranks") / "meeting"
        arguments = [sys.executable, str(SCRIPT), device_type, str(meeting), *pairs]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                arguments,
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        wrong: dict[str, dict[str, str]] = {pair: {} for pair in pairs}
        for rank, process in enumerate(ranks):
            try:
                out, err = process.communicate(timeout=60 + 60 * len(pairs))
            except subprocess.TimeoutExpired:  # it waits for one that has failed
                process.kill()
                out, err = process.communicate()
            lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
            for pair, reported in itertools.zip_longest(pairs, lines, fillvalue={"not reached": err}):
                wrong[pair] |= {f"rank {rank}, {name}": text for name, text in reported.items()}
        return wrong

    return run


def selected(request: pytest.FixtureRequest, device: torch.device) -> tuple[str, ...]:
    """Backend and recipe of each case of the test that will run."""
    items = [item for item in request.session.items if getattr(item, "function", None) is request.function]
    chosen = [case for case in (item.callspec.params["case"] for item in items) if not refusal(case, device)]
    return tuple(f"{case.backend.value}:{case.recipe.value}" for case in chosen)


def check(case: Case, request: pytest.FixtureRequest, device_type: str) -> None:
    """Shows what went wrong in any of the ranks."""
    found = request.getfixturevalue("found")(device_type, selected(request, torch.device(device_type)))
    wrong = found[f"{case.backend.value}:{case.recipe.value}"]
    assert not wrong, "\n\n".join(f"{name}\n{text}" for name, text in wrong.items())


ON_CPU = (
    (BackendKind.EMULATED, Recipe.NONE),
    (BackendKind.EMULATED, Recipe.FP8_BLOCKWISE),
    (BackendKind.TORCH, Recipe.NONE),
)


@pytest.mark.parametrize("case", [Case(*which, passes=TRAINING, shape=SHAPE) for which in ON_CPU], ids=str)
def test_two_ranks(case, request):
    check(case, request, "cpu")


@pytest.mark.gpu2
@pytest.mark.parametrize("case", cases(recipes=RECIPES, passes=(TRAINING,), shapes=[SHAPE]), ids=str)
def test_two_gpus(case, request):
    check(case, request, "cuda")
