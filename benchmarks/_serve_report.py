"""A run of serve.py as text and as markdown, and whether it reaches the goals. It reads the JSON of a run.

A run is a dict: device, versions, seconds, copy (GB/s that a copy reads and writes, None if it was not measured),
failures, left_out (what was not measured, and why), rows. A row has a part, a dtype ("bf16", "fp8": of the model) and
the name of an implementation:

- decode, prefill, layer: shape, tokens, mode, us (mean, median, p10, p90; None if the call failed), error (relative to
  fp32), peak (MiB), speedup (how many times as fast as each of transformers' in the same interleaved group). decode and
  prefill: batch, sequence. layer: reading (us to read the weights of active experts once, at the rate of a copy).
- stack: shape, layers, tokens, mode, us, error, peak, speedup. A step is forward and backward.
- generate: shape, layers, batch, prompt, new (tokens), mode (eager, static), us, error, peak, speedup.
- compat: mode, graph (whether the call was captured), fullgraph (None if nothing was compiled), skips (whether Inductor
  left out its CUDA graphs), state (agrees, disagrees, raises), reason ("" or one line).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from _report import Goal, Row

KEYS = {"device", "versions", "seconds", "copy", "failures", "left_out", "rows"}
FIGURES = ("mean", "median", "p10", "p90")
RECIPE = "grouped_gemm_fp8"
_MOST_US = {"H200": 20.0, "H100": 25.0}  # of qwen3-30b, T=1, fp8
_READING = 1.6  # a call within so many times the time of reading its weights need not be faster
_SMALL, _LARGE = 64, 4096


def name(row: Row) -> str:
    """The name of a row in a report."""
    what = f"{row['part']} {row['dtype']} {row['name']}"
    if row["part"] == "compat":
        return f"{what} {cell(row)}"
    if row["part"] == "generate":
        return f"{what} {row['shape']} {row['mode']} batch {row['batch']} prompt {row['prompt']}"
    sizes = f"{row['batch']}x{row['sequence']}" if row["part"] == "prefill" else f"T={row['tokens']}"
    return f"{what} {row['shape']} {row['mode']} {sizes}"


def cell(row: Row) -> str:
    """The column of a compat row: "default", "default, CUDA graph", "graph"."""
    return row["mode"] + (", CUDA graph" if row["graph"] else "")


def describe(row: Row) -> str:
    """One line of figures."""
    if row["part"] == "compat":
        return f"{name(row):70}{state(row)}" + (f": {row['reason']}" if row["reason"] else "")
    us = row["us"] or dict.fromkeys(FIGURES)
    text = f"{name(row):64}" + " ".join(_number(us[key], "10.1f") for key in FIGURES) + " us"
    if row["part"] == "generate":
        text += f"  {_number(rate(row), '.0f')} tokens/s"
    if row.get("reading") and row["us"]:
        text += f"  {us['median'] / row['reading']:.2f}x reading the weights ({row['reading']:.1f} us)"
    text += f"  peak {row['peak']:.1f} MiB" if row["peak"] is not None else ""
    text += "".join(f"  {value:.2f}x {peer}" for peer, value in row["speedup"].items())
    return text + (f"  error {row['error']:.1e}" if row["error"] is not None else "")


def state(row: Row) -> str:
    """What a cell of the compatibility table says."""
    if row["state"] != "agrees":
        return row["state"]
    return "yes" + (", graph breaks" if row["fullgraph"] is False else "") + (", no CUDA graph" if row["skips"] else "")


def _number(value: float | None, form: str) -> str:
    return format(float("nan") if value is None else value, form)


def rate(row: Row) -> float | None:
    """Tokens per second of a generate row."""
    return row["batch"] * row["new"] / row["us"]["median"] * 1e6 if row["us"] else None


def best(row: Row, dtype: str) -> float | None:
    """How many times as fast as transformers' fastest in this dtype; None if it has none here."""
    found = [value for peer, value in row["speedup"].items() if peer.startswith(f"{dtype} ")]
    return min(found) if found else None


# -- goals


