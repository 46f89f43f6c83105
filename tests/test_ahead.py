"""`warmup`: the calls that it makes, what it must not change, and what it returns."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grouped_gemm import (
    BackendKind,
    CallSpec,
    Machine,
    NoBackendError,
    Pass,
    Warmup,
    backends,
    functional,
    grouped_mm,
    prefer,
    quantize_weights,
    warmup,
)
from grouped_gemm.autotune import profile
from grouped_gemm.autotune import warmup as warmup_module
from grouped_gemm.autotune.measure import measure
from grouped_gemm.backends import emulated
from grouped_gemm.backends.base import Requirement
from grouped_gemm.core import call_spec, store
from grouped_gemm.core.call_spec import RowClass, row_class
from grouped_gemm.kernels.gemm import tile_search, tiles
from grouped_gemm.selection import route

E, K, N = 3, 32, 48


@pytest.fixture
def weights() -> torch.Tensor:
    """(E, K, N), seen through a transpose, of weights that are trained."""
    return torch.randn(E, N, K, dtype=torch.bfloat16, requires_grad=True).transpose(1, 2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of warmup on Emulated as a backend that compiles: a, b, offs, bias, whether gradients are enabled."""
    made = []
    original = warmup_module.grouped_mm

    def call(a, b, offs, *, bias=None, **options):
        made.append((a, b, offs, bias, torch.is_grad_enabled()))
        return original(a, b, offs, bias=bias, **options)

    monkeypatch.setattr(emulated.Backend, "compiles", True)
    monkeypatch.setattr(warmup_module, "grouped_mm", call)
    return made


def test_a_backend_that_compiles_nothing_is_not_called(monkeypatch, weights):
    monkeypatch.setattr(warmup_module, "grouped_mm", lambda *args, **options: pytest.fail("a call was made"))
    done = warmup(weights, kernel_preference="emulated")
    assert [c.calls for c in done.classes] == [0, 0, 0]
    assert all(dict(c.decision.chosen) == dict.fromkeys(Pass, BackendKind.EMULATED) for c in done.classes)
    assert "nothing to compile" in str(done)


def test_each_row_class_is_called_without_and_with_gradients(weights, calls):
    done = warmup(weights, recipe="fp8_blockwise")
    classes = [row_class(a.shape[0], E) for a, *_ in calls]
    assert classes == [c for c in (RowClass.LARGE, RowClass.SMALL, RowClass.DECODE) for _ in range(2)]
    assert [grad for *_, grad in calls] == [False, True] * 3
    assert [c.calls for c in done.classes] == [2, 2, 2]
    assert all(a.requires_grad and b.requires_grad for a, b, *_ in calls)


def test_operands_match_those_of_the_model(weights, calls):
    bias = torch.randn(E, N, dtype=torch.bfloat16, requires_grad=True)
    warmup(weights, bias=bias, rows=("large",))
    for a, b, offs, given, _ in calls:
        assert (a.shape[1], a.dtype, b.stride(), offs.dtype) == (K, torch.bfloat16, weights.stride(), torch.int32)
        assert given.shape == bias.shape and given.requires_grad
        assert 0 < offs[0] < offs[1] < offs[2] <= a.shape[0]
        assert a.isfinite().all()


@pytest.mark.parametrize("rows", ("small", RowClass.SMALL, ("SMALL",), ("small", RowClass.SMALL)), ids=str)
def test_row_classes_may_be_named(weights, rows):
    done = warmup(weights, rows=rows)
    assert [c.decision.spec.rows for c in done.classes] == [RowClass.SMALL]


def test_inference_has_no_gradients(weights, calls):
    done = warmup(weights, training=False, rows=(RowClass.DECODE,))
    assert [grad for *_, grad in calls] == [False]
    assert done.classes[0].decision.spec.passes == (Pass.FORWARD,)


def test_warmup_shows_its_progress(weights, calls):
    """Each row class when it is done: before the calls of the next one."""
    seen = []
    done = warmup(weights, rows=("small", "decode"), progress=lambda part: seen.append((part, len(calls))))
    assert tuple(part for part, _ in seen) == done.classes
    assert [count for _, count in seen] == [done.classes[0].calls, len(calls)] and len(calls) > done.classes[0].calls


@pytest.mark.parametrize("dgrad", (False, True))
def test_warmup_takes_quantized_weights(weights, calls, dgrad):
    done = warmup(quantize_weights(weights, "mxfp8", dgrad=dgrad), rows=("small",))
    assert done.classes[0].calls == 1 + dgrad
    assert done.classes[0].decision.spec.passes == ((Pass.FORWARD, Pass.DGRAD) if dgrad else (Pass.FORWARD,))


