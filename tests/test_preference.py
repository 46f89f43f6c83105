"""Which backend a call asks for: that of the argument, then prefer(...), then the environment, then AUTO."""

from __future__ import annotations

import threading

import pytest
import torch

from grouped_gemm import BackendKind, Decision, KernelPreference, explain, grouped_mm, prefer, quantize_weights
from grouped_gemm.core.preference import AUTOTUNE, BACKEND, SWITCHES, resolve

A = torch.ones(4, 32, dtype=torch.bfloat16)
B = torch.ones(2, 32, 16, dtype=torch.bfloat16)
OFFS = torch.tensor([1, 4], dtype=torch.int32)


@pytest.fixture(autouse=True)
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch in SWITCHES:
        monkeypatch.delenv(switch.name, raising=False)


def decision(**options) -> Decision:
    return explain(A, B, OFFS, **options).decision


def asked(**options) -> tuple[str, str]:
    """Which backend is asked for, and where."""
    found = decision(**options)
    return found.preference.value, found.asked_by


# Precedence


@pytest.mark.parametrize(
    ("argument", "context", "environment", "expected"),
    (
        ("triton", "torch", "deepgemm", ("triton", "argument")),
        ("auto", "torch", "deepgemm", ("torch", "context")),
        ("auto", "auto", "deepgemm", ("auto", "context")),
        ("auto", None, "deepgemm", ("deepgemm", "environment")),
        ("auto", None, "auto", ("auto", "default")),
        ("auto", None, "", ("auto", "default")),
        ("auto", None, None, ("auto", "default")),
    ),
)
def test_the_argument_comes_before_the_context_before_the_environment(
    monkeypatch, argument, context, environment, expected
):
    if environment is not None:
        monkeypatch.setenv("GROUPED_GEMM_BACKEND", environment)
    with prefer(context):
        assert asked(kernel_preference=argument) == expected


def test_a_call_without_the_argument_asks_for_auto():
    assert asked() == ("auto", "default")


def test_quantize_weights_follows_the_same_precedence(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_BACKEND", "deepgemm")
    with pytest.raises(RuntimeError, match=r"^deepgemm, requested by the environment"):
        quantize_weights(B, "mxfp8")
    with prefer("triton"), pytest.raises(RuntimeError, match=r"^triton, requested by the context"):
        quantize_weights(B, "mxfp8")
    with prefer("triton"):
        weights = quantize_weights(B, "mxfp8", kernel_preference="emulated")
    assert weights.forward_backend is BackendKind.EMULATED


def test_the_environment_is_read_at_every_call(monkeypatch):
    assert asked() == ("auto", "default")
    monkeypatch.setenv("GROUPED_GEMM_BACKEND", "triton")
    assert asked() == ("triton", "environment")


def test_an_unknown_environment_value_does_not_matter_where_a_context_comes_first(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_BACKEND", "cuda")
    assert resolve(KernelPreference.AUTO, KernelPreference.TORCH) == (KernelPreference.TORCH, "context")


# prefer


def test_the_innermost_block_wins_and_restores_the_outer_one():
    seen = []
    with prefer("triton"):
        with prefer("torch"):
            seen.append(asked())
        seen.append(asked())
    seen.append(asked())
    assert seen == [("torch", "context"), ("triton", "context"), ("auto", "default")]


def test_a_block_that_raises_restores_the_preference():
    with pytest.raises(ZeroDivisionError), prefer("triton", host_sync=False):
        raise ZeroDivisionError
    assert asked() == ("auto", "default")
    assert decision().spec.host_sync


def test_another_thread_does_not_see_the_block():
    seen = []
    with prefer("triton", host_sync=False):
        thread = threading.Thread(target=lambda: seen.append((asked(), decision().spec.host_sync)))
        thread.start()
        thread.join()
    assert seen == [(("auto", "default"), True)]


def test_blocks_of_several_threads_do_not_mix():
    names = ("triton", "torch", "deepgemm", "hipblaslt")
    inside, seen = threading.Barrier(len(names), timeout=10), {}

    def run(name: str) -> None:
        with prefer(name):
            inside.wait()
            seen[name] = asked()
            inside.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {name: (name, "context") for name in names}


def test_host_sync_is_allowed_unless_refused():
    assert decision().spec.host_sync
    with prefer(host_sync=False):
        assert not decision().spec.host_sync


def test_options_that_a_block_does_not_set_are_unchanged():
    with prefer("triton", host_sync=False):
        with prefer("torch"):
            assert not decision().spec.host_sync
        with prefer(host_sync=True):
            assert asked() == ("triton", "context")
            assert decision().spec.host_sync
        assert not decision().spec.host_sync


def test_refusing_host_syncs_has_no_effect_on_a_cpu():
    with prefer(host_sync=False):
        assert torch.equal(grouped_mm(A, B, OFFS), torch.full((4, 16), 32, dtype=torch.bfloat16))


# Names


@pytest.mark.parametrize("preference", KernelPreference, ids=lambda preference: preference.value)
@pytest.mark.parametrize("spelling", (str.lower, str.upper, str.title), ids=("lower", "upper", "title"))
def test_a_backend_is_known_by_its_name_in_either_case(monkeypatch, preference, spelling):
    name = spelling(preference.value)
    assert KernelPreference.parse(name) is preference
    with prefer(name):
        assert asked()[0] == preference.value
    monkeypatch.setenv("GROUPED_GEMM_BACKEND", name)
    assert asked()[0] == preference.value


def test_a_preference_is_taken_as_it_is():
    for value in (KernelPreference.TRITON, BackendKind.TRITON):
        assert KernelPreference.parse(value) is KernelPreference.TRITON


EXPECTED = f"one of {', '.join(preference.value for preference in KernelPreference)}; found 'cuda'"


def test_an_unknown_name_in_the_argument_is_named():
    with pytest.raises(ValueError, match=f"^kernel_preference: expected a KernelPreference or {EXPECTED}$"):
        grouped_mm(A, B, OFFS, kernel_preference="cuda")


def test_an_unknown_name_in_prefer_is_named():
    with pytest.raises(ValueError, match=f"^kernel_preference: .* {EXPECTED}$"), prefer("cuda"):
        pass


def test_a_preference_of_another_type_is_named():
    with pytest.raises(ValueError, match=r"^kernel_preference: .*; found 3$"):
        grouped_mm(A, B, OFFS, kernel_preference=3)


# AUTOTUNE is read where tiles are looked up: test_tuning.py
@pytest.mark.parametrize("switch", [s for s in SWITCHES if s is not AUTOTUNE], ids=lambda switch: switch.name)
def test_an_unknown_value_of_a_switch_is_named_by_the_next_call(monkeypatch, switch):
    grouped_mm(A, B, OFFS)  # caches its route
    monkeypatch.setenv(switch.name, "maybe")
    known = ", ".join(switch.values)
    with pytest.raises(ValueError, match=f"^{switch.name}: expected one of {known}; found 'maybe'$"):
        grouped_mm(A, B, OFFS)


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.name)
def test_an_empty_switch_is_at_its_default(monkeypatch, switch):
    monkeypatch.setenv(switch.name, "")
    assert switch.read() == switch.default


@pytest.mark.parametrize(
    ("switch", "value"),
    [(switch, value) for switch in SWITCHES if switch is not BACKEND for value in ("0", "1")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_switch_is_on_at_1_and_off_at_0(monkeypatch, switch, value):
    monkeypatch.setenv(switch.name, value)
    assert switch.is_on() is (value == "1")
