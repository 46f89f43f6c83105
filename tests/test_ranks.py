"""FSDP2 and experts sharded over ranks, in two processes: see ranks.py for what they check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grouped_gemm import BackendKind, Recipe
from grouped_gemm.testing import TRAINING, Case, Shape, cases

SCRIPT = Path(__file__).with_name("ranks.py")
RANKS = 2
RECIPES = (Recipe.NONE, Recipe.FP8_BLOCKWISE)
SHAPE = Shape("ranks", (40, 0, 30, 26), tail=4, k=128, n=256)  # as in ranks.py


def check(case: Case, device_type: str, meeting: Path) -> None:
    """Starts the ranks, and shows what went wrong in any of them."""
    arguments = [sys.executable, str(SCRIPT), device_type, str(meeting), case.backend.value, case.recipe.value]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            arguments, env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    outputs = []
    for rank in ranks:
        try:
            outputs.append(rank.communicate(timeout=120))
        except subprocess.TimeoutExpired:  # it waits for one that has failed
            rank.kill()
            outputs.append(rank.communicate())
    found = {}
    for rank, (out, err) in enumerate(outputs):
        wrong = json.loads(out.splitlines()[-1]) if ranks[rank].returncode == 0 else {"": err}
        found |= {f"rank {rank}, {name}": text for name, text in wrong.items()}
    assert not found, "\n\n".join(f"{name}\n{text}" for name, text in found.items())


ON_CPU = (
    (BackendKind.EMULATED, Recipe.NONE),
    (BackendKind.EMULATED, Recipe.FP8_BLOCKWISE),
    (BackendKind.TORCH, Recipe.NONE),
)


@pytest.mark.parametrize("case", [Case(*which, passes=TRAINING, shape=SHAPE) for which in ON_CPU], ids=str)
def test_two_ranks(case, tmp_path):
    check(case, "cpu", tmp_path / "meeting")


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases(recipes=RECIPES, passes=(TRAINING,), shapes=[SHAPE]), ids=str)
def test_two_gpus(case, tmp_path):
    if torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} GPUs; torch sees {torch.cuda.device_count()}")
    check(case, "cuda", tmp_path / "meeting")
