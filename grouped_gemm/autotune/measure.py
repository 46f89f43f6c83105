"""Measures whole calls on each plan that can run them, for a profile."""

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
from grouped_gemm.selection.route import Route, route_on
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
    a, b, dy, offs = operands(spec, num_rows, device)
    failures: dict[str, str] = {}
    found: dict[Call, Times] = {}
    training = tuple(pass_ for pass_ in Pass if pass_ in spec.passes)
    for passes in dict.fromkeys(((Pass.FORWARD,), training)):
        asked = spec._replace(passes=passes)
        a.requires_grad_(Pass.DGRAD in passes)
        b.requires_grad_(Pass.WGRAD in passes)
        plans = able_plans(asked, candidates)
        calls = {name: _call(route_on(asked, plan), a, b, dy, offs) for name, plan in plans.items()}
        capturable = able_plans(asked._replace(host_sync=False), candidates)
        found[Call.of(asked)] = Times(
            num_rows,
            _timed(calls, eager, failures),
            _timed({name: calls[name] for name in capturable}, captured, failures),
            date.today().isoformat(),
        )
    return found, failures


def operands(spec: CallSpec, num_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random ``a`` (M, K), ``b`` (E, K, N) and dY (M, N) of a call, and ``offs`` of uneven groups."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = spec.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

    num_groups, k, n = spec.num_groups, spec.k, spec.n
    b = normal(num_groups, n, k).transpose(1, 2) if spec.b_contiguous == "k" else normal(num_groups, k, n)
    offs = uneven_ends(num_rows, num_groups, spec.group_alignment, device)
    return normal(num_rows, k), b, normal(num_rows, n, dtype=spec.out_dtype), offs


def _call(route: Route, a: Tensor, b: Tensor, dy: Tensor, offs: Tensor) -> Callable[[], Any]:
    """Forward, with backward if an operand needs a gradient."""
    leaves = [x for x in (a, b) if x.requires_grad]
    if not leaves:
        return lambda: run_forward(a, b, None, offs, route)
    return lambda: torch.autograd.grad(GroupedMM.apply(a, b, None, offs, route, None, None), leaves, dy)


def _timed(calls: dict[str, Callable[[], Any]], timer: Timer, failures: dict[str, str]) -> dict[str, float]:
    """Times the plans interleaved; if that fails, each one alone. A plan that fails takes infinitely long."""
    try:
        return timer(calls)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if len(calls) == 1:
        failures.update(dict.fromkeys(calls, reason))
        return dict.fromkeys(calls, math.inf)
    return {name: _timed({name: call}, timer, failures)[name] for name, call in calls.items()}


def uneven_ends(num_rows: int, num_groups: int, alignment: int, device: torch.device) -> Tensor:
    """End rows (E,) int32, multiples of ``alignment``, of groups of 0.5 to 1.5 times the average size.

    Sizes are shuffled, in the same order each time.
    """
    shares = 0.5 + torch.randperm(num_groups, generator=torch.Generator().manual_seed(0)) / num_groups
    ends = shares.cumsum(0) * (num_rows / float(shares.sum()))
    return (ends.round().int() // alignment * alignment).clamp_(max=num_rows).to(device)
