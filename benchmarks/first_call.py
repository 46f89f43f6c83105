"""Seconds of the first training step in a new process with an empty Triton cache: what it compiles.

A step is `grouped_mm`, forward and backward, on the Triton backend. The first one also checks the backend's health.
Each recipe has a process of its own, once with kernels that are compiled together, as calls do it, and once with
kernels that are compiled one by one, as each is launched. Imports and the start of CUDA are not counted.

On a CPU, kernels are compiled for an H100 and nothing is launched.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from grouped_gemm import BackendKind, backends, grouped_mm
from grouped_gemm.backends import triton
from grouped_gemm.backends.base import Health
from grouped_gemm.core import machine
from grouped_gemm.kernels.common import launch

RECIPES = ("none", "fp8_rowwise", "fp8_blockwise")
MODES = ("one-by-one", "together")
M, E, K, N = 8192, 8, 2048, 2048


class TritonWithoutGPU(triton.Backend):
    """The Triton backend on a machine without a GPU, which compiles."""

    requirements: Any = ()

    def health(self, device: torch.device) -> Health:
        super().health(device)
        return Health()

    def compile_together(self, run: Any, x: torch.Tensor) -> None:
        launch.compile_together(lambda: (triton._run_tiny(*triton._TINY.empty_operands(x.device)), run()))


def _compile_only(launcher: launch.Launcher, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    launcher._kernel.warmup(*args, grid=grid, **launcher._constants, **launcher._options)


def compile_for_h100() -> None:
    """From here on, launches on a CPU compile what an H100 would run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            launcher_cls=lambda source, metadata: None,
            utils=SimpleNamespace(
                get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
                load_binary=lambda *args: (None, None, 0, 0, 1024),
            ),
        )
    )
    h100 = machine.Machine("nvidia", "sm_90", "NVIDIA H100 80GB HBM3", machine._versions())
    for target_of, name, value in (
        (machine, "_probe", lambda *args: h100),
        (launch.Launcher, "_compile_and_launch", _compile_only),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device", lambda device: nullcontext()),
    ):
        mock.patch.object(target_of, name, value).start()
    backends._instances[BackendKind.TRITON] = TritonWithoutGPU()


def first_step(recipe: str, mode: str) -> dict[str, Any]:
    """Seconds of forward and backward, and how many kernels were compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        compile_for_h100()
    if mode == "one-by-one":
        mock.patch.object(launch, "compile_together", lambda run: None).start()
    a = torch.ones(M, K, dtype=torch.bfloat16, device=device).requires_grad_()
    w = torch.ones(E, N, K, dtype=torch.bfloat16, device=device).requires_grad_()
    offs = torch.arange(1, E + 1, dtype=torch.int32, device=device) * (M // E)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step() -> tuple[float, float]:
        times = [time.perf_counter()]
        y = grouped_mm(a, w.transpose(1, 2), offs, recipe=recipe, kernel_preference="triton")
        wait()
        times.append(time.perf_counter())
        y.backward(torch.ones_like(y))
        wait()
        times.append(time.perf_counter())
        return times[1] - times[0], times[2] - times[1]

    wait()
    forward, backward = step()
    kernels = len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))
    return {"forward": forward, "backward": backward, "kernels": kernels, "second": sum(step())}


def measure(recipe: str, mode: str) -> dict[str, Any]:
    """`first_step` in a new process."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--child", recipe, "--modes", mode]
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"recipe": recipe, "mode": mode, **found}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grouped_gemm bench first_call", description=__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES, help="default: all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="how to compile; default: both")
    parser.add_argument("--repeats", type=int, default=1, help="processes of which the fastest counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--child", choices=RECIPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(first_step(args.child, *args.modes)))
        return
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "compiled for sm_90, not launched"
    print(f"torch {torch.__version__}, {where}, {os.cpu_count()} CPU cores, seconds after imports")
    rows = []
    for recipe in args.recipes:
        for mode in args.modes:
            runs = [measure(recipe, mode) for _ in range(args.repeats)]
            rows.append(best := min(runs, key=lambda run: run["forward"] + run["backward"]))
            print(
                f"{recipe:14} {mode:11} step {best['forward'] + best['backward']:5.2f}"
                f"  forward {best['forward']:5.2f}  backward {best['backward']:5.2f}  {best['kernels']} kernels"
                f"  second step {best['second']:.4f}",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
