"""The rows of the CI matrix: `python -m grouped_gemm doctor --json | python .ci/matrix.py [MACHINE ...]`.

Rows of backends that doctor does not list are left out, and so are rows of self-hosted machines that are not among the
arguments: without a runner, their jobs would never start. `row.py` installs and tests a row.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Collection
from dataclasses import dataclass

OLDEST_TRITON = "triton==3.6.0"  # the floors in pyproject.toml
OLDEST_TORCH = "torch==2.10.0"
NEWEST_TRITON = "triton==3.9.0"
NEWEST_TORCH = "torch==2.15.0"
NEWEST_TRANSFORMERS = "transformers==5.24.0"
EXTRAS = {"deepgemm": "deepgemm"}  # the extras of pyproject.toml that backends need on their machines


@dataclass(frozen=True)
class Row:
    """One job.

    Attributes:
        name: the name of the job.
        backends: those that the row is for; empty: all. The row exists if this version has one of them.
        pytest: arguments; empty: all tests.
        min_passed: the least number of tests that must pass; with fewer, the row has lost tests to skips or selection.
        env: environment variables.
        python: its version.
        pins: requirements that replace those in constraints.txt.
        extras: extras of pyproject.toml that the tests need, on every machine.
        without: distributions that are uninstalled after the installation.
        has_fake_deep_gemm: whether `import deep_gemm` gets tests/fake_deep_gemm.py.
        must_be_ready: backends that doctor must find ready, if it lists them.
        machine: label of a self-hosted runner, whose pip configuration finds the torch for its GPU; empty: GitHub's.
    """

    name: str
    backends: tuple[str, ...] = ()
    pytest: str = ""
    min_passed: int = 1
    env: tuple[tuple[str, str], ...] = ()
    python: str = "3.11"
    pins: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    has_fake_deep_gemm: bool = False
    must_be_ready: tuple[str, ...] = ()
    machine: str = ""

    def arguments(self) -> list[str]:
        """The arguments of pytest."""
        return [*shlex.split(self.pytest), "--min-passed", str(self.min_passed)]

    def job(self) -> dict[str, object]:
        """The row as the workflow reads it."""
        runs_on = ["self-hosted", self.machine] if self.machine else ["ubuntu-latest"]
        return {"name": self.name, "runs_on": runs_on, "python": self.python}


ON_HOPPER = ("emulated", "torch", "triton", "deepgemm")
HOPPER_PINS = ("torch==2.11.0", "triton==3.6.0")  # deep_gemm is built for one torch, which pins its triton
INTERPRETED = (("TRITON_INTERPRET", "1"),)


def _compiled_ahead(triton: str) -> Row:
    return Row(
        f"{triton}, compiled ahead of time",
        ("triton",),
        pytest="tests/test_compile_ahead.py",
        min_passed=6,
        pins=(triton,),
    )


def _with_transformers(name: str, pins: tuple[str, ...] = ()) -> Row:
    tests = "tests/test_transformers.py tests/test_bench_serve.py"
    return Row(name, pytest=tests, min_passed=165, pins=pins, extras=("transformers",))


def _on_a_gpu(name: str, machine: str, *backends: str, pins: tuple[str, ...] = ()) -> Row:
    return Row(name, backends, min_passed=1000, pins=pins, must_be_ready=backends, machine=machine)


ROWS = (
    Row("emulated", ("emulated",), pytest="--backend emulated", min_passed=1700, must_be_ready=("emulated",)),
    Row("torch", ("torch",), pytest="--backend torch", min_passed=250, must_be_ready=("torch",)),
    Row(
        "triton, interpreted",
        ("triton",),
        # Small shapes: an interpreted tile takes milliseconds.
        pytest="--backend triton -k 'one_row or no_rows or empty_middle or odd'",
        min_passed=130,
        env=INTERPRETED,
        pins=(NEWEST_TRITON,),
        must_be_ready=("triton",),
    ),
    Row(
        "Triton kernels, interpreted",
        ("triton",),
        pytest="tests/interpreter",
        min_passed=250,
        env=INTERPRETED,
        pins=(NEWEST_TRITON,),
        must_be_ready=("triton",),
    ),
    _compiled_ahead(OLDEST_TRITON),
    _compiled_ahead(NEWEST_TRITON),
    Row(
        "fake deep_gemm, interpreted",
        ("deepgemm",),
        pytest="tests/test_deepgemm.py tests/test_cli.py tests/interpreter/test_deepgemm.py",
        min_passed=180,
        env=INTERPRETED,
        has_fake_deep_gemm=True,
    ),
    Row("two processes of gloo", pytest="tests/test_ranks.py tests/test_shards.py", min_passed=30),
    _with_transformers("transformers"),
    _with_transformers("newest transformers", pins=(NEWEST_TRANSFORMERS,)),
    Row("Megatron-Core", pytest="tests/test_megatron.py", min_passed=46, python="3.13", extras=("megatron",)),
    Row("torchao", pytest="tests/test_torchao.py", min_passed=28, extras=("torchao",)),
    Row(
        "torchtitan",
        pytest="tests/test_torchtitan.py",
        min_passed=26,
        pins=("fsspec==2026.2.0",),  # the newest that its datasets take
        extras=("torchtitan",),
    ),
    Row("without triton", min_passed=4200, without=("triton",), must_be_ready=("emulated", "torch")),
    Row("oldest Python, torch and triton", min_passed=4200, python="3.10", pins=(OLDEST_TORCH, OLDEST_TRITON)),
    Row("newest Python, torch and triton", min_passed=4200, python="3.13", pins=(NEWEST_TORCH, NEWEST_TRITON)),
    _on_a_gpu("Hopper", "hopper", *ON_HOPPER, pins=HOPPER_PINS),
    Row(
        "two Hopper GPUs",
        ON_HOPPER,
        pytest="-m gpu2",
        min_passed=30,
        pins=HOPPER_PINS,
        must_be_ready=ON_HOPPER,
        machine="hopper-2",
    ),
    _on_a_gpu("ROCm", "rocm", "emulated", "torch", "triton", "hipblaslt"),
)


def matrix(listed: Collection[str], machines: Collection[str]) -> dict[str, list[dict[str, object]]]:
    """The matrix of a version that lists these backends, with these self-hosted ``machines``.

    Raises:
        ValueError: no row names one of the backends, or one of the machines.
    """
    if unknown := set(listed) - {name for row in ROWS for name in row.backends}:
        raise ValueError(f"no row of .ci/matrix.py is for backend {', '.join(sorted(unknown))}")
    if unknown := set(machines) - {row.machine for row in ROWS}:
        raise ValueError(f"no row of .ci/matrix.py is for machine {', '.join(sorted(unknown))}")
    rows = [row for row in ROWS if not row.machine or row.machine in machines]
    return {"include": [row.job() for row in rows if not row.backends or set(row.backends) & set(listed)]}


if __name__ == "__main__":
    backends = [backend["name"] for backend in json.load(sys.stdin)["backends"]]
    print(json.dumps(matrix(backends, sys.argv[1:])))