def test_group_sizes_have_the_guaranteed_alignment(weights, calls):
    warmup(weights, group_alignment=128)
    assert all(end % 128 == 0 for _, _, offs, *_ in calls for end in offs.tolist())


def test_prefer_and_autocast_apply(weights, calls):
    with prefer("emulated"), torch.autocast("cpu", torch.float16):
        done = warmup(weights.detach().float(), rows=("decode",))
    assert done.classes[0].decision.asked_by == "context"
    assert done.classes[0].decision.spec.dtype is torch.float16


def test_the_callers_state_is_unchanged(weights, calls):
    leaf = torch.randn(E, K, N, requires_grad=True)
    before, seed = leaf.detach().clone(), torch.get_rng_state()
    with torch.no_grad():
        warmup(leaf)
    assert torch.equal(leaf.detach(), before) and leaf.grad is None
    assert torch.equal(torch.get_rng_state(), seed)


def test_warmup_runs_in_inference_mode(calls):
    with torch.no_grad():
        weights = torch.randn(E, K, N)
    with torch.inference_mode():
        assert warmup(weights, rows=("decode",)).classes[0].calls == 2


def test_kernels_are_not_specialized_on_the_number_of_rows_or_groups():
    pytest.importorskip("triton")
    modules = [
        importlib.import_module(f"grouped_gemm.kernels.{name}")
        for name in ("gemm.k_grouped", "gemm.m_grouped", "quantize.fp8", "quantize.rowwise", "quantize.blockwise")
    ]
    kernels = [fn for module in modules for fn in vars(module).values() if "tl.program_id" in getattr(fn, "src", "")]
    assert len(kernels) > 5
    numbers = [(fn.__name__, p) for fn in kernels for p in fn.params if p.name in ("M", "E")]
    assert numbers and all(p.do_not_specialize for _, p in numbers)


def test_a_refusal_is_raised(weights):
    with pytest.raises(NoBackendError, match="hipblaslt"):
        warmup(weights, kernel_preference="hipblaslt")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        ({"b": torch.ones(3, 4)}, ValueError, "^b: expected a tensor of rank 3"),
        ({"b": "weights"}, TypeError, "^b: expected a torch.Tensor"),
        ({"rows": ("huge",)}, ValueError, "^rows: expected row classes out of decode, small, large; found 'huge'$"),
        ({"recipe": "fp4"}, ValueError, "^recipe: expected"),
        ({"bias": torch.ones(1)}, ValueError, "^bias: expected"),
        ({"group_alignment": 0}, ValueError, "^group_alignment: expected at least 1"),
    ),
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named(weights, change, error, message):
    with pytest.raises(error, match=message):
        warmup(**{"b": weights} | change)


def test_the_result_can_be_printed_and_serialized(weights, calls):
    done = warmup(weights, recipe="mxfp8", rows=("decode", RowClass.LARGE))
    lines = str(done).splitlines()
    assert lines[0] == str(done.classes[0].decision.spec)
    assert [line.split()[0] for line in lines[1:]] == ["large", "decode", "total"]
    assert "M = 771, calls: 2 " in lines[1]
    data = json.loads(json.dumps(done.to_dict()))
    assert [(c["call"]["rows"], c["calls"]) for c in data["classes"]] == [("large", 2), ("decode", 2)]


# Tuning

H200 = Machine("nvidia", "sm_90", "NVIDIA H200")


class Tiled(emulated.Backend):
    """Emulated GEMMs that look up tiles, as the Triton kernels do."""

    compiles = True

    def __init__(self) -> None:
        self.tiles: list[tuple[str, int, tiles.Tile]] = []  # kernel, M, tile

    def grouped_mm(self, lhs, rhs, plan, out_dtype, bias_EN=None):
        c, o = rhs.data.shape[rhs.axis], rhs.data.shape[3 - rhs.axis]
        tile = tile_search.gemm_tile(H200, "16 bit", row_class(plan.num_rows, E), c, o, rhs.axis == 1, True)
        self.tiles.append(("gemm", plan.num_rows, tile))
        return super().grouped_mm(lhs, rhs, plan, out_dtype, bias_EN)

    def wgrad(self, lhs, rhs, plan, out_dtype, *, contiguous):
        self.tiles.append(("wgrad", plan.num_rows, tile_search.wgrad_tile(H200, "16 bit", N, K, True)))
        return super().wgrad(lhs, rhs, plan, out_dtype, contiguous=contiguous)


