"""Tiles that were found ahead of time on the user's GPU and are kept in a file: GROUPED_GEMM_AUTOTUNE=1. No Triton.

Three rules hold. Calls only look tiles up: `search` runs in `grouped_gemm.warmup` and nowhere else. M is not a key,
only its row class, so the same machine code serves all calls of a class, and for wgrad all calls. A tile is kept only
if its result equals that of the shipped tile bit for bit: the switch changes how long a GEMM takes, never its value.

C, O: the contraction and the columns of `m_grouped`. P, Q: the features of `k_grouped`'s operands.
"""

from __future__ import annotations

import functools
import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.machine import Machine, machine_of
from grouped_gemm.core.preference import AUTOTUNE
from grouped_gemm.core.store import Section
from grouped_gemm.kernels.gemm import tiles
from grouped_gemm.kernels.gemm.tiles import Tile

MARGIN = 1.02  # how much faster than the shipped tile one must be: repeated medians differ by up to 1%
_POWERS_OF_TWO = ("block_m", "block_n", "block_k", "num_warps")
_BOUNDS = {
    "block_m": (16, 256), "block_n": (16, 256), "block_k": (16, 128),
    "num_warps": (1, 16), "num_stages": (1, 16), "group_m": (1, 16),
}  # fmt: skip


class Site(NamedTuple):
    """One use of a tile: everything that the best tile depends on, except the versions of Triton and of the kernels.

    Attributes:
        arch: "sm_90".
        gpu: the device's name, since an H100 and an H200 are both sm_90.
        kernel: "gemm" or "wgrad".
        kind: kind of operands, see `launch.kind_of`.
        rows: the row class, as a string; "any" for wgrad.
        sizes: (C, O) of gemm, (P, Q) of wgrad.
        layout: the contiguous axis of gemm's rhs, "c" or "o", and whether TMA reads the operands.
    """

    arch: str
    gpu: str
    kernel: str
    kind: str
    rows: str
    sizes: tuple[int, int]
    layout: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.kind} {self.rows} {self.sizes[0]}x{self.sizes[1]} {self.layout}"


class Found(NamedTuple):
    """What a search found: the tile, and its speedup over the shipped tile (1 if it is the shipped tile)."""

    tile: Tile
    speedup: float


@dataclass(frozen=True)
class Search:
    """One search, for reports.

    Attributes:
        site: what was tuned.
        shipped: the shipped tile.
        tile: the tile that is used from now on.
        shipped_ms: milliseconds of the shipped tile.
        ms: milliseconds of ``tile``.
        tried: how many other tiles were tried.
        different: how many of them gave different bits.
        failed: the tiles that did not compile or run, and why.
    """

    site: Site
    shipped: Tile
    tile: Tile
    shipped_ms: float
    ms: float
    tried: int
    different: int
    failed: tuple[tuple[Tile, str], ...]

    @property
    def speedup(self) -> float:
        """How many times as fast as the shipped tile; 1 if that one stays."""
        return 1.0 if self.tile == self.shipped else self.shipped_ms / self.ms

    def __str__(self) -> str:
        kept = "the shipped tile stays"
        if self.tile != self.shipped:
            kept = f"{self.speedup:.2f}x as fast with {tile_name(self.tile)}, shipped {tile_name(self.shipped)}"
        trials = f"{self.tried} tried, {len(self.failed)} failed, {self.different} gave different bits"
        reasons = sorted({reason for _, reason in self.failed})
        return f"{self.site}: {kept} ({trials}{''.join(f'; failed: {reason}' for reason in reasons)})"


def tile_name(tile: Tile) -> str:
    """``128x256x64, 8 warps, 3 stages, group_m 16``."""
    sides = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return f"{sides}, {tile.num_warps} warps, {tile.num_stages} stages, group_m {tile.group_m}"


# -- looking up


def gemm_tile(machine: Machine, kind: str, rows: RowClass, c: int, o: int, c_contiguous: bool, tma: bool) -> Tile:
    """The tile of the M-grouped kernel: with GROUPED_GEMM_AUTOTUNE=1 the one found for this use, else the shipped one.

    Raises:
        ValueError: the switch has an unknown value.
    """
    shipped = tiles.gemm_tile(machine.vendor, machine.arch, kind, rows)
    if not AUTOTUNE.is_on():
        return shipped
    layout = ("c" if c_contiguous else "o") + (" tma" if tma else "")
    return _look_up(Site(machine.arch, machine.name, "gemm", kind, rows.value, (c, o), layout), shipped)


