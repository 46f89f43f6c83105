"""The user's choice of a backend, and all environment variables.

Precedence: the argument ``kernel_preference``, then the innermost `prefer`, then the environment variable
GROUPED_GEMM_BACKEND, then AUTO. An argument of AUTO, the default, defers to the next one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeAlias


class BackendKind(Enum):
    """A backend."""

    EMULATED = "emulated"
    TORCH = "torch"
    TRITON = "triton"
    DEEPGEMM = "deepgemm"
    HIPBLASLT = "hipblaslt"
    # The enums of this package keep Enum's own hash, although it is slow: Dynamo of torch 2.11 supports no other.

    @classmethod
    def named(cls, name: str) -> BackendKind:
        """As ``BackendKind(name)``, which Dynamo of torch 2.11 cannot trace.

        Raises:
            KeyError: no backend has this name.
        """
        return _KINDS[name]


_KINDS = {kind.value: kind for kind in BackendKind}


class KernelPreference(Enum):
    """A user's choice: a backend, or AUTO, the fastest backend that can run the call."""

    AUTO = "auto"
    EMULATED = "emulated"
    TORCH = "torch"
    TRITON = "triton"
    DEEPGEMM = "deepgemm"
    HIPBLASLT = "hipblaslt"

    @property
    def kind(self) -> BackendKind | None:
        """The chosen backend; None for AUTO."""
        return None if self is KernelPreference.AUTO else BackendKind(self.value)

    @classmethod
    def parse(cls, value: Preference, argument: str = "kernel_preference") -> KernelPreference:
        """Converts ``value``: a `KernelPreference`, a `BackendKind`, or a name, in upper or lower case.

        Raises:
            ValueError: the name is unknown. The message names ``argument``.
        """
        if isinstance(value, KernelPreference):
            return value
        if isinstance(value, BackendKind):
            return _BY_NAME[value.value]
        if isinstance(value, str) and value.lower() in _BY_NAME:
            return _BY_NAME[value.lower()]
        raise ValueError(f"{argument}: expected a KernelPreference or one of {', '.join(_BY_NAME)}; found {value!r}")


Preference: TypeAlias = KernelPreference | BackendKind | str
_BY_NAME = {preference.value: preference for preference in KernelPreference}


@dataclass(frozen=True)
class Variable:
    """An environment variable of this package, with its description for docs/env.md and doctor."""

    name: str
    values: tuple[str, ...]  # empty: a directory
    default: str
    meaning: str


class Switch(Variable):
    """A variable with a few values. It is read at every call, but inside `torch.compile` only while tracing."""

    def read(self) -> str:
        """The value in lower case.

        Raises:
            ValueError: the variable is set to an unknown value.
        """
        value = os.environ.get(self.name)
        if not value:
            return self.default
        if value.lower() not in self.values:
            raise ValueError(f"{self.name}: expected one of {', '.join(self.values)}; found {value!r}")
        return value.lower()

    def is_on(self) -> bool:
        """For a switch of 0 and 1: whether it is 1."""
        return self.read() == "1"

    def is_on_now(self) -> bool:
        """As `is_on`, a microsecond faster if the variable is not set. For ops, which Dynamo does not trace."""
        return _get(_key_of[self.name]) is not None and self.is_on()


BACKEND = Switch(
    "GROUPED_GEMM_BACKEND",
    tuple(_BY_NAME),
    "auto",
    "The backend of every call that chooses none by its argument or a surrounding prefer(...).",
)
STRICT = Switch(
    "GROUPED_GEMM_STRICT",
    ("0", "1"),
    "0",
    "1: on a GPU, AUTO raises an error instead of falling back to the Emulated backend with a warning.",
)
LOG = Switch("GROUPED_GEMM_LOG", ("0", "1"), "0", "1: print each distinct decision once to standard error.")
VALIDATE = Switch(
    "GROUPED_GEMM_VALIDATE",
    ("0", "1"),
    "0",
    "1: check values, with a host sync at every call: offs, cached weights, a checkpoint's scales.",
)
AUTOTUNE = Switch(
    "GROUPED_GEMM_AUTOTUNE",
    ("0", "1"),
    "0",
    "1: warmup measures backends and searches tiles of the Triton kernels; calls use the stored results of both.",
)
SWITCHES = (BACKEND, STRICT, LOG, VALIDATE, AUTOTUNE)
CACHE_DIR = Variable(
    "GROUPED_GEMM_CACHE_DIR",
    (),
    "grouped_gemm in XDG_CACHE_HOME or ~/.cache",
    "The directory of the files that warmup writes with GROUPED_GEMM_AUTOTUNE=1.",
)


