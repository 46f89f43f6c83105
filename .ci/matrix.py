"""The rows of the CI matrix: `python -m grouped_gemm doctor --json | python .ci/matrix.py [MACHINE ...]`.

Rows of backends that doctor does not list are left out, and so are those of self-hosted machines that are not named
as arguments: without a runner they would wait in vain.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from dataclasses import dataclass

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST_TRITON = "3.6.0"  # the floor in pyproject.toml
NEWEST_TRITON = "3.9.0"
EXTRAS = {"deepgemm": "deepgemm"}  # what a backend needs installed, as an extra of pyproject.toml


@dataclass(frozen=True)
class Row:
    """One job.

    Attributes:
        name: of the job.
        backends: which it is for; those of this version make the row.
        pytest: arguments.
        env: environment variables.
        triton: version; empty: the one that constraints.txt and torch agree on.
        must_be_ready: whether doctor has to find the backends ready; else they are compiled and not run.
        machine: label of a self-hosted runner, whose own pip configuration finds the torch of its GPU; empty: hosted.
    """

    name: str
    backends: tuple[str, ...]
    pytest: str = ""
    env: tuple[tuple[str, str], ...] = ()
    triton: str = ""
    must_be_ready: bool = True
    machine: str = ""

    def job(self, listed: Collection[str]) -> dict[str, object]:
        """The row as the workflow reads it."""
        backends = [name for name in self.backends if name in listed]
        env = self.env if self.machine else (("PIP_EXTRA_INDEX_URL", CPU_INDEX), *self.env)
        return {
            "name": self.name,
            "runs_on": ["self-hosted", self.machine] if self.machine else ["ubuntu-latest"],
            "env": "\n".join(f"{name}={value}" for name, value in env),
            "extras": ",".join(EXTRAS[name] for name in backends if name in EXTRAS),
            "triton": self.triton,
            "ready": backends if self.must_be_ready else [],
            "pytest": self.pytest,
        }


def _compiled_ahead(triton: str) -> Row:
    return Row(
        f"triton {triton}, compiled ahead of time",
        ("triton",),
        pytest="--backend triton",
        env=(("TRITON_INTERPRET", "0"),),
        triton=triton,
        must_be_ready=False,
    )


ROWS = (
    Row("emulated", ("emulated",), pytest="--backend emulated"),
    Row("torch", ("torch",), pytest="--backend torch"),
    Row(
        "triton, interpreted",
        ("triton",),
        pytest="--backend triton",
        env=(("TRITON_INTERPRET", "1"),),
        triton=NEWEST_TRITON,
    ),
    _compiled_ahead(OLDEST_TRITON),
    _compiled_ahead(NEWEST_TRITON),
    Row("Hopper", ("emulated", "torch", "triton", "deepgemm"), machine="hopper"),
    Row("ROCm", ("emulated", "torch", "triton", "hipblaslt"), machine="rocm"),
)


def matrix(listed: Collection[str], machines: Collection[str]) -> dict[str, list[dict[str, object]]]:
    """The matrix of a version with the backends ``listed``, where the self-hosted ``machines`` are there.

    Raises:
        ValueError: a backend has no row, or no row is for a machine of this name.
    """
    if unknown := set(listed) - {name for row in ROWS for name in row.backends}:
        raise ValueError(f"no row of .ci/matrix.py is for backend {', '.join(sorted(unknown))}")
    if unknown := set(machines) - {row.machine for row in ROWS}:
        raise ValueError(f"no row of .ci/matrix.py is for machine {', '.join(sorted(unknown))}")
    rows = [row for row in ROWS if not row.machine or row.machine in machines]
    return {"include": [row.job(listed) for row in rows if any(name in listed for name in row.backends)]}


if __name__ == "__main__":
    backends = [backend["name"] for backend in json.load(sys.stdin)["backends"]]
    print(json.dumps(matrix(backends, sys.argv[1:])))
