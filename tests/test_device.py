"""`Machine`, and the probe that describes a device as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from grouped_gemm import BackendKind, CallSpec, Machine, Recipe
from grouped_gemm.backends import get_backend
from grouped_gemm.core import machine as machine_module
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.machine import ARCHS, GPU_ARCHS, ArchTraits


@pytest.mark.parametrize(
    ("arch", "dtype"),
    (
        ("gfx942", torch.float8_e4m3fnuz),
        ("gfx950", torch.float8_e4m3fn),
        ("sm_89", torch.float8_e4m3fn),
        ("sm_90", torch.float8_e4m3fn),
        ("sm_100", torch.float8_e4m3fn),
        ("cpu", torch.float8_e4m3fn),
    ),
)
def test_the_architecture_decides_the_fp8_type(arch, dtype):
    assert Machine("any", arch, "any").fp8_dtype is dtype


def test_an_unknown_architecture_has_no_features_of_a_known_one():
    unknown = Machine("nvidia", "sm_91", "any")
    assert unknown.traits == ArchTraits(shared_memory=0, fp8=None)
    assert unknown.fp8_dtype is torch.float8_e4m3fn  # plain torch converts to it on any device


def test_the_triton_backend_runs_on_every_gpu_of_the_table_and_on_no_other():
    triton = get_backend(BackendKind.TRITON)
    versions = (("triton", "3.6.0"),)
    for recipe in (Recipe.NONE, Recipe.FP8_ROWWISE):
        runs = set()
        for arch in (*GPU_ARCHS, "sm_91", "gfx90a"):
            machine = Machine("nvidia" if arch.startswith("sm") else "amd", arch, "any", versions)
            spec = CallSpec(machine, 8, 256, 256, RowClass.LARGE, recipe)
            if all(requirement.holds(spec) for requirement in triton.requirements):
                runs.add(arch)
        assert runs == {arch for arch in GPU_ARCHS if ARCHS[arch].fp8 or not recipe.is_scaled}


@pytest.mark.parametrize(
    ("vendor", "is_gpu"), (("nvidia", True), ("amd", True), ("cpu", False), ("mps", False), ("meta", False))
)
def test_a_gpu_is_one_of_nvidia_or_amd(vendor, is_gpu):
    assert Machine(vendor, "any", "any").is_gpu is is_gpu


def test_versions_compare_as_versions_and_not_as_text():
    machine = Machine("nvidia", "sm_90", "any", (("torch", "2.13.0+cu130"), ("triton", "3.10.0")))
    assert machine.version("triton") > Version("3.9.0")
    assert machine.version("torch").release == (2, 13, 0)


def test_the_version_of_rocm_is_read_as_torch_reports_it():
    machine = Machine("amd", "gfx942", "any", (("rocm", "6.4.43484-123f8eb5"),))
    assert machine.version("rocm") >= Version("6.4")


def test_a_missing_package_has_no_version():
    assert Machine("cpu", "cpu", "cpu").version("triton") is None


def test_machines_are_immutable_and_hashable():
    first, second = (Machine("amd", "gfx942", "MI300X", (("rocm", "7.0"),)) for _ in range(2))
    assert len({first, second}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.arch = "gfx950"


# The probe


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes torch report these GPUs, by index, and this release of HIP or None."""
    machine_module._probe.cache_clear()

    def report(hip: str | None, *gpus: SimpleNamespace, current: int = 0) -> None:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)

    yield report
    machine_module._probe.cache_clear()


H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
B200 = SimpleNamespace(name="NVIDIA B200", major=10, minor=0)
MI300X = SimpleNamespace(name="AMD Instinct MI300X", major=9, minor=4, gcnArchName="gfx942:sramecc+:xnack-")


def test_an_nvidia_gpu_is_known_by_its_compute_capability(cuda):
    cuda(None, H100, B200)
    found = [machine_module.machine_of(f"cuda:{index}") for index in range(2)]
    assert [(m.vendor, m.arch, m.name) for m in found] == [
        ("nvidia", "sm_90", "NVIDIA H100 80GB HBM3"),
        ("nvidia", "sm_100", "NVIDIA B200"),
    ]


