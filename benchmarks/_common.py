"""What the GPU benchmarks share: the device, the Triton backend, records of failures, timing."""

from __future__ import annotations

import json
import random
import statistics
import sys
import timeit
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from _report import legend

from grouped_gemm import Recipe
from grouped_gemm.backends import get_backend
from grouped_gemm.core.machine import Machine, machine_of
from grouped_gemm.core.preference import BackendKind

T = TypeVar("T")
DEVICE = "cuda"
RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE)
TRITON = get_backend(BackendKind.TRITON)
FP8 = torch.float8_e4m3fn
failures: list[str] = []
not_measured: dict[str, None] = {}  # lines, in order


def introduce(shapes: Iterable[str]) -> Machine | None:
    """This machine, after its name, its versions and the shapes are printed; None, and why, if it has no CUDA GPU."""
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA GPU, which torch does not see here.", file=sys.stderr)
        return None
    machine = machine_of(DEVICE)
    print(machine.name, ", ".join(f"{package} {version}" for package, version in machine.versions))
    print(legend(shapes), flush=True)
    return machine


def keep(machine: Machine, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Writes rows and failures as JSON, if there is a path."""
    if path is not None:
        run = {"device": machine.name, "versions": dict(machine.versions), "rows": rows, "failures": failures}
        path.write_text(json.dumps(run, indent=1) + "\n")


def attempt(what: str, function: Callable[[], Any]) -> Any:
    """What ``function`` returns, or None if it fails. A failure is printed and recorded, and the run goes on."""
    try:
        return function()
    except Exception as error:
        failures.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        print(f"FAILED {failures[-1]}", flush=True)
        traceback.print_exc(limit=-4)
        torch.cuda.empty_cache()
        return None


def reason_of(error: Exception) -> str:
    """The type and the message of an error, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def leave_out(what: str, reason: str) -> None:
    """Records what is not measured, and why."""
    line = f"{what}: {reason}"
    if line not in not_measured:
        not_measured[line] = None
        print(f"left out  {line}", flush=True)


def milliseconds(what: str, function: Callable[[], Any]) -> float | None:
    """The median time by CUDA events with a cold L2; None if ``function`` fails."""
    from triton.testing import do_bench

    return attempt(what, lambda: do_bench(function, warmup=20, rep=80, return_mode="median"))


def interleaved_milliseconds(what: str, functions: dict[str, Callable[[], Any]]) -> dict[str, float | None]:
    """The median times of all, interleaved, so that changes of the GPU's clocks affect all. None for one that fails.

    The first function is ours. A peer that fails is printed, but is no failure of the run.
    """
    from triton.testing import do_bench

    rounds: dict[str, list[float]] = {name: [] for name in functions}
    ours = next(iter(functions))
    for _ in range(3):
        for name, function in list(functions.items()):
            try:
                rounds[name].append(do_bench(function, warmup=8, rep=25, return_mode="median"))
            except Exception as error:
                text = f"{what} {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                print(f"FAILED {text}", flush=True)
                failures.extend([text] if name == ours else [])
                functions = {other: call for other, call in functions.items() if other != name}
    return {name: statistics.median(times) if len(times) == 3 else None for name, times in rounds.items()}


def interleaved_samples(
    calls: Mapping[T, Callable[[], Any]], seconds: float = 5.0, rounds: tuple[int, int] = (10, 40)
) -> tuple[dict[T, list[float]], dict[T, str]]:
    """Wall times of calls that are compared, in microseconds, and the errors of those that fail.

    A sample is the average of up to ten calls in a row, about 20 ms, as in a model's step: host or device bounds it.
    Each round takes one sample of each call, in shuffled order, so that the clocks and the heat of the GPU affect all.

    Args:
        calls: what is timed, by name.
        seconds: a round beyond the fewest starts only if the samples so far took less.
        rounds: the fewest and the most rounds.
    """
    order = random.Random(0)
    samples: dict[T, list[float]] = {name: [] for name in calls}
    errors: dict[T, str] = {}
    in_a_row: dict[T, int] = {}

    def sample(name: T, number: int) -> float:
        def run() -> None:
            for _ in range(number):
                calls[name]()
            synchronize()

        return timeit.timeit(run, number=1) / number  # it turns garbage collection off

    def fails(name: T, function: Callable[[], None]) -> bool:
        try:
            function()
        except Exception as error:
            errors[name] = reason_of(error)
        return name in errors

    def prepare(name: T) -> None:
        sample(name, 2)  # compiles, and fills caches
        in_a_row[name] = min(10, max(1, int(0.02 / max(sample(name, 1), 1e-6))))

    def take(name: T) -> None:
        samples[name].append(1e6 * sample(name, in_a_row[name]))

    remaining = [name for name in calls if not fails(name, lambda: prepare(name))]  # noqa: B023
    spent = 0.0
    for done in range(rounds[1]):
        if done >= rounds[0] and spent >= seconds:
            break
        for name in order.sample(remaining, len(remaining)):
            if fails(name, lambda: take(name)):  # noqa: B023
                remaining.remove(name)
            else:
                spent += 1e-6 * samples[name][-1] * in_a_row[name]
    return {name: samples[name] for name in remaining}, errors


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ends_of(num_rows: int, num_groups: int, kind: str, device: str = DEVICE) -> torch.Tensor:
    """End rows, (E,) int32, of groups that are multiples of 16 rows, as torch's fp8 needs them.

    "balanced": equal groups. "ragged": random sizes, one of them 0. "zipf": the i-th largest has a share of
    ``i**-1.2``, in random order.
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "balanced":
        sizes = torch.full((num_groups,), num_rows // num_groups)
    else:
        if kind == "zipf":
            shares = torch.arange(1, num_groups + 1).pow(-1.2)[torch.randperm(num_groups, generator=generator)]
        else:
            shares = torch.rand(num_groups, generator=generator)
            shares[num_groups // 2] = 0
        sizes = (shares / shares.sum() * num_rows).int() // 16 * 16
        sizes[0] += num_rows - sizes.sum()
    return sizes.cumsum(0).int().to(device)


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """The relative error over all elements; NaN or Inf in ``x`` gives NaN or Inf."""
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def poison(*shapes_and_dtype: Any) -> None:
    """Fills with NaN the memory that the allocator will return next for such a tensor."""
    *shape, dtype = shapes_and_dtype
    torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
