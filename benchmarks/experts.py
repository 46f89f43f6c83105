"""The experts of an MoE layer on one CUDA GPU: parity of the implementations, times, memory and host time beside peers.

    python -m grouped_gemm bench experts --json experts.json --plot experts.png
    python -m grouped_gemm bench experts --parts layer host --modes eager       # what the goals need, a few minutes
    python -m grouped_gemm bench experts --parts layer --shapes qwen3-30b --recipes fp8_blockwise --passes step
    python -m grouped_gemm bench experts --from-json experts.json --plot experts.png      # again, without a GPU
    python -m grouped_gemm bench experts --device cpu      # every part on tiny sizes, to see that it runs

parity: the results of eager, eager_fused, batched_mm and grouped_mm for (batch, tokens, k) = (1, 64, 2), (1, 1, 2),
(1, 7, 1), (1, 4, 8) and (4, 64, 2), with E = 8, H = 256, I = 512: their greatest and mean difference from eager. On
exact operands the order of sums does not matter, and differences must be zero. On random operands each element must lie
in an interval [lo, hi] that follows from the roundings of the layer: n * 2^-22 of the sum of magnitudes for a sum of n
terms in fp32 in any order, 2^-16 for an activation, and rounding to bf16, which is monotonic. So two results differ by
at most hi - lo. There are two intervals, since a fused kernel does not round pre-activations. `_experts_parity.py` has
the proof. A result outside makes the exit code 1. This part needs no GPU.

small: a layer of the same sizes, for 1, 8, 32, 128 and 512 tokens with k = 2. layer: that of Qwen3-30B (16384 and 4096
tokens), OLMoE, and DeepSeek-V3 on one of 8 ranks. Times are wall times of calls in a row, as in a model's step: mean,
median, p10 and p90. Calls that are compared are interleaved and shuffled: in eager mode all layers of one size; in the
other modes (compiled in each mode of torch.compile, CUDA graph) each layer with itself in eager mode. "1.20x torch"
is how many times as fast as torch in the same group. A step is forward and the gradients of x, topk_weights and the
weights. peak: memory beyond the operands, while a call runs; for a CUDA graph, while it is captured. kept: memory after
forward less memory before and less the output, so what backward needs. error: of the output, relative to eager_fused.
Only grouped_mm runs recipes: with weights that each call quantizes ("inside"), or the first call alone
("once"). Routing: random; balanced, so that experts get equally many tokens; zipf, with shares like rank^-1.2.

host: Python time of a layer's call, where the GPU is faster than the host, and the queue never fills.

Peers: a layer written on torch._grouped_mm, SonicMoE with its default tiles, and transformers' experts. One that is not
installed or fails is reported and left out. The last lines say which goals the run has reached.

T, k, E, H, I: tokens, experts per token, experts, hidden and intermediate features.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import _chart
import _experts_chart
import _experts_parity as parity
import torch
from _calls import MIB, allocated, captured, figures, free, peak
from _common import (
    RECIPES,
    attempt,
    failures,
    interleaved_samples,
    leave_out,
    not_measured,
    reason_of,
    relative_error,
    synchronize,
)
from _experts_layers import (
    BF16,
    IMPLEMENTATIONS,
    LOOPS,
    PEERS,
    ROUTINGS,
    Case,
    Layer,
    Operands,
    Variant,
    left_out,
    missing_peer,
    variants,
)
from _experts_report import KEYS, PASSES, describe, name, print_run
from _report import check_form
from torch import Tensor

from grouped_gemm import Recipe
from grouped_gemm.core.machine import machine_of

PARTS = ("parity", "small", "layer", "host")
MODES = ("eager", "graph", "default", "reduce-overhead", "max-autotune-no-cudagraphs")
SMALL = {f"small-{tokens}": Case(8, 256, 512, 2, tokens) for tokens in (1, 8, 32, 128, 512)}
SHAPES = {
    "qwen3-30b": Case(128, 2048, 768, 8, 16384),
    "qwen3-30b-4k": Case(128, 2048, 768, 8, 4096),
    "olmoe": Case(64, 2048, 1024, 8, 16384),
    "dsv3-ep8": Case(32, 7168, 2048, 8, 4096),
}
TINY = {"tiny": Case(4, 32, 16, 2, 24)}  # for --device cpu
BASES = ("eager", "torch", "sonic")  # whose times are divided by those of others
ROUTED = ("grouped_mm", "torch", "sonic")  # run with every routing
ERROR = {False: 1e-2, True: 0.1}  # of a layer without and with a recipe: fp8 rounds each operand by 2.6%, rms

results: list[dict[str, Any]] = []


class Call(NamedTuple):
    """A layer in a group of calls that are compared."""

    name: str
    variant: Variant
    routing: str
    mode: str

    @property
    def is_ours(self) -> bool:
        return self.name in IMPLEMENTATIONS

    @property
    def columns(self) -> dict[str, str]:
        """Of a row."""
        recipe, weights, keep = self.variant
        return {"name": self.name, "recipe": recipe.value, "weights": weights, "keep": keep}


def record(row: dict[str, Any]) -> None:
    results.append(row)
    print(describe(row), flush=True)


# -- parity and host


def check_parity(device: str) -> None:
    print("\nparity, (batch, tokens, k): differences from eager", flush=True)
    for operands in parity.OPERANDS:
        for case in parity.CASES:
            what = f"parity {case} {operands}"
            for row in attempt(what, lambda: list(parity.rows_of(case, operands, device))) or ():  # noqa: B023
                record(row)
                if row["outside"]:
                    failures.append(f"{name(row)}: {row['outside']} elements outside of their bounds")


def time_host(args: argparse.Namespace) -> None:
    """The best of several loops, since other work on the machine only ever adds to them."""
    print("\nhost time, microseconds of Python", flush=True)
    tiny = args.device == "cpu"
    case, loops, number = (TINY["tiny"], 2, 1) if tiny else (SMALL["small-512"], 30, 10)
    with Operands(case, args.device) as operands:
        for call, layer in layers_of("host", case, "eager", operands, args):
            if call.name not in ROUTED:
                continue
            for pass_ in args.passes:
                run = runner(layer, pass_, operands.dy)

                def measure(run: Callable[[], Any] = run) -> float:
                    for _ in range(3):
                        run()
                    times = []
                    for _ in range(loops):
                        synchronize()
                        times.append(timeit.timeit(run, number=number))  # without garbage collection
                    return min(times) / number * 1e6

                row = {"part": "host", **call.columns, "pass": pass_}
                if call.is_ours:
                    record(row | {"us": attempt(name(row), measure)})
                else:
                    try:
                        record(row | {"us": measure()})
                    except Exception as error:
                        leave_out(name(row), reason_of(error))


# -- layers


def layers_of(
    part: str, case: Case, mode: str, operands: Operands, args: argparse.Namespace
) -> Iterator[tuple[Call, Layer]]:
    """The layers of a part that can run in a mode. Reports the others."""
    for layer_name in args.names:
        is_ours = layer_name in IMPLEMENTATIONS
        has_recipes = layer_name == "grouped_mm"
        every_routing = part == "layer" and mode == "eager" and layer_name in ROUTED
        for variant in [v for recipe in args.recipes for v in variants(Recipe(recipe))] if has_recipes else [BF16]:
            what = f"{layer_name} {variant.label}"
            reason = "" if is_ours else missing_peer(layer_name, args.device)
            if reason:
                leave_out(layer_name, reason)
                continue
            reason = left_out(layer_name, case, variant, mode)
            if reason:
                sized = "copy" in reason or "loop" in reason
                leave_out(f"{what} {mode}" + (f" E={case.experts} T={case.tokens}" if sized else ""), reason)
                continue
            for routing in args.routings if every_routing else ("random",):
                call = Call(layer_name, variant, routing, mode)
                if is_ours:
                    yield call, operands.ours(layer_name, variant, routing)
                    continue
                try:
                    layer = operands.peer(layer_name, routing)
                except Exception as error:
                    leave_out(what, reason_of(error))
                else:
                    yield call, layer


def measure(part: str, shape: str, case: Case, mode: str, args: argparse.Namespace) -> None:
    """One size in one mode, with every layer and pass."""
    print(f"\n{part} {shape} {mode}: {', '.join(f'{k}={v}' for k, v in case._asdict().items())}", flush=True)
    heads = "".join(f"{head:>11}" for head in ("median", "mean", "p10", "p90"))
    print(f"{'size, layer, recipe, mode, routing, pass':75}{heads}", flush=True)
    with Operands(case, args.device) as operands:
        layers = dict(layers_of(part, case, mode, operands, args))
        references: dict[bool, Tensor] = {}

        def error_of(output: Tensor, interleaved: bool) -> float:
            if interleaved not in references:
                plain = operands.ours("eager_fused", BF16, "random", interleaved)
                references[interleaved] = runner(plain, "forward", operands.dy)()
            return relative_error(output, references[interleaved])

        groups = [layers] if mode == "eager" else [{call: layer} for call, layer in layers.items()]
        for pass_ in args.passes:
            for group in groups:
                measure_group(part, shape, case, pass_, group, operands, error_of, args)
                if mode not in ("eager", "graph"):
                    torch._dynamo.reset()
                free()
        references.clear()
    free()


def measure_group(
    part: str,
    shape: str,
    case: Case,
    pass_: str,
    layers: dict[Call, Layer],
    operands: Operands,
    error_of: Callable[[Tensor, bool], float],
    args: argparse.Namespace,
) -> None:
    """Times layers that are compared, and records a row for each. Outside of eager mode, each beside itself in eager
    mode, which gets no row."""

    def row_of(call: Call) -> dict[str, Any]:
        row: dict[str, Any] = {"part": part, "shape": shape, "tokens": case.tokens, **call.columns}
        row |= {"routing": call.routing, "mode": call.mode, "pass": pass_}
        return row | {"flops": case.flops * (1 if pass_ == "forward" else 3)}

    calls: dict[Call, Callable[[], Any]] = {}
    peaks: dict[Call, float] = {}
    errors: dict[Call, str] = {}
    for call, layer in layers.items():
        try:
            run = runner(layer, pass_, operands.dy)
            if call.mode == "graph":
                calls[call], peaks[call] = captured(run)
            elif call.mode != "eager":
                calls[call] = runner(compiled(layer, call), pass_, operands.dy)
            if call.mode != "eager":
                calls[call._replace(mode="eager")] = run
            else:
                calls[call] = run
        except Exception as error:
            errors[call] = reason_of(error)
    options: dict[str, Any] = {"seconds": 0.0, "rounds": (3, 3)} if args.device == "cpu" else {}
    samples, failed = interleaved_samples(calls, **options)
    errors |= failed
    medians = {call: statistics.median(times) for call, times in samples.items()}
    for call, layer in layers.items():
        row = row_of(call) | {"us": None, "peak": None, "kept": None, "error": None}
        row["speedup"] = speedups(call, layers, medians)
        if call in errors:
            if call.is_ours:
                failures.append(f"{name(row)}: {errors[call]}")
                print(f"FAILED {failures[-1]}", flush=True)
                record(row)
            else:
                leave_out(name(row), errors[call])
            continue
        row["us"] = figures(samples[call])
        try:
            if args.device == "cuda":
                # reduce-overhead keeps the memory of its graphs, so that a later call shows no peak.
                row["peak"] = peaks.get(call) if call.mode in ("graph", "reduce-overhead") else peak(calls[call])
                row["kept"] = kept(layer) if (pass_, call.mode) == ("step", "eager") else None
            if pass_ == "forward" and call.routing == "random":
                row["error"] = error_of(calls[call](), layer.interleaved)
        except Exception as error:
            (failures.append if call.is_ours else print)(f"{name(row)}: {reason_of(error)}")
        record(row)
        if call.is_ours and row["error"] is not None and not row["error"] < ERROR[call.variant.recipe.is_scaled]:
            failures.append(f"{name(row)}: error {row['error']}")
        if call.variant.weights == "once" and not operands.cache.nbytes:
            failures.append(f"{name(row)}: expected quantized weights in the weight cache; found none")


def speedups(call: Call, calls: dict[Call, Any], medians: dict[Call, float]) -> dict[str, float | None]:
    """How many times as fast as others of the group; None if ``call`` itself failed."""
    if call.mode != "eager":
        others = {"eager mode": call._replace(mode="eager")}
    else:
        others = {base: Call(base, BF16, call.routing, "eager") for base in BASES if base != call.name}
        if call.routing == "zipf":
            others["balanced"] = call._replace(routing="balanced")
    return {
        what: medians[other] / medians[call] if call in medians else None
        for what, other in others.items()
        if other in medians
    }


def runner(layer: Layer, pass_: str, dy: Tensor) -> Callable[[], Any]:
    """A forward call without gradients, or a training step."""

    def forward() -> Tensor:
        with torch.no_grad():
            return layer.forward()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer.forward(), layer.leaves, dy)

    return forward if pass_ == "forward" else step


def compiled(layer: Layer, call: Call) -> Layer:
    """The layer under torch.compile, in the mode of ``call``."""
    assert layer.module is not None, "peers are not compiled"
    module = torch.compile(layer.module, mode=call.mode, fullgraph=call.name not in LOOPS, dynamic=False)

    def forward() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return module(*layer.inputs)

    return layer._replace(forward=forward)


def kept(layer: Layer) -> float:
    """MiB that forward leaves for backward: allocated after it, less what was before and less its output."""
    before = allocated()
    y = layer.forward()
    return (allocated() - before - y.untyped_storage().nbytes()) / MIB


# -- the run


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """The run, as it is written to JSON. Rewrites the file after each size, so that a run that is cut off is kept."""
    begin, machine = time.time(), machine_of(args.device)
    versions = {package: str(machine.version(package)) for package in ("torch", "triton")}
    for package in ("sonic-moe", "quack-kernels", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    print(machine.name, versions, flush=True)

    def found() -> dict[str, Any]:
        run = {"device": machine.name, "versions": versions, "seconds": time.time() - begin}
        return run | {"failures": failures, "left_out": list(not_measured), "rows": results}

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(found(), indent=1) + "\n")

    def has_time(what: str) -> bool:
        if time.time() - begin < args.seconds:
            return True
        leave_out(what, f"{args.seconds:.0f} s are over")
        return False

    if "parity" in args.parts:
        check_parity(args.device)
        save()
    shapes = SHAPES if args.shapes is None else {shape: SHAPES[shape] for shape in args.shapes}
    sizes = {"small": SMALL, "layer": shapes} if args.device == "cuda" else {"small": TINY, "layer": TINY}
    # What the goals need comes first: modes other than eager take longer, since they compile.
    for mode in args.modes:
        for part in ("layer", "small"):
            for shape, case in sizes[part].items() if part in args.parts else ():
                if has_time(f"{part} {shape} {mode}"):
                    attempt(f"{part} {shape} {mode}", lambda: measure(part, shape, case, mode, args))  # noqa: B023
                    save()
        if mode == args.modes[0] and "host" in args.parts and has_time("host"):
            attempt("host", lambda: time_host(args))
            save()
    return found()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grouped_gemm bench experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(option: str, values: tuple[str, ...], default: tuple[str, ...] | None, meaning: str) -> None:
        parser.add_argument(option, nargs="*", choices=values, default=default, help=meaning)

    recipes = tuple(recipe.value for recipe in RECIPES)
    add("--parts", PARTS, None, "default: all that can run here")
    add("--shapes", tuple(SHAPES), None, "of the part layer; default: all")
    add("--recipes", recipes, ("none", "fp8_blockwise"), "of grouped_mm; default: none fp8_blockwise")
    add("--modes", MODES, None, "default: all; on a CPU: eager")
    add("--passes", PASSES, PASSES, "step: forward and backward; default: both")
    add("--routings", ROUTINGS, ROUTINGS, "of the part layer, in eager mode; default: all")
    add("--names", (*IMPLEMENTATIONS, *PEERS), (*IMPLEMENTATIONS, *PEERS), "layers; default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: tiny sizes, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="measure no further size after this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the run to this file")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw it")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing, report this run again")
    args = parser.parse_args()
    if args.plot and find_spec("matplotlib") is None:
        return _fail(_chart.NEEDED)
    has_gpu = torch.cuda.is_available()
    if args.from_json:
        try:
            run = check_form(json.loads(args.from_json.read_text(encoding="utf-8")), KEYS)
        except (OSError, ValueError) as error:
            return _fail(f"--from-json {args.from_json}: expected what --json has written; found {error}")
    else:
        if args.device == "cuda" and not has_gpu:
            return _fail("--device cuda: torch sees no CUDA GPU here")
        parts = args.parts or PARTS
        if args.device is None and not has_gpu:
            missing = [part for part in parts if part != "parity"]
            if missing:
                need = "need a CUDA GPU, which torch does not see here; --device cpu runs tiny sizes"
                print(f"{', '.join(missing)}: {need}", file=sys.stderr)
            if "parity" not in parts:
                return 1
            parts = ("parity",)
        args.parts, args.device = parts, args.device or ("cuda" if has_gpu else "cpu")
        args.modes = args.modes or (MODES if args.device == "cuda" else ("eager",))
        if args.device == "cpu":
            torch.set_num_threads(1)  # the sizes are tiny
        run = measure_all(args)
    print_run(run, rows=args.from_json is not None)
    if args.json:
        args.json.write_text(json.dumps(run, indent=1) + "\n")
    if args.plot:
        _experts_chart.draw(run, args.plot)
        print(f"The chart is in {args.plot}.")
    return 1 if run["failures"] else 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
