"""Experts shared by 2 and 4 ranks: see expert_parallel_ranks.py for what they check."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from expert_parallel_ranks import OF_PEERS, checks_of

SCRIPT = Path(__file__).with_name("expert_parallel_ranks.py")
TIMEOUT = 400  # seconds; a rank that waits for one that has failed gives up after 60


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Callable[[str, int], dict[str, dict[str, str]]]:
    """The errors of all ranks by check; a check that a rank has not reached is missing. "interpreter" is a CPU, too."""

    @functools.cache
    def run(device_type: str, ranks: int) -> dict[str, dict[str, str]]:
        folder = tmp_path_factory.mktemp("ranks")
        is_interpreted = device_type == "interpreter"
        names = [one.__name__ for one in OF_PEERS] if is_interpreted else []
        device = "cpu" if is_interpreted else device_type
        command = [sys.executable, str(SCRIPT), device, str(ranks), str(folder / "meeting"), *names]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        environment |= {"TRITON_INTERPRET": "1"} if is_interpreted else {}
        logs = [(folder / f"{rank}.out").open("w+") for rank in range(ranks)]
        processes = [
            subprocess.Popen(command, env=environment | {"RANK": str(r)}, stdout=log, stderr=subprocess.STDOUT)
            for r, log in enumerate(logs)
        ]
        errors: dict[str, dict[str, str]] = {}
        for rank, (process, log) in enumerate(zip(processes, logs)):
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
            log.seek(0)
            lines = [json.loads(line) for line in log if line.startswith("{")]
            errors[f"rank {rank}"] = {line["check"]: line["error"] for line in lines}
            log.close()
        return errors

    return run


def check(found: Callable[[str, int], dict[str, dict[str, str]]], device_type: str, ranks: int, name: str) -> None:
    """Shows what went wrong in each rank."""
    errors = {rank: by_check.get(name, "not reached") for rank, by_check in found(device_type, ranks).items()}
    assert not any(errors.values()), "\n\n".join(f"{rank}\n{error}" for rank, error in errors.items() if error)


@pytest.mark.parametrize("name, ranks", [(check.__name__, ranks) for ranks in (2, 4) for check in checks_of(ranks)])
def test_ranks_on_a_cpu(name, ranks, found):
    check(found, "cpu", ranks, name)


@pytest.mark.parametrize("name", [one.__name__ for one in OF_PEERS])
def test_files_in_place_of_peer_memory(name, found):
    pytest.importorskip("triton")
    check(found, "interpreter", 2, name)


@pytest.mark.gpu2
@pytest.mark.parametrize("name", [check.__name__ for check in checks_of(2)])
def test_two_gpus(name, found):
    check(found, "cuda", 2, name)
