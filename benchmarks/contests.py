"""Measures what AUTO compares on one CUDA GPU: the parts of a call, on each backend that runs it.

    python -m grouped_gemm bench contests --write grouped_gemm/measured_h200.csv

The cases are those of `SHAPES`: large groups, ragged and in whole blocks of 128 rows, then small and decode ones.
`grouped_gemm.selection.cost_model` says how AUTO reads the table. Backends that are not installed are left out, so a
table is only as good as the machine is equipped.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from datetime import date
from pathlib import Path

import torch
from _common import DEVICE, failures
from _report import SHAPES

from grouped_gemm import CallSpec, Pass, Recipe
from grouped_gemm.autotune.profile import measure
from grouped_gemm.backends import candidates
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.machine import machine_of
from grouped_gemm.selection.cost_model import Case, Table, render

RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE)  # on which backends compete
ROWS = {RowClass.SMALL: 128, RowClass.DECODE: 8}  # of a group


# Row class and promised alignment.
SETTINGS = ((RowClass.LARGE, 1), (RowClass.LARGE, 128), (RowClass.SMALL, 1), (RowClass.DECODE, 1))


def contest(shape: str, recipe: Recipe, rows: RowClass, alignment: int) -> Case:
    device = torch.device(DEVICE, torch.cuda.current_device())
    num_rows, num_groups, n, k = SHAPES[shape]
    num_rows = num_groups * ROWS[rows] if rows in ROWS else num_rows
    spec = CallSpec(
        machine_of(device),
        num_groups,
        k,
        n,
        rows,
        recipe,
        passes=tuple(Pass),
        group_alignment=alignment,
    )
    case, failed = measure(spec, num_rows, device, candidates(device))
    for kind, reason in failed.items():
        failures.append(f"{shape} {recipe.value} {rows.value}: {kind.value}: {reason}")
        print(f"FAILED {failures[-1]}", flush=True)
    return case


def describe(shape: str, case: Case) -> str:
    blocks = "whole blocks" if case.whole_blocks else ""
    times = [
        f"{kind.value} " + " / ".join(f"{parts[p.value]:.0f}" if p.value in parts else "-" for p in Pass)
        for kind, parts in case.times.items()
    ]
    return f"{shape:14}{case.recipe:15}{case.rows:8}{blocks:14}{'   '.join(times)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grouped_gemm bench contests",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    names = [recipe.value for recipe in RECIPES]
    parser.add_argument("--recipes", nargs="*", choices=names, default=names)
    parser.add_argument("--write", type=Path, metavar="CSV", help="also write the table to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU, which torch does not see here.", file=sys.stderr)
        return 1
    machine, begin = machine_of(DEVICE), time.time()
    versions = ", ".join(f"{package} {version}" for package, version in machine.versions)
    cases: list[Case] = []
    for shape, recipe, setting in itertools.product(args.shapes, map(Recipe.parse, args.recipes), SETTINGS):
        cases.append(contest(shape, recipe, *setting))
        print(describe(shape, cases[-1]), flush=True)
        torch.cuda.empty_cache()
        if args.write:  # as far as it has come
            table = Table(machine.name, machine.arch, date.today().isoformat(), versions, tuple(cases))
            args.write.write_text(render(table), encoding="utf-8")
    print("\n".join([*failures, f"{len(cases)} cases, {time.time() - begin:.0f} s"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
