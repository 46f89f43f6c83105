"""A run of experts.py as a picture: TFLOP/s of layers by shape and pass, times of the small one by tokens. No GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _experts_report import PASSES, label
from _report import Row

_INK = "#3b3f46"
# Okabe and Ito's colours, which the colour-blind can tell apart. Where they repeat, hatches and markers differ.
_COLORS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#f0e442", "#000000")
_MARKERS = "osD^v<>pPX*"
_TITLES = {"forward": "forward", "step": "forward and backward"}


def draw(run: dict[str, Any], path: Path) -> None:
    """Writes a PNG: for each pass a panel of the layers (eager, random routing), and one of the small layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # used directly: no display, no global state

    timed = [row for row in run["rows"] if row["part"] in ("layer", "small") and row["us"]]
    layers = [r for r in timed if r["part"] == "layer" and (r["mode"], r["routing"]) == ("eager", "random")]
    small = [r for r in timed if r["part"] == "small"]
    panels = [(_bars, pass_, [r for r in layers if r["pass"] == pass_]) for pass_ in PASSES]
    panels += [(_lines, pass_, [r for r in small if r["pass"] == pass_]) for pass_ in PASSES]
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(13, 1.2 + 4.4 * max(len(panels), 1)), dpi=120, layout="constrained")
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    figure.suptitle(f"The experts of an MoE layer on {run['device']}\n{versions}", x=0.01, ha="left", weight="bold",
                    color=_INK)  # fmt: skip
    axes = figure.subplots(max(len(panels), 1), 1, squeeze=False)[:, 0]
    for axis, (panel, pass_, rows) in zip(axes, panels):
        panel(axis, _TITLES[pass_], rows)
        axis.tick_params(colors=_INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.2, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, format="png")


def _bars(axis: Any, title: str, rows: list[Row]) -> None:
    """TFLOP/s of each layer by shape, with p10 to p90."""
    shapes, names = (list(dict.fromkeys(key(row) for row in rows)) for key in (_shape, label))
    width = 0.86 / len(names)
    for i, layer in enumerate(names):
        mine = [row for row in rows if label(row) == layer]
        at = [shapes.index(_shape(row)) + (i - (len(names) - 1) / 2) * width for row in mine]
        rates = {key: [row["flops"] / row["us"][key] / 1e6 for row in mine] for key in ("median", "p10", "p90")}
        # the fastest runs have the highest rate, so p10 is the upper end
        spread = [
            [max(m - low, 0.0) for m, low in zip(rates["median"], rates["p90"])],
            [max(high - m, 0.0) for m, high in zip(rates["median"], rates["p10"])],
        ]
        axis.bar(at, rates["median"], width * 0.94, yerr=spread, label=layer, color=_COLORS[i % len(_COLORS)],
                 hatch="//" if i >= len(_COLORS) else None, error_kw={"elinewidth": 0.8})  # fmt: skip
        for x, rate in zip(at, rates["median"]):
            axis.text(x, 0.0, f" {rate:.0f}", rotation=90, ha="center", va="bottom", fontsize=8, color=_INK)
    axis.set_title(f"{title}, eager, random routing: rate of the GEMMs' arithmetic; lines: p10 to p90", loc="left",
                   color=_INK)  # fmt: skip
    axis.set_ylabel("TFLOP/s of the whole layer", color=_INK)
    axis.set_xticks(range(len(shapes)), shapes, fontsize=9)


def _lines(axis: Any, title: str, rows: list[Row]) -> None:
    """Median microseconds by tokens: a colour for each layer, a style for each mode."""
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    names = list(dict.fromkeys(map(label, rows)))
    styles = ("-", ":", "--", "-.", (0, (1, 4)))  # one for each mode
    for i, layer in enumerate(names):
        for j, mode in enumerate(modes):
            mine = sorted((r["tokens"], r["us"]["median"]) for r in rows if (label(r), r["mode"]) == (layer, mode))
            if mine:
                axis.plot(*zip(*mine), linestyle=styles[j % len(styles)], marker=_MARKERS[i % len(_MARKERS)],
                          markersize=5, color=_COLORS[i % len(_COLORS)], label=f"{layer}, {mode}")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_title(f"{title}, the small layer: median time of a call", loc="left", color=_INK)
    axis.set_xlabel("tokens", color=_INK)
    axis.set_ylabel("microseconds", color=_INK)


def _shape(row: Row) -> str:
    return f"{row['shape']} T={row['tokens']}"
