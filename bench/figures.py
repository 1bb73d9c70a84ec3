"""Results as figures, SVG and PNG: bars with intervals, curves, rooflines. The same file gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from math import inf, log10
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from documents import Cell, Document, Json
from fastreg.benchmark.report import Row
from fastreg.optional import require
from tables import floor_seconds, title
from verdicts import OURS, REFERENCE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; the background is white on every page.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#9A7D0A")
MARKERS = {**dict(zip(OURS, "o^", strict=True)), REFERENCE: "s"}
OTHERS, OTHER_MARKER = "torch, as one would call it", "x"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "fastreg", "figure.facecolor": "white", "savefig.facecolor": "white",
         "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}  # fmt: skip


def save(figure: Figure, path: Path, caption: str) -> list[Path]:
    """Write ``path`` as .svg and .png with the caption above; the paths written."""
    figure.suptitle(caption, fontsize=7, color="#444444")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    return [path.with_suffix(".svg"), path.with_suffix(".png")]


def blank(width: float, height: float) -> Figure:
    """An empty figure that needs no display.

    Raises:
        FastregError: matplotlib is not installed.
    """
    require("matplotlib").rcParams.update(STYLE)
    figure: Figure = _figures().Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _figures() -> ModuleType:
    return require("matplotlib.figure")


def bars(path: Path, cells: Sequence[Cell]) -> list[Path]:
    """Ratios of one part, a panel per model and m; whiskers are p20 and p80, ours are blue."""
    shown = [(cell, [row for row in cell.rows if row.ratio is not None and row.method != "plain"]) for cell in cells]
    shown = [(cell, rows) for cell, rows in shown if rows]
    heights = [len(rows) + 1.5 for _, rows in shown]
    figure = blank(7.5, 0.6 + 0.24 * sum(heights))
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (cell, rows) in zip(panels, shown, strict=True):
        _bar_panel(axes, cell, rows)
    panels[-1].set_xlabel("time in plain steps (blue: fastreg; orange: others; median, p20 to p80)")
    return save(figure, path, f"{title(cells[0].part)}\n{cells[0].document.caption}")


def _bar_panel(axes: Axes, cell: Cell, rows: Sequence[Row]) -> None:
    middle = [row.ratio.p50 / row.products for row in rows]
    low = [(row.ratio.p50 - row.ratio.p20) / row.products for row in rows]
    high = [(row.ratio.p80 - row.ratio.p50) / row.products for row in rows]
    names = [row.method + (" (per product)" if row.products > 1 else "") for row in rows]
    colours = [BLUE if row.ours else ORANGE for row in rows]
    drawn = axes.barh(names, middle, xerr=(low, high), color=colours, ecolor="black", capsize=2, height=0.7)
    axes.bar_label(drawn, fmt="%.2f", padding=4, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_title(cell.label, loc="left", fontsize=9)


def curve(path: Path, name: str, document: Document, rows: Sequence[Row]) -> list[Path]:
    """Ratios along a curve on logarithmic axes, each labelled where it ends; ours are solid lines."""
    figure = blank(7.0, 4.2)
    axes = figure.subplots()
    ends: list[tuple[float, float, str, str]] = []
    for index, method in enumerate(dict.fromkeys(row.method for row in rows if row.ratio is not None)):
        points = sorted((row for row in rows if row.method == method and row.ratio), key=lambda row: row.at)
        colour = COLOURS[index % len(COLOURS)]
        _curve_line(axes, points, colour)
        ends.append((points[-1].ratio.p50 / points[-1].products, points[-1].at, method, colour))
    axes.set(xscale="log", yscale="log", xlabel=name.split()[-1], ylabel="time in plain steps")
    _ticks(axes, sorted({row.at for row in rows if row.ratio}))
    _label_ends(axes, ends)
    return save(figure, path, f"{name} (shaded: p20 to p80)\n{document.caption}")


def _curve_line(axes: Axes, points: Sequence[Row], colour: str) -> None:
    x = [row.at for row in points]
    low, middle, high = ([getattr(row.ratio, q) / row.products for row in points] for q in ("p20", "p50", "p80"))
    style = "-" if points[0].ours else "--"
    axes.plot(x, middle, style, color=colour, marker="o", markersize=3.5)
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.grid(alpha=0.25, linewidth=0.6)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names right of the lines, pushed apart where lines end close together."""
    low, high = (log10(value) for value in axes.get_ylim())
    gap, last = 0.045 * (high - low), -inf
    for y, x, name, colour in sorted(ends):
        last = max(log10(y), last + gap)
        axes.annotate(name, (x, 10**last), xytext=(6, -3), textcoords="offset points", color=colour, fontsize=8,
                      annotation_clip=False)


def roofline(path: Path, document: Document) -> list[Path]:
    """Speed over operations per byte below the measured roof; below it, the distance of every case to its floor."""
    timed = [row for row in document.kernels if row.get("seconds")]
    cases = list(dict.fromkeys((row["op"], row["case"]) for row in timed))
    heights = (4.0, 0.8 + 0.16 * len(cases))
    figure = blank(8.5, 0.8 + sum(heights))
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    _roof(upper, [row for row in timed if row["flops"]], document.ceilings)
    _distances(lower, timed, cases, document.ceilings)
    top = document.ceilings
    ceilings = f"copy {top['bytes_per_s'] / 1e9:.1f} GB/s, matmul {top['flops_per_s'] / 1e9:.0f} GFLOP/s"
    measured_on = document.described(timed[0]["dtype"])
    return save(figure, path, f"Operations against the measured ceilings ({ceilings})\n{measured_on}")


def _roof(axes: Axes, rows: Sequence[Json], ceilings: dict[str, float]) -> None:
    rate, bandwidth = ceilings["flops_per_s"], ceilings["bytes_per_s"]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    x = [min([*intensities, 1.0]) / 2, rate / bandwidth, 2 * max([*intensities, rate / bandwidth])]
    axes.plot(x, [min(bandwidth * one, rate) / 1e9 for one in x], color="black", linewidth=1.2)
    colours = dict(zip(dict.fromkeys(row["op"] for row in rows), cycle(COLOURS)))
    for row in rows:
        speed = row["flops"] / row["seconds"]["p50"] / 1e9
        axes.plot(row["flops"] / row["bytes"], speed, _marker(row), color=colours[row["op"]], markersize=5)
    for op, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=op)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte, both at least necessary", ylabel="GFLOP/s")
    _finish(axes)


def _distances(
    axes: Axes, rows: Sequence[Json], cases: Sequence[tuple[str, str]], ceilings: dict[str, float]
) -> None:
    for kind, marker in {**MARKERS, OTHERS: OTHER_MARKER}.items():
        own = [row for row in rows if _marker(row) == marker]
        x = [row["seconds"]["p50"] / floor_seconds(row, ceilings)[0] for row in own]
        y = [cases.index((row["op"], row["case"])) for row in own]
        colour = BLUE if kind in OURS else GREY if kind == OTHERS else ORANGE
        if own:
            axes.plot(x, y, marker, color=colour, markersize=4.5, label=kind)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="time over the floor", ylim=(len(cases) - 0.5, -0.5))
    axes.set_yticks(range(len(cases)), [f"{op}  {case}" for op, case in cases], fontsize=6.5)
    _finish(axes)


def _marker(row: Json) -> str:
    return MARKERS.get(str(row["implementation"]), OTHER_MARKER)


def _finish(axes: Axes) -> None:
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.25, linewidth=0.6)