def cache_directory() -> Path:
    """The directory for files: GROUPED_GEMM_CACHE_DIR, else "grouped_gemm" in XDG_CACHE_HOME or ~/.cache.

    Raises:
        OSError: the directory is in a home directory, and there is no home directory.
    """
    named = os.environ.get(CACHE_DIR.name) or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "grouped_gemm"
    )
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise OSError(f"no home directory for {named}") from error


# For a variable that is not set, os.environ encodes the name and raises a KeyError each time. The dict behind it, with
# encoded names, takes a tenth of the time.
_variables: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_encoded = str if _variables is os.environ else os.environ.encodekey
_key_of: dict[str, Any] = {switch.name: _encoded(switch.name) for switch in SWITCHES}
_keys = tuple(_key_of.values())
_get = _variables.get


def environment() -> tuple[Any, ...]:
    """The current settings of all switches, encoded. Equal tuples mean equal settings."""
    return tuple(map(_get, _keys))


class _Surrounding(threading.local):
    """The settings of the `prefer` blocks around this thread's calls; a preference of None: there is none.

    It is a threading.local rather than a ContextVar because Dynamo traces and guards only the former, so a compiled
    function follows `prefer`. The attributes are set in __init__ because Dynamo does not guard class attributes.
    """

    def __init__(self) -> None:
        self.kernel_preference: KernelPreference | None = None
        self.host_sync = True


surrounding = _Surrounding()


def check_bool(argument: str, value: object) -> None:
    """Checks that ``value`` is True or False.

    Raises:
        TypeError: it is anything else, including objects with a truth value, such as NumPy's bool.
    """
    if not isinstance(value, bool):
        found = type(value)
        module = "" if found.__module__ == "builtins" else f"{found.__module__}."
        raise TypeError(f"{argument}: expected True or False; found {value!r} of type {module}{found.__qualname__}")


@contextmanager
def prefer(kernel_preference: Preference | None = None, *, host_sync: bool | None = None) -> Iterator[None]:
    """Sets the preference for calls inside the block, in this thread. Blocks nest; the innermost wins.

    An argument that is not given keeps the surrounding block's value.

    Args:
        kernel_preference: a backend or its name. ``"auto"`` means AUTO even if the environment names a backend.
        host_sync: False: refuse every backend whose passes would synchronize the host.

    Raises:
        TypeError: ``host_sync`` is not a bool.
        ValueError: no backend has this name.
    """
    if host_sync is not None:
        check_bool("host_sync", host_sync)
    before = surrounding.kernel_preference, surrounding.host_sync
    if kernel_preference is not None:
        surrounding.kernel_preference = KernelPreference.parse(kernel_preference)
    if host_sync is not None:
        surrounding.host_sync = host_sync
    try:
        yield
    finally:
        surrounding.kernel_preference, surrounding.host_sync = before


def resolve(argument: KernelPreference, context: KernelPreference | None) -> tuple[KernelPreference, str]:
    """The preference in effect, and where it comes from: "argument", "context", "environment" or "default".

    Raises:
        ValueError: GROUPED_GEMM_BACKEND has an unknown value.
    """
    if argument is not KernelPreference.AUTO:
        return argument, "argument"
    if context is not None:
        return context, "context"
    from_environment = KernelPreference.parse(BACKEND.read(), BACKEND.name)
    return from_environment, "default" if from_environment is KernelPreference.AUTO else "environment"
