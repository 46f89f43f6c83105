"""Runs tests in processes of their own, two at a time, each with a log that survives a hang."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 600  # seconds


def environment(**variables: str | None) -> dict[str, str]:
    """The environment of this process with ``variables`` set, or unset where None. It imports the package from here."""
    changed = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)} | variables
    return {name: value for name, value in changed.items() if value is not None}


def run(command: Sequence[str | Path], log: Path, environment: dict[str, str], timeout: float = TIMEOUT) -> int:
    """Runs a Python ``command`` with its output in ``log``, and returns its exit code.

    After ``timeout`` seconds the process is aborted, and its Python stack goes to the log.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment | {"PYTHONFAULTHANDLER": "1"}, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            process.wait()
            file.write(f"\naborted after {timeout} seconds\n")
            return -signal.SIGABRT


@contextmanager
def two_at_a_time(request: pytest.FixtureRequest, parameter: str, start: Callable[[Any], Any]) -> Iterator[dict]:
    """Futures of ``start(value)``, for each value of ``parameter`` among the selected tests of the file."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    values = dict.fromkeys(item.callspec.params[parameter] for item in items if parameter in item.callspec.params)
    with ThreadPoolExecutor(2) as pool:
        futures: dict[Any, Future] = {value: pool.submit(start, value) for value in values}
        try:
            yield futures
        finally:
            pool.shutdown(cancel_futures=True)