def goals(rows: Iterable[Row], device: str) -> list[Goal]:
    """The goals, each with its cases among ``rows``. FP8 is that of FP8 models."""
    rows = list(rows)
    layers = [row for row in rows if row["part"] == "layer"]
    ours = [row for row in layers if row["name"] == "grouped_gemm"]

    def against(dtype: str, limit: float, tokens: Sequence[int], peers: str) -> Goal:
        """A row that failed is a case; one whose peers have all failed is none."""
        mine = [row for row in ours if row["dtype"] == dtype and row["tokens"] in tokens]
        cases = [(name(row), best(row, peers)) for row in mine if not row["us"] or best(row, peers) is not None]
        what = f"layer {dtype}, T={'/'.join(map(str, tokens))}, against transformers' best in {peers}"
        return Goal(what, limit, cases)

    def small(dtype: str) -> Goal:
        """The speed over 1.5, or 1.6 over the ratio to reading the weights, whichever is greater, is at least 1."""
        cases: list[tuple[str, float | None]] = []
        for row in ours:
            if row["dtype"] != dtype or row["mode"] != "graph" or row["tokens"] > _SMALL:
                continue
            speed = best(row, dtype)
            reading = row["us"]["median"] / row["reading"] if row["us"] and row["reading"] else None
            scores = [score for score in (speed and speed / 1.5, reading and _READING / reading) if score]
            text = f"{_number(speed, '.2f')}x transformers' best, {_number(reading, '.2f')}x reading"
            if not row["us"] or speed or max(scores, default=0) >= 1:  # otherwise there is nothing to compare with
                cases.append((f"{name(row)}: {text}", max(scores, default=None)))
        what = f"layer {dtype}, T<={_SMALL} as CUDA graphs: 1.5x transformers' best, or within {_READING}x of reading"
        return Goal(what, 1.0, cases)

    def one_token(shape: str) -> list[Row]:
        key = ("fp8", "graph", shape, 1)
        return [row for row in ours if (row["dtype"], row["mode"], row["shape"], row["tokens"]) == key]

    def stack(implementation: str, limit: float) -> Goal:
        mine = [row for row in rows if row["part"] == "stack" and row["name"] == implementation]
        peer = "bf16 grouped_mm"
        cases = [(name(row), row["speedup"].get(peer)) for row in mine if not row["us"] or peer in row["speedup"]]
        return Goal(f"stack {implementation}, a step, against transformers' grouped_mm", limit, cases)

    def peak() -> Goal:
        def key(row: Row) -> tuple[Any, ...]:
            return row["shape"], row["tokens"], row["dtype"], row["mode"]

        theirs = {key(row): row["peak"] for row in layers if row["name"] == "grouped_mm" and row["peak"]}
        cases = [(name(row), row["peak"] and row["peak"] / theirs[key(row)]) for row in ours if key(row) in theirs]
        return Goal("layer, peak memory against transformers' grouped_mm", 0.6, cases, at_most=True)

    most_us = next((us for gpu, us in _MOST_US.items() if gpu in device), None)
    times = [(name(row), row["us"] and row["us"]["median"]) for row in one_token("qwen3-30b")] if most_us else []
    large = sorted({row["tokens"] for row in ours if row["tokens"] >= _LARGE}) or [4096, 16384]
    shares = [
        (name(row), row["reading"] / row["us"]["median"] if row["us"] and row["reading"] else None)
        for row in one_token("dsv3-ep8")
    ]
    return [
        against("fp8", 2.5, large, "fp8"),
        against("bf16", 1.5, large, "bf16"),
        *(against(dtype, 2.0, (512,), dtype) for dtype in ("fp8", "bf16")),
        *(small(dtype) for dtype in ("fp8", "bf16")),
        Goal("dsv3-ep8 fp8 T=1, share of a copy's bandwidth", 0.85, shares),
        Goal("qwen3-30b fp8 T=1 as a CUDA graph", most_us or 20.0, times, at_most=True, unit=" us"),
        stack(RECIPE, 1.4),
        stack("grouped_gemm", 1.2),
        peak(),
    ]


# -- markdown


