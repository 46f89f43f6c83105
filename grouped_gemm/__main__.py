"""The command line: ``python -m grouped_gemm COMMAND``, see _COMMANDS. Each command imports only what it needs."""

from __future__ import annotations

import argparse
import ast
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from grouped_gemm.core import distributions
from grouped_gemm.core.call_spec import dtype_name
from grouped_gemm.core.machine import PACKAGES, Machine

try:
    from grouped_gemm import __version__
except ImportError:  # another distribution has overwritten __init__.py
    sys.exit(f"grouped_gemm: {distributions.message(distributions.others())}")

Run = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Prints an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code: 0 if all is well, 1 if the command found a problem.

    Raises:
        SystemExit: an argument is invalid (code 2), or only help was requested (code 0).
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog="python -m grouped_gemm", description="Grouped GEMM for mixture-of-experts layers.")
    parser.set_defaults(run=None, parser=parser)
    parser.add_argument("--version", action="version", version=f"grouped_gemm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (summary, configure) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name in argv:  # configuring a command may import a lot: skip the other commands
            command.set_defaults(run=configure(command), parser=command)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        usage = args.parser.format_usage().partition(args.parser.prog)[2]
        args.parser.error(f"unknown arguments: {' '.join(unknown)}; expected {' '.join(usage.split())}")
    if args.run is None:
        parser.print_help()
        return 0
    code: int = args.run(args)
    return code


def _doctor(parser: argparse.ArgumentParser) -> Run:
    from grouped_gemm.cli import doctor

    def run(args: argparse.Namespace) -> int:
        findings = doctor.gather()
        print(json.dumps(findings, indent=2) if args.json else doctor.render(findings))
        return 1 if doctor.errors(findings) else 0

    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return run


def _explain(parser: argparse.ArgumentParser) -> Run:
    from grouped_gemm.autotune import profile
    from grouped_gemm.backends import Candidate, candidates
    from grouped_gemm.core.call_spec import CallSpec, Pass, RowClass, row_class
    from grouped_gemm.core.machine import default_device, hypothetical, machine_of
    from grouped_gemm.core.preference import AUTOTUNE, STRICT, KernelPreference, resolve
    from grouped_gemm.core.recipes import FASTEST, OF_FASTEST, Recipe
    from grouped_gemm.selection.explanation import Explanation
    from grouped_gemm.selection.rules import decide, fastest_recipe, times_of_recipes

    def run(args: argparse.Namespace) -> int:
        here = machine_of(default_device())
        try:
            machine = hypothetical(here, args.arch, args.vendor, args.packages)
            preference, asked_by = resolve(KernelPreference(args.backend), None)
            strict, tunes = STRICT.is_on(), AUTOTUNE.is_on()
        except ValueError as error:
            parser.error(str(error))
        found = candidates(default_device())
        if machine is not here:  # no backend can be tried on another machine
            found, tunes = tuple(Candidate(candidate.backend) for candidate in found), False
        fastest = args.k if args.b_contiguous == "k" else args.n

        def explained(rows: RowClass) -> Explanation:
            picks = args.recipe == FASTEST
            spec = CallSpec(
                machine,
                num_groups=args.experts,
                k=args.k,
                n=args.n,
                rows=rows,
                recipe=Recipe.NONE if picks else Recipe(args.recipe),
                dtype=args.dtype,
                out_dtype=args.out_dtype or args.dtype,
                passes=(Pass.FORWARD,) if args.inference else tuple(Pass),
                b_contiguous=args.b_contiguous,
                has_bias=args.bias,
                group_alignment=args.group_alignment,
                is_aligned=all(size * args.dtype.itemsize % 16 == 0 for size in (args.k, fastest)),
            )
            profiles = profile.profiles(machine, tunes)
            decisions = {
                recipe: decide(
                    spec._replace(recipe=recipe), preference, found, asked_by=asked_by, strict=strict,
                    profiles=profiles,
                )
                for recipe in (*OF_FASTEST, spec.recipe)
            }  # fmt: skip
            times = times_of_recipes(list(decisions.values()))
            decision = decisions[fastest_recipe(times) if picks else spec.recipe]
            return Explanation(decision, args.m, times, picks)

        classes = args.rows if args.m is None else (row_class(args.m, args.experts),)
        explanations = [explained(rows) for rows in classes]
        assumed = {} if machine is here else {"assumed": _assumed(machine)}
        if args.json:
            dicts = [explanation.to_dict() | assumed for explanation in explanations]
            print(json.dumps(dicts if args.m is None else dicts[0], indent=2))
        else:
            if assumed:
                print(_hypothetical_note(machine, here))
            print("\n".join(map(str, explanations)))
        return 0 if all(explanation.decision.is_complete for explanation in explanations) else 1

    _add_call(parser)
    other = parser.add_argument_group("another machine", "explain what would run there; no backend is tried")
    other.add_argument("--arch", type=str.lower, help="its exact architecture: sm_90, gfx942, cpu")
    other.add_argument("--vendor", type=str.lower, help="nvidia, amd or cpu; must match --arch (default: its vendor)")
    other.add_argument(
        "--packages",
        type=_versions,
        default={},
        metavar="NAME=VERSION,...",
        help=f"versions installed there, of {', '.join(PACKAGES)}; the others are assumed to be the same as here",
    )
    return run


def _assumed(machine: Machine) -> dict[str, Any]:
    """What an explanation for another machine assumes about it."""
    versions = dict(machine.versions)
    return {
        "vendor": machine.vendor,
        "fp8_dtype": dtype_name(machine.fp8_dtype),
        "versions": {package: versions.get(package) for package in PACKAGES},
    }


def _hypothetical_note(machine: Machine, here: Machine) -> str:
    """`_assumed` as text, to print above an explanation."""
    assumed = _assumed(machine)
    installed = [f"{package} {version}" for package, version in assumed["versions"].items() if version]
    missing = [package for package, version in assumed["versions"].items() if not version]
    names = [" ".join(dict.fromkeys((m.vendor, m.arch))) for m in (machine, here)]  # a CPU is just "cpu"
    return "\n".join(
        [
            f"This describes another machine, {names[0]}; this one is {names[1]}. No backend was tried.",
            f"  {'assumed':12}{', '.join(installed)}; no {', '.join(missing)}; FP8 data in {assumed['fp8_dtype']}",
        ]
    )


def _versions(text: str) -> dict[str, str]:
    """Parses ``torch=2.11.0,triton=3.6.0``."""
    found = dict(part.partition("=")[::2] for part in text.split(","))
    if not all(found.values()):
        raise argparse.ArgumentTypeError(f"expected NAME=VERSION, or NAME=none, separated by commas; found {text!r}")
    return found


def _warmup(parser: argparse.ArgumentParser) -> Run:
    from grouped_gemm import NoBackendError, warmup
    from grouped_gemm.autotune.warmup import WarmedUp
    from grouped_gemm.core.call_spec import row_class
    from grouped_gemm.core.machine import default_device

    def run(args: argparse.Namespace) -> int:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=args.dtype, device=default_device())

        e, k, n = args.experts, args.k, args.n
        b = empty(e, n, k).transpose(1, 2) if args.b_contiguous == "k" else empty(e, k, n)
        shown: list[WarmedUp] = []

        def show(done: WarmedUp) -> None:
            if not args.json:
                print(*([] if shown else [done.decision.spec]), done, sep="\n", flush=True)
                shown.append(done)

        try:
            done = warmup(
                b,
                recipe=args.recipe,
                rows=args.rows if args.m is None else row_class(args.m, e),
                training=not args.inference,
                bias=empty(e, n) if args.bias else None,
                out_dtype=args.out_dtype,
                group_alignment=args.group_alignment,
                kernel_preference=args.backend,
                progress=show,
            )
        except ValueError as error:
            parser.error(str(error))
        except NoBackendError as error:
            print(error, file=sys.stderr)
            return 1
        print(json.dumps(done.to_dict(), indent=2) if args.json else done.total)
        return 0

    _add_call(parser)
    return run