def wgrad_tile(machine: Machine, kind: str, p: int, q: int, tma: bool) -> Tile:
    """The same for the K-grouped kernel."""
    shipped = tiles.wgrad_tile(machine.vendor, machine.arch, kind)
    if not AUTOTUNE.is_on():
        return shipped
    return _look_up(Site(machine.arch, machine.name, "wgrad", kind, "any", (p, q), "tma" if tma else "plain"), shipped)


class _Watch(threading.local):
    """What a search makes this thread do. Other threads keep using their tiles."""

    def __init__(self) -> None:
        self.seen: dict[Site, Tile] | None = None  # the uses that are looked up, and their shipped tiles
        self.trial: tuple[Site, Tile] | None = None


_watch = _Watch()


def _look_up(site: Site, shipped: Tile) -> Tile:
    if _watch.seen is not None:
        _watch.seen[site] = shipped
    if _watch.trial is not None and _watch.trial[0] == site:
        return _watch.trial[1]
    found = known().get(site)
    return shipped if found is None else found.tile


# -- the file


def known() -> dict[Site, Found]:
    """What was found for this Triton and these kernels, here or in an earlier process."""
    return _section.known(versions())


def store(found: dict[Site, Found]) -> None:
    """Uses ``found`` from now on, in this process, and adds it to the file."""
    _section.store(versions(), found)


def forget() -> None:
    """Reads the file again at the next look."""
    _section.forget()


def _parse(entry: dict[str, Any]) -> tuple[Site, Found]:
    _check(entry)
    return _site(entry), Found(Tile(**entry["tile"]), entry["speedup"])


def _render(site: Site, found: Found) -> dict[str, Any]:
    return {**site._asdict(), "tile": found.tile._asdict(), "speedup": round(found.speedup, 4)}


def _site(entry: dict[str, Any]) -> Site:
    first, second = entry["sizes"]
    names = {name: entry[name] for name in Site._fields if name != "sizes"}
    if not all(isinstance(value, str) for value in names.values()) or not all(
        isinstance(n, int) for n in (first, second)
    ):
        raise TypeError(f"expected one use of a tile; found {entry!r}")
    return Site(**names, sizes=(first, second))


def _check(entry: dict[str, Any]) -> None:
    """Checks that an entry's tile is one that its kernel accepts and a search would try."""
    site, tile = _site(entry), Tile(**entry["tile"])
    for name, value in tile._asdict().items():
        least, most = _BOUNDS[name]
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name}: expected {least} to {most}; found {value!r}")
    if any(value & (value - 1) for value in (getattr(tile, name) for name in _POWERS_OF_TWO)):
        raise ValueError(f"expected powers of two for {', '.join(_POWERS_OF_TWO)}; found {tile}")
    if site.kind in ("blockwise", "mx", "mx upcast") and tile.block_k != 128:
        raise ValueError(f"block_k: expected 128, a block of scales; found {tile.block_k}")
    if (site.kernel, site.kind) == ("gemm", "blockwise") and tile.block_n > 128:
        raise ValueError(f"block_n: expected at most 128, a block of scales; found {tile.block_n}")
    if type(entry["speedup"]) not in (int, float) or not 0 < entry["speedup"] < math.inf:
        raise ValueError(f"speedup: expected a positive number; found {entry['speedup']!r}")


@functools.cache
def versions() -> dict[str, str]:
    """What a tile was found with. The sources of the kernels are part of it: what was found with others is not used."""
    sources = hashlib.sha256()
    for source in sorted(Path(__file__).parent.parent.rglob("*.py")):
        sources.update(source.read_bytes())
    return {"triton": str(machine_of("cpu").version("triton")), "kernels": sources.hexdigest()[:16]}


_section: Section[Site, Found] = Section("tiles", _parse, _render)


# -- searching