def test_an_amd_gpu_is_known_by_its_gfx_name_without_features(cuda):
    cuda("7.0", MI300X)
    machine = machine_module.machine_of("cuda:0")
    assert (machine.vendor, machine.arch) == ("amd", "gfx942")


def test_a_gpu_without_an_index_is_the_current_one(cuda):
    cuda(None, H100, B200, current=1)
    assert machine_module.machine_of("cuda") == machine_module.machine_of("cuda:1")


def test_the_cpu_is_a_machine_without_an_architecture_of_its_own():
    machine = machine_module.machine_of("cpu")
    assert (machine.vendor, machine.arch, machine.is_gpu) == ("cpu", "cpu", False)


def test_the_machine_knows_the_version_of_torch():
    assert machine_module.machine_of("cpu").version("torch").release == Version(torch.__version__).release


@pytest.mark.parametrize("flags, found", (("-DUSE_FBGEMM -DUSE_MSLK", torch.__version__), ("-DUSE_FBGEMM", None)))
def test_mslk_is_found_where_torch_was_built_with_it(flags, found, monkeypatch):
    monkeypatch.setattr(torch.__config__, "show", lambda: flags)
    assert dict(machine_module._versions.__wrapped__()).get("mslk") == found


def test_versions_of_missing_packages_are_left_out():
    assert all(isinstance(version, str) for _, version in machine_module.machine_of("cpu").versions)


def test_a_device_is_probed_once():
    assert machine_module.machine_of("cpu") is machine_module.machine_of(torch.device("cpu"))


def test_a_device_of_another_kind_is_its_own_vendor():
    assert machine_module.machine_of("meta").vendor == "meta"


@pytest.mark.parametrize(("is_available", "expected"), ((True, "cuda"), (False, "cpu")))
def test_the_default_device_is_the_gpu_where_there_is_one(monkeypatch, is_available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    assert machine_module.default_device() == torch.device(expected)


@pytest.mark.parametrize(
    ("installed", "version"),
    (
        ({"triton": "3.9.0"}, "3.9.0"),
        ({"pytorch-triton": "3.6.0"}, "3.6.0"),
        ({"pytorch-triton-rocm": "3.8.0"}, "3.8.0"),
        ({}, None),
    ),
    ids=lambda value: "",
)
def test_triton_is_found_under_the_name_of_any_of_its_distributions(monkeypatch, installed, version):
    monkeypatch.setattr(machine_module, "_distribution_version", installed.get)
    assert dict(machine_module._versions.__wrapped__()).get("triton") == version


CUDA = (("torch", "2.11.0"), ("cuda", "13.0"), ("mslk", "2.11.0"), ("triton", "3.6.0"))


@pytest.mark.parametrize(
    ("here", "arch", "versions"),
    (
        (Machine("nvidia", "sm_90", "NVIDIA H200", CUDA), "sm_100", CUDA),
        (Machine("nvidia", "sm_90", "NVIDIA H200", CUDA), "gfx942", (CUDA[0], CUDA[3])),
        (Machine("cpu", "cpu", "cpu", CUDA), "sm_90", CUDA),  # torch is built for a GPU that this machine lacks
    ),
)
def test_a_hypothetical_machine_has_the_software_of_this_one_that_fits_it(here, arch, versions):
    there = machine_module.hypothetical(here, arch, None, {})
    assert (there.arch, there.versions, there.name) == (arch, versions, arch)


def test_packages_of_a_hypothetical_machine_may_differ():
    here = Machine("nvidia", "sm_90", "NVIDIA H200", CUDA)
    there = machine_module.hypothetical(here, None, None, {"deep_gemm": "0.1.5", "mslk": "none", "triton": "3.7.1"})
    assert dict(there.versions) == {"torch": "2.11.0", "cuda": "13.0", "triton": "3.7.1", "deep_gemm": "0.1.5"}


def test_a_description_of_this_machine_is_this_machine():
    for here in (Machine("cpu", "cpu", "cpu", CUDA), Machine("nvidia", "sm_90", "NVIDIA H200", CUDA)):
        assert machine_module.hypothetical(here, here.arch, here.vendor, {"triton": "3.6.0"}) is here
