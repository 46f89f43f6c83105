"""Calls that are alike are checked and decided once, and every change that matters is noticed."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest
import torch

from grouped_gemm import (
    BackendKind,
    NoBackendError,
    functional,
    grouped_mm,
    override_torch,
    prefer,
    quantize_weights,
)
from grouped_gemm.core.preference import SWITCHES, environment
from grouped_gemm.selection import route

M, E, K, N = 12, 3, 48, 32
A = torch.ones(M, K, dtype=torch.bfloat16)
B = torch.ones(E, K, N, dtype=torch.bfloat16)
OFFS = torch.tensor([4, 4, 12], dtype=torch.int32)
BIAS = torch.ones(E, N, dtype=torch.bfloat16)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The ``a`` of each call that is checked; the list grows as calls are made."""
    seen, describe = [], functional.describe

    def record(a, *rest):
        seen.append(a)
        return describe(a, *rest)

    monkeypatch.setattr(functional, "describe", record)
    return seen


# Calls that are alike


ALIKE = {
    "other tensors": lambda: grouped_mm(A.clone(), B.clone(), OFFS.clone()),
    "other values of offs": lambda: grouped_mm(A, B, torch.tensor([0, 1, 1], dtype=torch.int32)),
    "other rows of one class": lambda: grouped_mm(A[:5], B, OFFS.clamp(max=5)),
    "explicit defaults": lambda: grouped_mm(A, B, OFFS, group_alignment=1, recipe=None),
}


@pytest.mark.parametrize("call", ALIKE.values(), ids=ALIKE)
def test_calls_that_are_alike_are_checked_once(call, prepared):
    grouped_mm(A, B, OFFS)
    call()
    assert len(prepared) == 1


def test_quantized_weights_and_training_are_checked_once_too(prepared):
    weights = quantize_weights(B, "fp8_blockwise")
    for _ in range(2):
        grouped_mm(A, weights, OFFS)
        grouped_mm(A.clone().requires_grad_(), B.clone().requires_grad_(), OFFS, bias=BIAS)
    assert len(prepared) == 2


def test_operands_that_autocast_casts_are_checked_once_too(prepared):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert grouped_mm(A.float(), B.float(), OFFS).dtype == torch.bfloat16
    assert len(prepared) == 1


def test_one_route_per_row_class_is_kept_while_rows_change():
    for num_rows in (0, 1, 7, 48, 49, 200, 768, 769, 1000):
        grouped_mm(torch.ones(num_rows, K), B.float(), torch.zeros(E, dtype=torch.int32))
    assert len(route._known) == 3


def test_the_number_of_routes_is_bounded(monkeypatch):
    monkeypatch.setattr(route, "_MAX_ROUTES", 4)
    for n in range(1, 12):
        grouped_mm(A, B[:, :, :n].contiguous(), OFFS)
        assert len(route._known) <= 4


def test_calls_on_subclasses_have_no_number():
    class Other(torch.Tensor):
        pass

    for a in (A, A.clone().as_subclass(Other)):
        grouped_mm(a, B, OFFS)
    plain, other = route._known.values()
    assert plain.number is not None and other.number is None


def test_no_operand_is_kept_alive():
    a, b, weights = A.clone(), B.clone(), quantize_weights(B, "mxfp8")
    grouped_mm(a, b, OFFS)
    grouped_mm(a, weights, OFFS)
    gone = [weakref.ref(x) for x in (a, b, weights)]
    del a, b, weights
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_the_warning_about_a_fallback_names_the_line_of_the_call(monkeypatch):
    monkeypatch.setattr(route.Decision, "falls_back", True)
    calls = (
        lambda: grouped_mm(A, B, OFFS),
        lambda: quantize_weights(B, "mxfp8"),
        lambda: override_torch()(torch._grouped_mm)(A, B, offs=OFFS),
    )
    for call in calls:
        route.reset_caches()
        with pytest.warns(UserWarning, match="falls back to the Emulated backend") as caught:
            call()
        assert caught[0].filename == __file__


# Changes that must be noticed


def test_the_environment_acts_on_the_next_call(monkeypatch):
    grouped_mm(A, B, OFFS)
    monkeypatch.setenv("GROUPED_GEMM_BACKEND", "deepgemm")
    with pytest.raises(NoBackendError, match="deepgemm, requested by the environment"):
        grouped_mm(A, B, OFFS)
    monkeypatch.delenv("GROUPED_GEMM_BACKEND")
    grouped_mm(A, B, OFFS)
    monkeypatch.setenv("GROUPED_GEMM_VALIDATE", "1")
    with pytest.raises(ValueError, match=r"^offs\[1\]"):
        grouped_mm(A, B, torch.tensor([4, 3, 12], dtype=torch.int32))


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_every_way_to_change_the_environment_is_noticed(switch, monkeypatch):
    seen = [environment()]
    monkeypatch.setenv(switch.name, "0")
    seen.append(environment())
    os.environ[switch.name] = "1"
    seen.append(environment())
    os.environ.update({switch.name: ""})
    seen.append(environment())
    os.environ.pop(switch.name)
    assert len(set(seen)) == 4
    assert environment() == seen[0]


def test_a_decision_during_which_the_environment_changes_is_not_kept(monkeypatch):
    describe = functional.describe

    def meddle(*args):
        monkeypatch.setenv("GROUPED_GEMM_LOG", "1")
        return describe(*args)

    monkeypatch.setattr(functional, "describe", meddle)
    grouped_mm(A, B, OFFS)
    assert not route._known


