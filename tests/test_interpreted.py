"""Runs tests of interpreted kernels in processes of their own: the interpreter is switched on for a whole process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import processes
import pytest

from grouped_gemm import Machine
from grouped_gemm.backends import get_backend
from grouped_gemm.core.call_spec import CallSpec, RowClass
from grouped_gemm.core.preference import BackendKind

pytest.importorskip("triton")

FOLDER = Path(__file__).with_name("interpreter")
# The files of each process, by its name; "others" runs all other files. A process takes seconds to start.
FILES = {
    "moe": ["test_moe_fused.py", "test_moe_decode.py"],
    "vendors": ["test_torch_native.py", "test_deepgemm.py", "test_hipblaslt.py"],
}
FILES["others"] = sorted({path.name for path in FOLDER.glob("test_*.py")}.difference(*FILES.values()))


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Log and exit code of each process, by its name in FILES."""
    logs = tmp_path_factory.mktemp("interpreted")
    environment = processes.environment(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")

    def run(name: str) -> tuple[Path, int]:
        log = logs / f"{name}.log"
        paths = [FOLDER / file for file in FILES[name]]
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *paths]
        return log, processes.run(command, log, environment)

    with processes.two_at_a_time(request, "name", run) as running:
        yield running


@pytest.mark.parametrize("name", FILES)
def test_kernels_under_the_interpreter(name, runs):
    log, code = runs[name].result()
    text = log.read_text()
    failing = re.findall(r"^(?:FAILED|ERROR) .*", text, re.MULTILINE)
    assert code == 0, "\n".join([f"exit code {code}; the whole log is {log}", *failing, text[-6000:]])


CALL = """
import os, sys, torch
import grouped_gemm.core.machine
from grouped_gemm import NoBackendError, grouped_mm

a, b, offs = torch.randn(4, 16).bfloat16(), torch.randn(1, 16, 16).bfloat16(), torch.tensor([4], dtype=torch.int32)

def call(recipe=None):
    try:
        y = grouped_mm(a, b, offs, recipe=recipe, kernel_preference="triton")
    except NoBackendError as error:
        return str(error)
    right = grouped_mm(a, b, offs, recipe=recipe, kernel_preference="emulated")
    return "right" if torch.allclose(y, right, rtol=1e-2, atol=1e-2) else "wrong"

"""


def printed(script: str, **variables: str | None) -> list[str]:
    """The lines that ``script``, after CALL, prints in a new process."""
    environment = processes.environment(CUDA_VISIBLE_DEVICES="", **variables)
    done = subprocess.run([sys.executable, "-c", CALL + script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_process_that_starts_with_the_interpreter_keeps_it():
    """This holds for kernels that are first launched after the switch is changed, and for a second device."""
    script = "print(call()); os.environ['TRITON_INTERPRET'] = '0'; print(call()); print(call('fp8_blockwise'))"
    script += "; print(grouped_gemm.core.machine.machine_of('meta').interprets)"
    assert printed(script, TRITON_INTERPRET="1") == ["right"] * 3 + ["True"]


@pytest.mark.parametrize("before", ("call()", "import triton"))
def test_a_process_cannot_switch_to_the_interpreter_later(before):
    script = f"{before}; os.environ['TRITON_INTERPRET'] = '1'; print(call().replace(chr(10), ' '))"
    (refusal,) = printed(script, TRITON_INTERPRET=None)
    assert "found cpu" in refusal and "start the process with TRITON_INTERPRET=1" in refusal


def test_a_missing_numpy_is_named():
    script = "sys.modules['numpy'] = None; print(call().replace(chr(10), ' '))"
    (refusal,) = printed(script, TRITON_INTERPRET="1")
    assert "is installed but broken" in refusal and "needs numpy" in refusal


@pytest.mark.parametrize(
    "vendor, interprets, runs",
    (
        ("cpu", True, True),
        ("cpu", False, False),
        ("nvidia", True, False),
        ("nvidia", False, True),
        ("amd", True, False),
        ("meta", True, False),
    ),
)
def test_interpreted_kernels_are_for_a_cpu_and_compiled_ones_for_a_gpu(vendor, interprets, runs):
    spec = CallSpec(Machine(vendor, vendor, vendor, interprets=interprets), 1, 16, 16, RowClass.DECODE)
    first_two = get_backend(BackendKind.TRITON).requirements[:2]
    assert all(requirement.holds(spec) for requirement in first_two) is runs
