"""Training steps of one `grouped_mm` on one CUDA GPU, beside `torch._grouped_mm` in bf16: device time and memory.

    python -m grouped_gemm bench steps
    python -m grouped_gemm bench steps --shapes seed few_rows --kinds zipf --json run.json

A step is forward and backward. Times are those of CUDA graphs of ten equal steps, interleaved, so the host does not
count. "fp8" lets the profile pick the recipe. All choose their backends by AUTO.

Memory is what a step adds to weights, gradients of results, and what other layers keep: `a` is made by the step, as a
layer before would make it, and lives only as long as backward needs it. "kept" lives between forward and backward,
without the result. Weights that are quantized are counted apart: they are in `cache_weights` already.

M, E, N, K: rows, groups, out and in features.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _calls import allocated
from _common import DEVICE, attempt, ends_of, failures, introduce, keep
from _report import ALL_SHAPES, KINDS, Goal

from grouped_gemm import Recipe, cache_weights, explain, grouped_mm
from grouped_gemm.autotune.timing import captured_microseconds

FP8 = "fp8"
RECIPES = (*(r.value for r in (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE)), FP8)
# How many times as fast as torch's bf16 a step of "fp8" is, by shape; and of any shape.
FASTER = {"seed": 1.5, "qwen3_gateup": 1.25}
NEVER_UNDER = 0.98
KEPT, PEAK = 0.55, 1.0  # at most so much of torch's bf16
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def measure(shape: str, kind: str, recipes: Iterable[str]) -> list[dict[str, Any]]:
    num_rows, num_groups, n, k = ALL_SHAPES[shape]
    offs = ends_of(num_rows, num_groups, kind)
    torch.manual_seed(0)
    root = torch.randn(num_rows, k, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    w = (torch.randn(num_groups, n, k, device=DEVICE, dtype=torch.bfloat16) * k**-0.5).requires_grad_()
    dy = torch.randn(num_rows, n, device=DEVICE, dtype=torch.bfloat16)
    forwards: dict[str, Forward] = {"torch": lambda a, b: torch._grouped_mm(a, b, offs=offs)}
    for recipe in recipes:
        forwards[recipe] = lambda a, b, recipe=recipe: grouped_mm(a, b, offs, recipe=recipe)  # type: ignore[misc]

    def step(forward: Forward) -> None:
        torch.autograd.grad(forward(root, w.transpose(1, 2)), (root, w), dy)

    def memory(forward: Forward) -> tuple[int, int]:
        """Bytes that are kept for backward, and the most that a step needs at once."""
        with cache_weights():
            step(forward)  # fills the cache, and compiles
            before = allocated()
            torch.cuda.reset_peak_memory_stats()
            y = forward(root.clone(), w.transpose(1, 2))
            kept = allocated() - before - y.nbytes
            found = torch.autograd.grad(y, (root, w), dy)
            peak = torch.cuda.max_memory_allocated() - before
            del y, found
        return kept, peak

    for forward in forwards.values():
        for _ in range(3):  # compiles, records, and replays
            step(forward)
    times = captured_microseconds({name: partial(step, forward) for name, forward in forwards.items()})
    rows = []
    for name, forward in forwards.items():
        kept, peak = memory(forward)
        row = {"shape": shape, "kind": kind, "name": name, "us": times[name], "kept": kept, "peak": peak}
        if name != "torch":
            decision = explain(root, w.transpose(1, 2), offs, recipe=name).decision
            row["plan"] = f"{decision.spec.recipe.value} on {'+'.join(b.value for b in decision.backends)}"
        rows.append(row)
        print(describe(row, rows[0]), flush=True)
    return rows


def describe(row: dict[str, Any], of_torch: dict[str, Any]) -> str:
    kept, peak = (row[what] / 2**20 for what in ("kept", "peak"))
    text = f"{row['shape']:15}{row['kind']:9}{row['name']:14}{row['us']:8.0f} us {of_torch['us'] / row['us']:5.2f}x"
    text += f"  kept {kept:6.0f} MiB {row['kept'] / of_torch['kept']:5.2f}"
    return f"{text}  peak {peak:6.0f} MiB {row['peak'] / of_torch['peak']:5.2f}  {row.get('plan', '')}".rstrip()


def goals(rows: Iterable[dict[str, Any]]) -> list[Goal]:
    """The goals, each with its cases among ``rows``."""
    rows = list(rows)
    of_torch = {(r["shape"], r["kind"]): r for r in rows if r["name"] == "torch"}
    ours = [(r, of_torch[r["shape"], r["kind"]]) for r in rows if r["name"] != "torch"]

    def cases(value: Callable[[Any, Any], float], counts: Callable[[Any], bool]) -> list[tuple[str, float | None]]:
        return [(f"{r['shape']} {r['kind']} {r['name']}", value(r, other)) for r, other in ours if counts(r)]

    def speed(row: Any, other: Any) -> float:
        return float(other["us"] / row["us"])

    found = [
        Goal(f"fp8 on {shape} beside torch", limit, cases(speed, lambda r: r["name"] == FP8 and r["shape"] == shape))  # noqa: B023
        for shape, limit in FASTER.items()
    ]
    kept, peak = (lambda r, other, what=what: r[what] / other[what] for what in ("kept", "peak"))
    return [
        *found,
        Goal("fp8 beside torch", NEVER_UNDER, cases(speed, lambda r: r["name"] == FP8)),
        Goal(
            "kept activations in FP8 of torch's", KEPT, cases(kept, lambda r: "fp8_" in r.get("plan", "")),
            at_most=True,
        ),
        Goal("peak of torch's", PEAK, cases(peak, lambda r: True), at_most=True),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grouped_gemm bench steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="*", choices=list(ALL_SHAPES), default=list(ALL_SHAPES))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=RECIPES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the run to this file")
    args = parser.parse_args()
    begin, machine = time.time(), introduce(args.shapes)
    if machine is None:
        return 1
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for kind in args.kinds:
            rows += attempt(f"{shape} {kind}", partial(measure, shape, kind, args.recipes)) or []
            torch.cuda.empty_cache()
    print("\ngoals, in this run")
    print("\n".join(map(str, goals(rows))))
    print(f"\n{len(failures)} failures, {time.time() - begin:.0f} s")
    keep(machine, rows, args.json)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
