"""A run of experts.py as text, and whether it reaches the goals. It reads the JSON of a run, without a GPU.

A run is a dict: device, versions, seconds, failures, left_out (what was not measured, and why), rows. A row has a part:

- parity: batch, tokens, k, operands, name, and what `_experts_parity.compare` returns.
- small, layer: shape, tokens, name, recipe, weights, keep, routing, mode, pass; us (mean, median, p10, p90), speedup
  (how many times as fast as others in the same interleaved group, by name), peak and kept (MiB), error (relative to a
  loop over experts). A figure that was not measured is None; ``us`` is None if the call failed.
- host: name, recipe, weights, keep, pass; us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from _report import Goal, Row

KEYS = {"device", "versions", "seconds", "failures", "left_out", "rows"}
PASSES = ("forward", "step")
_LARGE = ("qwen3-30b", "olmoe")  # T = 16384
_MOST_HOST_US = {"forward": 300.0, "step": 900.0}
_MOST_ZIPF = 1.10


def label(row: Row) -> str:
    """What was called: "grouped_mm fp8_blockwise once", "torch bf16"."""
    recipe = "bf16" if row["recipe"] == "none" else row["recipe"]
    return " ".join(filter(None, (row["name"], recipe, row["weights"], row["keep"] and f"keep={row['keep']}")))


def name(row: Row) -> str:
    """The name of a row in a report."""
    if row["part"] == "parity":
        return f"({row['batch']}, {row['tokens']}, {row['k']}) {row['operands']} {row['name']}"
    if row["part"] == "host":
        return f"host {label(row)} {row['pass']}"
    return f"{row['shape']} T={row['tokens']} {label(row)} {row['mode']} {row['routing']} {row['pass']}"


def describe(row: Row) -> str:
    """One line of figures."""
    if row["part"] == "parity":
        text = f"max {row['max']:.2e}  mean {row['mean']:.2e}"
        text += f"  bound {row['bound_max']:.2e}, mean {row['bound_mean']:.2e}"
        text += f"  pre-activations in {row['pre']}  outside {row['outside']}"
        return f"{name(row):40}{text}"
    if row["part"] == "host":
        return f"{name(row):54}{_number(row['us'], '9.1f')} us"
    us = row["us"] or dict.fromkeys(("median", "mean", "p10", "p90"))
    text = f"{name(row):76}" + " ".join(_number(us[key], "10.1f") for key in ("median", "mean", "p10", "p90")) + " us"
    for key in ("peak", "kept"):
        text += f"  {key} {_number(row[key], '.0f')} MiB" if row[key] is not None else ""
    text += "".join(f"  {_number(value, '.2f')}x {peer}" for peer, value in row["speedup"].items())
    return text + (f"  error {row['error']:.1e}" if row["error"] is not None else "")


def _number(value: float | None, form: str) -> str:
    return format(float("nan") if value is None else value, form)


def goals(rows: Iterable[Row]) -> list[Goal]:
    """The goals of the layer, each with its cases among ``rows``."""
    rows = list(rows)
    eager = [row for row in rows if row["part"] == "layer" and row["mode"] == "eager"]
    ours = [row for row in eager if row["name"] == "grouped_mm"]

    def of(recipe: str, weights: str, keep: str, shapes: Sequence[str], pass_: str) -> list[Row]:
        key = (recipe, weights, keep, "random", pass_)
        return [
            row
            for row in ours
            if tuple(row[k] for k in ("recipe", "weights", "keep", "routing", "pass")) == key and row["shape"] in shapes
        ]

    def speed(recipe: str, weights: str, shapes: Sequence[str], pass_: str, peer: str, limit: float) -> Goal:
        cases = [(name(row), row["speedup"][peer]) for row in of(recipe, weights, "", shapes, pass_)
                 if peer in row["speedup"]]  # fmt: skip
        return Goal(f"{_kind(recipe, weights)} {'/'.join(shapes)} {pass_} against {peer}", limit, cases)

    def kept(recipe: str, weights: str, keep: str, limit: float) -> Goal:
        theirs = {row["shape"]: row["kept"] for row in eager
                  if (row["name"], row["pass"], row["routing"]) == ("sonic", "step", "random")}  # fmt: skip
        cases = [
            (name(row), None if row["kept"] is None else row["kept"] / theirs[row["shape"]])
            for row in of(recipe, weights, keep, _LARGE, "step")
            if theirs.get(row["shape"])
        ]
        what = f"{_kind(recipe, weights)}{f' keep={keep}' if keep else ''} {'/'.join(_LARGE)} kept against sonic"
        return Goal(what, limit, cases, at_most=True)

    def zipf(pass_: str) -> Goal:
        balanced = [(row, row["speedup"]["balanced"]) for row in ours
                    if (row["routing"], row["pass"]) == ("zipf", pass_) and "balanced" in row["speedup"]]  # fmt: skip
        cases = [(name(row), ratio and 1 / ratio) for row, ratio in balanced]
        return Goal(f"time with zipf over balanced routing, {pass_}", _MOST_ZIPF, cases, at_most=True)

    def host(pass_: str) -> Goal:
        cases = [(name(row), row["us"]) for row in rows
                 if (row["part"], row.get("name"), row.get("pass")) == ("host", "grouped_mm", pass_)]  # fmt: skip
        return Goal(f"host time of a layer, {pass_}", _MOST_HOST_US[pass_], cases, at_most=True, unit=" us")

    dsv3 = ("dsv3-ep8",)
    return [
        *(speed("none", "", _LARGE, pass_, "sonic", 1.0) for pass_ in PASSES),
        kept("none", "", "", 1.0),
        *(speed("none", "", ("qwen3-30b-4k",), pass_, "sonic", 1.3) for pass_ in PASSES),
        *(speed("none", "", dsv3, pass_, "torch", limit) for pass_, limit in zip(PASSES, (1.5, 1.4))),
        *(speed("fp8_blockwise", "once", _LARGE, pass_, "sonic", limit) for pass_, limit in zip(PASSES, (1.5, 1.4))),
        kept("fp8_blockwise", "once", "recipe", 0.65),
        *(speed("fp8_blockwise", "inside", _LARGE, pass_, "sonic", 1.2) for pass_ in PASSES),
        *(speed("fp8_blockwise", "once", dsv3, pass_, "torch", limit) for pass_, limit in zip(PASSES, (2.1, 1.7))),
        *(zipf(pass_) for pass_ in PASSES),
        *(host(pass_) for pass_ in PASSES),
    ]


def _kind(recipe: str, weights: str) -> str:
    return "bf16" if recipe == "none" else f"{recipe} {weights}"


def print_run(run: dict[str, Any], rows: bool, write: Callable[[str], Any] = print) -> None:
    """Every row, if ``rows``; the goals, what was left out, the failures."""
    if rows:
        write(", ".join([run["device"], *(f"{package} {version}" for package, version in run["versions"].items())]))
        for row in run["rows"]:
            write(describe(row))
    write("\ngoals, in this run")
    for goal in goals(run["rows"]):
        write(str(goal))
    for what, lines in (("left out", run["left_out"]), ("failures", run["failures"])):
        write(f"\n{len(lines)} {what}")
        for line in lines:
            write(f"  {line}")
    write(f"{run['seconds']:.0f} s")
