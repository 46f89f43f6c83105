"""The package deep_gemm: its functions under whichever names they have, and what can be wrong with it.

It compiles its kernels at their first use, with the CUDA toolkit's nvcc, and keeps them in a directory. Where
DG_JIT_CACHE_DIR names none, that is one of this node and user here: the package's own choice is the home directory,
which nodes often share, and where ranks that start at the same time wait for each other.
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
# By function of `Functions`, the names that packages have for it; the first that is there counts.
_NAMES = {
    "scaled_grouped_mm": ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_fp4_gemm_nt_contiguous"),
    "grouped_mm": ("m_grouped_bf16_gemm_nt_contiguous",),
    "scaled_wgrad": ("k_grouped_fp8_gemm_nt_contiguous",),
    "alignment": ("get_mk_alignment_for_contiguous_layout",),
}
_OLDEST_NVCC = {"sm_90": "12.3", "sm_100": "12.9"}
# What broken builds say, and what it means. Seen with torch 2.11, 2026-11.
_BROKEN_BUILDS = (
    (
        "dim == 2 or dim == 3",
        "a build for another torch, which imports and then fails every call (sgl-deep-gemm 0.1.5.post3 to 0.2.1 do so "
        "with torch 2.11)",
    ),
    (
        "undefined symbol",
        "a build for another torch, which cannot be imported (sgl-deep-gemm 0.2.3 and later cannot with torch 2.11)",
    ),
)


class Functions(NamedTuple):
    """What of the package is called."""

    scaled_grouped_mm: Callable[..., None]  # (a, scales), (b, scales), out, group of each row, recipe
    grouped_mm: Callable[..., None]  # a, b, out, group of each row
    scaled_wgrad: Callable[..., None]  # (a, scales), (b, scales), out, sizes on the host, sizes, what is added to
    alignment: Callable[[], int]  # the rows in which it steps through groups


@functools.cache
def functions() -> Functions:
    """The package's functions. Imports it.

    Raises:
        AttributeError: it lacks one of them; the message names it.
        Exception: whatever the import of a broken build raises.
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


def look(machine: Machine) -> Health:
    """Compiler, import, symbols and alignment: all that is known of the package before a kernel runs."""
    if os.environ.get("DG_JIT_USE_NVRTC", "0") != "1":
        health = _look_at_nvcc(machine)
        if not health.is_good:
            return health
    try:
        alignment = functions().alignment()
    except Exception as error:
        return explain(error, machine)
    if BLOCK % alignment:
        return Health(
            f"it steps through groups in {alignment} rows",
            f"Call deep_gemm.set_mk_alignment_for_contiguous_layout({BLOCK}).",
        )
    return Health()


def explain(error: Exception, machine: Machine) -> Health:
    """What an error of the package, at its import or in a call, says of it."""
    text = " ".join(str(error).split())[:300]
    version = dict(machine.versions).get("deep_gemm", "")
    for sign, meaning in _BROKEN_BUILDS:
        if sign in text:
            return Health(f"deep_gemm {version} is {meaning}: {text}", f"{INSTALL}.")
    if isinstance(error, AssertionError) and not text:  # its own search for one
        return Health("deep_gemm finds no CUDA toolkit, whose headers it needs", "Set CUDA_HOME to one.")
    if isinstance(error, AttributeError):
        return Health(f"{text} (version {version})", f"{INSTALL}, or an upstream build that has it.")
    if "INVALID_HANDLE" in text or "INVALID_CONTEXT" in text or "invalid resource handle" in text:
        return Health(
            f"its kernels belong to another device of this process: {text}", "Use one process for each device."
        )
    return Health(f"{type(error).__name__}: {text}", f"{INSTALL}.")


def _look_at_nvcc(machine: Machine) -> Health:
    oldest = _OLDEST_NVCC.get(machine.arch, "12.3")
    fix = f"Install nvcc {oldest} or later and set CUDA_HOME, or set DG_JIT_USE_NVRTC=1."
    nvcc = _find_nvcc()
    if nvcc is None:
        return Health("it compiles its kernels with nvcc, of which there is none", fix)
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Health(f"{nvcc} does not run: {error}", fix)
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None or Version(found[1]) < Version(oldest):
        return Health(f"{nvcc} is {found[1] if found else 'of no known version'}", fix)
    return Health()


def _find_nvcc() -> str | None:
    """Where the package looks for it."""
    named = os.environ.get("DG_JIT_NVCC_COMPILER")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not (named or home):
        return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    return shutil.which(named or str(Path(str(home)) / "bin" / "nvcc"))


def _cache_directory() -> Path | None:
    """A directory of this node that nobody else writes to; None where there is none: kernels are loaded from it.

    Nor may anybody else put another one in its place, or in that of a directory above it. The path has no links.
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
    """Whether this is a directory, and no link to one, that nobody else writes to."""
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _keeps(parent: os.stat_result) -> bool:
    """Whether what is in a directory can be replaced by its owner and by root only."""
    others_write, is_sticky = parent.st_mode & 0o022, parent.st_mode & stat.S_ISVTX
    return parent.st_uid in (0, os.getuid()) and (not others_write or bool(is_sticky))