def markdown(run: dict[str, Any]) -> str:
    """The tables of a run: latencies, generate, and what runs."""
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    lines = [f"{run['device']}, {versions}."]
    rows = run["rows"]
    for part, sizes in (("decode", ("batch",)), ("prefill", ("batch", "sequence")), ("layer", ("tokens",))):
        mine = [row for row in rows if row["part"] == part and row["us"]]
        for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in mine):
            cases = [row for row in mine if (row["shape"], row["dtype"]) == (shape, dtype)]
            lines += ["", f"{part}, {shape}, {dtype}: milliseconds", ""]
            lines += _table(
                [*sizes, "mode", "implementation", *FIGURES, "peak, MiB"], [_cells(row, sizes) for row in cases]
            )
    mine = [row for row in rows if row["part"] == "generate" and row["us"]]
    if mine:
        keys = ("shape", "dtype", "batch", "prompt")
        cells = [
            [*(row[key] for key in keys), row["mode"], f"`{row['name']}`", f"{rate(row):,.0f}", _peak(row)]
            for row in mine
        ]
        lines += ["", "generate, greedy", ""]
        lines += _table([*keys, "cache", "implementation", "tokens per second", "peak, MiB"], cells)
    return "\n".join([*lines, *_compat_lines([row for row in rows if row["part"] == "compat"]), ""])


def _cells(row: Row, sizes: Sequence[str]) -> list[Any]:
    times = [f"{row['us'][key] / 1e3:.3f}" for key in FIGURES]
    return [*(row[size] for size in sizes), row["mode"], f"`{row['name']}`", *times, _peak(row)]


def _peak(row: Row) -> str:
    return "" if row["peak"] is None else f"{row['peak']:,.1f}"


def _compat_lines(rows: Sequence[Row]) -> list[str]:
    """Implementations down, modes across. Reasons below, by number."""
    if not rows:
        return []
    columns = list(dict.fromkeys(cell(row) for row in rows))
    reasons: dict[str, int] = {}
    table = []
    for dtype, implementation in dict.fromkeys((row["dtype"], row["name"]) for row in rows):
        mine = {cell(row): row for row in rows if (row["dtype"], row["name"]) == (dtype, implementation)}
        cells = [dtype, f"`{implementation}`"]
        for column in columns:
            row = mine.get(column)
            note = f" ({reasons.setdefault(row['reason'], len(reasons) + 1)})" if row and row["reason"] else ""
            cells.append("" if row is None else state(row) + note)
        table.append(cells)
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return ["", "What runs and agrees with fp32", "", *_table(["dtype", "implementation", *columns], table), "", *notes]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


# -- the run


def print_run(run: dict[str, Any], rows: bool, write: Callable[[str], Any] = print) -> None:
    """Every row, if ``rows``; the goals, what was left out, the failures."""
    if rows:
        write(", ".join([run["device"], *(f"{package} {version}" for package, version in run["versions"].items())]))
        for row in run["rows"]:
            write(describe(row))
    if run["copy"]:
        write(f"\na copy reads and writes {run['copy']:,.0f} GB/s")
    write("\ngoals, in this run")
    for goal in goals(run["rows"], run["device"]):
        write(str(goal))
    _write_fp8_against_bf16(run["rows"], write)
    for what, lines in (("left out", run["left_out"]), ("failures", run["failures"])):
        write(f"\n{len(lines)} {what}")
        for line in lines:
            write(f"  {line}")
    write(f"{run['seconds']:.0f} s")


def _write_fp8_against_bf16(rows: Iterable[Row], write: Callable[[str], Any]) -> None:
    """No goal: transformers' FP8 kernels are on the Hub, so its best in FP8 may be missing."""
    found = [
        (best(row, "bf16"), name(row))
        for row in rows
        if (row["part"], row["dtype"], row["name"]) == ("layer", "fp8", "grouped_gemm")
    ]
    ratios = [(value, case) for value, case in found if value is not None]
    if ratios:
        (least, case), (most, other) = min(ratios), max(ratios)
        write("  for comparison, layer fp8 against transformers' best in bf16:")
        write(f"    {least:.2f}x ({case}) to {most:.2f}x ({other})")
