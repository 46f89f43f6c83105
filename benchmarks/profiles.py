"""Measures the profile that AUTO reads on one CUDA GPU: whole calls, on each plan that runs them.

    python -m grouped_gemm bench profiles --write grouped_gemm/autotune/profiles

Large groups, ragged and in whole blocks of 128 rows, then small and decode ones; forward alone, and forward with
backward. The file is named after the GPU. Backends that are not installed are left out, so install all of them first.
A measurement needs the GPU for itself, but compilation does not: with `--compile`, several processes can compile the
kernels of different shapes before one process measures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import DEVICE, failures
from _report import SHAPES

from grouped_gemm import CallSpec, Pass, Recipe
from grouped_gemm.autotune.measure import measure
from grouped_gemm.autotune.profile import as_entry
from grouped_gemm.autotune.timing import captured_microseconds, eager_microseconds
from grouped_gemm.backends import candidates
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.store import SCHEMA

PROFILED = SHAPES | {
    "mixtral_22b": (16384, 8, 32768, 6144),
    "dbrx": (16384, 16, 21504, 6144),
    "jamba": (16384, 16, 28672, 4096),
    "gpt_oss": (32768, 32, 5760, 2880),
    "little": (8192, 16, 1024, 1024),  # host time exceeds device time
}
RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE)  # that several backends run
ROWS = {RowClass.SMALL: 128, RowClass.DECODE: 2}  # per group
# Row class and guaranteed alignment.
SETTINGS = ((RowClass.LARGE, 1), (RowClass.LARGE, 128), (RowClass.SMALL, 1), (RowClass.DECODE, 1))


def profile(shape: str, recipe: Recipe, rows: RowClass, alignment: int, compile_only: bool) -> list[dict[str, Any]]:
    device = torch.device(DEVICE, torch.cuda.current_device())
    num_rows, num_groups, n, k = PROFILED[shape]
    num_rows = num_groups * ROWS[rows] if rows in ROWS else num_rows
    # A shipped profile has no plans with a host sync.
    facts: dict[str, Any] = {"passes": tuple(Pass), "group_alignment": alignment, "host_sync": False}
    spec = CallSpec(device, num_groups, k, n, rows, recipe, **facts)
    timers: list[Callable[..., Any]] = [eager_microseconds, captured_microseconds]
    if compile_only:
        timers = [lambda calls: dict.fromkeys(calls, 0.0)] * 2
    found, failed = measure(spec, num_rows, device, candidates(device), *timers)
    for plan, reason in failed.items():
        failures.append(f"{shape} {recipe.value} {rows.value}: {plan}: {reason}")
        print(f"FAILED {failures[-1]}", flush=True)
    for call, times in found.items():
        kind = f"{call.rows} {'whole ' if call.whole_blocks else ''}{'step' if call.training else 'forward'}"
        clocks = [", ".join(f"{plan} {us:.0f}" for plan, us in clock.items()) for clock in times[1:3]]
        print(f"{shape:14}{call.recipe:15}{kind:20}{clocks[0]}; captured {clocks[1]}", flush=True)
    return [as_entry(call, times) for call, times in found.items()]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grouped_gemm bench profiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="*", choices=list(PROFILED), default=list(PROFILED))
    names = [recipe.value for recipe in RECIPES]
    parser.add_argument("--recipes", nargs="*", choices=names, default=names)
    parser.add_argument("--rows", nargs="*", choices=[rows.value for rows in RowClass], help="only these row classes")
    parser.add_argument("--alignments", nargs="*", type=int, default=[1, 128], help="only these guaranteed alignments")
    parser.add_argument("--compile", action="store_true", help="only compile the kernels; measure nothing")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="also write the profile to this folder")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU, which torch does not see here.", file=sys.stderr)
        return 1
    machine, begin = machine_of(DEVICE), time.time()
    setting = {"gpu": machine.name, **dict(machine.versions)}
    entries: list[dict[str, Any]] = []
    for shape, recipe, (rows, alignment) in itertools.product(args.shapes, map(Recipe.parse, args.recipes), SETTINGS):
        if alignment not in args.alignments or (args.rows and rows.value not in args.rows):
            continue
        found = profile(shape, recipe, rows, alignment, compile_only=args.compile)
        entries += [{"setting": setting, **entry} for entry in found]
        torch.cuda.empty_cache()
        if args.write and not args.compile:  # after each setting, so that an interrupted run leaves its results
            lines = ",\n".join(map(json.dumps, entries))
            file = args.write / f"{machine.name.lower().replace(' ', '_')}.json"
            file.write_text(f'{{"schema": {SCHEMA}, "profiles": [\n{lines}\n]}}\n', encoding="utf-8")
    print("\n".join([*failures, f"{len(entries)} calls, {time.time() - begin:.0f} s"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