def test_a_change_by_putenv_has_no_effect(monkeypatch):
    os.putenv("GROUPED_GEMM_BACKEND", "deepgemm")
    try:
        grouped_mm(A, B, OFFS)
        monkeypatch.setenv("GROUPED_GEMM_BACKEND", "deepgemm")
        with pytest.raises(NoBackendError):
            grouped_mm(A, B, OFFS)
    finally:
        os.unsetenv("GROUPED_GEMM_BACKEND")


def test_prefer_acts_on_the_next_call():
    grouped_mm(A, B, OFFS)
    with prefer("deepgemm"), pytest.raises(NoBackendError, match="deepgemm, requested by the context"):
        grouped_mm(A, B, OFFS)
    grouped_mm(A, B, OFFS)
    with pytest.raises(NoBackendError, match="deepgemm, requested by the argument"):
        grouped_mm(A, B, OFFS, kernel_preference=BackendKind.DEEPGEMM)


def test_a_cached_route_is_not_used_under_the_preference_of_another_thread():
    refused = []

    def elsewhere() -> None:
        with prefer("deepgemm"):
            try:
                grouped_mm(A, B, OFFS)
            except NoBackendError as error:
                refused.append(str(error))

    grouped_mm(A, B, OFFS)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    grouped_mm(A, B, OFFS)
    assert len(refused) == 1


def test_gradients_follow_requires_grad_and_the_grad_mode():
    a, b = A.clone(), B.clone()
    found = [grouped_mm(a, b, OFFS).requires_grad]
    a.requires_grad_()
    found.append(grouped_mm(a, b, OFFS).requires_grad)
    with torch.no_grad():
        found.append(grouped_mm(a, b, OFFS).requires_grad)
    with torch.inference_mode():
        found.append(grouped_mm(a, b, OFFS).requires_grad)
    a.requires_grad_(False)
    found.append(grouped_mm(a, b, OFFS).requires_grad)
    found.append(grouped_mm(a, b, OFFS, bias=BIAS.clone().requires_grad_()).requires_grad)
    assert found == [False, True, False, False, False, True]


def test_a_later_call_that_needs_a_gradient_is_refused_where_no_backend_has_it():
    weights = quantize_weights(B, "mxfp8")
    a = A.clone().requires_grad_()
    grouped_mm(A, weights, OFFS)
    with torch.no_grad():
        grouped_mm(a, weights, OFFS)
    with pytest.raises(NoBackendError, match="dgrad requires quantized weights in its layout"):
        grouped_mm(a, weights, OFFS)


def test_entering_and_leaving_autocast_is_noticed():
    dtypes = [grouped_mm(A, B, OFFS).dtype]
    with torch.autocast("cpu", dtype=torch.float16):
        dtypes.append(grouped_mm(A, B, OFFS).dtype)
        with torch.autocast("cpu", enabled=False):
            dtypes.append(grouped_mm(A, B, OFFS).dtype)
    dtypes.append(grouped_mm(A, B, OFFS).dtype)
    assert dtypes == [torch.bfloat16, torch.float16, torch.bfloat16, torch.bfloat16]


def test_changed_options_are_noticed():
    assert grouped_mm(A, B, OFFS).dtype == torch.bfloat16
    assert grouped_mm(A, B, OFFS, out_dtype=torch.float32).dtype == torch.float32
    assert (grouped_mm(A, B, OFFS, bias=BIAS) == K + 1).all()
    assert (grouped_mm(A, B, OFFS) == K).all()


@pytest.mark.parametrize(
    ("num_rows", "a"),
    ((0, A.t().contiguous().t()), (1, A[:, ::2][:, :1])),
    ids=("no row", "a single value"),
)
def test_strides_that_do_not_matter_for_few_rows_matter_for_more(num_rows, a, monkeypatch):
    """Whatever its strides, a tensor without rows is contiguous, and so is one of a single value."""
    passed = []
    run_forward = functional.run_forward
    monkeypatch.setattr(functional, "run_forward", lambda a, *rest: passed.append(a) or run_forward(a, *rest))
    b = B[:, : a.shape[1]].contiguous()
    grouped_mm(a[:num_rows], b, OFFS.clamp(max=num_rows))
    grouped_mm(a, b, OFFS)
    assert passed[1].stride() == (a.shape[1], 1)


def test_a_changed_layout_of_weights_is_noticed(monkeypatch):
    passed = []
    run_forward = functional.run_forward
    monkeypatch.setattr(functional, "run_forward", lambda *args: passed.append(args) or run_forward(*args))
    for b in (B, B.transpose(1, 2).contiguous().transpose(1, 2), B.repeat(1, 2, 2)[:, ::2, ::2]):
        grouped_mm(A, b, OFFS)
    assert [b.stride()[1:] for _, b, *_ in passed] == [(N, 1), (1, K), (N, 1)]
    assert [route.b_contiguous for *_, route, _ in passed] == ["n", "k", "n"]


@pytest.mark.parametrize("name", ("a", "b", "offs", "bias"))
def test_a_sparse_operand_is_named(name):
    good = {"a": A, "b": B, "offs": OFFS, "bias": BIAS[:1, :1].expand(E, N)}  # its strides are those of a sparse one
    grouped_mm(**good)
    with pytest.raises(ValueError, match=f"^{name}: expected a dense tensor; found torch.sparse_coo"):
        grouped_mm(**good | {name: good[name].to_sparse()})
