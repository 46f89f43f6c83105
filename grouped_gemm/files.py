"""Files that several processes of a machine change and read: what is found ahead of time is kept in them."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What `read` raises for a file that is damaged, and what looks at its entries may raise.
DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def read(file: Path, schema: int, name: str) -> list[dict[str, Any]]:
    """The list ``name`` of a JSON file; empty where there is no file.

    Raises:
        One of DAMAGE: it cannot be read, is of another schema, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    if content["schema"] != schema:
        raise ValueError(f"schema {content['schema']!r} and not {schema}")
    entries: list[dict[str, Any]] = content[name]
    return entries


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Alone among the processes that do this; where the file system has no locks, as it comes."""
    import fcntl  # not on Windows, where there is no Triton

    with file.open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file gives it up
        yield


def replace(file: Path, text: str) -> None:
    """Writes ``file`` as a whole or not at all: a reader sees it as it was before or after. Call it under `locked`."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")  # others may read it, as the process's umask has it
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
