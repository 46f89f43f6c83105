"""The regret of AUTO on one CUDA GPU: its time over that of the best backend, for the same call.

    python -m grouped_gemm bench auto --json regret.json

Whole calls: a forward call without gradients, and forward with backward, for the shapes of the profile and for
untuned ones, which no profile has and no tile was chosen for. Groups are balanced (in whole blocks of 128
rows, which is guaranteed), ragged, or few rows: 64 in all. The backends' calls are interleaved, and timed by the wall
clock, ten in a row. Where AUTO chooses one backend for all passes, both make the same call, so any difference of their
ratio from 1 is noise. If the regret is over 1.03, all are timed four more times, and the least of each counts. If it
stays over, the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import DEVICE, ends_of, failures, introduce, keep
from _report import ALL_SHAPES

from grouped_gemm import NoBackendError, Recipe, explain, grouped_mm
from grouped_gemm.autotune.timing import eager_microseconds
from grouped_gemm.core.preference import BackendKind

GOAL = 1.03
MOST_RUNS = 5
CASES = {  # recipe and dtype
    "bf16": (Recipe.NONE, torch.bfloat16),
    "fp16": (Recipe.NONE, torch.float16),
    "fp8_rowwise": (Recipe.FP8_ROWWISE, torch.bfloat16),
    "fp8_blockwise": (Recipe.FP8_BLOCKWISE, torch.bfloat16),
    "mxfp8": (Recipe.MXFP8, torch.bfloat16),
}
KINDS = ("balanced", "ragged", "tiny")
TINY = 64  # rows
BACKENDS = tuple(kind for kind in BackendKind if kind is not BackendKind.EMULATED)
results: list[dict[str, Any]] = []


def measure(shape: str, kind: str, name: str) -> None:
    recipe, dtype = CASES[name]
    num_rows, num_groups, n, k = ALL_SHAPES[shape]
    num_rows = TINY if kind == "tiny" else num_rows
    torch.manual_seed(0)
    a = torch.randn(num_rows, k, device=DEVICE, dtype=dtype).requires_grad_()
    w = (torch.randn(num_groups, n, k, device=DEVICE, dtype=dtype) * 0.02).requires_grad_()
    dy = torch.randn(num_rows, n, device=DEVICE, dtype=dtype)
    if kind == "tiny":
        offs = torch.arange(1, num_groups + 1, device=DEVICE).mul(num_rows).div(num_groups).int()
    elif kind == "ragged":  # any sizes up to about twice the average, as a router gives them
        shares = torch.rand(num_groups, generator=torch.Generator().manual_seed(0)).cumsum(0)
        offs = (shares / shares[-1] * num_rows).int().to(DEVICE)
    else:
        offs = ends_of(num_rows, num_groups, kind)
    options: dict[str, Any] = {"recipe": recipe, "group_alignment": 128 if kind == "balanced" else 1}

    def forward(backend: str) -> Callable[[], Any]:
        def call() -> torch.Tensor:
            with torch.no_grad():
                return grouped_mm(a, w.transpose(1, 2), offs, **options, kernel_preference=backend)

        return call

    def step(backend: str) -> Callable[[], Any]:
        def call() -> tuple[torch.Tensor, ...]:
            y = grouped_mm(a, w.transpose(1, 2), offs, **options, kernel_preference=backend)
            return torch.autograd.grad(y, (a, w), dy)

        return call

    for what, make, grad in (("forward", forward, False), ("step", step, True)):
        calls = {}
        for backend in ("auto", *(candidate.value for candidate in BACKENDS)):
            try:
                make(backend)()  # compiles
                calls[backend] = make(backend)
            except NoBackendError:
                continue
            except Exception as error:
                failures.append(f"{shape} {kind} {name} {what} {backend}: {type(error).__name__}: {str(error)[:200]}")
                torch.cuda.empty_cache()
        with torch.set_grad_enabled(grad):
            chosen = explain(a, w.transpose(1, 2), offs, **options).decision
        if len(calls) < 2 or "auto" not in calls:  # failures say why
            continue
        times = eager_microseconds(calls)
        runs = 1 if times["auto"] <= GOAL * min(times.values()) else MOST_RUNS
        for _ in range(runs - 1):
            again = eager_microseconds(calls)
            times = {backend: min(us, again[backend]) for backend, us in times.items()}
        auto = times.pop("auto")
        best = min(times, key=times.__getitem__)
        regret = auto / times[best]
        alone = len(chosen.backends) == 1
        noise = auto / times[chosen.backends[0].value] if alone and chosen.backends[0].value in times else None
        row = {"shape": shape, "kind": kind, "case": name, "call": what, "auto_us": auto, "us": times, "best": best}
        row |= {"regret": regret, "noise": noise, "runs": runs, "chosen": {p.value: b.value for p, b in chosen.chosen}}
        row |= {"source": chosen.expected and chosen.expected.source}
        results.append(row)
        picked = "+".join(dict.fromkeys(b.value for _, b in chosen.chosen))
        others = ", ".join(f"{backend} {us:.0f}" for backend, us in times.items())
        mark = "" if regret <= GOAL else "  OVER"
        print(
            f"{shape:15}{kind:9}{name:14}{what:8}{regret:6.3f}  {picked:16}{auto:8.0f} us  ({others}){mark}", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grouped_gemm bench auto",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="*", choices=list(ALL_SHAPES), default=list(ALL_SHAPES))
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    begin, machine = time.time(), introduce(args.shapes)
    if machine is None:
        return 1
    for shape in args.shapes:
        for name in args.cases:
            for kind in args.kinds:
                measure(shape, kind, name)
                torch.cuda.empty_cache()
    over = [row for row in results if row["regret"] > GOAL]
    worst = max((row["regret"] for row in results), default=float("nan"))
    print(f"{len(results)} calls, {len(over)} over {GOAL}, worst {worst:.3f}, {time.time() - begin:.0f} s")
    print("\n".join(failures))
    keep(machine, results, args.json)
    return 1 if over or failures else 0


if __name__ == "__main__":
    sys.exit(main())
