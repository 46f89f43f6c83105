"""transformers' MoE models by "grouped_gemm", beside transformers' own implementations: latencies, goals, what runs.

    python -m grouped_gemm bench serve --json serve.json --markdown serve.md     # all parts, at most about 8 minutes
    python -m grouped_gemm bench serve --parts layer stack                       # what the goals need
    python -m grouped_gemm bench serve --parts decode prefill --shapes qwen3-30b --modes max-autotune --seconds 540
    python -m grouped_gemm bench serve --parts compat --markdown compat.md
    python -m grouped_gemm bench serve --from-json serve.json --markdown serve.md       # again, without a GPU
    python -m grouped_gemm bench serve --device cpu      # every part on tiny sizes, to see that it runs

It needs transformers >= 5.17. Implementations, by their names in transformers: of bf16 models "grouped_gemm",
"grouped_gemm_fp8" (the recipe fp8_blockwise, weights quantized once and kept by `cache_weights`), and transformers'
own; of FP8 models (FP8Experts, a scale for each block of 128x128) "grouped_gemm" and transformers' own. One of
transformers' that fails is reported with the reason and left out: its FP8 kernels and DeepGEMM come from the Hub.

Every result is checked before it is timed, against fp32 with dequantized weights: relative error below 1e-2, in FP8
below 0.1. A wrong result of ours is a failure, and the exit code 1. Calls that are compared are timed in turns. All
operands are random.

decode: the experts of one layer for 1 and 4 tokens. prefill: for batches of 1 and 4 with sequences of 16 and 128. In
eager mode, as a CUDA graph of the eager call, and compiled in each mode: wall times of calls in a row, as in a model's
step, mean, median, p10 and p90. Unless --shapes or --modes says so, compiled modes run for the first shape only.

layer: one layer for 1, 4, 16 and 64 tokens as CUDA graphs with a cold L2, and for 512, 4096 and 16384 in eager mode.
"x reading the weights": the time over that of reading the weights of active experts once, at the rate of a copy in
the same run (bytes read and written). peak: memory above weights and inputs while a call runs, or is captured.

stack: forward and backward of two layers of Qwen3-30B, attention included, for 4 sequences of 4096 tokens.
"grouped_gemm_fp8" quantizes the weights once per step. The output and all gradients are checked, with limits twice and
four times as large, since errors of layers add up. For that, routers are told which experts to pick, since rounding
would change some choices.

generate: two layers with a vocabulary of 1024, greedy; tokens per second of a whole call, prompt included. The checked
error is the median over the logits of all generated tokens; the limit is four times as large. static: a static cache,
which transformers compiles on a GPU. peak: of the first call.

compat: which implementation runs in which mode, in one graph, and in CUDA graphs; see `_serve_compat.py`.

The last lines say which goals the run has reached.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import _serve_compat as compat
import _serve_models as models
import torch
from _calls import captured, cold_samples, copy_rate, free, peak
from _common import attempt, failures, interleaved_samples, leave_out, not_measured, relative_error
from _report import Row, check_form
from _serve_group import Call, Run, Timer, checked, limit_of, measure_group, poisoned, record, results
from _serve_layers import (
    COMPILED,
    DTYPES,
    MODES,
    NAMES,
    RECIPE,
    SHAPES,
    TINY,
    Layer,
    Shape,
    Weights,
    compiled,
    inputs_of,
    is_ours,
    layer_of,
    left_out,
    missing,
)
from _serve_report import KEYS, markdown, print_run
from torch import Tensor

from grouped_gemm import cache_weights
from grouped_gemm.core.machine import machine_of

PARTS = ("layer", "stack", "decode", "prefill", "generate", "compat")
TOKENS = (1, 4, 16, 64, 512, 4096, 16384)  # of the part layer
GRAPHS = 64  # up to so many tokens, the part layer captures
STACK = ("qwen3-30b", 2, 4, 4096)  # layers, batch, sequence
GENERATE = ("qwen1.5-moe", "qwen3-30b")  # the first one, unless --shapes names the other
_ROUNDS = 60  # of calls with a cold L2


class Bench:
    """The options of a run, and its clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.begin = args, args.device, time.time()
        self.is_tiny = args.device == "cpu"
        self.copy: float | None = None  # bytes per microsecond

    def has_time(self, what: str) -> bool:
        if time.time() - self.begin < self.args.seconds:
            return True
        leave_out(what, f"{self.args.seconds:.0f} s are over")
        return False

    def names(self, dtype: str) -> list[str]:
        return [name for name in NAMES[dtype] if name in self.args.names]

    def timer(self, seconds: float, rounds: tuple[int, int] = (10, 40)) -> Timer:
        """`interleaved_samples`, with fewer rounds on a CPU."""
        if self.is_tiny:
            seconds, rounds = 0.0, (2, 2)
        return partial(interleaved_samples, seconds=seconds, rounds=rounds)

    # -- layers

    def sizes(self, part: str) -> Iterator[tuple[int, dict[str, int]]]:
        """The numbers of tokens of a part, and what a row says of them."""
        args = self.args
        if part == "layer":
            yield from ((tokens, {}) for tokens in ((1, 24) if self.is_tiny else args.tokens))
        elif part == "decode":
            yield from ((batch, {"batch": batch, "sequence": 1}) for batch in args.batches)
        else:
            for sequence in (8,) if self.is_tiny else args.sequences:
                yield from ((batch * sequence, {"batch": batch, "sequence": sequence}) for batch in args.batches)

    def layers(self, part: str, shape_name: str, shape: Shape, modes: Sequence[str]) -> None:
        """Every size of a shape, in each mode."""
        weights = {dtype: Weights(shape, dtype, self.device) for dtype in self.args.dtypes}
        for mode in modes:
            for tokens, fields in self.sizes(part):
                is_small = tokens <= GRAPHS and not self.is_tiny
                chosen = ("graph" if is_small else "eager") if part == "layer" else mode
                what = f"{part} {shape_name} {chosen} T={tokens}"
                if self.has_time(what):
                    row = {"part": part, "shape": shape_name, "tokens": tokens, **fields}
                    attempt(what, partial(self.layer, row, shape, chosen, weights))
        weights.clear()
        free()

    def layer(self, fields: Row, shape: Shape, mode: str, weights: Mapping[str, Weights]) -> None:
        """One size in one mode: every dtype and implementation, compared with each other."""
        part, case = fields["part"], shape.case(fields["tokens"])
        print(f"\n{part} {fields['shape']} {mode} T={case.tokens}", flush=True)
        inputs = inputs_of(case, self.device)
        rows: dict[Call, Row] = {}
        for dtype, shared in weights.items():
            for name in self.names(dtype):
                if reason := left_out(name, dtype, mode, case, self.device):
                    sized = f" {fields['shape']} T={case.tokens}" if "copy" in reason else ""
                    leave_out(f"{dtype} {name} {mode}{sized}", reason)
                    continue
                row = fields | {"dtype": dtype, "name": name, "mode": mode}
                if part == "layer":
                    row["reading"] = self.copy and shared.active_bytes(inputs.ids) / self.copy
                rows[Call(dtype, name, mode)] = row
        truths = {dtype: shared.truth(inputs) for dtype, shared in weights.items()}
        layers: dict[Call, Layer] = {}
        peaks: dict[Call, float] = {}

        def prepare(call: Call) -> Run:
            layer = layer_of(weights[call.dtype].module(call.name), inputs)
            if mode in COMPILED:
                layer.call()  # what fails in eager mode is not compiled
                layer = compiled(layer, mode, fullgraph=is_ours(call.name))
            layers[call] = layer
            if mode != "graph":
                return layer.call
            replay, peaks[call] = captured(layer.call)
            layers[call] = layer._replace(call=poisoned(replay, replay()))
            return replay

        def error_of(call: Call, _: Any) -> float:
            return checked(relative_error(layers[call].call(), truths[call.dtype]), limit_of(call))

        def peak_of(call: Call, run: Run) -> float | None:
            if self.is_tiny or mode in ("reduce-overhead", "max-autotune"):  # these keep the memory of their graphs
                return None
            return peaks[call] if mode == "graph" else peak(run)

        is_cold = part == "layer" and mode == "graph"
        timer = partial(cold_samples, rounds=_ROUNDS) if is_cold else self.timer(2.0 if part == "layer" else 1.0)
        with cache_weights() as cache:
            measure_group(rows, prepare, error_of, timer, peak_of)
            if any(call.name == RECIPE for call in rows) and not cache.nbytes:
                failures.append(f"{part} {RECIPE}: expected quantized weights in the weight cache; found none")
        layers.clear()
        if mode in COMPILED:
            torch._dynamo.reset()
        free()

    # -- whole models

    def stack(self) -> None:
        """A training step of two layers."""
        shape_name, layers, batch, sequence = ("tiny", 2, 2, 12) if self.is_tiny else STACK
        shape = TINY["tiny"] if self.is_tiny else SHAPES[shape_name]
        print(f"\nstack {shape_name}, {layers} layers, {batch} x {sequence} tokens, a step", flush=True)
        family = models.Models(shape, layers, "bf16", self.device)
        torch.manual_seed(3)
        sizes = (batch, sequence, shape.hidden)
        x, dy = (torch.randn(sizes, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        x.requires_grad_()

        def fixed_step(model: Any, name: str, x: Tensor) -> tuple[Tensor, ...]:
            with models.fixed_routing(model, shape):
                return models.step_of(model, name, x, dy.to(x.dtype))()

        in_fp32 = fixed_step(family.in_fp32(), "eager", x.detach().float().requires_grad_())
        truth = tuple(t.cpu() for t in in_fp32)  # it takes as much memory as the model
        del in_fp32
        peer = models.check_step(fixed_step(family.named("eager"), "eager", x), truth, limit=float("inf"))
        free()
        rows = {}
        for name in self.names("bf16"):
            if name in ("grouped_mm", "sonicmoe", "deepgemm") or is_ours(name):
                if reason := left_out(name, "bf16", "eager", shape.case(batch * sequence), self.device):
                    leave_out(f"stack {name}", reason)
                    continue
                row = {"part": "stack", "shape": shape_name, "layers": layers, "tokens": batch * sequence}
                rows[Call("bf16", name, "eager")] = row | {"dtype": "bf16", "name": name, "mode": "eager"}
        named = {call: family.named(call.name) for call in rows}

        def prepare(call: Call) -> Run:
            return models.step_of(named[call], call.name, x, dy)

        def error_of(call: Call, _: Any) -> float:
            found = fixed_step(named[call], call.name, x)
            return models.check_step(found, truth, limit_of(call, layers), peer)[0]

        measure_group(rows, prepare, error_of, self.timer(8.0), lambda _, run: None if self.is_tiny else peak(run))
        free()

    def generate(self, mode: str) -> None:
        args = self.args
        shapes = {name: SHAPES[name] for name in args.shapes or GENERATE[:1] if name in GENERATE}
        for shape_name, shape in (TINY if self.is_tiny else shapes).items():
            for dtype in args.dtypes:
                family = models.Models(shape, args.layers, dtype, self.device)
                for prompt in (8,) if self.is_tiny else args.sequences:
                    for batch in args.batches:
                        what = f"generate {shape_name} {dtype} {mode} batch {batch} prompt {prompt}"
                        if self.has_time(what):
                            attempt(what, partial(self.generate_group, family, shape_name, mode, batch, prompt))
                del family
                torch._dynamo.reset()
                free()

    def generate_group(self, family: models.Models, shape_name: str, mode: str, batch: int, prompt: int) -> None:
        """One size of generate: every implementation."""
        new, ids = self.args.new, family.prompt(batch, prompt)
        print(f"\ngenerate {shape_name} {family.dtype} {mode} batch {batch} prompt {prompt}", flush=True)
        fields = {"part": "generate", "shape": shape_name, "layers": family.layers, "batch": batch, "prompt": prompt}
        rows: dict[Call, Row] = {}
        for name in self.names(family.dtype):
            is_compiled = mode == "static" and not self.is_tiny
            case = family.shape.case(batch * prompt)
            if reason := left_out(name, family.dtype, "default" if is_compiled else "eager", case, self.device):
                leave_out(f"generate {family.dtype} {name} {mode}", reason)
                continue
            row = fields | {"new": new, "dtype": family.dtype, "name": name, "mode": mode}
            rows[Call(family.dtype, name, mode)] = row
        truth, peaks = family.in_fp32(), {}

        def prepare(call: Call) -> Run:
            run = models.generator_of(family.named(call.name), ids, new, mode)
            if not self.is_tiny:
                peaks[call] = peak(run)
            return partial(run, return_dict_in_generate=True, output_logits=True)

        def error_of(call: Call, output: Any) -> float:
            return checked(models.generated_error(truth, output, prompt), 2 * limit_of(call, family.layers))

        with cache_weights():
            measure_group(rows, prepare, error_of, self.timer(2.0, (3, 10)), lambda call, _: peaks.get(call))
        gc.collect()

    # -- the run

    def compat(self) -> None:
        print("\ncompat", flush=True)
        modes = self.args.modes or (("eager", compat.TRACED) if self.is_tiny else ("eager", *COMPILED))
        modes = [mode for mode in modes if mode in compat.MODES]

        def names(dtype: str) -> list[str]:
            reasons = {
                name: left_out(name, dtype, "eager", compat.SHAPE.case(64), self.device) for name in self.names(dtype)
            }
            for name, reason in reasons.items():
                if reason:
                    leave_out(f"compat {dtype} {name}", reason)
            return [name for name, reason in reasons.items() if not reason]

        shape = TINY["tiny"] if self.is_tiny else compat.SHAPE
        for row in compat.rows_of(self.args.dtypes, names, modes, self.device, self.has_time, shape):
            record(row)
            if row["state"] != "agrees" and is_ours(row["name"]):
                failures.append(f"compat {row['dtype']} {row['name']} {row['mode']}: {row['state']}: {row['reason']}")

    def run(self, save: Callable[[], None]) -> None:
        """All parts. What compiles comes last, since it takes longest."""
        args = self.args
        shapes = TINY if self.is_tiny else {name: SHAPES[name] for name in args.shapes or SHAPES}
        if "layer" in args.parts:
            self.copy = attempt("copy", partial(copy_rate, self.device))
        chosen = args.modes or (("eager",) if self.is_tiny else MODES)
        fast = [mode for mode in chosen if mode in ("eager", "graph")]
        slow = [mode for mode in chosen if mode in COMPILED]
        slow_shapes = shapes if args.shapes or args.modes else dict(list(shapes.items())[:1])

        def layers(part: str, some: Mapping[str, Shape], modes: Sequence[str]) -> list[tuple[str, Callable[[], Any]]]:
            return [(part, partial(self.layers, part, name, shape, modes)) for name, shape in some.items() if modes]

        steps: list[tuple[str, Callable[[], Any]]] = [
            *layers("layer", shapes, ("",)),
            ("stack", self.stack),
            *layers("decode", shapes, fast),
            *layers("prefill", shapes, fast),
            ("generate", partial(self.generate, "eager")),
            ("compat", self.compat),
            ("generate", partial(self.generate, "static")),
            *layers("decode", slow_shapes, slow),
            *layers("prefill", slow_shapes, slow),
        ]
        for part, step in steps:
            if part in args.parts and self.has_time(part):
                attempt(part, step)
                free()
                save()


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """The run, as it is written to JSON. Rewrites the file after each part, so that a run that is cut off is kept."""
    machine = machine_of(args.device)
    versions = {package: str(machine.version(package)) for package in ("torch", "triton")}
    for package in ("transformers", "kernels"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    print(machine.name, versions, flush=True)
    bench = Bench(args)

    def found() -> dict[str, Any]:
        run = {"device": machine.name, "versions": versions, "seconds": time.time() - bench.begin}
        run |= {"copy": bench.copy and bench.copy / 1e3, "failures": failures, "left_out": list(not_measured)}
        return run | {"rows": results}

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(found(), indent=1) + "\n")

    bench.run(save)
    return found()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m grouped_gemm bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(option: str, values: Sequence[str], default: Sequence[str] | None, meaning: str) -> None:
        parser.add_argument(option, nargs="*", choices=values, default=default, help=meaning)

    def sizes(option: str, default: tuple[int, ...], meaning: str) -> None:
        parser.add_argument(option, nargs="*", type=int, default=default, metavar="N", help=meaning)

    names = tuple(dict.fromkeys(name for dtype in DTYPES for name in NAMES[dtype]))
    add("--parts", PARTS, PARTS, "default: all")
    add("--shapes", tuple(SHAPES), None, "default: all")
    add("--dtypes", DTYPES, DTYPES, "of the model; default: both")
    add("--names", names, names, "implementations; default: all")
    add("--modes", (*MODES, compat.TRACED), None, f"of decode, prefill and compat; {compat.TRACED}: only compat")
    sizes("--tokens", TOKENS, "of the part layer")
    sizes("--batches", (1, 4), "of decode, prefill and generate")
    sizes("--sequences", (16, 128), "of prefill and generate")
    parser.add_argument("--layers", type=int, default=2, help="of the model of generate (%(default)s)")
    parser.add_argument("--new", type=int, default=32, help="tokens that generate adds to each prompt (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: tiny sizes, to see that everything runs")
    parser.add_argument("--seconds", type=float, default=400, help="begin no measurement after this time (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the run to this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write its tables to this file")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing, report this run again")
    args = parser.parse_args()
    if args.from_json:
        try:
            run = check_form(json.loads(args.from_json.read_text(encoding="utf-8")), KEYS)
        except (OSError, ValueError) as error:
            return _fail(f"--from-json {args.from_json}: expected what --json has written; found {error}")
    else:
        if args.device != "cpu" and not torch.cuda.is_available():
            return _fail("bench serve: needs a CUDA GPU, which torch does not see here; --device cpu runs tiny sizes")
        if reason := missing():
            return _fail(f"bench serve: {reason}")
        args.device = args.device or "cuda"
        if args.device == "cpu":
            torch.set_num_threads(1)  # the sizes are tiny
        # All experts of transformers share the code that is compiled. Past the limit, they would run in eager mode.
        torch._dynamo.config.recompile_limit = 64
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # in transformers
        run = measure_all(args)
    print_run(run, rows=args.from_json is not None)
    if args.json:
        args.json.write_text(json.dumps(run, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(markdown(run), encoding="utf-8")
        print(f"The tables are in {args.markdown}.")
    return 1 if run["failures"] else 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
