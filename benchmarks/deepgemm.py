"""The DeepGEMM backend on one CUDA GPU: its GEMMs, its quantizers, and whole calls.

    python -m grouped_gemm bench deepgemm --shapes seed qwen3_gateup --json run.json

GEMMs: the backend against direct calls of the package on the same operands; the difference is the backend's overhead.
Quantizers: GB/s of the memory traffic that is needed, x read once, padded rows written once, compared with a copy.
Forward and training step: whole calls, on each backend, and on torchao if it is installed. Times are medians of CUDA
events with a cold L2, interleaved; only ratios within a run are reliable. If a goal is missed, the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _common import DEVICE, attempt, ends_of, failures, interleaved_milliseconds, milliseconds
from _report import SHAPES, legend

from grouped_gemm import CallSpec, Pass, Recipe, grouped_mm
from grouped_gemm.backends import candidates, get_backend
from grouped_gemm.backends.deepgemm import package as deepgemm_package
from grouped_gemm.core.call_spec import RowClass
from grouped_gemm.core.machine import machine_of
from grouped_gemm.core.preference import BackendKind
from grouped_gemm.selection.rules import decide

RECIPE = Recipe.FP8_BLOCKWISE
BACKEND = get_backend(BackendKind.DEEPGEMM)
BF16 = torch.bfloat16
GOALS = {
    "over a call by hand": ("at most", 1.01),
    "share of a copy": ("at least", 0.85),
    "torchao's padded forward over ours": ("at least", 1.4),
}
results: list[dict[str, Any]] = []


def record(what: str, goal: str | None = None, value: float | None = None, **more: Any) -> None:
    """Records a row and prints it; a missed goal is a failure."""
    results.append({"what": what, "goal": goal, "value": value} | more)
    shown = ", ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in more.items())
    print(f"{what:44}{shown}" + ("" if value is None else f", {goal} {value:.3f}"), flush=True)
    if goal in GOALS and value is not None:
        bound, limit = GOALS[goal]
        if (value > limit) if bound == "at most" else (value < limit):
            failures.append(f"{what}: {goal} {value:.3f}, goal: {bound} {limit}")


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def operands(shape: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a, w (E, N, K), dy."""
    num_rows, num_groups, n, k = SHAPES[shape]
    torch.manual_seed(0)
    return (
        torch.randn(num_rows, k, device=DEVICE, dtype=BF16),
        torch.randn(num_groups, n, k, device=DEVICE, dtype=BF16) * 0.02,
        torch.randn(num_rows, n, device=DEVICE, dtype=BF16),
    )


