"""What the machine is: vendor, exact architecture and its traits, versions. The package's only probe of hardware.

Everything that depends on the machine reads a `Machine`, a plain value, so that a test can describe
a machine that it does not have. To support a new GPU, add an entry to `ARCHS` and its tiles to `kernels.gemm.tiles`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

PACKAGES = ("torch", "triton", "deep_gemm", "cuda", "rocm", "mslk")  # whose versions a machine may have
_BUILDS = {"nvidia": ("cuda", "mslk"), "amd": ("rocm",), "cpu": ()}  # those that come with torch's build for a vendor
_ARCHS = {"nvidia": r"sm_\d+", "amd": r"gfx[0-9a-f]+", "cpu": "cpu"}

# The distributions that may provide an import; which versions of it are installed decides what works.
_DISTRIBUTIONS = {
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm"),
    "deep_gemm": ("sgl-deep-gemm", "deep-gemm"),
}


@dataclass(frozen=True)
class ArchTraits:
    """What this package's own kernels need to know about an architecture. What a vendor library supports is declared
    by that library's backend.

    Attributes:
        shared_memory: KiB of shared memory that one program can use.
        fp8: the e4m3 type that Triton converts to and multiplies; None: there is none.
        sums_fp8_coarsely: whether the tensor cores add fp8 products with 13 bits of mantissa.
        tma: whether the copy engine (TMA) reads tiles through descriptors.
        mx: whether the matrix cores multiply MX operands. If not, our kernels widen them to bfloat16.
        packed_max: whether there is ``max.u16x2``, which compares two 16-bit values at once.
        kernels: "hopper" for the kernels written for Hopper where they can run; "portable" for the others.
    """

    shared_memory: int
    fp8: torch.dtype | None = torch.float8_e4m3fn
    sums_fp8_coarsely: bool = False
    tma: bool = False
    mx: bool = False
    packed_max: bool = False
    kernels: str = "portable"


# Every architecture that the Triton backend runs on. "cpu" is Triton's interpreter, which has descriptors, too.
# Matrix cores for MX are used where `tl.dot_scaled` works: before Triton 3.8 it neither compiles for gfx942 nor runs
# interpreted, and on sm_121 Triton 3.6 would widen the operands in more shared memory than there is.
ARCHS: dict[str, ArchTraits] = {
    "sm_80": ArchTraits(163, fp8=None),
    "sm_86": ArchTraits(99, fp8=None),
    "sm_89": ArchTraits(99, sums_fp8_coarsely=True),
    "sm_90": ArchTraits(227, sums_fp8_coarsely=True, tma=True, packed_max=True, kernels="hopper"),
    "sm_100": ArchTraits(227, tma=True, mx=True, packed_max=True),
    "sm_103": ArchTraits(227, tma=True, mx=True, packed_max=True),
    "sm_120": ArchTraits(99, tma=True, mx=True, packed_max=True),
    "sm_121": ArchTraits(99, tma=True, packed_max=True),
    "gfx942": ArchTraits(64, fp8=torch.float8_e4m3fnuz),
    "gfx950": ArchTraits(160, mx=True),
    "cpu": ArchTraits(0, tma=True),
}
GPU_ARCHS = tuple(arch for arch in ARCHS if arch != "cpu")
_UNKNOWN = ArchTraits(0, fp8=None)


@dataclass(frozen=True)
class Machine:
    """One device and the software around it.

    Attributes:
        vendor: "nvidia", "amd", "cpu", or torch's device type for anything else.
        arch: the exact architecture, "sm_90" or "gfx942"; equal to ``vendor`` where there is none.
        name: the device's own name, for people.
        versions: (name, version) of torch, triton, deep_gemm, cuda and rocm, as far as they are there. "mslk" are the
            kernels of that library that torch itself was built with, and have its version.
        interprets: whether Triton interprets kernels in this process instead of compiling them.
    """

    vendor: str
    arch: str
    name: str
    versions: tuple[tuple[str, str], ...] = ()
    interprets: bool = False

    @property
    def is_gpu(self) -> bool:
        """Whether the device is an NVIDIA or AMD GPU."""
        return self.vendor in ("nvidia", "amd")

    @property
    def traits(self) -> ArchTraits:
        """What `ARCHS` says about the architecture. One that it does not list has none of the features."""
        return ARCHS.get(self.arch, _UNKNOWN)

    @property
    def fp8_dtype(self) -> torch.dtype:
        """The e4m3 type of fp8 operands: that of the architecture, else e4m3fn, which plain torch converts to anywhere.

        The largest value of e4m3fnuz is 240, that of e4m3fn is 448.
        """
        return self.traits.fp8 or torch.float8_e4m3fn

    def version(self, package: str) -> Version | None:
        """The installed version of ``package``, or None."""
        found = dict(self.versions).get(package)
        return None if found is None else Version(found.partition("-")[0])  # HIP's ends in the hash of its build


def machine_of(device: torch.device | str) -> Machine:
    """The machine as seen from ``device``; probed once per device and process."""
    if not isinstance(device, torch.device):
        device = torch.device(device)
    if device.type != "cuda":
        return _probe(device.type, None)
    return _probe("cuda", torch.cuda.current_device() if device.index is None else device.index)


def default_device() -> torch.device:
    """The device that the command line speaks of: the current GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def imagined(here: Machine, arch: str | None, vendor: str | None, packages: dict[str, str]) -> Machine:
    """A machine that is not there, to explain what would run on it.

    Args:
        here: whose software it is assumed to have, as far as that fits the vendor.
        arch: its exact architecture; None: that of ``here``.
        vendor: None: whoever makes ``arch``.
        packages: versions of those `PACKAGES` that are not as they are here; "none" for one that is not there.

    Returns:
        The machine; ``here`` itself, where that is what was described.

    Raises:
        ValueError: there is no such architecture or package, or vendor and architecture do not fit each other.
    """
    arch = here.arch if arch is None else arch
    maker = next((maker for maker, pattern in _ARCHS.items() if re.fullmatch(pattern, arch)), None)
    if maker is None:
        raise ValueError(f"arch: expected one like sm_90 (nvidia) or gfx942 (amd), or cpu; found {arch!r}")
    if vendor not in (None, maker):
        raise ValueError(
            f"vendor: expected {maker}, to which arch {arch} belongs; found {vendor!r}. Name an arch of that vendor or "
            "leave the vendor out"
        )
    for package, version in packages.items():
        if package not in PACKAGES:
            raise ValueError(f"packages: expected some of {', '.join(PACKAGES)}; found {package!r}")
        if version != "none":
            try:
                Version(version)
            except InvalidVersion:
                raise ValueError(
                    f"packages: expected a version of {package} such as 2.11.0; found {version!r}"
                ) from None
    foreign = () if maker == here.vendor else {"cuda", "mslk", "rocm"}.difference(_BUILDS[maker])
    assumed = {package: version for package, version in here.versions if package not in foreign} | packages
    found = tuple((package, assumed[package]) for package in assumed if assumed[package] != "none")
    if arch == here.arch and dict(found) == dict(here.versions):
        return here
    return Machine(maker, arch, arch, found)


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the current stream, and ``x`` is on a GPU."""
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _probe(device_type: str, index: int | None) -> Machine:
    if device_type != "cuda":
        return Machine(device_type, device_type, device_type, _versions(), _interprets())
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        # "gfx942:sramecc+:xnack-" -> "gfx942"
        return Machine("amd", properties.gcnArchName.split(":")[0], properties.name, _versions(), _interprets())
    return Machine("nvidia", f"sm_{properties.major}{properties.minor}", properties.name, _versions(), _interprets())


@functools.cache
def _interprets() -> bool:
    """Whether Triton interprets kernels.

    Triton reads TRITON_INTERPRET at every ``@triton.jit``, which includes its own library at its import. A later change
    would mix kernels of both kinds, which cannot call each other. So the first answer holds for the process, also
    for devices that `_probe` sees later.
    """
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return False
    try:
        import triton.language
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:  # a run of the backend says what is missing
        return True
    return isinstance(triton.language.zeros, InterpretedFunction)


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    own = str(torch.__version__)
    has_mslk = "USE_MSLK" in torch.__config__.show()
    found = [
        ("torch", own),
        ("cuda", torch.version.cuda),
        ("rocm", torch.version.hip),
        ("mslk", own if has_mslk else None),
    ]
    for package, distributions in _DISTRIBUTIONS.items():
        version = next(filter(None, map(_distribution_version, distributions)), None)
        if version is None and package == "deep_gemm":  # anybody may have built one
            version = _provider_version(package)
        found.append((package, version))
    return tuple((package, version) for package, version in found if version is not None)


def _distribution_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _provider_version(package: str) -> str | None:
    """The version of whatever else provides ``package``; "0" where it came without one."""
    try:
        if importlib.util.find_spec(package) is None:
            return None
    except ImportError:
        return None
    except ValueError:  # it was put into sys.modules by hand
        return "0"
    distributions = metadata.packages_distributions().get(package, ())
    return next(filter(None, map(_distribution_version, distributions)), "0")
