"""Tiles found ahead of time on the user's own GPU, and kept in a file: GROUPED_GEMM_AUTOTUNE=1. Imports no Triton.

Three rules. A call only looks up: `search` runs in `grouped_gemm.warmup` and nowhere else. M is no key, the row class
is, so that one machine code serves all calls of a class; wgrad's does not even depend on that. And a tile is kept only
if its result is that of the shipped tile, bit for bit: the switch changes how long a product takes, never its value,
and a row's bits depend on the other groups as much as they did before, which is not at all.

C, O, P, Q: the contraction and the columns of `m_grouped`, the features of `k_grouped`'s operands.
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

MARGIN = 1.02  # how many times as fast as the shipped tile one must be: repeated medians differ by up to 1%
_POWERS_OF_TWO = ("block_m", "block_n", "block_k", "num_warps")
_BOUNDS = {
    "block_m": (16, 256), "block_n": (16, 256), "block_k": (16, 128),
    "num_warps": (1, 16), "num_stages": (1, 16), "group_m": (1, 16),
}  # fmt: skip


class Site(NamedTuple):
    """One use of a tile: all that the best one depends on, beside the versions of Triton and of the kernels.

    Attributes:
        arch: "sm_90".
        gpu: the device's own name: an H100 and an H200 are both sm_90.
        kernel: "gemm" or "wgrad".
        kind: kind of operands, as in `tiles`.
        rows: value of the row class; "any" for wgrad.
        sizes: (C, O) of gemm, (P, Q) of wgrad.
        layout: which axis of gemm's rhs is contiguous, "c" or "o"; and whether TMA reads the operands.
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
    """What a search found: the tile, and how many times as fast as the shipped one it is (1 where it is that one)."""

    tile: Tile
    speedup: float


@dataclass(frozen=True)
class Search:
    """One search, for people.

    Attributes:
        site: what was tuned.
        shipped: the tile of the table.
        tile: the one that is used from now on.
        shipped_ms: milliseconds of the shipped tile.
        ms: milliseconds of ``tile``.
        tried: how many other tiles were tried.
        different: how many of them gave other bits.
        failed: those that did not compile or run, and why.
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
        """How many times as fast as the shipped tile; 1 where that one stays."""
        return 1.0 if self.tile == self.shipped else self.shipped_ms / self.ms

    def __str__(self) -> str:
        kept = "the shipped tile stays"
        if self.tile != self.shipped:
            kept = f"{self.speedup:.2f}x as fast with {tile_name(self.tile)}, shipped {tile_name(self.shipped)}"
        trials = f"{self.tried} tried, {len(self.failed)} failed, {self.different} gave other bits"
        reasons = sorted({reason for _, reason in self.failed})
        return f"{self.site}: {kept} ({trials}{''.join(f'; failed: {reason}' for reason in reasons)})"


def tile_name(tile: Tile) -> str:
    """``128x256x64, 8 warps, 3 stages, group_m 16``."""
    sides = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return f"{sides}, {tile.num_warps} warps, {tile.num_stages} stages, group_m {tile.group_m}"


# -- looking up


def gemm_tile(machine: Machine, kind: str, rows: RowClass, c: int, o: int, c_contiguous: bool, tma: bool) -> Tile:
    """The tile of the M-grouped kernel: where GROUPED_GEMM_AUTOTUNE=1, one that was found for this use; else shipped.

    Raises:
        ValueError: the switch has an unknown value.
    """
    shipped = tiles.gemm_tile(machine.vendor, machine.arch, kind, rows)
    if not AUTOTUNE.is_on():
        return shipped
    layout = ("c" if c_contiguous else "o") + (" tma" if tma else "")
    return _look_up(Site(machine.arch, machine.name, "gemm", kind, rows.value, (c, o), layout), shipped)


def wgrad_tile(machine: Machine, kind: str, p: int, q: int, tma: bool) -> Tile:
    """Likewise of the K-grouped kernel."""
    shipped = tiles.wgrad_tile(machine.vendor, machine.arch, kind)
    if not AUTOTUNE.is_on():
        return shipped
    return _look_up(Site(machine.arch, machine.name, "wgrad", kind, "any", (p, q), "tma" if tma else "plain"), shipped)


class _Watch(threading.local):
    """What a search has this thread do: other threads go on with the tiles that they have."""

    def __init__(self) -> None:
        self.seen: dict[Site, Tile] | None = None  # uses and their shipped tiles
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
    """The tile of an entry is one that its kernel takes, no larger than a search tries."""
    site, tile = _site(entry), Tile(**entry["tile"])
    for name, value in tile._asdict().items():
        least, most = _BOUNDS[name]
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} of a tile is {value!r}, and not from {least} to {most}")
    if any(value & (value - 1) for value in (getattr(tile, name) for name in _POWERS_OF_TWO)):
        raise ValueError(f"no powers of two: {tile}")
    if site.kind in ("blockwise", "mx", "mx upcast") and tile.block_k != 128:
        raise ValueError(f"block_k of a tile is {tile.block_k}; a block of scales has 128")
    if (site.kernel, site.kind) == ("gemm", "blockwise") and tile.block_n > 128:
        raise ValueError(f"block_n of a tile is {tile.block_n}; a block of scales has 128")
    if type(entry["speedup"]) not in (int, float) or not 0 < entry["speedup"] < math.inf:
        raise ValueError(f"speedup is {entry['speedup']!r}")


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
    """Searches a tile for each use in ``run`` that nothing is known of yet, and stores what it found.

    Takes about a second for each tile that has to be compiled; waits for the device. Not during graph capture.

    Args:
        run: launches a product, on operands of a size that tells; the same result each time.
        timer: milliseconds of a function; None: the median of ``triton.testing.do_bench``, which empties L2 before
            each run.

    Returns:
        What was done, one for each use.

    Raises:
        RuntimeError: the shipped tile's own result does not repeat, so that no comparison means anything.
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
    """Better tiles are looked for in one respect after the other, each time around the best one so far."""
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
            except Exception as error:  # of the compiler or the launch: this tile is none; the report says so
                failed[tile] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if not _same_bits(_with(site, shipped, run), truth):  # raises where a trial has left the device unusable
        raise RuntimeError(f"{site}: expected the same bits from the same tile; found others. Nothing was stored.")
    best = min(times, key=times.__getitem__)
    tried = len(times) + len(failed) - 1
    if best != shipped:  # once more, in turns: the first times were minutes apart
        again = [(_with(site, shipped, lambda: timer(run)), _with(site, best, lambda: timer(run))) for _ in range(2)]
        times[shipped], times[best] = (min(column) for column in zip(*again))
        if times[shipped] < MARGIN * times[best]:
            best = shipped
    return Search(site, shipped, best, times[shipped], times[best], tried, different, tuple(failed.items()))


def _with(site: Site, tile: Tile, run: Callable[[], Any]) -> Any:
    """What ``run`` returns where ``site`` works in ``tile``."""
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
