"""The package deep_gemm: its functions, whose names differ between versions, and checks of the installation.

The package compiles its kernels at first use with the CUDA toolkit's nvcc, and caches them in a directory. If
DG_JIT_CACHE_DIR is not set, we set it to a local directory of this node and user. The package's default is in the home
directory, which nodes often share, and where ranks that start together wait for each other.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

from grouped_gemm.backends.base import Health
from grouped_gemm.backends.deepgemm.layouts import BLOCK
from grouped_gemm.core.machine import Machine

INSTALL = "pip install sgl-deep-gemm==0.1.5 apache-tvm-ffi==0.1.11, which work with torch 2.11"
# For each function of `Functions`, the names that versions of the package have for it. The first one found is used.
_NAMES = {
    "scaled_grouped_mm": ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_fp4_gemm_nt_contiguous"),
    "grouped_mm": ("m_grouped_bf16_gemm_nt_contiguous",),
    "scaled_wgrad": ("k_grouped_fp8_gemm_nt_contiguous",),
    "alignment": ("get_mk_alignment_for_contiguous_layout",),
}
_OLDEST_NVCC = {"sm_90": "12.3", "sm_100": "12.9"}
# Error texts of broken builds, and what they mean. Seen with torch 2.11, 2026-11.
_BROKEN_BUILDS = (
    (
        "dim == 2 or dim == 3",
        "a build for another torch: it imports, but every call fails (as sgl-deep-gemm 0.1.5.post3 to 0.2.1 do with "
        "torch 2.11)",
    ),
    (
        "undefined symbol",
        "a build for another torch: it cannot be imported (like sgl-deep-gemm 0.2.3 and later with torch 2.11)",
    ),
)


class Functions(NamedTuple):
    """The functions of the package that this backend calls."""

    scaled_grouped_mm: Callable[..., None]  # (a, scales), (b, scales), out, group of each row, recipe
    grouped_mm: Callable[..., None]  # a, b, out, group of each row
    scaled_wgrad: Callable[..., None]  # (a, scales), (b, scales), out, sizes on the host, sizes, what to add to
    alignment: Callable[[], int]  # how many rows of a group one block of the kernel covers


@functools.cache
def functions() -> Functions:
    """The package's functions. Imports it.

    Raises:
        AttributeError: a function is missing; the message names it.
        Exception: anything that the import of a broken build raises.
    """
    directory = _cache_directory()
    if directory is not None:
        os.environ.setdefault("DG_JIT_CACHE_DIR", str(directory))
    import deep_gemm

    found = {}
    for function, names in _NAMES.items():
        name = next((name for name in names if hasattr(deep_gemm, name)), None)
        if name is None:
            raise AttributeError(f"deep_gemm has no {' or '.join(names)}")
        found[function] = getattr(deep_gemm, name)
    return Functions(**found)


def check(machine: Machine) -> Health:
    """Checks all that can be checked before a kernel runs: compiler, import, symbols and alignment."""
    if os.environ.get("DG_JIT_USE_NVRTC", "0") != "1":
        health = _check_nvcc(machine)
        if not health.is_good:
            return health
    try:
        alignment = functions().alignment()
    except Exception as error:
        return explain(error, machine)
    if BLOCK % alignment:
        return Health(
            f"it needs groups in multiples of {alignment} rows",
            f"Call deep_gemm.set_mk_alignment_for_contiguous_layout({BLOCK}).",
        )
    return Health()


def explain(error: Exception, machine: Machine) -> Health:
    """The problem and remedy behind an error that the package raised, at its import or in a call."""
    text = " ".join(str(error).split())[:300]
    version = dict(machine.versions).get("deep_gemm", "")
    for sign, meaning in _BROKEN_BUILDS:
        if sign in text:
            return Health(f"deep_gemm {version} is {meaning}: {text}", f"{INSTALL}.")
    if isinstance(error, AssertionError) and not text:  # raised by its own search for a toolkit
        return Health("deep_gemm needs the headers of a CUDA toolkit, and finds none", "Set CUDA_HOME to a toolkit.")
    if isinstance(error, AttributeError):
        return Health(f"{text} (version {version})", f"{INSTALL}, or an upstream build that has it.")
    if "INVALID_HANDLE" in text or "INVALID_CONTEXT" in text or "invalid resource handle" in text:
        return Health(f"its kernels belong to another device of this process: {text}", "Use one process per device.")
    return Health(f"{type(error).__name__}: {text}", f"{INSTALL}.")


def _check_nvcc(machine: Machine) -> Health:
    oldest = _OLDEST_NVCC.get(machine.arch, "12.3")
    fix = f"Install nvcc {oldest} or later and set CUDA_HOME, or set DG_JIT_USE_NVRTC=1."
    nvcc = _find_nvcc()
    if nvcc is None:
        return Health("it compiles its kernels with nvcc, which was not found", fix)
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Health(f"{nvcc} does not run: {error}", fix)
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None or Version(found[1]) < Version(oldest):
        return Health(f"{nvcc} is {found[1] if found else 'of unknown version'}", fix)
    return Health()


def _find_nvcc() -> str | None:
    """The nvcc that the package would use."""
    named = os.environ.get("DG_JIT_NVCC_COMPILER")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not (named or home):
        return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return shutil.which(named or str(Path(str(home)) / "bin" / "nvcc"))


def _cache_directory() -> Path | None:
    """A directory on this node that only this user can write to, since kernels are loaded from it; None: there is none.

    Nobody else can replace it, or a directory above it. The path contains no links.
    """
    if not hasattr(os, "getuid"):
        return None
    try:
        directory = Path(tempfile.gettempdir()).resolve() / f"grouped_gemm-deep_gemm-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        is_safe = _is_private(directory.lstat()) and all(_keeps(parent.lstat()) for parent in directory.parents)
    except OSError:
        return None
    return directory if is_safe else None


def _is_private(status: os.stat_result) -> bool:
    """Whether this is a directory, not a link to one, that only this user can write to."""
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _keeps(parent: os.stat_result) -> bool:
    """Whether nobody but their owners and root can replace the entries of a directory."""
    others_write, is_sticky = parent.st_mode & 0o022, parent.st_mode & stat.S_ISVTX
    return parent.st_uid in (0, os.getuid()) and (not others_write or bool(is_sticky))
