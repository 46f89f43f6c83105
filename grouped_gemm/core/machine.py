"""The machine: vendor, exact architecture and its traits, versions. No other module probes the hardware.

All code that depends on the machine reads a `Machine`, a plain value, so tests can describe machines that are not
there. To support a new GPU, add an entry to `ARCHS` and its tiles to `kernels.gemm.tiles`.
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

PACKAGES = ("torch", "triton", "deep_gemm", "cuda", "rocm", "mslk")  # the packages in `Machine.versions`
OLDEST_TRITON = "3.6"  # that this package's own kernels run on
_TORCH_BUILDS = {"nvidia": ("cuda", "mslk"), "amd": ("rocm",), "cpu": ()}  # packages in torch's build for a vendor
_ARCH_PATTERNS = {"nvidia": r"sm_\d+", "amd": r"gfx[0-9a-f]+", "cpu": "cpu"}

# The distributions that may provide an import.
_DISTRIBUTIONS = {
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm"),
    "deep_gemm": ("sgl-deep-gemm", "deep-gemm"),
}


@dataclass(frozen=True)
class ArchTraits:
    """What this package's own kernels need to know about an architecture.

    What a vendor library supports is declared by the backend of that library.

    Attributes:
        shared_memory: KiB of shared memory that one program can use.
        fp8: the e4m3 type that Triton converts to and multiplies; None: there is none.
        sums_fp8_coarsely: whether the tensor cores add fp8 products with only 13 mantissa bits.
        tma: whether kernels load tiles through TMA descriptors.
        mx: whether the matrix cores multiply MX operands. If not, our kernels widen them to bfloat16.
        packed_max: whether there is ``max.u16x2``, which compares two 16-bit values at once.
        kernels: "hopper": the Hopper kernels where they can run, else the portable ones; "portable": only the latter.
    """

    shared_memory: int
    fp8: torch.dtype | None = torch.float8_e4m3fn
    sums_fp8_coarsely: bool = False
    tma: bool = False
    mx: bool = False
    packed_max: bool = False
    kernels: str = "portable"


# Every architecture that the Triton backend runs on. "cpu" is Triton's interpreter, which supports descriptors.
# ``mx`` is set where `tl.dot_scaled` works: before Triton 3.8 it neither compiles for gfx942 nor runs interpreted, and
# for sm_121 Triton 3.6 would widen the operands in more shared memory than there is.
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
        arch: the exact architecture, such as "sm_90" or "gfx942"; on other devices the same as ``vendor``.
        name: the device's product name.
        versions: (name, version) of those `PACKAGES` that are installed. "mslk" is there if torch was built with the
            kernels of that library; its version is torch's.
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

    @functools.cached_property
    def runs_kernels(self) -> bool:
        """Whether this package's own kernels run here: compiled on a GPU, or interpreted on a CPU."""
        version = self.version("triton")
        if version is None or version < Version(OLDEST_TRITON):
            return False
        return self.arch in (("cpu",) if self.interprets else GPU_ARCHS)

    @property
    def traits(self) -> ArchTraits:
        """The traits of the architecture in `ARCHS`. An unlisted architecture has none of the features."""
        return ARCHS.get(self.arch, _UNKNOWN)

    @property
    def fp8_dtype(self) -> torch.dtype:
        """The e4m3 type of fp8 operands: the architecture's, or else e4m3fn, which torch can convert to on any device.

        The largest value of e4m3fnuz is 240, that of e4m3fn is 448.
        """
        return self.traits.fp8 or torch.float8_e4m3fn

    def version(self, package: str) -> Version | None:
        """The installed version of ``package``, or None."""
        found = dict(self.versions).get(package)
        return None if found is None else Version(found.partition("-")[0])  # HIP appends a build hash


def machine_of(device: torch.device | str) -> Machine:
    """The machine of ``device``, probed once per device and process."""
    if not isinstance(device, torch.device):
        device = torch.device(device)
    if device.type != "cuda":
        return _probe(device.type, None)
    return _probe("cuda", torch.cuda.current_device() if device.index is None else device.index)


def fp8_dtype_of(device: torch.device) -> torch.dtype:
    """The type of fp8 data on ``device``."""
    return machine_of(device).fp8_dtype


fp8_dtype_of._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as `selection.route._decided`


def default_device() -> torch.device:
    """The default device of the command line: the current GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hypothetical(here: Machine, arch: str | None, vendor: str | None, packages: dict[str, str]) -> Machine:
    """A machine that is not there, to explain what would run on it.

    Args:
        here: the actual machine. The other one is assumed to have the same software, where its vendor allows that.
        arch: its exact architecture; None: that of ``here``.
        vendor: its vendor; None: the vendor of ``arch``.
        packages: versions of `PACKAGES` that differ from ``here``; "none" for a package that is not installed.

    Returns:
        The machine; ``here`` itself if nothing differs.

    Raises:
        ValueError: the architecture or a package is unknown, or the vendor does not match the architecture.
    """
    arch = here.arch if arch is None else arch
    maker = next((maker for maker, pattern in _ARCH_PATTERNS.items() if re.fullmatch(pattern, arch)), None)
    if maker is None:
        raise ValueError(f"arch: expected a name like sm_90 (nvidia) or gfx942 (amd), or cpu; found {arch!r}")
    if vendor not in (None, maker):
        raise ValueError(
            f"vendor: expected {maker}, the vendor of arch {arch}; found {vendor!r}. Pass an arch of that vendor, or "
            "omit vendor"
        )
    for package, version in packages.items():
        if package not in PACKAGES:
            raise ValueError(f"packages: expected names out of {', '.join(PACKAGES)}; found {package!r}")
        if version != "none":
            try:
                Version(version)
            except InvalidVersion:
                raise ValueError(
                    f"packages: expected a version of {package} such as 2.11.0; found {version!r}"
                ) from None
    foreign = () if maker == here.vendor else {"cuda", "mslk", "rocm"}.difference(_TORCH_BUILDS[maker])
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

    Triton reads TRITON_INTERPRET at every ``@triton.jit``, including those of its own library at import. A later change
    would mix kernels of both kinds, which cannot call each other. So the first answer holds for the whole process, also
    for devices that `_probe` sees later.
    """
    if os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return False
    try:
        import triton.language
        from triton.runtime.interpreter import InterpretedFunction
    except ImportError:  # running the backend reports what is missing
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
        if version is None and package == "deep_gemm":  # users build it under other distribution names
            version = _provider_version(package)
        found.append((package, version))
    return tuple((package, version) for package, version in found if version is not None)


def _distribution_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _provider_version(package: str) -> str | None:
    """The version of any other distribution that provides ``package``; "0" if it has no version."""
    try:
        if importlib.util.find_spec(package) is None:
            return None
    except ImportError:
        return None
    except ValueError:  # a module in sys.modules without a spec
        return "0"
    distributions = metadata.packages_distributions().get(package, ())
    return next(filter(None, map(_distribution_version, distributions)), "0")
