"""A report on this machine, as data and as text; and the generated pages of docs/.

``python -m grouped_gemm.cli.doctor docs`` writes these pages.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from grouped_gemm import __version__
from grouped_gemm.autotune import profile
from grouped_gemm.backends import Candidate, candidates
from grouped_gemm.backends.base import ALL_PASSES, _GroupedMMBackend
from grouped_gemm.core import distributions
from grouped_gemm.core.call_spec import CallSpec, Pass, RowClass, dtype_name
from grouped_gemm.core.machine import Machine, default_device, machine_of
from grouped_gemm.core.preference import (
    AUTOTUNE,
    BACKEND,
    CACHE_DIR,
    STRICT,
    SWITCHES,
    KernelPreference,
    Switch,
    Variable,
    cache_directory,
    resolve,
)
from grouped_gemm.core.recipes import Recipe
from grouped_gemm.selection.cost_model import PLANS
from grouped_gemm.selection.rules import FIRST, MARGIN, auto_order, decide


def gather(machine: Machine | None = None, backends: Sequence[Candidate] | None = None) -> dict[str, Any]:
    """Everything that doctor shows, as plain strings, numbers, lists and dicts, ready for JSON.

    Args:
        machine: the machine to report on; None: that of the current GPU, or of the CPU if there is no GPU.
        backends: the candidates; None: every backend of this version.

    Returns:
        machine: name, vendor, arch, fp8_dtype.
        versions: version by package.
        overwritten_by: other distributions that have written to this package's folder, as "name version".
        backends: for each its name; whether it is ready, which means that it runs some pass of some recipe; the passes
            that it ``runs``, by recipe; its ``reasons`` (passes, reason, fix) for refusing passes of the recipe that it
            runs most of; a summary.
        switches: for each its name, value, default, meaning, and error: None, or why its value is invalid. The last
            is GROUPED_GEMM_CACHE_DIR; its value is the directory in use, None if there is no home directory.
        choices: by recipe and pass, AUTO's backend for a training call; None: no backend runs it.
    """
    machine = machine_of(default_device()) if machine is None else machine
    backends = candidates(default_device()) if backends is None else backends
    switches = [*map(_switch, SWITCHES), _cache_dir()]
    return {
        "machine": {
            "name": machine.name,
            "vendor": machine.vendor,
            "arch": machine.arch,
            "fp8_dtype": dtype_name(machine.fp8_dtype),
        },
        "versions": {"grouped_gemm": __version__, "python": platform.python_version(), **dict(machine.versions)},
        "overwritten_by": distributions.others(),
        "backends": [_backend(candidate, machine) for candidate in backends],
        "switches": switches,
        "choices": _choices(machine, backends, any(switch["error"] for switch in switches)),
    }


def errors(findings: dict[str, Any]) -> list[str]:
    """Errors in the environment. Every call would raise them."""
    return [switch["error"] for switch in findings["switches"] if switch["error"]]


def _nominal(machine: Machine, recipe: Recipe) -> CallSpec:
    """A training call of a mid-size model: bfloat16, sizes that every kernel supports."""
    return CallSpec(machine, num_groups=8, k=4096, n=4096, rows=RowClass.LARGE, recipe=recipe, passes=ALL_PASSES)


def _backend(candidate: Candidate, machine: Machine) -> dict[str, Any]:
    """What a backend runs, and the reasons for which it refuses passes of the recipe that it runs most of."""
    kind = candidate.backend.kind
    runs, refused = {}, []
    for recipe in Recipe:
        decision = decide(_nominal(machine, recipe), kind, [candidate])
        reasons = [refusal for refusal in decision.refusals if refusal.backend is kind]
        passes = [p.value for p in Pass if not any(p in reason.passes for reason in reasons)]
        if passes:
            runs[recipe.value] = passes
        refused.append((-len(passes), len(reasons), reasons))
    _, _, fewest = min(refused, key=lambda entry: entry[:2])
    return {
        "name": kind.value,
        "ready": bool(runs),
        "runs": runs,
        "reasons": [{"passes": [p.value for p in r.passes], "reason": r.reason, "fix": r.fix} for r in fewest],
        "summary": candidate.backend.summary,
    }


def _switch(switch: Switch) -> dict[str, str | None]:
    value, error = None, None
    try:
        value = switch.read()
    except ValueError as unknown:
        error = str(unknown)
    return _described(switch, value, error)


def _cache_dir() -> dict[str, str | None]:
    try:
        return _described(CACHE_DIR, str(cache_directory()), None)
    except OSError:  # calls do not raise this
        return _described(CACHE_DIR, None, None)


def _described(variable: Variable, value: str | None, error: str | None) -> dict[str, str | None]:
    described = {"name": variable.name, "value": value, "default": variable.default, "meaning": variable.meaning}
    return {**described, "error": error}


def _choices(machine: Machine, backends: Sequence[Candidate], is_broken: bool) -> dict[str, dict[str, str | None]]:
    """The backend of each pass in this environment. None if a switch has an invalid value: every call raises then."""
    if is_broken:
        return {recipe.value: {p.value: None for p in Pass} for recipe in Recipe}
    preference, asked_by = resolve(KernelPreference.AUTO, None)
    choices = {}
    for recipe in Recipe:
        profiles = profile.profiles(machine, AUTOTUNE.is_on())
        decision = decide(
            _nominal(machine, recipe), preference, backends, asked_by=asked_by, strict=STRICT.is_on(), profiles=profiles
        )
        chosen = dict(decision.chosen)
        choices[recipe.value] = {p.value: chosen[p].value if p in chosen else None for p in Pass}
    return choices


def render(findings: dict[str, Any]) -> str:
    """The findings of `gather` as text for a terminal."""
    machine = findings["machine"]
    name = ", ".join(dict.fromkeys((machine["name"], machine["vendor"], machine["arch"])))  # a CPU is just "cpu"
    lines = ["machine", f"  {name}", f"  FP8 data in {machine['fp8_dtype']}", "", "versions"]
    lines += [f"  {package:16}{version}" for package, version in findings["versions"].items()]
    if findings["overwritten_by"]:
        lines.append(f"  error: {distributions.message(findings['overwritten_by'])}")
    lines += ["", "backends"]
    for backend in findings["backends"]:
        lines += _backend_lines(backend)
    lines += ["", "environment"]
    for switch in findings["switches"]:
        found = (
            f"error: {switch['error']}"
            if switch["error"]
            else f"{switch['value'] or 'none'} (default {switch['default']})"
        )
        lines += [f"  {switch['name']:24}{found}", f"    {switch['meaning']}"]
    lines += ["", "choice for training in bfloat16 (E=8, K=4096, N=4096)"]
    if errors(findings):
        return "\n".join([*lines, "  none: every call raises the error above"])
    lines.append(f"  {'recipe':20}" + "".join(f"{p.value:12}" for p in Pass).rstrip())
    for recipe, by_pass in findings["choices"].items():
        lines.append(f"  {recipe:20}" + "".join(f"{backend or '-':12}" for backend in by_pass.values()).rstrip())
    return "\n".join(lines)


def _backend_lines(backend: dict[str, Any]) -> list[str]:
    lines = [f"  {backend['name']:16}{'ready' if backend['ready'] else 'not ready'}", f"    {backend['summary']}"]
    for passes in dict.fromkeys(map(tuple, backend["runs"].values())):
        recipes = [recipe for recipe, runs in backend["runs"].items() if tuple(runs) == passes]
        lines.append(f"    {_passes(passes) or 'every pass'}: {', '.join(recipes)}")
    for reason in backend["reasons"]:
        refused = _passes(reason["passes"])
        lines.append(f"    {refused}{refused and ' '}{reason['reason']}. {reason['fix']}".rstrip())
    return lines


def _passes(passes: Sequence[str]) -> str:
    """The passes joined by "+"; empty if it is all of them."""
    return "" if len(passes) == len(Pass) else "+".join(passes)


def backends_markdown() -> str:
    """The page docs/backends.md: the requirements of every backend of this version."""
    backends = [candidate.backend for candidate in candidates(torch.device("cpu"))]
    here = {backend.kind for backend in backends}
    order = [
        (vendor or "any other", ", ".join(kind.value for kind in auto_order(vendor) if kind in here))
        for vendor in FIRST
    ]
    return "\n".join(
        [
            "# Backends",
            "",
            f"<!-- generated: {_WRITE} -->",
            "",
            "A backend runs a pass of a call if all its requirements for that pass are met, and if a tiny run on the",
            "device has shown that it works. A refusal names each requirement that is not met, what was found, and the",
            "remedy. `python -m grouped_gemm doctor` shows what a machine can run, `explain` what a call can use.",
            "",
            "Only the backend that wrote weights in `quantize_weights` can read them.",
            "",
            "## Which backend AUTO takes",
            "",
            "For each pass, AUTO takes the first backend in the vendor's order that does not refuse it:",
            "",
            *_table(("vendor", "order"), order),
            "",
            f"On a GPU with a profile, AUTO takes another plan if the whole call was measured to be "
            f"{round(100 * (MARGIN - 1))}% faster with it.",
            f"The plans are: {'; '.join(PLANS)}.",
            "",
            f"This package ships profiles for {', '.join(profile.shipped_gpus())}. A profile applies to exactly one",
            "GPU name. A call of another size follows the nearest profiled sizes. `warmup` with",
            "`GROUPED_GEMM_AUTOTUNE=1` measures a model's own calls on any GPU ([env.md](env.md)). AUTO uses these",
            "measurements first. `explain` shows the times, or says that nothing was measured. AUTO takes a plan with",
            "a host sync for its speed only if the user's own profile has measured exactly this call.",
            *(line for backend in backends for line in _backend_page(backend)),
            "",
        ]
    )


def _backend_page(backend: _GroupedMMBackend) -> list[str]:
    rows = [
        (r.what, "all" if r.passes == ALL_PASSES else ", ".join(p.value for p in r.passes), r.fix)
        for r in backend.requirements
    ]
    return [
        "",
        f"## {backend.kind.value}",
        "",
        backend.summary,
        "",
        f"Host syncs: {backend.host_syncs or 'none'}.",
        "",
        *_table(("requires", "passes", "remedy"), rows),
    ]


def env_markdown() -> str:
    """The table of docs/env.md: every environment variable of this package."""
    rows = []
    for switch in SWITCHES:
        values = ", ".join(f"`{v}`" for v in switch.values)
        if switch is BACKEND:
            values = "`auto`, or a backend from [backends.md](backends.md)"
        rows.append((f"`{switch.name}`", values, f"`{switch.default}`", switch.meaning))
    rows.append((f"`{CACHE_DIR.name}`", "a directory", CACHE_DIR.default, CACHE_DIR.meaning))
    return "\n".join(_table(("variable", "values", "default", "meaning"), rows))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


_WRITE = "python -m grouped_gemm.cli.doctor docs"
_ENV_START = f"<!-- generated: {_WRITE} -->\n\n"
_ENV_END = "\n\n<!-- end of the generated part -->"


def pages(folder: Path) -> dict[Path, str]:
    """The generated pages in ``folder``, by path. Only the part of env.md between two markers is generated.

    Raises:
        ValueError: env.md does not have the markers.
    """
    env = folder / "env.md"
    before, start, rest = env.read_text(encoding="utf-8").partition(_ENV_START)
    _, end, after = rest.partition(_ENV_END)
    if not (start and end):
        raise ValueError(
            f"{env}: expected the markers {_ENV_START.strip()!r} and {_ENV_END.strip()!r}; found no such pair. Put "
            "them around the table of variables"
        )
    return {folder / "backends.md": backends_markdown(), env: before + start + env_markdown() + end + after}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {_WRITE}")
    for path, text in pages(Path(sys.argv[1])).items():
        path.write_text(text, encoding="utf-8")
        print(path)
