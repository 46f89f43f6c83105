"""The DeepGEMM backend: its requirements on each machine, checks of the package, and, on a GPU, the real package.

tests/interpreter/test_deepgemm.py tests its layouts, and whole calls on a fake package that checks its operands.
"""

from __future__ import annotations

import os
import stat
import sys
from types import SimpleNamespace

import pytest
import torch
from deepgemm_checks import GROUPS, MANY_GROUPS, check_activations, check_plan

from grouped_gemm import (
    CallSpec,
    Explanation,
    Machine,
    NoBackendError,
    Pass,
    Recipe,
    explain,
    grouped_mm,
    prefer,
    testing,
)
from grouped_gemm.backends import Candidate, get_backend
from grouped_gemm.backends.base import Health
from grouped_gemm.backends.deepgemm import package as deepgemm_package
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind, KernelPreference
from grouped_gemm.selection.rules import decide
from grouped_gemm.testing import DGRAD, TRAINING, Case, Shape

AUTO = KernelPreference.AUTO
DEEPGEMM, TRITON, EMULATED = (BackendKind[name] for name in ("DEEPGEMM", "TRITON", "EMULATED"))
FORWARD, BACKWARD, WGRAD = Pass
BACKENDS = {kind: get_backend(kind) for kind in (DEEPGEMM, TRITON, EMULATED)}
VERSIONS = (("deep_gemm", "0.1.5"), ("triton", "3.6.0"))
H200 = Machine("nvidia", "sm_90", "NVIDIA H200", VERSIONS)
B200 = Machine("nvidia", "sm_100", "NVIDIA B200", VERSIONS)
B300 = Machine("nvidia", "sm_103", "NVIDIA B300", VERSIONS)
BARE = Machine("nvidia", "sm_90", "NVIDIA H200", VERSIONS[1:])
BLOCKWISE, POW2 = Recipe.FP8_BLOCKWISE, Recipe.FP8_BLOCKWISE_POW2


def spec(machine: Machine = H200, recipe: Recipe = BLOCKWISE, **facts) -> CallSpec:
    facts = {"num_groups": 8, "k": 4096, "n": 2048, "passes": TRAINING} | facts
    return CallSpec(machine, rows=RowClass.LARGE, recipe=recipe, **facts)


def decision(asked: CallSpec, preference: BackendKind | KernelPreference = DEEPGEMM, broken: str = ""):
    healths = {DEEPGEMM: lambda: Health(broken, broken and "Repair it.")}
    found = [Candidate(backend, healths.get(kind, Health)) for kind, backend in BACKENDS.items()]
    return decide(asked, preference, found)


def refused(asked: CallSpec) -> dict[Pass, str]:
    """The reasons for each refused pass."""
    found = [r for r in decision(asked).refusals if r.backend is DEEPGEMM]
    passes = {p: "; ".join(f"{r.reason}. {r.fix}" for r in found if p in r.passes) for p in asked.passes}
    return {p: reason for p, reason in passes.items() if reason}


@pytest.mark.parametrize(
    "facts, passes, text",
    (
        ({}, (), ""),
        ({"recipe": POW2}, (), ""),
        ({"recipe": Recipe.NONE}, (WGRAD,), "a recipe with scales"),
        ({"recipe": Recipe.MXFP8}, TRAINING, "mxfp8"),
        ({"recipe": Recipe.FP8_ROWWISE}, TRAINING, "fp8_rowwise"),
        ({"machine": B200}, TRAINING, "Use fp8_blockwise_pow2"),
        ({"machine": B200, "recipe": POW2}, (WGRAD,), "requires sm_90; found sm_100"),
        ({"machine": B200, "recipe": Recipe.NONE}, TRAINING, "sm_90 for a recipe without scales"),
        ({"machine": B300, "recipe": POW2}, TRAINING, "sm_103"),
        ({"machine": BARE}, TRAINING, "sgl-deep-gemm==0.1.5"),
        ({"host_sync": False}, (WGRAD,), "CUDA graph capture"),
        ({"k": 2880}, TRAINING, "K = 2880"),
        ({"n": 704}, TRAINING, "N = 704"),
        ({"recipe": Recipe.NONE, "n": 704, "passes": DGRAD}, (), ""),
        ({"recipe": Recipe.NONE, "n": 720, "passes": DGRAD}, DGRAD, "N = 720"),
        ({"dtype": torch.float16}, TRAINING, "float16"),
        ({"out_dtype": torch.float32}, (FORWARD,), "float32"),
        ({"has_bias": True}, (FORWARD,), "a bias"),
        ({"num_groups": 384}, (), ""),
    ),
    ids=str,
)
def test_what_it_refuses(facts, passes, text):
    found = refused(spec(**facts))
    assert tuple(found) == tuple(passes)
    assert all(text in reason for reason in found.values())