@pytest.fixture
def tiled(monkeypatch, tmp_path):
    """A backend whose tiles are fastest with group_m = 1, and an empty cache directory."""
    backend = Tiled()

    def milliseconds(run):
        before = len(backend.tiles)
        run()
        assert len(backend.tiles) == before + 1, "a pass is not timed alone"
        return 1.0 if backend.tiles[-1][2].group_m == 1 else 2.0

    monkeypatch.setitem(backends._instances, BackendKind.EMULATED, backend)
    monkeypatch.setattr(tile_search, "_milliseconds", milliseconds)
    monkeypatch.setattr(warmup_module, "_TYPICAL_ROWS", {RowClass.DECODE: 2, RowClass.SMALL: 20, RowClass.LARGE: 260})
    monkeypatch.setenv("GROUPED_GEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GROUPED_GEMM_AUTOTUNE", "1")
    tile_search.forget()
    yield backend
    tile_search.forget()


def searches(done: Warmup) -> list[tile_search.Search]:
    return [search for warmed in done.classes for search in warmed.searches]


def test_without_the_switch_nothing_is_tuned(monkeypatch, weights, tiled):
    monkeypatch.delenv("GROUPED_GEMM_AUTOTUNE")
    assert searches(warmup(weights)) == []
    assert not store.path().exists()


def test_each_use_of_a_kernel_is_tuned_once(weights, tiled):
    done = warmup(weights)
    uses = [(s.site.kernel, s.site.rows, s.site.sizes) for s in searches(done)]
    assert sorted(uses) == sorted(
        [("wgrad", "any", (N, K))]
        + [("gemm", rows, sizes) for rows in ("decode", "small", "large") for sizes in ((K, N), (N, K))]
    )
    # decode ships group_m = 1
    assert {s.site.rows for s in searches(done) if s.tile != s.shipped} == {"small", "large", "any"}
    assert "as fast with" in str(done) and "as fast with" in json.dumps(done.to_dict())
    assert searches(warmup(weights)) == []


def test_wgrad_is_tuned_on_the_most_rows(weights, tiled):
    warmup(weights, rows=("decode", "large"))
    searched = [m for kernel, m, tile in tiled.tiles if kernel == "wgrad" and tile.group_m == 4]  # tried, not taken
    assert set(searched) == {260 * E}


def test_a_call_uses_a_tuned_tile_without_searching(monkeypatch, weights, tiled):
    def call() -> tuple[torch.Tensor, tiles.Tile]:
        y = grouped_mm(weights.detach()[0].t().repeat(20, 1), weights, torch.tensor([1, 2, 900], dtype=torch.int32))
        return y.detach(), tiled.tiles[-1][2]

    y, shipped = call()
    warmup(weights)
    monkeypatch.setattr(tile_search, "search", pytest.fail)
    tuned_y, tile = call()
    assert tile == shipped._replace(group_m=1) != shipped
    assert torch.equal(tuned_y, y)


def test_quantized_weights_are_tuned_as_they_are_without_wgrad(weights, tiled, monkeypatch):
    quantized = quantize_weights(weights, "mxfp8", dgrad=True)
    monkeypatch.setattr(tiled, "quantize_weights", pytest.fail)
    done = warmup(quantized, rows=("small",))
    assert sorted(s.site.sizes for s in searches(done)) == [(K, N), (N, K)]


# Profiles


