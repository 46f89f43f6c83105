"""The command line: ``python -m grouped_gemm``, and one of _COMMANDS. A command imports its own needs."""

from __future__ import annotations

import argparse
import ast
import json
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

Run = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code: 0 where all is well, 1 where the command found something wrong.

    Raises:
        SystemExit: an argument is wrong (code 2), or only help was asked for (code 0).
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog="python -m grouped_gemm", description="Grouped GEMM for mixture-of-experts layers.")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (summary, configure) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name in argv:  # the others' arguments are not wanted, nor the imports that they may take
            command.set_defaults(run=configure(command))
    args = parser.parse_args(argv)
    if args.run is None:
        parser.print_help()
        return 0
    code: int = args.run(args)
    return code


def _doctor(parser: argparse.ArgumentParser) -> Run:
    from grouped_gemm import doctor

    def run(args: argparse.Namespace) -> int:
        findings = doctor.gather()
        print(json.dumps(findings, indent=2) if args.json else doctor.render(findings))
        return 1 if doctor.errors(findings) else 0

    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return run


def _explain(parser: argparse.ArgumentParser) -> Run:
    from grouped_gemm import arguments, contests
    from grouped_gemm.backends import candidates
    from grouped_gemm.device import default_device, machine_of
    from grouped_gemm.preference import AUTOTUNE, STRICT, KernelPreference, resolve
    from grouped_gemm.problem import Pass, Problem, dtype_name, row_class
    from grouped_gemm.recipes import Recipe
    from grouped_gemm.report import Explanation
    from grouped_gemm.select import decide

    dtypes = {dtype_name(dtype): dtype for dtype in arguments.DTYPES}

    def run(args: argparse.Namespace) -> int:
        dtype = dtypes[args.dtype]
        problem = Problem(
            machine_of(default_device()),
            num_groups=args.experts,
            k=args.k,
            n=args.n,
            rows=row_class(args.m, args.experts),
            recipe=Recipe(args.recipe),
            dtype=dtype,
            out_dtype=dtype,
            passes=(Pass.FORWARD,) if args.inference else tuple(Pass),
            is_aligned=args.k * dtype.itemsize % 16 == 0,
        )
        try:
            preference, asked_by = resolve(KernelPreference(args.backend), None)
            strict, tunes = STRICT.is_on(), AUTOTUNE.is_on()
        except ValueError as error:
            parser.error(str(error))
        tables = contests.tables(problem.machine, tunes)
        found = candidates(default_device())
        decision = decide(problem, preference, found, asked_by=asked_by, strict=strict, tables=tables)
        explanation = Explanation(decision, args.m)
        print(json.dumps(explanation.to_dict(), indent=2) if args.json else explanation)
        return 0 if decision.is_complete else 1

    parser.add_argument("--m", type=_at_least(0), required=True, help="rows of a, over all groups")
    parser.add_argument("--n", type=_at_least(1), required=True, help="out features")
    parser.add_argument("--k", type=_at_least(1), required=True, help="in features")
    parser.add_argument("--experts", type=_at_least(1), required=True, metavar="E", help="groups")
    _choice(parser, "--recipe", [recipe.value for recipe in Recipe], "none", "how operands are quantized")
    _choice(parser, "--dtype", list(dtypes), "bfloat16", "dtype of the operands")
    _choice(parser, "--backend", [kind.value for kind in KernelPreference], "auto", "who should run it")
    parser.add_argument("--inference", action="store_true", help="forward only; otherwise dgrad and wgrad as well")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return run


def _warmup(parser: argparse.ArgumentParser) -> Run:
    import torch

    from grouped_gemm import NoBackendError, arguments, warmup
    from grouped_gemm.device import default_device
    from grouped_gemm.preference import KernelPreference
    from grouped_gemm.problem import RowClass, dtype_name
    from grouped_gemm.recipes import Recipe

    dtypes = {dtype_name(dtype): dtype for dtype in arguments.DTYPES}

    def run(args: argparse.Namespace) -> int:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtypes[args.dtype], device=default_device())

        e, k, n = args.groups, args.k, args.n
        b = empty(e, n, k).transpose(1, 2) if args.b_contiguous == "k" else empty(e, k, n)
        try:
            done = warmup(
                b,
                recipe=args.recipe,
                rows=args.rows.split(","),
                training=not args.inference,
                bias=empty(e, n) if args.bias else None,
                kernel_preference=args.backend,
            )
        except ValueError as error:
            parser.error(str(error))
        except NoBackendError as error:
            print(error, file=sys.stderr)
            return 1
        print(json.dumps(done.to_dict(), indent=2) if args.json else done)
        return 0

    classes = ",".join(row_class.value for row_class in RowClass)
    parser.add_argument("--groups", "--experts", type=_at_least(1), required=True, metavar="E", help="groups")
    parser.add_argument("-k", "--k", type=_at_least(1), required=True, help="in features")
    parser.add_argument("-n", "--n", type=_at_least(1), required=True, help="out features")
    _choice(parser, "--recipe", [recipe.value for recipe in Recipe], "none", "how operands are quantized")
    _choice(parser, "--dtype", list(dtypes), "bfloat16", "dtype of the operands")
    _choice(parser, "--backend", [kind.value for kind in KernelPreference], "auto", "who should run it")
    _choice(parser, "--b-contiguous", ["k", "n"], "k", "the fastest axis of b; k: (E, N, K) weights, transposed")
    parser.add_argument(
        "--rows", default=classes, metavar="NAME,...", help="classes of rows in a group on average (%(default)s)"
    )
    parser.add_argument("--inference", action="store_true", help="forward only; otherwise dgrad and wgrad as well")
    parser.add_argument("--bias", action="store_true", help="calls have a bias")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    return run


def _choice(parser: argparse.ArgumentParser, name: str, values: Sequence[str], default: str, meaning: str) -> None:
    help_ = f"{meaning}: {', '.join(values)}"
    parser.add_argument(name, type=str.lower, choices=values, default=default, help=help_, metavar="NAME")


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}; found {text!r}")
        return value

    return parse


def _demo(parser: argparse.ArgumentParser) -> Run:
    from grouped_gemm import demo

    demo.add_arguments(parser)
    return demo.run


def _bench(parser: argparse.ArgumentParser) -> Run:
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    scripts = {path.stem: path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")}

    def run(args: argparse.Namespace) -> int:
        if not scripts:
            print("The benchmarks are in the source repository: run this command in a checkout of it.", file=sys.stderr)
            return 1
        if args.list:
            print("\n".join(f"{name:16}{_first_line(path)}" for name, path in scripts.items()))
            return 0
        if args.name not in scripts:
            parser.error(f"argument NAME: expected one of {', '.join(scripts)}; found {args.name!r}")
        before = sys.argv, sys.path[:]
        sys.argv = [str(scripts[args.name]), *args.arguments]
        sys.path.insert(0, str(folder))  # as where Python runs the script itself: it may have parts in other files
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
    "doctor": ("show this machine, its backends, and which of them runs what", _doctor),
    "explain": ("show who would run a grouped_mm of a given size here, and why", _explain),
    "warmup": ("compile, and where GROUPED_GEMM_AUTOTUNE=1 tune, what calls of a given size need", _warmup),
    "demo": ("train a small mixture-of-experts language model in every recipe", _demo),
    "bench": ("run a benchmark of the source repository", _bench),
}


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, head for one, has seen enough; the flush at exit must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