def search(run: Callable[[], Tensor], timer: Callable[[Callable[[], Tensor]], float] | None = None) -> list[Search]:
    """Searches a tile for each use in ``run`` that has none yet, and stores the tiles that it found.

    Takes about a second for each tile that has to be compiled. Host syncs, so it cannot run during graph capture.

    Args:
        run: launches a GEMM on operands of a representative size, with the same result each time.
        timer: measures a function in milliseconds. None: the median of ``triton.testing.do_bench``, which flushes L2
            before each run.

    Returns:
        One report for each use.

    Raises:
        RuntimeError: the shipped tile's own result does not repeat, so results cannot be compared.
    """
    timer = timer or _milliseconds
    seen: dict[Site, Tile] = {}
    _watch.seen = seen
    try:
        run()
    finally:
        _watch.seen = None
    searches = [_search(site, shipped, run, timer) for site, shipped in seen.items() if site not in known()]
    if searches:
        store({done.site: Found(done.tile, done.speedup) for done in searches})
    return searches


def _search(
    site: Site, shipped: Tile, run: Callable[[], Tensor], timer: Callable[[Callable[[], Tensor]], float]
) -> Search:
    """Varies one parameter after the other, each time around the best tile so far."""
    truth = _with(site, shipped, run)
    times = {shipped: _with(site, shipped, lambda: timer(run))}
    failed: dict[Tile, str] = {}
    different = 0
    for variants in (_sides, _block_ks, _stages, _group_ms):
        for tile in variants(site, min(times, key=times.__getitem__)):
            if tile in times or tile in failed:
                continue
            try:
                result = _with(site, tile, run)
                if not _same_bits(result, truth):
                    different += 1
                    times[tile] = float("inf")
                    continue
                times[tile] = _with(site, tile, lambda: timer(run))
            except Exception as error:  # of the compiler or the launch: reported, and this tile is out
                failed[tile] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if not _same_bits(_with(site, shipped, run), truth):  # raises if a trial has left the device unusable
        raise RuntimeError(
            f"{site}: expected the same bits from the same tile; found different ones. Nothing was stored."
        )
    best = min(times, key=times.__getitem__)
    tried = len(times) + len(failed) - 1
    if best != shipped:  # once more, interleaved: the first times were minutes apart
        again = [(_with(site, shipped, lambda: timer(run)), _with(site, best, lambda: timer(run))) for _ in range(2)]
        times[shipped], times[best] = (min(column) for column in zip(*again))
        if times[shipped] < MARGIN * times[best]:
            best = shipped
    return Search(site, shipped, best, times[shipped], times[best], tried, different, tuple(failed.items()))


def _with(site: Site, tile: Tile, run: Callable[[], Any]) -> Any:
    """What ``run`` returns when ``site`` uses ``tile``."""
    _watch.trial = site, tile
    try:
        return run()
    finally:
        _watch.trial = None


def _milliseconds(run: Callable[[], Tensor]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=50, return_mode="median"))


def _same_bits(x: Tensor, truth: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return torch.equal(x.view(bits), truth.view(bits))


def _sides(site: Site, tile: Tile) -> Iterator[Tile]:
    """block_m and block_n, with warps that leave 32 to 128 accumulators to a thread."""
    heights = {RowClass.DECODE.value: (16, 32, 64), RowClass.SMALL.value: (32, 64, 128)}.get(site.rows, (64, 128, 256))
    # blockwise, a step of gemm has one scale of rhs
    widths = (32, 64, 128) if site.kind == "blockwise" and site.kernel == "gemm" else (64, 128, 256)
    for block_m in heights:
        for block_n in widths:
            for num_warps in (4, 8):
                if 32 <= block_m * block_n // (32 * num_warps) <= 128:
                    yield tile._replace(block_m=block_m, block_n=block_n, num_warps=num_warps)


def _block_ks(site: Site, tile: Tile) -> Iterator[Tile]:
    """Values of the contraction in one step. Blockwise, a step is a block of scales."""
    for block_k in () if site.kind == "blockwise" else (32, 64, 128):
        yield tile._replace(block_k=block_k)


def _stages(site: Site, tile: Tile) -> Iterator[Tile]:
    for num_stages in (tile.num_stages - 1, tile.num_stages + 1, tile.num_stages + 2):
        if num_stages >= 1:
            yield tile._replace(num_stages=num_stages)


def _group_ms(site: Site, tile: Tile) -> Iterator[Tile]:
    for group_m in (1, 4, 8, 16):
        yield tile._replace(group_m=group_m)
