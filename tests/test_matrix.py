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
ARGUMENTS = argparse.ArgumentParser()
ARGUMENTS.add_argument("--backend")
ARGUMENTS.add_argument("--min-passed", type=int)
ARGUMENTS.add_argument("-k", "-m", dest="k", default="")  # marks are keywords
ARGUMENTS.add_argument("paths", nargs="*", default=["tests/"])
CHOSEN = {row.name: ARGUMENTS.parse_args(row.arguments()) for row in matrix.ROWS}
# A plugin that lists the tests, and evaluates -k with pytest's own code.
PLUGIN = """
import json
import conftest
from _pytest.mark import KeywordMatcher
from _pytest.mark.expression import Expression

def pytest_collection_finish(session):
    found, expressions = [], {k: Expression.compile(k) for k in KEYWORDS}
    for item in session.items:
        kind, matcher = conftest._backend(item), KeywordMatcher.from_item(item)
        keywords = [k for k, expression in expressions.items() if expression.evaluate(matcher)]
        found.append((item.nodeid, kind and kind.value, keywords))
    print("\\n" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> list[tuple[str, str | None, list[str]]]:
    """Every test, interpreted ones included: name, backend, and which of the rows' -k expressions it matches."""
    pytest.importorskip("triton")
    directory = tmp_path_factory.mktemp("plugin")
    keywords = sorted({chosen.k for chosen in CHOSEN.values()} - {""})
    (directory / "which_tests.py").write_text(f"KEYWORDS = {keywords}\n{PLUGIN}")
    environment = processes.environment(TRITON_INTERPRET="1")
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'tests'}{os.pathsep}{directory}"
    options = ("--collect-only", "-q", "-p", "no:cacheprovider", "-p", "which_tests", "--assert=plain")
    command = [sys.executable, "-m", "pytest", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[[")))


def names(machines=()):
    return [job["name"] for job in matrix.matrix(BACKENDS, machines)["include"]]


def test_a_row_of_a_machine_is_made_if_the_machine_exists():
    hosted = [row.name for row in matrix.ROWS if not row.machine]
    assert names() == hosted
    assert set(names(MACHINES)) == {row.name for row in matrix.ROWS}
    assert len(set(names(MACHINES))) == len(matrix.ROWS), "two rows have the same name"


def test_a_backend_without_a_row_is_refused():
    with pytest.raises(ValueError, match="for backend nonesuch"):
        matrix.matrix([*BACKENDS, "nonesuch"], ())


def test_a_machine_without_a_row_is_refused():
    with pytest.raises(ValueError, match="for machine attic"):
        matrix.matrix(BACKENDS, ["attic"])


def test_rows_of_other_backends_are_left_out():
    rows = {row.name: row for row in matrix.ROWS}
    made = [rows[job["name"]].backends for job in matrix.matrix(["emulated"], ())["include"]]
    assert made
    assert all(not backends or "emulated" in backends for backends in made)


@pytest.mark.parametrize("row", matrix.ROWS, ids=lambda row: row.name)
def test_a_row_selects_the_tests_that_must_pass(row, collected):
    chosen = CHOSEN[row.name]
    is_interpreted = ("TRITON_INTERPRET", "1") in row.env
    found = [
        name
        for name, backend, keywords in collected
        if name.startswith(tuple(chosen.paths))
        and (is_interpreted or not name.startswith("tests/interpreter/"))
        and chosen.k in ("", *keywords)
        and chosen.backend in (None, backend)
    ]
    assert len(found) >= chosen.min_passed > 0
    assert all(any(name.startswith(path) for name in found) for path in chosen.paths)


@pytest.mark.parametrize("least, code", ((1, 0), (2, 1)))
def test_a_run_of_fewer_tests_than_must_pass_fails(tmp_path, capsys, pytestconfig, least, code):
    """The run has one test that passes and one that is skipped."""
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_a(): pytest.skip('not here')\n\ndef test_b(): ...\n"
    )
    options = ["-p", "no:cacheprovider", "--import-mode=importlib", "--min-passed", str(least), str(tmp_path)]
    conftest = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    found = pytest.main(options, plugins=[conftest])
    out = capsys.readouterr().out
    assert found == code, out
    assert (f"expected at least {least} tests to pass; found 1" in out) is bool(code)


def test_pins_take_the_place_of_constraints():
    lines = row.constraints(matrix.Row("any", pins=("torch==2.10.0", "triton==3.6.0"))).splitlines()
    own = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if re.match("(torch|triton)==", line)] == ["torch==2.10.0", "triton==3.6.0"]
    assert len(lines) == len(own)


def test_the_oldest_are_those_that_are_supported():
    project = (ROOT / "pyproject.toml").read_text()
    (oldest,) = (row for row in matrix.ROWS if row.name.startswith("oldest"))
    assert f'requires-python = ">={oldest.python}"' in project
    for pin in oldest.pins:
        assert '"' + pin.replace("==", ">=").removesuffix(".0") in project, pin
