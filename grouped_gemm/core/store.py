"""The file that keeps what was measured ahead of time: tiles and profiles, for every process of a machine.

`autotune-2.json` is one JSON object: "schema", and a list of entries for each section. An entry holds for one setting
(GPU and versions); those of other settings are kept and ignored.
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

SCHEMA = 2  # of the file, and part of its name: a version with another form reads and writes another file
Entry = dict[str, Any]
K = TypeVar("K")
V = TypeVar("V")

# What reading a damaged file or entry may raise.
DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


def path() -> Path:
    """The file, in `preference.cache_directory`.

    Raises:
        OSError: there is no home directory to keep it in.
    """
    return cache_directory() / f"autotune-{SCHEMA}.json"


def read(file: Path) -> dict[str, list[Entry]]:
    """The sections of a file; empty where there is no file.

    Raises:
        One of DAMAGE: it cannot be read, is of another schema, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if content.pop("schema") != SCHEMA:
        raise ValueError(f"expected schema {SCHEMA}")
    if not all(isinstance(entries, list) for entries in content.values()):
        raise TypeError("expected a list of entries in each section")
    return {name: list(map(dict, entries)) for name, entries in content.items()}


class Section(Generic[K, V]):
    """One list of the file, of values by key.

    Args:
        name: of the list.
        parse: the key and value of an entry; raises one of DAMAGE for an entry that is damaged.
        render: the entry of a key and value.
    """

    def __init__(self, name: str, parse: Callable[[Entry], tuple[K, V]], render: Callable[[K, V], Entry]) -> None:
        self.name = name
        self._parse = parse
        self._render = render
        self._known: dict[tuple[tuple[str, str], ...], dict[K, V]] = {}  # by setting
        self._lock = threading.Lock()

    def known(self, setting: dict[str, str]) -> dict[K, V]:
        """What this process and earlier ones stored for ``setting``; the file is read once.

        A file that is damaged or cannot be read is ignored with a warning.
        """
        name = tuple(setting.items())
        if name not in self._known:
            found: dict[K, V] = {}
            try:
                found = self._parsed(read(path()), setting)
            except OSError as error:
                self._warn(f"a file that can be read; found {error}. What the package ships is used")
            except DAMAGE as error:
                warnings.warn(
                    f"{path()}: expected {self.name}; found {type(error).__name__}: {error}. The file is ignored. "
                    "Delete it; grouped_gemm.warmup then measures again.",
                    stacklevel=3,
                )
            self._known.setdefault(name, found)
        return self._known[name]

    def forget(self) -> None:
        """Reads the file again at the next look: another process may have written to it."""
        self._known.clear()

    def store(self, setting: dict[str, str], found: dict[K, V]) -> None:
        """Uses ``found`` from now on, in this process, and adds it to the file.

        Several processes may do so at once: each reads, adds to and replaces the file under a lock, and a reader sees
        the file as it was before or after. What another process stored first for a key stays, and is used here as well.
        """
        try:
            file = path()
            file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(file.with_suffix(".lock")):
                try:
                    sections = read(file)
                    before = self._parsed(sections, setting)
                except DAMAGE:  # `known` has warned of it
                    sections, before = {}, {}
                new = {key: value for key, value in found.items() if key not in before}
                head = {"setting": setting, "date": date.today().isoformat()}
                entries = [{**head, **self._render(key, value)} for key, value in new.items()]
                sections[self.name] = sections.get(self.name, []) + entries
                _replace(file, json.dumps({"schema": SCHEMA, **sections}, indent=1))
                found = before | new
        except OSError as error:
            self._warn(f"a directory to write to; found {error}. Only this process uses what it measured")
        known = self.known(setting)
        with self._lock:
            self._known[tuple(setting.items())] = known | found

    def _parsed(self, sections: dict[str, list[Entry]], setting: dict[str, str]) -> dict[K, V]:
        return dict(self._parse(entry) for entry in sections.get(self.name, []) if entry["setting"] == setting)

    def _warn(self, expected: str) -> None:
        warnings.warn(
            f"autotune-{SCHEMA}.json: expected {expected}. Set {CACHE_DIR.name} to a directory that can be read and "
            "written.",
            stacklevel=4,
        )


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds a lock among processes; where the file system has no locks, goes on without one.

    The directory may be shared: what lies in the place of ``file`` is left as it is, and a link there is not followed.
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
            os.close(lock)  # which releases it


def _replace(file: Path, text: str) -> None:
    """Writes ``file`` as a whole or not at all: a reader sees it as it was before or after. Call it under `_locked`."""
    temporary = file.with_name(f"{file.name}.{os.urandom(8).hex()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as output:  # a new file, which others may read, as the umask has it
            output.write(text)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
