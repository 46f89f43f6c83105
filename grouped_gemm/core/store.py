"""The file that stores measured tiles and profiles, for all processes on a machine.

`autotune-2.json` is one JSON object: "schema", and a list of entries for each section. An entry is valid for one
setting (GPU and versions). Entries of other settings are kept, but ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, Generic, TypeVar

from grouped_gemm.core.preference import CACHE_DIR, cache_directory

SCHEMA = 2  # part of the file's name, so that versions with another schema use another file
Entry = dict[str, Any]
K = TypeVar("K")
V = TypeVar("V")

# Errors from reading a damaged file or entry.
DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


def path() -> Path:
    """The path of the file, in `preference.cache_directory`.

    Raises:
        OSError: it would be in the home directory, and there is none.
    """
    return cache_directory() / f"autotune-{SCHEMA}.json"


def read(file: Path) -> dict[str, list[Entry]]:
    """The sections of a file; empty if there is no file.

    Raises:
        One of DAMAGE: the file cannot be read, has another schema, or is damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if content.pop("schema") != SCHEMA:
        raise ValueError(f"it does not have schema {SCHEMA}")
    if not all(isinstance(entries, list) for entries in content.values()):
        raise TypeError("a section is not a list of entries")
    return dict(content)


class Section(Generic[K, V]):
    """A section of the file: a list of entries, each with a key and a value.

    Args:
        name: the name of the section.
        parse: converts an entry to its key and value; raises one of DAMAGE if the entry is damaged.
        render: converts a key and value to an entry.
    """

    def __init__(self, name: str, parse: Callable[[Entry], tuple[K, V]], render: Callable[[K, V], Entry]) -> None:
        self.name = name
        self._parse = parse
        self._render = render
        self._known: dict[tuple[tuple[str, str], ...], dict[K, V]] = {}  # by setting
        self._lock = threading.Lock()

    def known(self, setting: dict[str, str]) -> dict[K, V]:
        """The values stored for ``setting`` by this process and earlier ones. The file is read once.

        A file or an entry that is damaged, or a file that cannot be read, is ignored with a warning.
        """
        name = tuple(setting.items())
        if name not in self._known:
            found: dict[K, V] = {}
            try:
                found, damaged = self._parsed(read(path()), setting)
                if damaged:
                    self._warn_of_damage(damaged[0][1], "Damaged entries are")
            except OSError as error:
                self._warn(f"a readable file; found {error}. Only the shipped values are used")
            except DAMAGE as error:
                self._warn_of_damage(error, "The file is")
            self._known.setdefault(name, found)
        return self._known[name]

    def forget(self) -> None:
        """Makes the next `known` read the file again, which another process may have changed."""
        self._known.clear()

    def store(self, setting: dict[str, str], found: dict[K, V]) -> None:
        """Adds ``found`` to the file, and uses it in this process from now on.

        Several processes may do this at once: each of them reads, extends and replaces the file under a lock. A reader
        sees the file either before or after a change. If another process has stored a value for a key first, that value
        stays, and this process uses it as well.
        """
        try:
            file = path()
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(file.with_suffix(".lock")):
                sections: dict[str, list[Entry]] = {}
                with contextlib.suppress(*DAMAGE):  # `known` warns about it
                    sections = read(file)
                before, damaged = self._parsed(sections, setting)
                new = {key: value for key, value in found.items() if key not in before}
                head = {"setting": setting, "date": date.today().isoformat()}
                kept = [entry for entry in sections.get(self.name, []) if not any(entry is bad for bad, _ in damaged)]
                sections[self.name] = kept + [{**head, **self._render(key, value)} for key, value in new.items()]
                _replace(file, json.dumps({"schema": SCHEMA, **sections}, indent=1))
                found = before | new
        except OSError as error:
            self._warn(f"a writable directory; found {error}. The measurements are lost when this process ends")
        known = self.known(setting)
        with self._lock:
            self._known[tuple(setting.items())] = known | found

    def _parsed(
        self, sections: dict[str, list[Entry]], setting: dict[str, str]
    ) -> tuple[dict[K, V], list[tuple[Entry, Exception]]]:
        """The values for ``setting``, and the damaged entries with their errors. Other settings' are not looked at."""
        found: dict[K, V] = {}
        damaged: list[tuple[Entry, Exception]] = []
        for entry in sections.get(self.name, []):
            try:
                if entry["setting"] == setting:
                    found.update([self._parse(entry)])
            except DAMAGE as error:
                damaged.append((entry, error))
        return found, damaged

    def _warn_of_damage(self, error: Exception, what: str) -> None:
        warnings.warn(
            f"{path()}: expected valid {self.name}; found {type(error).__name__}: {error}. {what} ignored. Delete the "
            "file; then grouped_gemm.warmup measures again.",
            stacklevel=4,
        )

    def _warn(self, expected: str) -> None:
        warnings.warn(
            f"autotune-{SCHEMA}.json: expected {expected}. Set {CACHE_DIR.name} to a directory that is readable and "
            "writable.",
            stacklevel=4,
        )


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds a lock between processes; without one if the file system has no locks.

    The directory may be shared with other users, so an existing ``file`` is not changed, and a link is not followed.
    """
    import fcntl  # missing on Windows, where there is no Triton

    lock = None
    try:
        with contextlib.suppress(OSError):  # a link, another user's file, a file system without locks
            lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        if lock is not None:
            os.close(lock)  # releases the lock


def _replace(file: Path, text: str) -> None:
    """Replaces ``file`` atomically: a reader sees it either before or after. Call it under `_locked`."""
    temporary = file.with_name(f"{file.name}.{os.urandom(8).hex()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as output:  # a new file with the permissions of the umask
            output.write(text)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