def time_gemms(shape: str) -> None:
    """Groups of whole blocks: the backend only adds its launch to the package's own kernels."""
    a, w, dy = operands(shape)
    num_rows, num_groups, n, k = SHAPES[shape]
    plan = BACKEND.plan(ends_of(num_rows, num_groups, "balanced"), num_rows, 128)
    row_map, _, sizes = plan.derived
    a_rows, a_columns = BACKEND.quantize_activations(a, plan, RECIPE, rows=True, columns=True)
    dy_rows, dy_columns = BACKEND.quantize_activations(dy, plan, RECIPE, rows=True, columns=True)
    forward, dgrad = BACKEND.quantize_weights(w.transpose(1, 2), RECIPE, forward=True, dgrad=True)
    y, da = torch.empty_like(dy), torch.empty_like(a)
    package, on_host, tokens = deepgemm_package.functions(), sizes.tolist(), int(sizes.sum())

    def by_hand(lhs: Any, rhs: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
        # contiguous scales, as in DeepGEMM's own examples
        package.scaled_grouped_mm((lhs.data, lhs.scale), (rhs, scale), out, row_map, recipe=(1, 128, 128))

    def wgrad_by_hand() -> torch.Tensor:
        out = torch.zeros(num_groups, n, k, device=DEVICE)
        pairs = [(x.data[: tokens * x.scale.shape[1]], x.scale[: tokens // 128].t()) for x in (dy_columns, a_columns)]
        package.scaled_wgrad(*pairs, out, on_host, sizes, out)
        return out

    forward_scale, dgrad_scale = forward.scale.transpose(1, 2).contiguous(), dgrad.scale.contiguous()
    w_forward = forward.data.transpose(1, 2)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "forward": (
            lambda: BACKEND.grouped_mm(a_rows, forward, plan, BF16),
            lambda: by_hand(a_rows, w_forward, forward_scale, y),
        ),
        "dgrad": (
            lambda: BACKEND.grouped_mm(dy_rows, dgrad, plan, BF16),
            lambda: by_hand(dy_rows, dgrad.data, dgrad_scale, da),
        ),
        "wgrad, fp32": (
            lambda: BACKEND.wgrad(a_columns, dy_columns, plan, torch.float32, contiguous="k"),
            wgrad_by_hand,
        ),
    }
    for pass_, (ours, theirs) in pairs.items():
        times = interleaved_milliseconds(f"{shape} {pass_}", {"ours": ours, "by hand": theirs})
        # wgrad reads the sizes with a host sync, which a call by hand does not need: it has no goal
        goal = "over a call by hand" if pass_ in ("forward", "dgrad") else "with the read of the sizes, over by hand"
        record(f"{shape} {pass_}", goal, ratio(times["ours"], times["by hand"]), ms=times["ours"])


def time_quantizers(shape: str) -> None:
    a, w, _ = operands(shape)
    num_rows, num_groups, _, k = SHAPES[shape]
    target = torch.empty_like(a)
    copy_ms = milliseconds("copy", lambda: target.copy_(a))
    copy = copy_ms and 4 * a.numel() / copy_ms / 1e6
    for kind, alignment in (("balanced", 128), ("ragged", 1)):
        plan = BACKEND.plan(ends_of(num_rows, num_groups, kind), num_rows, alignment)
        padded = plan.derived[0].shape[0]
        for what, rows, columns in (("rows", True, False), ("both", True, True)):
            ms = milliseconds(
                f"{shape} {kind} quantizer",
                lambda rows=rows, columns=columns, plan=plan: BACKEND.quantize_activations(
                    a, plan, RECIPE, rows=rows, columns=columns
                ),
            )
            nbytes = 2 * a.numel() + padded * (k + k // 32) + columns * num_rows * (k + k // 32)
            rate = ms and nbytes / ms / 1e6
            goal = "share of a copy"
            record(f"{shape} {kind} quantizer, {what}", goal, ratio(rate, copy), rows=padded, GBs=rate)
    ms = milliseconds(
        f"{shape} weights", lambda: BACKEND.quantize_weights(w.transpose(1, 2), RECIPE, forward=True, dgrad=True)
    )
    record(f"{shape} quantizer of weights, both", None, None, GBs=ms and 4 * w.numel() / ms / 1e6)


def time_calls(shape: str, kind: str) -> None:
    """A forward call without gradients, and forward with backward."""
    a, w, dy = operands(shape)
    num_rows, num_groups, _, _ = SHAPES[shape]
    offs = ends_of(num_rows, num_groups, kind)
    alignment = 128 if kind == "balanced" else 1
    a.requires_grad_()
    w.requires_grad_()

    def ours(backend: str) -> Callable[[], torch.Tensor]:
        return lambda: grouped_mm(
            a, w.transpose(1, 2), offs, recipe=RECIPE, group_alignment=alignment, kernel_preference=backend
        )

    calls: dict[str, Callable[[], torch.Tensor]] = {name: ours(name) for name in ("deepgemm", "triton", "auto")}
    calls["bf16 torch"] = lambda: torch._grouped_mm(a, w.transpose(1, 2), offs=offs)
    if find_spec("torchao") is not None:

        def add_torchao() -> None:
            from torchao.prototype.moe_training.blockwise_fp8.grouped_mm import (
                _to_fp8_blockwise_then_scaled_grouped_mm as torchao,
            )

            calls["torchao"] = lambda: torchao(
                a, w.transpose(1, 2), offs, pad_token_groups_for_grouped_mm=alignment == 1
            )

        attempt("torchao", add_torchao)

    def without_gradients(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with torch.no_grad():
                return call()

        return run

    def step(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            a.grad = w.grad = None
            call().backward(dy)

        return run

    for what, wrap in (("forward", without_gradients), ("training step", step)):
        times = interleaved_milliseconds(f"{shape} {kind} {what}", {name: wrap(call) for name, call in calls.items()})
        goal = "torchao's padded forward over ours" if what == "forward" and kind == "ragged" else "torchao over ours"
        shown = {name: ms and 1e3 * ms for name, ms in times.items()}
        record(f"{shape} {kind} {what}, us", goal, ratio(times.get("torchao"), times["deepgemm"]), **shown)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grouped_gemm bench deepgemm", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["seed", "qwen3_gateup"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    args = parser.parse_args()

    device = torch.device(DEVICE)
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA GPU, which torch does not see here.")
    spec = CallSpec(machine_of(device), 8, 4096, 4096, RowClass.LARGE, RECIPE, passes=tuple(Pass))
    decide(spec, BackendKind.DEEPGEMM, candidates(device)).check()
    machine = machine_of(device)
    print(machine.name, ", ".join(f"{package} {version}" for package, version in machine.versions))
    print(legend(args.shapes))
    for shape in args.shapes:
        attempt(f"{shape} GEMMs", lambda shape=shape: time_gemms(shape))
        torch.cuda.empty_cache()
        attempt(f"{shape} quantizers", lambda shape=shape: time_quantizers(shape))
        for kind in ("balanced", "ragged"):
            torch.cuda.empty_cache()
            attempt(f"{shape} {kind} calls", lambda shape=shape, kind=kind: time_calls(shape, kind))
    if args.json is not None:
        run = {"device": machine.name, "versions": dict(machine.versions), "failures": failures, "rows": results}
        args.json.write_text(json.dumps(run, indent=2) + "\n")
    print("\n".join(failures) or "every goal reached")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
