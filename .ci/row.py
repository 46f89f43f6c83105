"""Installs and tests one row of the CI matrix, on CI or by hand: `python .ci/row.py "without triton" DIRECTORY`.

DIRECTORY gets the environment of the row, in venv, and the output of doctor, in doctor.json. An existing environment
that is newer than constraints.txt and pyproject.toml is reused.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from matrix import EXTRAS, ROWS, Row

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Prints ``command``, and runs it in the root of the repository."""
    print("+", shlex.join(map(str, command)), flush=True)
    return subprocess.run(command, cwd=ROOT, check=True, text=True, **options)


def constraints(row: Row) -> str:
    """constraints.txt, with the row's pins in place of its own."""
    pinned = {pin.partition("==")[0] for pin in row.pins}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return "\n".join([*(line for line in lines if line.partition("==")[0] not in pinned), *row.pins, ""])


def install(row: Row, directory: Path) -> Path:
    """Makes the row's environment, and returns its Python."""
    venv, pins = directory / "venv", directory / "constraints.txt"
    python = venv / "bin" / "python"
    if not pins.exists() or pins.read_text() != constraints(row):  # make compares its modification time
        pins.write_text(constraints(row))
    run("make", "venv", f"VENV={venv}", f"CONSTRAINTS={pins}", f"PYTHON=python{row.python}")
    extras = [*row.extras, *(EXTRAS[name] for name in row.backends if name in EXTRAS and row.machine)]
    if extras:
        run(python, "-m", "pip", "install", "--no-build-isolation", "-c", pins, "-e", f".[{','.join(extras)}]")
    if row.without:
        run(python, "-m", "pip", "uninstall", "--yes", *row.without)
    if row.has_fake_deep_gemm:
        print_path = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = run(python, "-c", print_path, stdout=subprocess.PIPE).stdout.strip()
        shutil.copy(ROOT / "tests" / "fake_deep_gemm.py", Path(packages) / "deep_gemm.py")
    return python


def check_ready(row: Row, python: Path, directory: Path) -> None:
    """Ends the process if doctor does not find the row's backends ready."""
    found = run(python, "-m", "grouped_gemm", "doctor", "--json", stdout=subprocess.PIPE).stdout
    (directory / "doctor.json").write_text(found)
    print(found)
    backends = {backend["name"]: backend for backend in json.loads(found)["backends"]}
    refused = [name for name in row.must_be_ready if name in backends and not backends[name]["ready"]]
    if refused:
        sys.exit("\n".join(f"{name} is not ready: {backends[name]['reasons']}" for name in refused))


def main(name: str, directory: str) -> int:
    """Installs and tests the row; returns the exit code of its tests."""
    row = next((row for row in ROWS if row.name == name), None)
    if row is None:
        sys.exit(f"NAME: expected one of {', '.join(row.name for row in ROWS)}; found {name}")
    os.environ.update(row.env)
    if not row.machine:
        os.environ.setdefault("PIP_EXTRA_INDEX_URL", CPU_INDEX)
    path = Path(directory).resolve()
    path.mkdir(parents=True, exist_ok=True)
    python = install(row, path)
    check_ready(row, python, path)
    return subprocess.run([python, "-m", "pytest", *row.arguments()], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
