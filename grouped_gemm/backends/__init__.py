"""The backends, one file each, imported when they are first looked at.

A new backend is a file here and a line in `_MODULES`; CONTRIBUTING.md walks through it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from grouped_gemm.backends.base import Health, _GroupedMMBackend
from grouped_gemm.preference import KernelPreference

# Each module has one subclass of _GroupedMMBackend, named Backend.
_MODULES = {
    KernelPreference.EMULATED: "grouped_gemm.backends.emulated",
    KernelPreference.TRITON: "grouped_gemm.backends.triton",
    KernelPreference.DEEPGEMM: "grouped_gemm.backends.deepgemm",
    KernelPreference.HIPBLASLT: "grouped_gemm.backends.hipblaslt",
}


@dataclass(frozen=True)
class Candidate:
    """A backend on a device.

    Attributes:
        backend: the backend.
        health: finds out whether it works there; asked only when every requirement of a problem holds.
    """

    backend: _GroupedMMBackend
    health: Callable[[], Health] = Health


_instances: dict[KernelPreference, _GroupedMMBackend] = {}


def get_backend(kind: KernelPreference) -> _GroupedMMBackend:
    """The one instance of a backend, in a plain dict that Dynamo can look into.

    Raises:
        KeyError: this version has no such backend.
    """
    if kind not in _instances:
        _instances[kind] = importlib.import_module(_MODULES[kind]).Backend()
    return _instances[kind]


@functools.cache
def candidates(device: torch.device) -> tuple[Candidate, ...]:
    """Every backend of this version, on ``device``. Their health is found out once per process and device."""
    return tuple(
        Candidate(backend, functools.cache(functools.partial(_health, backend, device)))
        for backend in map(get_backend, _MODULES)
    )


def _health(backend: _GroupedMMBackend, device: torch.device) -> Health:
    """What the backend's own check says; what it raises is an answer as well."""
    try:
        return backend.health(device)
    except Exception as error:
        return Health(f"{type(error).__name__}: {error}", "Reinstall it for this torch and device.")
