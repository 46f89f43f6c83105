"""What the GPU benchmarks share: the device, the Triton backend, records of failures, timing."""

from __future__ import annotations

import statistics
import traceback
from collections.abc import Callable
from typing import Any

import torch

from grouped_gemm import Recipe
from grouped_gemm.backends import get_backend
from grouped_gemm.core.preference import BackendKind

DEVICE = "cuda"
RECIPES = (Recipe.NONE, Recipe.FP8_ROWWISE, Recipe.FP8_BLOCKWISE)
TRITON = get_backend(BackendKind.TRITON)
FP8 = torch.float8_e4m3fn
failures: list[str] = []


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


def ends_of(num_rows: int, num_groups: int, kind: str) -> torch.Tensor:
    """End rows, (E,) int32: equal groups; or skewed ones, one empty, in multiples of 16, as torch's fp8 needs."""
    if kind == "balanced":
        sizes = torch.full((num_groups,), num_rows // num_groups)
    else:
        shares = torch.rand(num_groups, generator=torch.Generator().manual_seed(0))
        shares[num_groups // 2] = 0
        sizes = (shares / shares.sum() * num_rows).int() // 16 * 16
        sizes[0] += num_rows - sizes.sum()
    return sizes.cumsum(0).int().to(DEVICE)


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """The relative error over all elements; NaN or Inf in ``x`` gives NaN or Inf."""
    return ((x.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def poison(*shapes_and_dtype: Any) -> None:
    """Fills with NaN the memory that the allocator will return next for such a tensor."""
    *shape, dtype = shapes_and_dtype
    torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
