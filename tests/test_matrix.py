"""The rows of the CI matrix: every backend has one, and every row selects the tests that it says must pass."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matrix
import processes
import pytest
import row

from grouped_gemm.testing import backend_kinds

ROOT = Path(__file__).parent.parent
BACKENDS = [kind.value for kind in backend_kinds()]
MACHINES = sorted({row.machine for row in matrix.ROWS} - {""})
PLUGIN = """
import json
import conftest

def pytest_collection_finish(session):
    found = [(item.nodeid, conftest._backend(item)) for item in session.items]
    print("\\n" + json.dumps([(name, kind and kind.value) for name, kind in found]))
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> list[tuple[str, str | None]]:
    """Name and backend of every test, those that are interpreted too."""
    pytest.importorskip("triton")
    directory = tmp_path_factory.mktemp("plugin")
    (directory / "which_tests.py").write_text(PLUGIN)
    environment = processes.environment(TRITON_INTERPRET="1")
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'tests'}{os.pathsep}{directory}"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "which_tests"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))


def names(machines=()):
    return [job["name"] for job in matrix.matrix(BACKENDS, machines)["include"]]


def test_rows_of_machines_are_there_where_these_are():
    hosted = [row.name for row in matrix.ROWS if not row.machine]
    assert names() == hosted
    assert set(names(MACHINES)) == {row.name for row in matrix.ROWS}
    assert len(set(names(MACHINES))) == len(matrix.ROWS), "two rows have one name"


def test_a_backend_without_a_row_is_refused():
    with pytest.raises(ValueError, match="for backend mill"):
        matrix.matrix([*BACKENDS, "mill"], ())


def test_a_machine_without_a_row_is_refused():
    with pytest.raises(ValueError, match="for machine attic"):
        matrix.matrix(BACKENDS, ["attic"])


def test_rows_of_other_backends_are_left_out():
    rows = {row.name: row for row in matrix.ROWS}
    assert all("emulated" in rows[job["name"]].backends for job in matrix.matrix(["emulated"], ())["include"])


@pytest.mark.parametrize("row", matrix.ROWS, ids=lambda row: row.name)
def test_a_row_selects_the_tests_that_must_pass(row, collected):
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend")
    parser.add_argument("--min-passed", type=int)
    parser.add_argument("-k", default="")
    parser.add_argument("paths", nargs="*", default=["tests/"])
    chosen = parser.parse_args(row.arguments())
    is_interpreted = ("TRITON_INTERPRET", "1") in row.env
    found = [
        name
        for name, backend in collected
        if name.startswith(tuple(chosen.paths))
        and (is_interpreted or not name.startswith("tests/interpreter/"))
        and any(word in name for word in chosen.k.split(" or "))
        and chosen.backend in (None, backend)
    ]
    assert len(found) >= chosen.min_passed > 0
    assert all(any(name.startswith(path) for name in found) for path in chosen.paths)


@pytest.mark.parametrize("least, code", ((1, 0), (2, 1)))
def test_a_run_of_fewer_tests_than_must_pass_fails(tmp_path, least, code):
    """Its process has one test that passes and one that is skipped."""
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_a(): pytest.skip('not here')\n\ndef test_b(): ...\n"
    )
    environment = processes.environment()
    environment["PYTHONPATH"] += os.pathsep + str(ROOT / "tests")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--min-passed", str(least), tmp_path]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert (f"expected at least {least} tests to pass; found 1" in done.stdout) is bool(code)


def test_pins_take_the_place_of_constraints():
    lines = row.constraints(matrix.Row("any", pins=("torch==2.10.0", "triton==3.6.0"))).splitlines()
    own = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if re.match("torch|triton", line)] == ["torch==2.10.0", "triton==3.6.0"]
    assert len(lines) == len(own)


def test_the_oldest_are_those_that_are_supported():
    project = (ROOT / "pyproject.toml").read_text()
    (oldest,) = (row for row in matrix.ROWS if row.name.startswith("oldest"))
    assert f'requires-python = ">={oldest.python}"' in project
    for pin in oldest.pins:
        assert '"' + pin.replace("==", ">=").removesuffix(".0") in project, pin
