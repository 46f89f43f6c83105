"""Files that several processes of a machine change and read: what is found ahead of time is kept in them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


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
