"""A run of grouped_mm.py as a bar chart: our share of the measured ceilings, peers as marks on the bars. No GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _report import CEILINGS, PASSES, Row, rate, share, sizes

NEEDED = "--plot needs matplotlib: pip install grouped-gemm-dispatch[bench]"
_INK = "#3b3f46"
# Distinguishable for the colour-blind (Okabe, Ito).
_BARS = {"balanced": "#0072b2", "ragged": "#8ec1e0", "zipf": "#cfe3f1"}
_PEERS = {"torch": ("torch", "D", "#d55e00"), "deep_gemm": ("DeepGEMM", "^", "#009e73")}
_RECIPES = {"none": "bf16", "fp8_rowwise": "fp8_rowwise", "fp8_blockwise": "fp8_blockwise"}


def draw(run: dict[str, Any], path: Path) -> None:
    """Writes a bar chart as a PNG: a panel for each recipe, by shape and pass.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # used directly: no display, no global state

    gemms = [r for r in run["rows"] if "pass" in r]
    panels: list[tuple[str, list[Row]]] = []
    for recipe, label in _RECIPES.items():
        ceiling = run["ceilings"].get(CEILINGS[recipe])
        title = f"{label} GEMMs, TFLOP/s in the bars; ceiling: one large {CEILINGS[recipe]} matmul"
        title += f", {ceiling:.0f} TFLOP/s" if ceiling else ", which failed"
        panels.append((title, [r for r in gemms if r["recipe"] == recipe]))
    panels = [panel for panel in panels if panel[1]]
    width = max(13.0, 2.6 * len({r["shape"] for r in gemms}))
    figure = Figure(figsize=(width, 1.2 + 3.6 * max(len(panels), 1)), dpi=120, layout="constrained")
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    title = f"Share of the measured ceiling: grouped_gemm on {run['device']} ({versions})"
    figure.suptitle(title, x=0.01, ha="left", weight="bold", color=_INK)
    axes = figure.subplots(max(len(panels), 1), 1, squeeze=False)[:, 0]
    for axis, (title, rows) in zip(axes, panels):
        _panel(axis, title, rows, run["ceilings"])
        axis.set_ylabel("share of the matmul", color=_INK)
        axis.set_xlabel(
            "shape, M x E x N x K: tokens, experts, out features, in features", fontsize=9, color=_INK, labelpad=40
        )
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles) or 1, frameon=False)
    figure.savefig(path, format="png")


def _panel(axis: Any, title: str, rows: list[Row], ceilings: dict[str, float | None]) -> None:
    """Bars by shape, and within these by pass."""
    outer = list(dict.fromkeys(r["shape"] for r in rows))
    inner = [p for p in PASSES if any(r["pass"] == p for r in rows)]
    kinds = [kind for kind in _BARS if any(r["kind"] == kind for r in rows)]
    width = 0.84 / len(kinds)
    ticks = {}
    for row in rows:
        middle = outer.index(row["shape"]) * (len(inner) + 0.8) + inner.index(row["pass"])
        ticks[middle] = row["pass"]
        x = middle + (kinds.index(row["kind"]) - (len(kinds) - 1) / 2) * width
        mine = share(row, ceilings, row["ms"])
        if mine is None:
            axis.plot(x, 0.02, "x", color="red", label="failed", linestyle="none", markersize=6)
        else:
            axis.bar(x, mine, width * 0.94, color=_BARS[row["kind"]], label=f"grouped_gemm, {row['kind']}")
            axis.text(x, 0.015, f"{rate(row, row['ms']):.0f}", ha="center", va="bottom", fontsize=10, rotation=90,
                      color="white" if row["kind"] == "balanced" else _INK)  # fmt: skip
        for peer, ms in row.get("peers", {}).items():
            theirs = share(row, ceilings, ms)
            label, marker, color = _PEERS.get(peer, (peer, "o", _INK))
            if theirs is not None:
                axis.plot(x, theirs, marker, color=color, label=label, markersize=8, markeredgecolor="white",
                          linestyle="none")  # fmt: skip
    axis.axhline(1, color=_INK, linewidth=1, label="ceiling")
    axis.set_title(title, loc="left", color=_INK)
    axis.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    for group, shape in enumerate(outer):
        middle = group * (len(inner) + 0.8) + (len(inner) - 1) / 2
        label = "\n".join(filter(None, (shape, sizes(shape))))
        axis.text(middle, -0.1, label, ha="center", va="top", fontsize=10, color=_INK,
                  transform=axis.get_xaxis_transform())  # fmt: skip
    axis.set_xlim(-0.8, len(outer) * (len(inner) + 0.8) - 1)
    axis.set_ylim(0, max(1.08, axis.get_ylim()[1]))
    axis.tick_params(length=0, colors=_INK)
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.grid(axis="y", alpha=0.2, linewidth=0.6)
    axis.set_axisbelow(True)
