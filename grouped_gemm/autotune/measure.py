"""Measures whole calls on each plan that can run them, for a profile.

M, E, K, N: rows, groups, in and out features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import torch
from torch import Tensor

from grouped_gemm.autograd import GroupedMM, run_forward
from grouped_gemm.autotune.timing import captured_microseconds, eager_microseconds
from grouped_gemm.backends import Candidate
from grouped_gemm.core.call_spec import CallSpec, Pass
from grouped_gemm.selection.cost_model import Call, Times
from grouped_gemm.selection.route import route_on
from grouped_gemm.selection.rules import able_plans

Timer = Callable[[dict[str, Callable[[], Any]]], dict[str, float]]


def measure(
    spec: CallSpec,
    num_rows: int,
    device: torch.device,
    candidates: Sequence[Candidate],
    eager: Timer = eager_microseconds,
    captured: Timer = captured_microseconds,
) -> tuple[dict[Call, Times], dict[str, str]]:
    """Times whole calls on random operands, on each plan that AUTO may take.

    It times forward alone and, if ``spec`` has gradients, forward with backward. It takes about a second per plan, plus
    compilation, and as much memory as a training step. Synchronizes the host.

    Args:
        spec: the call.
        num_rows: M.
        device: the device to measure on.
        candidates: the backends on that device.
        eager: times eager calls, in microseconds.
        captured: times calls that are replayed in a CUDA graph, in microseconds.

    Returns:
        The times by kind of call, and the errors by plan that failed.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device).normal_(generator=generator).to(spec.dtype)

    a_MK, dy_MN = normal(num_rows, spec.k), normal(num_rows, spec.n)
    w_ENK = normal(spec.num_groups, spec.n, spec.k) * spec.k**-0.5
    b_EKN = w_ENK.transpose(1, 2) if spec.b_contiguous == "k" else w_ENK.transpose(1, 2).contiguous()
    del w_ENK
    offs = uneven_ends(num_rows, spec.num_groups, spec.group_alignment, device)
    failures: dict[str, str] = {}
    found: dict[Call, Times] = {}
    training = tuple(pass_ for pass_ in Pass if pass_ in spec.passes)
    for passes in dict.fromkeys(((Pass.FORWARD,), training)):
        asked = spec._replace(passes=passes)
        wanted = [x.requires_grad_(p in passes) for p, x in ((Pass.DGRAD, a_MK), (Pass.WGRAD, b_EKN))]
        leaves = [x for x in wanted if x.requires_grad]

        def call(plan: dict[Pass, Any], asked: CallSpec = asked, leaves: list[Tensor] = leaves) -> Callable[[], Any]:
            route = route_on(asked, plan)
            if not leaves:
                return torch.no_grad()(lambda: run_forward(a_MK, b_EKN, None, offs, route)[0])
            return lambda: torch.autograd.grad(GroupedMM.apply(a_MK, b_EKN, None, offs, route), leaves, dy_MN)

        calls = {name: call(plan) for name, plan in able_plans(asked, candidates).items()}
        compiled = {name: run for name, run in calls.items() if _runs(name, run, failures)}
        capturable = able_plans(asked._replace(host_sync=False), candidates)
        in_graphs = {name: run for name, run in compiled.items() if name in capturable}
        found[Call.of(asked)] = Times(
            num_rows,
            dict.fromkeys(calls, math.inf) | _timed(compiled, eager, failures),
            dict.fromkeys(capturable, math.inf) | _timed(in_graphs, captured, failures),
            date.today().isoformat(),
        )
    return found, failures


def _runs(name: str, run: Callable[[], Any], failures: dict[str, str]) -> bool:
    """Runs a call once, which compiles it, and says whether that worked. An error goes into ``failures``."""
    try:
        run()
        return True
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return False


def _timed(calls: dict[str, Callable[[], Any]], timer: Timer, failures: dict[str, str]) -> dict[str, float]:
    """Times the plans interleaved. If that fails, times each plan alone, to find those that fail."""
    try:
        return timer(calls) if calls else {}
    except Exception:
        times: dict[str, float] = {}
        for name, run in calls.items():
            _runs(name, lambda name=name, run=run: times.update(timer({name: run})), failures)  # type: ignore[misc]
        return times


def uneven_ends(num_rows: int, num_groups: int, alignment: int, device: torch.device) -> Tensor:
    """End rows (E,) int32, multiples of ``alignment``, of groups of 0.5 to 1.5 times the average size.

    Sizes are shuffled, in the same order each time.
    """
    shares = 0.5 + torch.randperm(num_groups, generator=torch.Generator().manual_seed(0)) / num_groups
    ends = shares.cumsum(0) * (num_rows / float(shares.sum()))
    return (ends.round().int() // alignment * alignment).clamp_(max=num_rows).to(device)
