"""Tuned tiles: when they are looked up, the file that keeps them, and the search, with made-up times."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from grouped_gemm import Machine
from grouped_gemm.core import store
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.preference import cache_directory
from grouped_gemm.kernels.gemm import tile_search, tiles
from grouped_gemm.kernels.gemm.tile_search import Found, Site
from grouped_gemm.kernels.gemm.tiles import Tile

H200 = Machine("nvidia", "sm_90", "NVIDIA H200")
USE = (H200, "16 bit", RowClass.LARGE, 7168, 2048, True, True)
SITE = Site("sm_90", "NVIDIA H200", "gemm", "16 bit", "large", (7168, 2048), "c tma")
SHIPPED = tiles.gemm_tile("nvidia", "sm_90", "16 bit", RowClass.LARGE)
OTHER = Tile(64, 64, 32, 4, 2, group_m=1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory, the switch on, and nothing read yet."""
    monkeypatch.setenv("GROUPED_GEMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("GROUPED_GEMM_AUTOTUNE", "1")
    tile_search.forget()
    yield tmp_path / "cache"
    tile_search.forget()


def in_a_new_process() -> None:
    """Forgets everything that is not in the file, as a new process does."""
    tile_search.forget()


def change(**changes: object) -> None:
    """Changes the one entry of the file; versions are in its setting."""
    content = json.loads(store.path().read_text())
    content["tiles"][0].update(changes)
    store.path().write_text(json.dumps(content))
    in_a_new_process()


# Looking up


def test_without_a_file_the_shipped_tile_is_used():
    assert tile_search.gemm_tile(*USE) == SHIPPED
    assert tile_search.wgrad_tile(H200, "16 bit", 7168, 2048, True) == tiles.wgrad_tile("nvidia", "sm_90", "16 bit")


def test_a_tuned_tile_comes_before_the_shipped_one():
    tile_search.store({SITE: Found(OTHER, 1.1)})
    assert tile_search.gemm_tile(*USE) == OTHER


def test_a_tuned_tile_serves_later_processes():
    tile_search.store({SITE: Found(OTHER, 1.1)})
    in_a_new_process()
    assert tile_search.gemm_tile(*USE) == OTHER


def test_wgrad_has_a_tile_of_its_own():
    site = Site("sm_90", "NVIDIA H200", "wgrad", "rowwise", "any", (7168, 2048), "plain")
    tile_search.store({site: Found(OTHER, 1.1)})
    assert tile_search.wgrad_tile(H200, "rowwise", 7168, 2048, False) == OTHER
    assert tile_search.wgrad_tile(H200, "rowwise", 7168, 2048, True) != OTHER


@pytest.mark.parametrize(
    "use",
    (
        (Machine("nvidia", "sm_90", "NVIDIA H100"), *USE[1:]),
        (Machine("nvidia", "sm_100", "NVIDIA H200"), *USE[1:]),
        (H200, "rowwise", *USE[2:]),
        (*USE[:2], RowClass.SMALL, *USE[3:]),
        (*USE[:3], 2048, 7168, *USE[5:]),
        (*USE[:5], False, True),
        (*USE[:5], True, False),
    ),
    ids=("gpu", "arch", "kind", "row class", "sizes", "contiguous", "tma"),
)
def test_another_use_keeps_the_shipped_tile(use):
    tile_search.store({SITE: Found(OTHER, 1.1)})
    assert tile_search.gemm_tile(*use) == tiles.gemm_tile("nvidia", use[0].arch, *use[1:3])


@pytest.mark.parametrize("value", ("0", "", None))
def test_with_the_switch_off_nothing_is_read(monkeypatch, value):
    tile_search.store({SITE: Found(OTHER, 1.1)})
    in_a_new_process()
    if value is None:
        monkeypatch.delenv("GROUPED_GEMM_AUTOTUNE")
    else:
        monkeypatch.setenv("GROUPED_GEMM_AUTOTUNE", value)
    monkeypatch.setattr(store, "read", lambda file: pytest.fail("the file was read"))
    assert tile_search.gemm_tile(*USE) == SHIPPED
    assert tile_search.search(lambda: torch.tensor(float(tile_search.gemm_tile(*USE).block_m)), pytest.fail) == []


def test_an_unknown_value_of_the_switch_is_named(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match=r"^GROUPED_GEMM_AUTOTUNE: expected one of 0, 1; found 'yes'$"):
        tile_search.gemm_tile(*USE)


def test_the_file_is_read_once(monkeypatch):
    reads = []
    monkeypatch.setattr(store, "read", lambda file: reads.append(1) or {})
    tile_search.gemm_tile(*USE)
    tile_search.gemm_tile(*USE)
    assert len(reads) == 1


def test_the_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.setenv("GROUPED_GEMM_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "grouped_gemm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "grouped_gemm"


# The file


@pytest.mark.parametrize("name", ("triton", "kernels"))
def test_tiles_tuned_with_other_versions_are_kept_and_not_used(name):
    tile_search.store({SITE: Found(OTHER, 1.1)})
    change(setting={**tile_search.versions(), name: "another"}, tile={"an": "unknown form"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tile_search.gemm_tile(*USE) == SHIPPED
        tile_search.store({SITE: Found(OTHER, 1.2)})
    entries = json.loads(store.path().read_text())["tiles"]
    assert [entry["setting"][name] == "another" for entry in entries] == [True, False]


DAMAGE = {
    "no JSON": "{",
    "no text": b"\xff\xfe\x00",
    "a list": "[]",
    "another schema": json.dumps({"schema": store.SCHEMA + 1, "tiles": []}),
    "tiles that are no list": json.dumps({"schema": store.SCHEMA, "tiles": 3}),
    "entries that are no objects": json.dumps({"schema": store.SCHEMA, "tiles": [3]}),
    "an entry without a setting": json.dumps({"schema": store.SCHEMA, "tiles": [{"arch": "sm_90"}]}),
}
TILES = {
    "no power of two": {"block_m": 96},
    "a negative number": {"num_stages": -1},
    "a text": {"num_warps": "8"},
    "an unknown field": {"color": 1},
    "too many rows": {"block_m": 2**40},
    "too many warps": {"num_warps": 32},
    "a billion stages": {"num_stages": 10**9},
    "no group_m": {"group_m": 0},
    "no number": {"group_m": True},
    "less than a matrix instruction": {"block_k": 8},
}


def assert_ignored_with_one_warning():
    with pytest.warns(UserWarning, match="Delete the file") as caught:
        assert tile_search.gemm_tile(*USE) == SHIPPED
        assert tile_search.gemm_tile(*USE) == SHIPPED
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"{store.path()}: expected valid tiles")


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_ignored_with_one_warning_and_replaced(content):
    store.path().parent.mkdir()
    store.path().write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_ignored_with_one_warning()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tile_search.store({SITE: Found(OTHER, 1.1)})
        in_a_new_process()
        assert tile_search.gemm_tile(*USE) == OTHER


@pytest.mark.parametrize("changes", TILES.values(), ids=TILES)
def test_a_tile_that_no_kernel_takes_is_damage(changes):
    tile_search.store({SITE: Found(OTHER, 1.1)})
    change(tile=OTHER._asdict() | changes)
    assert_ignored_with_one_warning()


@pytest.mark.parametrize("changes", ({"block_k": 64}, {"block_n": 256}), ids=str)
def test_a_tile_that_splits_a_block_of_scales_is_damage(changes):
    blockwise = tiles.gemm_tile("nvidia", "sm_90", "blockwise", RowClass.LARGE)
    tile_search.store({SITE._replace(kind="blockwise"): Found(blockwise, 1.1)})
    change()
    assert tile_search.known()
    change(tile=blockwise._asdict() | changes)
    assert_ignored_with_one_warning()


@pytest.mark.parametrize("speedup", (0, -1.5, float("nan"), float("inf"), True, "2"))
def test_an_invalid_speedup_is_damage(speedup):
    tile_search.store({SITE: Found(OTHER, 1.1)})
    change(speedup=speedup)
    assert_ignored_with_one_warning()


@pytest.mark.parametrize("kernel", ("gemm", "wgrad"))
@pytest.mark.parametrize("kind", ("16 bit", "32 bit", "rowwise", "blockwise", "mx upcast"))
def test_every_shipped_tile_passes_the_check_of_tuned_tiles(kernel, kind):
    shipped = (
        [tiles.wgrad_tile("nvidia", "sm_90", kind)]
        if kernel == "wgrad"
        else [tiles.gemm_tile("nvidia", "sm_90", kind, rows) for rows in RowClass]
    )
    for tile in shipped:
        tile_search._check({**SITE._replace(kernel=kernel, kind=kind)._asdict(), "tile": tile._asdict(), "speedup": 1})


def assert_unusable(reason: str) -> None:
    """Reading and storing warn, and name the remedy. Calls still run, and this process uses its tuned tiles."""
    with pytest.warns(UserWarning, match="Set GROUPED_GEMM_CACHE_DIR") as caught:
        assert tile_search.gemm_tile(*USE) == SHIPPED
        tile_search.store({SITE: Found(OTHER, 1.1)})
    assert [reason in str(warning.message) for warning in caught] == [True, True]
    assert tile_search.gemm_tile(*USE) == OTHER


def test_a_directory_that_is_a_file_is_named_with_its_remedy(folder):
    folder.write_text("a file, where a directory should be")
    assert_unusable(str(folder))


def test_a_home_directory_that_is_not_there_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setenv("GROUPED_GEMM_CACHE_DIR", "~no_such_user_/x")
    assert_unusable("no home directory for ~no_such_user_/x")


def test_no_home_directory_at_all_is_named_with_its_remedy(monkeypatch):
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GROUPED_GEMM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert_unusable("no home directory for ~/.cache/grouped_gemm")


def test_a_lock_that_is_a_link_is_not_followed(folder):
    folder.mkdir()
    precious, new = folder / "precious", folder / "new"
    precious.write_text("precious")
    for target in (precious, new):
        lock = folder / f"autotune-{store.SCHEMA}.lock"
        lock.unlink(missing_ok=True)
        lock.symlink_to(target)
        tile_search.store({SITE: Found(OTHER, 1.1)})
    assert precious.read_text() == "precious" and not new.exists()
    in_a_new_process()
    assert tile_search.gemm_tile(*USE) == OTHER


def test_a_lock_is_not_emptied(folder):
    folder.mkdir()
    lock = folder / f"autotune-{store.SCHEMA}.lock"
    lock.write_text("precious")
    tile_search.store({SITE: Found(OTHER, 1.1)})
    assert lock.read_text() == "precious"


def test_a_file_that_is_a_link_is_read_and_then_replaced(folder, tmp_path):
    tile_search.store({SITE: Found(OTHER, 1.1)})
    elsewhere = tmp_path / "elsewhere.json"
    store.path().rename(elsewhere)
    store.path().symlink_to(elsewhere)
    before = elsewhere.read_text()
    in_a_new_process()
    assert tile_search.gemm_tile(*USE) == OTHER
    tile_search.store({SITE._replace(gpu="NVIDIA H100"): Found(OTHER, 1.1)})
    assert elsewhere.read_text() == before and not store.path().is_symlink()


def test_a_file_in_the_place_of_the_temporary_one_is_left_alone(folder, monkeypatch):
    folder.mkdir()
    monkeypatch.setattr(os, "urandom", bytes)
    precious = folder / "precious"
    precious.write_text("precious")
    guessed = folder / f"autotune-{store.SCHEMA}.json.{bytes(8).hex()}.tmp"
    guessed.symlink_to(precious)
    with pytest.warns(UserWarning, match="File exists"):
        tile_search.store({SITE: Found(OTHER, 1.1)})
    assert precious.read_text() == "precious"


def test_a_write_that_fails_leaves_the_file_as_it_was(monkeypatch):
    tile_search.store({SITE: Found(OTHER, 1.1)})
    before = store.path().read_text()

    def fail(*paths: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="no space left"):
        tile_search.store({SITE._replace(gpu="NVIDIA H100"): Found(OTHER, 1.1)})
    assert store.path().read_text() == before
    assert not list(store.path().parent.glob("*.tmp"))


def _store_many(number: int) -> None:
    for i in range(10):
        tile_search.store({SITE._replace(sizes=(number, i)): Found(OTHER, 1.1)})


def test_processes_that_write_at_the_same_time_lose_nothing():
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_store_many, args=(number,)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    in_a_new_process()
    assert {site.sizes for site in tile_search.known()} == {(number, i) for number in range(4) for i in range(10)}


# The search


class GEMM:
    """A GEMM whose time depends on its tile, and whose bits differ for the tiles that ``differs`` names."""

    def __init__(self, milliseconds: Callable[[Tile], float], differs: Callable[[Tile], bool] = lambda tile: False):
        self.milliseconds, self.differs = milliseconds, differs
        self.tiles: list[Tile] = []

    def __call__(self) -> torch.Tensor:
        tile = tile_search.gemm_tile(*USE)
        self.tiles.append(tile)
        if tile.num_stages > 4:
            raise RuntimeError("out of resource: shared memory")
        return torch.tensor([1.0, float("nan"), float(self.differs(tile))])

    def timer(self, run: Callable[[], torch.Tensor]) -> float:
        run()
        return self.milliseconds(self.tiles[-1])

    def search(self) -> list[tile_search.Search]:
        return tile_search.search(self, self.timer)


def test_the_fastest_tile_is_found_used_and_kept():
    best = SHIPPED._replace(block_m=64, block_n=128, num_warps=4, num_stages=4, group_m=1)
    gemm = GEMM(lambda tile: 1 + sum(one != other for one, other in zip(tile, best)))
    (done,) = gemm.search()
    assert (done.site, done.shipped, done.tile) == (SITE, SHIPPED, best)
    assert tile_search.gemm_tile(*USE) == best
    in_a_new_process()
    assert tile_search.known()[SITE] == Found(best, done.speedup)


def test_a_tuned_tile_is_not_searched_again():
    gemm = GEMM(lambda tile: 1.0)
    assert len(gemm.search()) == 1
    in_a_new_process()
    gemm.tiles.clear()
    assert gemm.search() == []
    assert gemm.tiles == [SHIPPED]


def test_a_tile_that_is_hardly_faster_is_not_taken():
    (done,) = GEMM(lambda tile: 1.0 if tile == SHIPPED else 0.99).search()
    assert done.tile == SHIPPED and done.speedup == 1


def test_a_tile_that_is_faster_only_once_is_not_taken():
    timed: set[Tile] = set()

    def milliseconds(tile: Tile) -> float:
        first = tile not in timed
        timed.add(tile)
        return 0.5 if first and tile.block_m == 64 else 1.0

    (done,) = GEMM(milliseconds).search()
    assert done.tile == SHIPPED


def test_a_tile_that_gives_other_bits_is_not_taken():
    gemm = GEMM(lambda tile: 1.0 if tile == SHIPPED else 0.5, differs=lambda tile: tile != SHIPPED)
    (done,) = gemm.search()
    assert done.tile == SHIPPED
    assert done.different == done.tried - len(done.failed) > 0


def test_a_tile_that_fails_is_skipped_counted_and_named():
    (done,) = GEMM(lambda tile: 1 / tile.num_stages).search()
    assert done.tile.num_stages == 4
    assert done.failed and all(tile.num_stages > 4 for tile, _ in done.failed)
    assert f"{len(done.failed)} failed" in str(done)
    assert "RuntimeError: out of resource: shared memory" in str(done)


def test_a_shipped_tile_that_fails_is_an_error():
    def fail() -> torch.Tensor:
        tile_search.gemm_tile(*USE)
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        tile_search.search(fail, lambda run: 1.0)
    assert tile_search.gemm_tile(*USE) == SHIPPED


def test_a_gemm_that_does_not_repeat_is_an_error():
    numbers = iter(range(1000))

    def run() -> torch.Tensor:
        tile_search.gemm_tile(*USE)
        return torch.tensor([float(next(numbers))])

    with pytest.raises(RuntimeError, match="expected the same bits from the same tile"):
        tile_search.search(run, lambda run: 1.0)
    assert not store.path().exists()


def test_a_function_that_uses_no_tile_is_not_searched():
    assert tile_search.search(lambda: torch.ones(3), pytest.fail) == []
    assert not store.path().exists()


@pytest.mark.parametrize("kernel", ("gemm", "wgrad"))
@pytest.mark.parametrize("kind", ("16 bit", "32 bit", "rowwise", "blockwise"))
def test_variants_are_tiles_that_the_kernels_allow(kernel, kind):
    site = SITE._replace(kernel=kernel, kind=kind)
    shipped = tiles.wgrad_tile("nvidia", "sm_90", kind)
    for variants in (tile_search._sides, tile_search._block_ks, tile_search._stages, tile_search._group_ms):
        for tile in variants(site, shipped):
            tile_search._check({**site._asdict(), "tile": tile._asdict(), "speedup": 1})
            assert 128 % tile.block_k == 0
            if kind == "blockwise":
                assert tile.block_k == 128 and (kernel == "wgrad" or 128 % tile.block_n == 0)