class Rival(emulated.Backend):
    """Emulated under the name of another backend, so that the CPU, as an H200, has several backends to choose from."""

    host_syncs, requirements = "", ()

    def __init__(self, kind: BackendKind) -> None:
        self.kind = kind
        if kind is BackendKind.TORCH:
            self.requirements = (
                Requirement("no bias", lambda p: not p.has_bias, lambda p: "a bias", ""),
                Requirement("permission to sync", lambda p: p.host_sync, lambda p: "none", ""),
                Requirement("bfloat16", lambda p: p.out_dtype is torch.bfloat16, lambda p: "another", ""),
            )


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Warmup, list[RowClass]]]:
    """`warmup` as on an H200 where the TORCH backend takes half the time of TRITON; also the classes it measured."""
    monkeypatch.setenv("GROUPED_GEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("GROUPED_GEMM_AUTOTUNE", "1")
    profile.forget()
    machine = Machine("nvidia", "sm_90", "NVIDIA H200", (("torch", "2.11.0"), ("triton", "3.6.0")))
    rivals = tuple(backends.Candidate(Rival(kind)) for kind in (BackendKind.TRITON, BackendKind.TORCH))
    monkeypatch.setattr(call_spec, "machine_of", lambda device: machine)
    monkeypatch.setattr(backends, "_instances", {rival.backend.kind: rival.backend for rival in rivals})
    for module in (route, warmup_module):
        monkeypatch.setattr(module, "candidates", lambda device: rivals)
    times = {"triton": 2.0, "torch": 1.0}
    timer = lambda calls: {plan: (call(), times[plan])[1] for plan, call in calls.items()}  # noqa: E731
    measured: list[RowClass] = []

    def timed(spec: CallSpec, *args: Any) -> Any:
        measured.append(spec.rows)
        return measure(spec, *args, eager=timer, captured=timer)

    monkeypatch.setattr(warmup_module, "measure", timed)
    route.forget()

    def run(b: Any, rows: RowClass, **options: Any) -> tuple[Warmup, list[RowClass]]:
        measured.clear()
        return warmup(b, rows=rows, **{"recipe": "fp8_rowwise"} | options), list(measured)

    yield run
    route.forget()
    profile.forget()


LARGE = [RowClass.LARGE]


def test_auto_chooses_by_a_new_profile(weights, profiled):
    done, _ = profiled(weights, RowClass.LARGE)
    assert done.classes[0].decision.backends == (BackendKind.TORCH,)
    assert "  measured  torch 1 us; triton 2 us" in str(done)
    a, offs = (
        torch.zeros(3000, K, dtype=torch.bfloat16).requires_grad_(),
        torch.tensor([1000, 2000, 3000], dtype=torch.int32),
    )
    decided = functional.explain(a, weights, offs, recipe="fp8_rowwise").decision
    assert decided.backends == (BackendKind.TORCH,)
    assert decided.expected.is_exact and "NVIDIA H200" in decided.expected.source


def test_a_call_is_profiled_once(weights, profiled):
    assert profiled(weights, RowClass.LARGE)[1] == LARGE
    assert profiled(weights, RowClass.LARGE)[1] == []
    assert profiled(weights, RowClass.LARGE, training=False)[1] == [], "the first profile has forward as well"


def test_a_plan_that_fails_is_named(weights, profiled, monkeypatch):
    def fail(*args: Any) -> torch.Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(backends._instances[BackendKind.TORCH], "grouped_mm", fail)
    done, _ = profiled(weights, RowClass.LARGE)
    assert done.classes[0].failed == (("torch", "RuntimeError: no kernel"),)
    assert "  failed    torch: RuntimeError: no kernel" in str(done)
    assert done.to_dict()["classes"][0]["failed"] == {"torch": "RuntimeError: no kernel"}


@pytest.mark.parametrize("out_dtype", (None, torch.float32))
def test_every_plan_for_calls_with_the_same_profile_key_is_profiled(weights, profiled, out_dtype):
    """A profile has one entry for calls with and without a bias, of any output dtype, with and without host syncs."""
    options = {"bias": torch.zeros(E, N, dtype=torch.bfloat16), "out_dtype": out_dtype}
    with prefer(host_sync=False):
        decision = profiled(weights, RowClass.LARGE, **options)[0].classes[0].decision
    for times in profile.known(decision.spec.machine).times.values():
        assert set(times.eager) == {"triton", "torch"}
    assert profiled(weights, RowClass.LARGE)[1] == []


def test_a_row_class_smaller_than_the_alignment_is_not_profiled(weights, profiled):
    assert profiled(weights, RowClass.DECODE, group_alignment=128)[1] == []
    assert profiled(weights, RowClass.LARGE, group_alignment=128)[1] == LARGE


def test_a_cached_route_follows_a_new_profile(weights, profiled, monkeypatch):
    a, offs = torch.zeros(3000, K, dtype=torch.bfloat16), torch.tensor([1000, 2000, 3000], dtype=torch.int32)
    routes = []
    monkeypatch.setattr(functional, "run_forward", lambda *args: routes.append(args[-2].forward) or (None,))
    with torch.no_grad():
        grouped_mm(a, weights, offs, recipe="fp8_rowwise")
        profiled(weights, RowClass.LARGE)
        grouped_mm(a, weights, offs, recipe="fp8_rowwise")
    assert routes == [BackendKind.TRITON, BackendKind.TORCH]


@pytest.mark.parametrize(
    "changed", ({"kernel_preference": "triton"}, {"recipe": "mxfp8", "kernel_preference": "torch"})
)
def test_a_named_backend_is_not_profiled(weights, profiled, changed):
    assert profiled(weights, RowClass.LARGE, **changed)[1] == []


def test_nothing_is_profiled_on_a_cpu(weights, profiled, monkeypatch):
    monkeypatch.setattr(call_spec, "machine_of", lambda device: Machine("cpu", "cpu", "cpu"))
    assert profiled(weights, RowClass.LARGE)[1] == []
