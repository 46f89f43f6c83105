"""The logs of tests that run in processes of their own."""

from __future__ import annotations

import signal
import sys

import processes


def test_output_goes_to_the_log(tmp_path):
    script = "import os, sys; print(os.environ['SWITCH']); print('to stderr', file=sys.stderr); sys.exit(3)"
    log = tmp_path / "log"
    assert processes.run([sys.executable, "-c", script], log, processes.environment(SWITCH="on")) == 3
    assert sorted(log.read_text().split("\n")) == ["", "on", "to stderr"]


def test_a_hang_leaves_its_stack_in_the_log(tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text("import time\n\ndef hang():\n    time.sleep(60)\n\nprint('before', flush=True)\nhang()\n")
    log = tmp_path / "log"
    code = processes.run([sys.executable, script], log, processes.environment(), timeout=2)
    text = log.read_text()
    assert code == -signal.SIGABRT
    assert text.startswith("before") and "line 4 in hang" in text and text.endswith("aborted after 2 seconds\n")
