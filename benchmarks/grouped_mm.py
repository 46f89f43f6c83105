"""Triton GEMMs on one CUDA GPU, compared with torch, DeepGEMM and the ceilings of the GPU.

    python -m grouped_gemm bench
    python -m grouped_gemm bench grouped_mm --shapes seed --json run.json --plot run.png
    python -m grouped_gemm bench grouped_mm --from-json run.json --plot run.png       # again, without a GPU

First, results are compared with `reference` on small ragged cases, and each GEMM of the timed shapes on some of its
groups, in memory poisoned with NaN; a wrong result makes the exit code 1. Times are medians of CUDA events with a cold
L2, where ours and the peers' are interleaved; only ratios within a run are reliable. Peers: torch's grouped GEMMs, and
DeepGEMM if it is installed (for ragged groups, on groups padded to 128, which it needs; the padding is not timed).
Ceilings: one matmul of 8192^3 in bf16 and in fp8 with rowwise scales. The last lines say which goals the run has
reached. `quantizers` measures the quantizers, `steps` whole training steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _chart
import torch
from _checks import check_small, sampled_error
from _common import (
    DEVICE,
    FP8,
    RECIPES,
    TRITON,
    attempt,
    ends_of,
    failures,
    interleaved_milliseconds,
    milliseconds,
)
from _peers import make_peers
from _report import ALL_SHAPES, KINDS, check_form, describe, print_run

from grouped_gemm import Recipe, grouped_mm
from grouped_gemm.backends.base import OffsetPlan
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.quantized import Quantized

ERROR = 1e-2  # of a GEMM, relative to quantized operands: Hopper's tensor cores sum fp8 with 13 bits
SIDE = 8192  # of the matmuls that are ceilings
results: list[dict[str, Any]] = []
ceilings: dict[str, float | None] = {}


def record(row: dict[str, Any]) -> None:
    results.append(row)
    print(describe(row, ceilings), flush=True)


def measure_ceilings() -> None:
    """TFLOP/s of one large matmul, in bf16 and fp8: the ceilings of the GEMMs."""
    x, y = (torch.randn(SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    x8, y8, ones = x.to(FP8), y.to(FP8), torch.ones(SIDE, device=DEVICE)

    def fp8() -> torch.Tensor:
        return torch._scaled_mm(
            x8, y8.t(), scale_a=ones[:, None], scale_b=ones[None], out_dtype=torch.bfloat16, use_fast_accum=True
        )

    for name, function in {"bf16": lambda: torch.mm(x, y.t()), "fp8": fp8}.items():
        ms = milliseconds(f"matmul in {name}", function)
        ceilings[name] = ms and 2 * SIDE**3 / ms / 1e9
        print(f"matmul of {SIDE}^3 in {name}: {ceilings[name] or float('nan'):.0f} TFLOP/s", flush=True)


def time_gemms(shape: str, kind: str, recipe: Recipe) -> None:
    num_rows, num_groups, n, k = ALL_SHAPES[shape]
    flops = 2 * num_rows * n * k
    offs = ends_of(num_rows, num_groups, kind)
    plan = OffsetPlan(offs, num_rows)
    a = torch.randn(num_rows, k, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(num_groups, n, k, device=DEVICE, dtype=torch.bfloat16) * 0.02
    dy = torch.randn(num_rows, n, device=DEVICE, dtype=torch.bfloat16)
    a_rows, a_columns = TRITON.quantize_activations(a, plan, recipe, rows=True, columns=True)
    dy_rows, dy_columns = TRITON.quantize_activations(dy, plan, recipe, rows=True, columns=True)
    w_forward, w_dgrad = TRITON.quantize_weights(w.transpose(1, 2), recipe, forward=True, dgrad=True)
    ours = {
        "forward": lambda: TRITON.grouped_mm(a_rows, w_forward, plan, torch.bfloat16),
        "dgrad": lambda: TRITON.grouped_mm(dy_rows, w_dgrad, plan, torch.bfloat16),
        "wgrad": lambda: TRITON.wgrad(a_columns, dy_columns, plan, torch.bfloat16, contiguous="k"),
    }
    peers = attempt(f"{shape} {recipe.value} peers", lambda: make_peers(recipe, a, w, dy, offs)) or {}
    for pass_, function in ours.items():
        name = f"{shape} {kind} {recipe.value} {pass_}"
        error = attempt(name, lambda: sampled_error(recipe, pass_, function, a, w, dy, offs))  # noqa: B023
        if error is not None and not error < ERROR:
            failures.append(f"{name}: error {error}")
        times = interleaved_milliseconds(name, ({} if error is None else {"": function}) | peers.get(pass_, {}))
        row = {"shape": shape, "kind": kind, "recipe": recipe.value, "pass": pass_, "flops": flops}
        record(row | {"error": error, "ms": times.pop("", None), "peers": times})


def time_host() -> None:
    """Host time of an eager call without gradients, in microseconds; the GPU's queue never fills."""
    offs = torch.tensor([64, 128], dtype=torch.int32, device=DEVICE)
    a = torch.randn(128, 256, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(2, 256, 256, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    calls: dict[str, Callable[[], Any]] = {
        f"grouped_mm {recipe.value}": lambda recipe=recipe: grouped_mm(
            a, b, offs, recipe=recipe, kernel_preference="triton"
        )
        for recipe in RECIPES
    }
    lhs, rhs = Quantized(a, None, Recipe.NONE, 1, ""), Quantized(b, None, Recipe.NONE, 1, "")
    calls["kernel only, bf16"] = lambda: TRITON.grouped_mm(lhs, rhs, OffsetPlan(offs, 128), torch.bfloat16)
    calls["torch._grouped_mm"] = lambda: torch._grouped_mm(a, b, offs=offs)
    for name, function in calls.items():

        def measure(function: Callable[[], Any] = function) -> float:
            for _ in range(20):
                function()
            best = float("inf")
            for _ in range(10):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(50):
                    function()
                best = min(best, (time.perf_counter() - begin) / 50 * 1e6)
            return best

        record({"host": name, "us": attempt(f"host time {name}", measure)})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The run, as it is written to JSON."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    machine = machine_of(DEVICE)
    versions = {package: str(machine.version(package)) for package in ("torch", "triton")}
    print(machine.name, versions, "" if find_spec("deep_gemm") else "(DeepGEMM is not installed)", flush=True)
    begin = time.time()
    health = attempt("health", lambda: TRITON.health(torch.device(DEVICE)))
    print(f"health: {health} after {time.time() - begin:.0f} s", flush=True)
    if "check" not in args.skip:
        check_small()
    if "host" not in args.skip:
        time_host()
    if "gemms" not in args.skip:
        attempt("ceilings", measure_ceilings)
        torch.cuda.empty_cache()
        for shape in args.shapes:
            for recipe in map(Recipe, args.recipes):
                for kind in args.kinds:
                    attempt(f"{shape} {recipe.value}", lambda: time_gemms(shape, kind, recipe))  # noqa: B023
                    torch.cuda.empty_cache()
    return {
        "device": machine.name,
        "versions": versions,
        "seconds": time.time() - begin,
        "ceilings": ceilings,
        "rows": results,
        "failures": failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grouped_gemm bench grouped_mm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="*", choices=list(ALL_SHAPES), default=list(ALL_SHAPES))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--recipes", nargs="*", choices=[r.value for r in RECIPES], default=[r.value for r in RECIPES])
    parser.add_argument("--skip", nargs="*", choices=("check", "gemms", "host"), default=[])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the run to this file")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw it: shares of the measured ceilings")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing, report this run again")
    args = parser.parse_args()
    if args.plot and find_spec("matplotlib") is None:
        return _fail(_chart.NEEDED)
    if args.from_json:
        try:
            run = check_form(json.loads(args.from_json.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            return _fail(f"--from-json {args.from_json}: expected what --json has written; found {error}")
    elif torch.cuda.is_available():
        run = measure(args)
        print()
    else:
        return _fail(
            "This benchmark needs a CUDA GPU, which torch does not see here; --from-json shows an earlier run."
        )
    print_run(run)
    if args.json:
        args.json.write_text(json.dumps(run, indent=1) + "\n")
    if args.plot:
        _chart.draw(run, args.plot)
        print(f"The chart is in {args.plot}.")
    return 1 if run["failures"] else 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