def _add_call(parser: argparse.ArgumentParser) -> None:
    """Adds the options that describe a call, for every command that takes one."""
    from grouped_gemm.core.call_spec import RowClass
    from grouped_gemm.core.preference import KernelPreference
    from grouped_gemm.core.recipes import FASTEST, Recipe
    from grouped_gemm.selection import checks

    dtypes = {dtype_name(dtype): dtype for dtype in checks.DTYPES}
    classes = [rows.value for rows in RowClass]

    def dtype(text: str) -> Any:
        if text.lower() not in dtypes:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(dtypes)}; found {text!r}")
        return dtypes[text.lower()]

    def row_classes(text: str) -> tuple[RowClass, ...]:
        names = text.lower().split(",")
        if not set(names) <= set(classes):
            raise argparse.ArgumentTypeError(f"expected row classes out of {', '.join(classes)}; found {text!r}")
        return tuple(map(RowClass, dict.fromkeys(names)))

    parser.add_argument(
        "--experts", "--groups", type=_at_least(1), required=True, metavar="E", help="number of experts, or groups"
    )
    parser.add_argument("--k", "-k", type=_at_least(1), required=True, metavar="K", help="in features")
    parser.add_argument("--n", "-n", type=_at_least(1), required=True, metavar="N", help="out features")
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--m", "-m", type=_at_least(0, checks.MOST_ROWS), metavar="M", help="rows of a, over all experts")
    rows.add_argument(
        "--rows",
        type=row_classes,
        default=tuple(RowClass),
        metavar="NAME,...",
        help="instead of M, row classes, by average rows per expert: decode (at most 16), small (at most 256), large "
        "(default: all)",
    )
    _choice(parser, "--recipe", [*(recipe.value for recipe in Recipe), FASTEST], "none", "how operands are quantized")
    help_ = f"dtype of the operands: {', '.join(dtypes)} (bfloat16)"
    parser.add_argument("--dtype", type=dtype, default=torch.bfloat16, help=help_, metavar="NAME")
    parser.add_argument(
        "--out-dtype", type=dtype, help="dtype of the output (default: that of the operands)", metavar="NAME"
    )
    _choice(parser, "--backend", [kind.value for kind in KernelPreference], "auto", "the backend to run it")
    _choice(parser, "--b-contiguous", ["k", "n"], "k", "the contiguous axis of b; k: transposed (E, N, K) weights")
    parser.add_argument(
        "--group-alignment",
        type=_at_least(1, checks.MOST_ROWS),
        default=1,
        metavar="ROWS",
        help="every group's size is a multiple of this (%(default)s)",
    )
    parser.add_argument("--bias", action="store_true", help="the call has a bias")
    parser.add_argument("--inference", action="store_true", help="forward only (default: also dgrad and wgrad)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _choice(parser: argparse.ArgumentParser, name: str, values: Sequence[str], default: str, meaning: str) -> None:
    help_ = f"{meaning}: {', '.join(values)} (%(default)s)"
    parser.add_argument(name, type=str.lower, choices=values, default=default, help=help_, metavar="NAME")


def _at_least(least: int, most: int | None = None) -> Callable[[str], int]:
    limit = "" if most is None else f" and at most {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}{limit}; found {text!r}")
        return value

    return parse


