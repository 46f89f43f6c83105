"""Profiles: what whole calls took on each plan. Those that this package ships, and the user's own file of them.

Both were measured by `measure`. With GROUPED_GEMM_AUTOTUNE=1, `warmup` measures a model's own calls on the user's GPU,
and AUTO believes these first. No call measures anything.
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
    """The profiles that decisions on ``machine`` rest on, the one that counts most first.

    Args:
        machine: where.
        tunes: whether the file of this GPU's own measurements is one of them.
    """
    found = (known(machine) if tunes and machine.is_gpu else None, shipped(machine.name))
    return tuple(profile for profile in found if profile is not None)


def shipped_gpus() -> tuple[str, ...]:
    """The names of the GPUs that this package ships a profile for."""
    return tuple(read(file)["profiles"][0]["setting"]["gpu"] for file in sorted(_SHIPPED.glob("*.json")))


@functools.cache
def shipped(gpu: str) -> Profile | None:
    """The profile that this package ships for a GPU of exactly this name; None: there is none."""
    entries = read(_SHIPPED / f"{gpu.lower().replace(' ', '_')}.json").get("profiles", [])
    return Profile(gpu, dict(map(of_entry, entries))) if entries else None


def known(machine: Machine) -> Profile:
    """What was measured on this GPU with these versions, here or in an earlier process."""
    return Profile(machine.name, _section.known(_setting(machine)), is_exact=True)


def store(machine: Machine, found: dict[Call, Times]) -> None:
    """Uses ``found`` from now on, in this process, and adds it to the file."""
    _section.store(_setting(machine), found)


def forget() -> None:
    """Reads the file again at the next look: another process may have measured the same."""
    _section.forget()


def _setting(machine: Machine) -> dict[str, str]:
    """What a measurement holds for: the GPU, and all software that runs on it."""
    versions = {package: version for package, version in machine.versions if package in ("torch", "deep_gemm")}
    return {"gpu": machine.name, **tile_search.versions(), **versions}


def as_entry(call: Call, times: Times) -> Entry:
    """One measurement as `core.store` keeps it."""
    entry: Entry = {**call._asdict(), **times._asdict()}
    for clock in ("eager", "captured"):
        entry[clock] = {plan: None if math.isinf(us) else round(us, 1) for plan, us in entry[clock].items()}
    return entry


def of_entry(entry: Entry) -> tuple[Call, Times]:
    """The measurement that `as_entry` wrote.

    Raises:
        KeyError, TypeError, ValueError: it is not one.
    """
    call = Call(**{name: entry[name] for name in Call._fields})
    times = Times(entry["num_rows"], _clock(entry["eager"]), _clock(entry["captured"]), entry["date"])
    sizes = (*call[-3:], times.num_rows)
    if not (
        all(type(size) is int and 1 <= size < 2**63 for size in sizes)
        and all(isinstance(name, str) for name in (call.recipe, call.rows, times.date))
        and isinstance(call.whole_blocks, bool)
        and isinstance(call.training, bool)
    ):
        raise TypeError(f"expected one measured call; found {entry!r}")
    return call, times


def _clock(found: Any) -> dict[str, float]:
    times = {plan: math.inf if us is None else float(us) for plan, us in found.items()}
    if not all(plan in PLANS and us >= 0 for plan, us in times.items()):
        raise ValueError(f"expected microseconds by plan; found {found!r}")
    return times


_section: Section[Call, Times] = Section("profiles", of_entry, as_entry)
