"""Profiles, the measured times of whole calls on each plan: those that this package ships, and the user's own.

`measure` measures both. With GROUPED_GEMM_AUTOTUNE=1, `warmup` measures a model's own calls on the user's GPU, and
these times take precedence. A call itself measures nothing.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from grouped_gemm.core.machine import Machine
from grouped_gemm.core.store import Entry, Section, read
from grouped_gemm.kernels.gemm import tile_search
from grouped_gemm.selection.cost_model import PLANS, Call, Profile, Times

_SHIPPED = Path(__file__).parent / "profiles"


def profiles(machine: Machine, tunes: bool) -> tuple[Profile, ...]:
    """The profiles for decisions on ``machine``, in order of precedence.

    Args:
        machine: the machine of the call.
        tunes: whether to include the user's own measurements on this GPU.
    """
    found = (known(machine) if tunes and machine.is_gpu else None, shipped(machine.name))
    return tuple(profile for profile in found if profile is not None)


def shipped_gpus() -> tuple[str, ...]:
    """The names of the GPUs for which this package ships a profile."""
    return tuple(read(file)["profiles"][0]["setting"]["gpu"] for file in sorted(_SHIPPED.glob("*.json")))


@functools.cache
def shipped(gpu: str) -> Profile | None:
    """The profile that this package ships for a GPU of exactly this name; None if there is none."""
    entries = read(_SHIPPED / f"{gpu.lower().replace(' ', '_')}.json").get("profiles", [])
    entries = [entry for entry in entries if entry["setting"]["gpu"] == gpu]  # names that differ may share a file name
    return Profile(gpu, dict(map(of_entry, entries))) if entries else None


def known(machine: Machine) -> Profile:
    """The user's own measurements on this GPU with these versions, from this process and earlier ones."""
    return Profile(machine.name, _section.known(_setting(machine)), is_exact=True)


def store(machine: Machine, found: dict[Call, Times]) -> None:
    """Adds ``found`` to the file. This process uses it from now on."""
    _section.store(_setting(machine), found)


def forget() -> None:
    """Makes the next access read the file again, since another process may have measured the same."""
    _section.forget()


def _setting(machine: Machine) -> dict[str, str]:
    """What a measurement is valid for: the GPU and the versions of the software that runs on it."""
    versions = {package: version for package, version in machine.versions if package in ("torch", "deep_gemm")}
    return {"gpu": machine.name, **tile_search.versions(), **versions}


def as_entry(call: Call, times: Times) -> Entry:
    """One measurement in the form that `core.store` keeps."""
    entry: Entry = {**call._asdict(), **times._asdict()}
    for mode in ("eager", "captured"):
        entry[mode] = {plan: None if math.isinf(us) else round(us, 1) for plan, us in entry[mode].items()}
    return entry


def of_entry(entry: Entry) -> tuple[Call, Times]:
    """The measurement that `as_entry` wrote.

    Raises:
        KeyError, TypeError, ValueError: ``entry`` is not a measurement.
    """
    # A user's own entry applies only to an equal call, so an entry for an impossible call does no harm.
    call = Call(**{name: entry[name] for name in Call._fields})
    return call, Times(entry["num_rows"], _by_plan(entry["eager"]), _by_plan(entry["captured"]), entry["date"])


def _by_plan(found: Any) -> dict[str, float]:
    # Another version may have measured plans that this one does not know.
    times = {plan: math.inf if us is None else float(us) for plan, us in found.items() if plan in PLANS}
    if not all(us >= 0 for us in times.values()):
        raise ValueError(f"expected microseconds by plan; found {found!r}")
    return times


_section: Section[Call, Times] = Section("profiles", of_entry, as_entry)