def _demo(parser: argparse.ArgumentParser) -> Run:
    from grouped_gemm.cli import demo
    from grouped_gemm.core.preference import KernelPreference
    from grouped_gemm.core.recipes import Recipe

    names = [recipe.value for recipe in demo.RECIPES[1:]]

    def recipes(text: str) -> tuple[Recipe, ...]:
        chosen = text.lower().split(",")
        if not set(chosen) <= set(names):
            raise argparse.ArgumentTypeError(f"expected recipes out of {', '.join(names)}; found {text!r}")
        return tuple(recipe for recipe in demo.RECIPES if recipe is Recipe.NONE or recipe.value in chosen)

    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if torch sees a GPU, else cpu")
    backends = [*(kind.value for kind in KernelPreference), "all"]
    meaning = "the backend of the experts; all: each one that runs here, on a GPU without emulated"
    _choice(parser, "--backend", backends, "auto", meaning)
    help_ = f"FP8 recipes to train beside bf16, of {', '.join(names)} (default: all)"
    parser.add_argument("--recipes", type=recipes, default=demo.RECIPES, metavar="NAME,...", help=help_)
    _choice(parser, "--size", list(demo.SIZES), "small", "size of the model and its batches, large for a GPU")
    parser.add_argument(
        "--steps",
        type=_at_least(2),
        default=120,
        metavar="N",
        help="batches in each run; the first is not timed (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=_at_least(0), default=0, metavar="N", help="seed of weights and batches (%(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo.png"), metavar="FILE", help="file for the chart (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the losses (default: none)")
    return demo.run


def _bench(parser: argparse.ArgumentParser) -> Run:
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    scripts = {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}

    def run(args: argparse.Namespace) -> int:
        if not scripts:
            print(
                "The benchmarks are only in the source repository: run this command in a checkout of it.",
                file=sys.stderr,
            )
            return 1
        if args.list:
            print("\n".join(f"{name:16}{_first_line(path)}" for name, path in scripts.items()))
            return 0
        if args.name not in scripts:
            parser.error(f"argument NAME: expected one of {', '.join(scripts)}; found {args.name!r}")
        before = sys.argv, sys.path[:]
        sys.argv = [str(scripts[args.name]), *args.arguments]
        sys.path.insert(0, str(folder))  # as when Python runs the script itself, which may import files next to it
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            sys.argv, sys.path[:] = before
        return 0

    parser.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("name", nargs="?", default="grouped_mm", metavar="NAME", help="which benchmark (%(default)s)")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the benchmark, after its name"
    )
    return run


def _first_line(script: Path) -> str:
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], Run]]] = {
    "doctor": ("show this machine, its backends, and what each of them can run", _doctor),
    "explain": ("show which backend would run a grouped_mm call, here or on another machine, and why", _explain),
    "warmup": ("compile the kernels that a call needs, and tune them under GROUPED_GEMM_AUTOTUNE=1", _warmup),
    "demo": ("train a small mixture-of-experts language model in every recipe", _demo),
    "bench": ("run a benchmark of the source repository", _bench),
}


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has exited; the flush at exit must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