def test_only_wgrad_has_a_host_sync():
    assert Explanation(decision(spec())).host_syncs == {"deepgemm": BACKENDS[DEEPGEMM].host_syncs}
    assert Explanation(decision(spec(passes=DGRAD))).host_syncs == {}
    assert Explanation(decision(spec(passes=DGRAD))).padding == {"deepgemm": 8 * 127}
    assert Explanation(decision(spec(passes=DGRAD, group_alignment=128))).padding == {}


# Checks of the package


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Installs a fake package that has the named functions, and an nvcc of some release, or none."""

    def put(*names: str, release: str = "12.9", alignment: int = 128) -> None:
        functions = {name: lambda *args, **options: None for name in names}
        functions |= {"get_mk_alignment_for_contiguous_layout": lambda: alignment}
        monkeypatch.setitem(sys.modules, "deep_gemm", SimpleNamespace(**functions))
        nvcc = tmp_path / "bin" / "nvcc"
        if release:
            nvcc.parent.mkdir(exist_ok=True)
            nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
            nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    for name in ("DG_JIT_USE_NVRTC", "DG_JIT_NVCC_COMPILER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "cache"))
    deepgemm_package.functions.cache_clear()
    yield put
    deepgemm_package.functions.cache_clear()


OTHERS = ("m_grouped_bf16_gemm_nt_contiguous", "k_grouped_fp8_gemm_nt_contiguous")
ALL = ("m_grouped_fp8_gemm_nt_contiguous", *OTHERS)


@pytest.mark.parametrize("name", ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_fp4_gemm_nt_contiguous"))
def test_either_name_of_a_function_will_do(package, name):
    package(name, *OTHERS)
    assert deepgemm_package.check(H200).is_good


@pytest.mark.parametrize(
    "names, options, machine, problem, fix",
    (
        (ALL[:2], {}, H200, "has no k_grouped_fp8_gemm_nt_contiguous", "pip install"),
        (OTHERS, {}, H200, "m_grouped_fp8_gemm_nt_contiguous or m_grouped_fp8_fp4_gemm_nt_contiguous", "pip install"),
        (ALL, {"release": "12.2"}, H200, "nvcc is 12.2", "nvcc 12.3 or later"),
        (ALL, {"release": "12.8"}, B200, "nvcc is 12.8", "nvcc 12.9 or later"),
        (ALL, {"release": ""}, H200, "nvcc, which was not found", "set CUDA_HOME"),
        (ALL, {"alignment": 256}, H200, "multiples of 256 rows", "set_mk_alignment_for_contiguous_layout(128)"),
    ),
    ids=str,
)
def test_a_problem_of_the_package_is_named_with_its_remedy(package, names, options, machine, problem, fix):
    package(*names, **options)
    found = deepgemm_package.check(machine)
    assert problem in found.problem
    assert fix in found.fix


def test_nvrtc_needs_no_nvcc(package, monkeypatch):
    package(*ALL, release="")
    monkeypatch.setenv("DG_JIT_USE_NVRTC", "1")
    assert deepgemm_package.check(H200).is_good


@pytest.mark.parametrize(
    "error, text",
    (
        (RuntimeError("Assertion error (csrc/utils/layout.hpp:18): dim == 2 or dim == 3"), "0.1.5.post3 to 0.2.1"),
        (OSError("/deep_gemm/_C.so: undefined symbol: _ZN3c104impl"), "0.2.3 and later"),
        (RuntimeError("CUDA driver error: CUDA_ERROR_INVALID_HANDLE"), "another device"),
        (AssertionError(), "a CUDA toolkit, and finds none"),
        (RuntimeError("something else"), "RuntimeError: something else"),
    ),
    ids=str,
)
def test_broken_builds_are_named(error, text):
    found = deepgemm_package.explain(error, H200)
    assert text in found.problem
    assert found.fix


def test_a_package_that_cannot_be_imported_is_no_error(package, monkeypatch):
    package(*ALL)
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    assert not deepgemm_package.check(H200).is_good


def test_the_kernel_cache_directory_is_private_and_can_be_set(package, monkeypatch, tmp_path):
    package(*ALL)
    deepgemm_package.functions()
    assert os.environ["DG_JIT_CACHE_DIR"] == str(tmp_path / "cache")
    monkeypatch.delenv("DG_JIT_CACHE_DIR")
    monkeypatch.setattr(deepgemm_package.tempfile, "gettempdir", lambda: str(tmp_path))
    directory = deepgemm_package._cache_directory()
    assert directory is not None and directory.parent == tmp_path and directory.stat().st_mode & 0o777 == 0o700
    directory.chmod(0o777)  # anybody could put kernels there
    assert deepgemm_package._cache_directory() is None


@pytest.mark.parametrize(
    "mode, is_taken", ((0o755, True), (0o1777, True), (0o1775, True), (0o777, False), (0o775, False))
)
@pytest.mark.parametrize("below", ("", "mine"), ids=("parent", "grandparent"))
def test_nobody_can_replace_the_kernel_cache_directory(mode, is_taken, below, monkeypatch, tmp_path):
    scratch = tmp_path / "scratch"
    (scratch / below).mkdir(parents=True)
    scratch.chmod(mode)
    monkeypatch.setattr(deepgemm_package.tempfile, "gettempdir", lambda: str(scratch / below))
    directory = deepgemm_package._cache_directory()
    assert (directory is not None) == is_taken
    assert directory is None or directory.parent == scratch / below


def test_a_link_to_the_directory_for_temporary_files_is_resolved(monkeypatch, tmp_path):
    shared, safe = tmp_path / "shared", tmp_path / "safe"
    shared.mkdir()
    safe.mkdir()
    shared.chmod(0o777)  # anybody could change the link
    (shared / "link").symlink_to(safe)
    monkeypatch.setattr(deepgemm_package.tempfile, "gettempdir", lambda: str(shared / "link"))
    directory = deepgemm_package._cache_directory()
    assert directory is not None and directory.parent == safe.resolve()


@pytest.mark.parametrize(
    "mode, is_others, is_private",
    (
        (stat.S_IFDIR | 0o755, False, True),
        (stat.S_IFDIR | 0o755, True, False),
        (stat.S_IFDIR | 0o775, False, False),
        (stat.S_IFDIR | 0o757, False, False),
        (stat.S_IFLNK | 0o755, False, False),  # Linux gives links 0o777, other systems do not
    ),
)
def test_only_a_directory_that_nobody_else_writes_to_is_private(mode, is_others, is_private):
    assert deepgemm_package._is_private(SimpleNamespace(st_mode=mode, st_uid=os.getuid() + is_others)) is is_private


def test_a_link_in_place_of_the_kernel_cache_directory_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(deepgemm_package.tempfile, "gettempdir", lambda: str(tmp_path))
    directory = deepgemm_package._cache_directory()
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    assert deepgemm_package._cache_directory() is None


def test_a_kernel_cache_directory_inside_another_users_is_refused():
    status = SimpleNamespace(st_mode=0o1755, st_uid=os.getuid() + 1)
    assert not deepgemm_package._keeps(status)


# The real package, on a GPU

# DeepGEMM compiles a kernel for each E, K and N, which takes seconds, so there are few of them.
K, N = 256, 384
GPU_SHAPES = (
    Shape("one_group", (300,), tail=5, k=K, n=N),
    Shape("ragged", (0, 37, 1, 130, 0, 700), tail=5, k=K, n=N),
    Shape("aligned", (128, 0, 256, 1024, 0, 128), tail=7, k=K, n=N, alignment=128),
    Shape("skewed", (4000, 3, 0, 1, 250, 0), k=K, n=N),
    Shape("all_empty", (0, 0, 0, 0, 0, 0), tail=4, k=K, n=N),
    Shape("no_rows", (0, 0), k=K, n=N),
    Shape("128_groups", tuple(i * 7 % 300 for i in range(128)), k=K, n=N),
    Shape("384_groups", tuple(i * 5 % 200 for i in range(384)), k=K, n=N),
    # 1024 blocks of 128 rows: DeepGEMM's own transform of scales cannot be launched from 908 on
    Shape("many_blocks", (1024,) * 128, k=K, n=N, alignment=128),
)
gpu_shapes = pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda shape: shape.name)


def gpu_case(recipe: Recipe, shape: Shape, device: torch.device, b_contiguous: str = "k") -> Case:
    passes = TRAINING if recipe.is_scaled else DGRAD
    case = Case(DEEPGEMM, recipe, passes=passes, shape=shape, b_contiguous=b_contiguous)
    if reason := testing.refusal(case, device):
        pytest.skip(reason)
    return case


@pytest.mark.gpu
@pytest.mark.parametrize("ends, num_rows, alignment", (*GROUPS, MANY_GROUPS), ids=str)
@pytest.mark.parametrize("recipe", (BLOCKWISE, POW2), ids=lambda r: r.value)
def test_plan_and_quantizer_bit_for_bit(ends, num_rows, alignment, recipe, device):
    if machine_of(device).arch not in ("sm_90", "sm_100"):
        pytest.skip("the quantizers need sm_90 or sm_100")
    check_plan(ends, num_rows, alignment, device)
    check_activations(ends, num_rows, alignment, recipe, device)


@pytest.mark.gpu
@gpu_shapes
@pytest.mark.parametrize("recipe", (BLOCKWISE, POW2, Recipe.NONE), ids=lambda r: r.value)
def test_every_pass_against_the_reference(recipe, shape, device):
    check_passes(gpu_case(recipe, shape, device), device)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", (BLOCKWISE, Recipe.NONE), ids=lambda r: r.value)
def test_weights_with_n_contiguous(recipe, device):
    check_passes(gpu_case(recipe, GPU_SHAPES[1], device, "n"), device)


def check_passes(case: Case, device: torch.device) -> None:
    inputs = testing.make_inputs(case, device)
    found = testing.run(case, inputs)
    bound = testing.rounding_tolerance(torch.bfloat16, case, device)
    for pass_ in case.passes:
        truth = testing.expected(pass_, inputs, case.recipe)
        result = found.of(pass_)
        assert testing.worst_row_error(result, truth) <= 2 * bound, pass_
        if pass_ is not WGRAD:
            assert not result[sum(case.shape.sizes) :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES[1:3], ids=lambda shape: shape.name)
@pytest.mark.parametrize("recipe", (BLOCKWISE, Recipe.NONE), ids=lambda r: r.value)
def test_forward_and_dgrad_have_no_host_sync(recipe, shape, device):
    case = gpu_case(recipe, shape, device)
    case = Case(DEEPGEMM, recipe, passes=DGRAD, shape=shape)
    inputs = testing.make_inputs(case, device)

    def call() -> None:
        a = inputs.a.detach().requires_grad_()
        y = grouped_mm(
            a, inputs.b, inputs.offs, recipe=recipe, group_alignment=shape.alignment, kernel_preference=DEEPGEMM
        )
        torch.autograd.grad(y, a, inputs.dy)

    call()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with prefer(host_sync=False):
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_wgrad_is_refused_where_host_syncs_are_not_allowed(device):
    case = gpu_case(BLOCKWISE, GPU_SHAPES[1], device)
    inputs = testing.make_inputs(case, device)
    a, b = inputs.a.requires_grad_(), inputs.b.detach().requires_grad_()
    with prefer(host_sync=False):
        with pytest.raises(NoBackendError, match="wgrad requires host syncs to be allowed"):
            grouped_mm(a, b, inputs.offs, recipe=BLOCKWISE, kernel_preference=DEEPGEMM)
        assert explain(a, b, inputs.offs, recipe=BLOCKWISE, group_alignment=128).decision.backend(WGRAD) is TRITON


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES[1:3], ids=lambda shape: shape.name)
def test_nothing_runs_between_quantizer_and_gemm(shape, device):
    """Plan, quantizers, GEMM, and the one kernel that unpads: no copy, transpose or transform of scales."""
    case = gpu_case(BLOCKWISE, shape, device)
    backend = get_backend(DEEPGEMM)
    inputs = testing.make_inputs(case, device)

    def forward() -> torch.Tensor:
        plan = backend.plan(inputs.offs, len(inputs.a), shape.alignment)
        lhs, _ = backend.quantize_activations(inputs.a, plan, BLOCKWISE, rows=True, columns=False)
        rhs, _ = backend.quantize_weights(inputs.b, BLOCKWISE, forward=True, dgrad=False)
        return backend.grouped_mm(lhs, rhs, plan, torch.bfloat16)

    forward()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        forward()
        torch.cuda.synchronize()
    events = sorted((e for e in profile.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    kernels = [event.name for event in events]
    ours = ["_lay_out", "_quantize_tiles", "quantize_weights_blockwise"]
    assert [name for name in kernels if name in ours] == ours, kernels
    expected = len(ours) + 1 + (0 if shape.alignment % 128 == 0 else 1)
    assert len(kernels) == expected, kernels
    assert "fp8_gemm" in kernels[3], kernels


@pytest.mark.gpu2
def test_a_second_device_works_or_is_refused_with_the_reason(device):
    for index in (0, 1):
        here = torch.device("cuda", index)
        case = gpu_case(BLOCKWISE, GPU_SHAPES[1], here)  # skips with the reason where it is refused
        inputs = testing.make_inputs(case, here)
        found, truth = testing.run(case, inputs).y, testing.expected(FORWARD, inputs, BLOCKWISE)
        assert testing.worst_row_error(found, truth) <= 2 * testing.rounding_tolerance(torch.bfloat16, case, here)
