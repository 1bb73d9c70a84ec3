"""``fastreg monitor FILE``: what a CSVSink or a JSONLSink has written, as a table and as curves."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fastreg.cli_output import add_json, at_least_one, deliver, plot_file
from fastreg.errors import FastregError
from fastreg.optional import require

Series = dict[str, dict[int, float]]

EPILOG = """\
Mean, min and max are over finite values. Of a step that a resumed run has written again, the later row counts."""
COLUMNS = ("metric", "rows", "last", "mean", "min", "max", "trend")
BARS = "▁▂▃▄▅▆▇█"
TREND_WIDTH = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("file", type=Path, metavar="FILE", help="written by fastreg.sinks.CSVSink or JSONLSink")
    parser.add_argument(
        "--plot", type=plot_file, metavar="OUT.svg", help="draw one panel per metric, as .png, .svg or .pdf"
    )
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="only these metrics (default: all)")
    parser.add_argument(
        "--last", type=at_least_one, metavar="N", help="only the last N rows of each metric (default: all)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table or the document, and draw the plot; FastregError if the file or a request cannot be served."""
    if args.plot is not None:
        require("matplotlib")
    series = read_series(args.file)
    unknown = [name for name in args.metric or () if name not in series]
    if unknown:
        raise FastregError(f"monitor: --metric must be among {list(series)}, got {unknown}")
    chosen = {name: _last_rows(series[name], args.last) for name in args.metric or series}
    if args.json:
        deliver({"file": str(args.file), "metrics": {name: summary(chosen[name]) for name in chosen}}, True)
    else:
        print(table(chosen))
    if args.plot is not None:
        draw(args.plot, chosen, title=args.file.name)
    return 0


def read_series(path: Path) -> Series:
    """``{metric: {step: value}}`` of a file in either format.

    Raises:
        FastregError: the file is missing, without rows, or has a line that is no row; the message names the line.

    Example:
        >>> import pathlib, tempfile
        >>> from fastreg.monitor_cli import read_series
        >>> path = pathlib.Path(tempfile.mkdtemp(), "run.csv")
        >>> _ = path.write_text("step,loss\\n1,0.5\\n2,0.25\\n")
        >>> read_series(path)
        {'loss': {1: 0.5, 2: 0.25}}
    """
    if not path.is_file():
        raise FastregError(f"monitor: FILE must be an existing file, got {path}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    # A CSV file has a header, a JSONL file starts with a row.
    first = 0 if lines[0].startswith("{") else 1
    parse = _csv_parser(lines[0]) if first else json.loads
    series: Series = {}
    for number, line in enumerate(lines[first:], first + 1):
        step, values = _values(parse, line, f"line {number} of {path}")
        for name, value in values.items():
            series.setdefault(name, {})[step] = value
    if not series:
        raise FastregError(f"monitor: FILE must have at least one row, got none in {path}")
    return series


def _last_rows(points: dict[int, float], count: int | None) -> dict[int, float]:
    rows = sorted(points.items())
    return dict(rows if count is None else rows[-count:])


def _csv_parser(header: str) -> Callable[[str], dict[str, str]]:
    names = next(csv.reader([header]), [])
    return lambda line: dict(zip(names, next(csv.reader([line])), strict=True))


def _values(parse: Callable[[str], dict[str, Any]], line: str, place: str) -> tuple[int, dict[str, float]]:
    try:
        values = {name: math.nan if value is None else float(value) for name, value in dict(parse(line)).items()}
        return int(values.pop("step")), values
    except (ValueError, TypeError, KeyError, OverflowError, csv.Error) as error:
        raise FastregError(
            f"monitor: {place} must be a row with a step and numbers, got {line[:60]!r} (remove or repair that line)"
        ) from error


def table(series: Series) -> str:
    """One line per metric: rows, last, mean, min, max and the trend."""
    rows = [COLUMNS, *(_cells(name, points) for name, points in series.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    lines = []
    for name, *numbers, trend in rows:
        cells = [name.ljust(widths[0]), *(number.rjust(w) for number, w in zip(numbers, widths[1:])), trend]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def summary(points: dict[int, float]) -> dict[str, float]:
    """Number of rows, first and last step, last value, and mean, min and max of the finite values (nan without any).

    Example:
        >>> from fastreg.monitor_cli import summary
        >>> summary({1: 0.5, 4: 0.25})["mean"]
        0.375
    """
    values = list(points.values())
    known = [value for value in values if math.isfinite(value)] or [math.nan]
    found = {"last": values[-1], "mean": fmean(known), "min": min(known), "max": max(known)}
    return {"rows": len(values), "first_step": min(points), "last_step": max(points), **found}


def _cells(name: str, points: dict[int, float]) -> tuple[str, ...]:
    found = summary(points)
    numbers = (f"{found[column]:.4g}" for column in ("last", "mean", "min", "max"))
    return name, str(len(points)), *numbers, sparkline(list(points.values()))


def sparkline(values: Sequence[float]) -> str:
    """At most 40 bars, from the least to the greatest; each is the mean of the finite values it stands for, or a space.

    Example:
        >>> from fastreg.monitor_cli import sparkline
        >>> sparkline([0.0, 1.0, float("nan"), 7.0])
        '▁▂ █'
    """
    count = min(len(values), TREND_WIDTH)
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    finite = [[value for value in part if math.isfinite(value)] for part in parts]
    means = [fmean(part) if part else math.nan for part in finite]
    low = min((mean for mean in means if not math.isnan(mean)), default=0.0)
    span = max((mean - low for mean in means if not math.isnan(mean)), default=0.0) or 1.0
    return "".join(" " if math.isnan(mean) else BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)


def draw(path: Path, series: Series, title: str) -> None:
    """One panel per metric over steps; a value that is not finite leaves a gap."""
    # Figure without pyplot: no display is looked for and no global state is left behind.
    figure = require("matplotlib.figure").Figure(figsize=(7, 0.6 + 2 * len(series)), layout="constrained")
    panels = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, points) in zip(panels, series.items()):
        panel.plot(list(points), list(points.values()), marker=".", markersize=3, linewidth=1)
        panel.set_title(name, fontsize=9)
    panels[-1].set_xlabel("step")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
