"""Which backend the user asks for, and every switch that is read from the environment.

Precedence: the argument ``kernel_preference``, then the innermost `prefer`, then the environment
variable GROUPED_GEMM_BACKEND, then AUTO. An argument of AUTO, the default, defers to the next.
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
    # The enums of this package keep Enum's own hash, slow as it is: Dynamo of torch 2.11 knows no other.

    @classmethod
    def named(cls, name: str) -> BackendKind:
        """The backend of this name, as ``BackendKind(name)``, which Dynamo of torch 2.11 does not trace.

        Raises:
            KeyError: nothing has this name.
        """
        return _KINDS[name]


_KINDS = {kind.value: kind for kind in BackendKind}


class KernelPreference(Enum):
    """What a user asks for: a backend, or AUTO, the fastest one that can run the call."""

    AUTO = "auto"
    EMULATED = "emulated"
    TORCH = "torch"
    TRITON = "triton"
    DEEPGEMM = "deepgemm"
    HIPBLASLT = "hipblaslt"

    @property
    def kind(self) -> BackendKind | None:
        """The backend that it names; None for AUTO."""
        return None if self is KernelPreference.AUTO else BackendKind(self.value)

    @classmethod
    def parse(cls, value: Preference, argument: str = "kernel_preference") -> KernelPreference:
        """The preference that ``value`` stands for: itself, a `BackendKind`, or the name of one in either case.

        Raises:
            ValueError: nothing has this name; the message says that it was found in ``argument``.
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
    """An environment variable, as docs/env.md and doctor describe it."""

    name: str
    values: tuple[str, ...]  # empty: any directory
    default: str
    meaning: str


class Switch(Variable):
    """One of a few values. Read at every call, except inside `torch.compile`, where it is read while tracing."""

    def read(self) -> str:
        """Its value in lower case.

        Raises:
            ValueError: it is set to something that it does not know.
        """
        value = os.environ.get(self.name)
        if not value:
            return self.default
        if value.lower() not in self.values:
            raise ValueError(f"{self.name}: expected one of {', '.join(self.values)}; found {value!r}")
        return value.lower()

    def is_on(self) -> bool:
        """Whether a switch of 0 and 1 is 1."""
        return self.read() == "1"

    def is_on_now(self) -> bool:
        """`is_on`, a microsecond sooner where it is not set; for ops, into which Dynamo does not look."""
        return _get(_key_of[self.name]) is not None and self.is_on()


BACKEND = Switch(
    "GROUPED_GEMM_BACKEND",
    tuple(_BY_NAME),
    "auto",
    "The backend of every call that names none, in its argument or in a surrounding prefer(...).",
)
STRICT = Switch(
    "GROUPED_GEMM_STRICT",
    ("0", "1"),
    "0",
    "1: on a GPU, AUTO raises where it would fall back to the Emulated backend with a warning.",
)
LOG = Switch("GROUPED_GEMM_LOG", ("0", "1"), "0", "1: each distinct decision is printed once to standard error.")
VALIDATE = Switch(
    "GROUPED_GEMM_VALIDATE",
    ("0", "1"),
    "0",
    "1: values are checked, with a host sync at every call: offs, weights in cache_weights, a checkpoint's scales.",
)
AUTOTUNE = Switch(
    "GROUPED_GEMM_AUTOTUNE",
    ("0", "1"),
    "0",
    "1: warmup times backends and searches tiles for the Triton kernels; calls use what the files of both hold.",
)
SWITCHES = (BACKEND, STRICT, LOG, VALIDATE, AUTOTUNE)
CACHE_DIR = Variable(
    "GROUPED_GEMM_CACHE_DIR",
    (),
    "grouped_gemm in XDG_CACHE_HOME or ~/.cache",
    "The directory of the files that warmup writes with GROUPED_GEMM_AUTOTUNE=1.",
)


def cache_directory() -> Path:
    """Where files are kept: GROUPED_GEMM_CACHE_DIR, else "grouped_gemm" in XDG_CACHE_HOME or ~/.cache.

    Raises:
        OSError: that is in a home directory, and there is none.
    """
    named = os.environ.get(CACHE_DIR.name) or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "grouped_gemm"
    )
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise OSError(f"no home directory for {named}") from error


# os.environ encodes a name and raises a KeyError at each look for a variable that is not set. The dict behind it, with
# encoded names, answers in a tenth of the time.
_variables: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_encoded = str if _variables is os.environ else os.environ.encodekey
_key_of: dict[str, Any] = {switch.name: _encoded(switch.name) for switch in SWITCHES}
_keys = tuple(_key_of.values())
_get = _variables.get


def environment() -> tuple[Any, ...]:
    """What every switch is set to at this moment, to compare with that of another."""
    return tuple(map(_get, _keys))


class _Surrounding(threading.local):
    """What the `prefer` blocks around this thread ask for; None: nothing.

    A threading.local and no ContextVar, because Dynamo traces and guards the former only: a compiled
    function follows `prefer`. The attributes are set in __init__, since Dynamo does not guard class attributes.
    """

    def __init__(self) -> None:
        self.kernel_preference: KernelPreference | None = None
        self.host_sync = True


surrounding = _Surrounding()


def check_bool(argument: str, value: object) -> None:
    """``value`` is True or False.

    Raises:
        TypeError: it is something else, even if that has a truth, such as NumPy's bool.
    """
    if not isinstance(value, bool):
        found = type(value)
        module = "" if found.__module__ == "builtins" else f"{found.__module__}."
        raise TypeError(f"{argument}: expected True or False; found {value!r} of type {module}{found.__qualname__}")


@contextmanager
def prefer(kernel_preference: Preference | None = None, *, host_sync: bool | None = None) -> Iterator[None]:
    """Sets the preference of the calls inside the block, in this thread. Blocks nest; the innermost wins.

    Args:
        kernel_preference: a backend or its name. ``"auto"`` asks for AUTO even where the environment names a backend.
        host_sync: False refuses every backend whose passes would wait for the device.
            What is not given stays as the surrounding block has it.

    Raises:
        TypeError: ``host_sync`` is no bool.
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
    """The preference that holds, and who asked for it: "argument", "context", "environment" or "default".

    Raises:
        ValueError: GROUPED_GEMM_BACKEND has an unknown value.
    """
    if argument is not KernelPreference.AUTO:
        return argument, "argument"
    if context is not None:
        return context, "context"
    from_environment = KernelPreference.parse(BACKEND.read(), BACKEND.name)
    return from_environment, "default" if from_environment is KernelPreference.AUTO else "environment"
