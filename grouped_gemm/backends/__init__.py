"""The backends: one file or folder each, imported at first use.

To add a backend, add a member to `BackendKind` and a file or folder of the same name here. CONTRIBUTING.md has the
steps.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

from grouped_gemm.backends.base import Health, _GroupedMMBackend
from grouped_gemm.core.library import NAMES
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind

_OTHER_NAMES = {BackendKind.TORCH: "torch_native"}  # a module named torch would hide the package torch


@dataclass(frozen=True)
class Candidate:
    """A backend on a device.

    Attributes:
        backend: the backend.
        health: checks whether it works there. Called only when every requirement of a call holds.
    """

    backend: _GroupedMMBackend
    health: Callable[[], Health] = Health


_instances: dict[BackendKind, _GroupedMMBackend] = {}


def get_backend(kind: BackendKind) -> _GroupedMMBackend:
    """The one instance of a backend. It is kept in a plain dict, which Dynamo can trace.

    Raises:
        KeyError: this version has no such backend.
    """
    if kind not in _instances:
        _instances[kind] = _backend_of(f"grouped_gemm.backends.{_OTHER_NAMES.get(kind, kind.value)}")
    return _instances[kind]


def _backend_of(name: str) -> _GroupedMMBackend:
    """The ``Backend`` in the file of this name, or in ``backend.py`` in the folder of this name."""
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.backend")
    backend: _GroupedMMBackend = module.Backend()
    return backend


def register_ops() -> None:
    """Defines every op of this version under ``torch.ops.grouped_gemm``. Otherwise a backend defines its ops at first
    use.

    Call it before `torch.export.load` of a program that calls `grouped_mm`. The ops of the MoE layer are defined by
    importing `grouped_gemm.moe`.
    """
    for kind in BackendKind:
        get_backend(kind)


def gemm_ops() -> list[torch._ops.OpOverload]:
    """The GEMM ops of every backend, which a policy of selective activation checkpointing would save.

    In forward, `grouped_mm` calls ``<backend>_grouped_mm``, or ``<backend>_wgrad`` if both operands have 2 dimensions.
    Those of a fused MoE layer are among them once `grouped_gemm.moe` is imported.

    >>> create_selective_checkpoint_contexts([*gemm_ops(), torch.ops.aten.mm.default])
    """
    register_ops()
    names = sorted(name for name in NAMES if name.endswith(("_grouped_mm", "_gathered_mm", "_gated_mm", "_wgrad")))
    return [getattr(torch.ops.grouped_gemm, name).default for name in names]


def runs_kernels(device: torch.device) -> bool:
    """Whether this package's own kernels run on ``device``: the Triton backend supports the machine and is healthy."""
    return machine_of(device).runs_kernels and _triton_on(device).health().is_good


@functools.cache
def _triton_on(device: torch.device) -> Candidate:
    return next(item for item in candidates(device) if item.backend.kind is BackendKind.TRITON)


@functools.cache
def candidates(device: torch.device) -> tuple[Candidate, ...]:
    """Every backend of this version, on ``device``. Their health is checked once per process and device."""
    return tuple(Candidate(backend, _HealthCheck(backend, device)) for backend in map(get_backend, BackendKind))


class _HealthCheck:
    """The health of a backend on a device, checked at first use.

    Nothing can be run while a CUDA graph is captured. Then the backend is assumed to be healthy, and checked at the
    next call outside of a capture. A decision that rests on this assumption must not be cached.
    """

    def __init__(self, backend: _GroupedMMBackend, device: torch.device) -> None:
        self._backend = backend
        self._device = device
        self._found: Health | None = None

    def __call__(self) -> Health:
        if self._found is None:
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return Health()
            self._found = _health(self._backend, self._device)
        return self._found


def _health(backend: _GroupedMMBackend, device: torch.device) -> Health:
    """The result of the backend's own check. An exception counts as a bad health.

    The first call may come from anywhere: while a model is traced, under modes that watch or replace ops, in autocast,
    or where host syncs are errors.
    """
    casts = device.type != "meta" and torch.is_autocast_enabled(device.type)  # is_autocast_enabled raises for meta
    # Setting the sync debug mode warns once per process, even if it stays off. It is off until CUDA is initialized.
    is_watched = device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.get_sync_debug_mode() != 0
    with (
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False) if casts else nullcontext(),
        _host_syncs_allowed() if is_watched else nullcontext(),
    ):
        try:
            return backend.health(device)
        except Exception as error:
            return Health(f"{type(error).__name__}: {error}", "Reinstall it for this torch and device.")


@contextmanager
def _host_syncs_allowed() -> Iterator[None]:
    """Turns off `torch.cuda.set_sync_debug_mode`, under which a health check could not compare its results."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
