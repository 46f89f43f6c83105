"""The health of a backend is checked once, and does not depend on the modes around the call that checks it."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from grouped_gemm import grouped_mm
from grouped_gemm.backends import _HealthCheck, emulated
from grouped_gemm.backends.base import Health

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BROKEN = Health("broken", "Repair it.")


class Backend(emulated.Backend):
    """Records the modes around its health check."""

    def __init__(self) -> None:
        self.modes: list[tuple[object, ...]] = []

    def health(self, device: torch.device) -> Health:
        self.modes.append(
            (
                torch._C._len_torch_dispatch_stack(),
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                type(torch.zeros(1) + 1),
            )
        )
        return BROKEN


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **kwargs or {})


class Replace(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        return result.as_subclass(torch.nn.Buffer) if isinstance(result, torch.Tensor) else result


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("modes", (Watch, Replace, torch.inference_mode, autocast), ids=lambda s: s.__name__)
def test_a_health_check_runs_outside_of_all_modes(modes):
    backend = Backend()
    with modes():
        assert _HealthCheck(backend, CPU)() == BROKEN
    assert backend.modes == [(0, False, False, False, torch.Tensor)]


def test_no_health_check_runs_while_a_graph_is_captured(monkeypatch):
    backend = Backend()
    checkup = _HealthCheck(backend, GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert checkup() == Health() and backend.modes == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert checkup() == checkup() == BROKEN and len(backend.modes) == 1


def test_meta_tensors_have_a_backend():
    a, b = torch.empty(8, 32, device="meta"), torch.empty(2, 32, 16, device="meta")
    y = grouped_mm(a, b, torch.empty(2, dtype=torch.int32, device="meta"))
    assert y.shape == (8, 16) and y.is_meta
