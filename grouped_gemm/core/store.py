"""Files that several processes of a machine change and read: what is found ahead of time is kept in them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What `read` raises for a file that is damaged, and what looks at its entries may raise.
DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


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
    """Alone among the processes that do this; where there can be no lock, as it comes.

    The directory may be shared: what is in the place of ``file`` is left as it is, and a link there is not followed.
    """
    import fcntl  # not on Windows, where there is no Triton

    lock = None
    try:
        with contextlib.suppress(OSError):  # a link, another user's file, a file system without locks
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        if lock is not None:
            os.close(lock)  # which gives it up


def replace(file: Path, text: str) -> None:
    """Writes ``file`` as a whole or not at all: a reader sees it as it was before or after. Call it under `locked`."""
    temporary = file.with_name(f"{file.name}.{os.urandom(8).hex()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as output:  # a new file, which others may read, as the umask has it
            output.write(text)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
