"""The health of a backend is checked once, and does not depend on the modes around the call that checks it."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from grouped_gemm import grouped_mm, reference
from grouped_gemm.backends import _HealthCheck, emulated, triton
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


def _wrong_group(y, db, a, b):
    y[29] = a[29] @ b[1]


def _too_few_rows(y, db, a, b):
    db[0] = a[:29].t().double() @ y[:29].double()


def _too_many_rows(y, db, a, b):
    db[2] = a[29:80].t().double() @ y[29:80].double()


def _rows_past_the_end(y, db, a, b):
    y[80] = 1


def _short_contraction(y, db, a, b):
    y[60] = a[60, :60] @ b[2, :60]


WRONG = (_wrong_group, _too_few_rows, _too_many_rows, _rows_past_the_end, _short_contraction)


@pytest.mark.parametrize("spoil", (None, *WRONG))
def test_triton_is_broken_if_one_row_is_wrong(monkeypatch, spoil):
    pytest.importorskip("triton")

    def run(a, b, offs):
        y = reference.grouped_mm(a, b, offs.tolist()).bfloat16()
        db = reference.wgrad(a, y, offs.tolist()).bfloat16()
        if spoil is not None:
            spoil(y, db, a, b)
        return y, db

    monkeypatch.setattr(triton, "_run_tiny", run)
    assert triton.Backend().health(CPU).is_good is (spoil is None)
