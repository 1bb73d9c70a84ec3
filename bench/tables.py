"""Results as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from documents import Cell, Document, Json, cells
from fastreg.benchmark.measure import Spread
from fastreg.benchmark.methods import METHODS
from fastreg.benchmark.presets import PRESETS
from fastreg.benchmark.report import Row
from verdicts import leads, loses, standing

PARTS = {
    "norms": "Gradient norms on a training step",
    "penalty": "Gradient-norm penalties",
    "fisher": "Fisher-trace penalties",
    "compiled": "Compiled steps",
    "regularizers": "Every penalty",
    "monitor": "Cost of Monitor",
    "sam": "Cost of SAM and m-SAM",
    "hvp": "Products with curvature matrices",
    "scale": "Recomputed and perturbed penalties",
}
STEP_HEADER = "| method | error, float64 | ms p50 [p20-p80] | ratio [p20-p80] | FLOPs | peak MB | the best rival |"


def title(part: str) -> str:
    """A part's heading."""
    return PARTS.get(part, part)


def paragraph(text: str) -> str:
    """Prose in lines that fit into a source file."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _rule(header: str) -> str:
    return "|" + " --- |" * (header.count("|") - 1)


def spread(value: Spread, factor: float = 1.0, form: str = ".2f") -> str:
    """Median and interval."""
    low, middle, high = (format(factor * one, form) for one in (value.p20, value.p50, value.p80))
    return f"{middle} [{low}-{high}]"


def quoted(text: str | None) -> str:
    """A message as code that fits into a table."""
    return "`" + (text or "no reason given").replace("`", "'").replace("|", "/") + "`"


def step_table(cell: Cell) -> str:
    """A row per method of one cell; ours in bold where nobody is faster beyond noise."""
    lines = [STEP_HEADER, _rule(STEP_HEADER)]
    return "\n".join(lines + [_step_line(row, cell.rows) for row in cell.rows])


def _step_line(row: Row, rows: Sequence[Row]) -> str:
    error = "-" if row.error_float64 is None else f"{row.error_float64:.0e}"
    if row.ratio is None:
        return f"| {row.method} | {error} | {row.status}: not timed | | | | |"
    mark = "**" if leads(row, rows) else ""
    flops = "-" if row.flops_ratio is None else f"{row.flops_ratio:.2f}"
    memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
    each = "" if row.products == 1 else f" ({row.ratio.p50 / row.products:.2f} per product)"
    return (f"| {mark}{row.method}{mark} | {error} | {spread(row.seconds, 1e3, '.1f')} "
            f"| {mark}{spread(row.ratio)}{mark}{each} | {flops} | {memory} | {standing(row, rows)} |")


def pivot(found: Sequence[Cell]) -> str:
    """Median ratios of one part: a row per method, a column per model and m; the plain step's are 1."""
    header = "| | " + " | ".join(cell.label for cell in found) + " |"
    lines = [header, _rule(header)]
    for name in dict.fromkeys(row.method for cell in found for row in cell.rows if row.method != "plain"):
        label = f"`{name}`: {METHODS[name].about}" if name in METHODS else f"`{name}`"
        each = any(row.method == name and row.products > 1 for cell in found for row in cell.rows)
        entries = [label + ", each" * each, *(_pivot_entry(name, cell) for cell in found)]
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)


def _pivot_entry(name: str, cell: Cell) -> str:
    row = next((row for row in cell.rows if row.method == name), None)
    if row is None:
        return "-"
    if row.ratio is None:
        return row.status
    mark = "**" if leads(row, cell.rows) else ""
    return f"{mark}{row.ratio.p50 / row.products:.2f}{mark}"


def models(found: Sequence[Cell]) -> str:
    """What the models' names stand for, in one paragraph."""
    names = [name for name in dict.fromkeys(cell.model for cell in found) if name in PRESETS]
    return paragraph("Models: " + "; ".join(f"`{name}`: {PRESETS[name].about}" for name in names) + ".")


def losses(documents: Sequence[Document]) -> str:
    """Every row of ours that a rival beats beyond noise, as a list."""
    lost = [(cell, row) for cell in cells(documents) for row in cell.rows if loses(row, cell.rows)]
    lines = [f"* {title(cell.part)}, {cell.label}: `{row.method}` is {standing(row, cell.rows)}." for cell, row in lost]
    return "\n".join(lines) or "No row of ours is slower than a rival beyond noise."


def not_timed(documents: Sequence[Document]) -> str:
    """What has no time, with the reason; the same reason on several models and curves is one line."""
    header = "| method | where | why |"
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in (row for document in documents for row in document.rows if row.ratio is None):
        place = f"{row.model}, m = {row.m}" if row.curve is None else f"{row.curve} = {row.at:g}"
        reasons.setdefault((row.method, _reason(row)), []).append(place)
    lines = [f"| {name} | {'; '.join(dict.fromkeys(places))} | {why} |" for (name, why), places in reasons.items()]
    return "\n".join([header, _rule(header), *lines]) if lines else "Every method was timed wherever it was to be."


def _reason(row: Row) -> str:
    if row.status == "wrong":
        return f"wrong by {row.error_float64:.0e} in float64"
    return "not installed" if row.status == "not installed" else f"{row.status}: {quoted(row.message)}"


def curve_table(rows: Sequence[Row]) -> str:
    """Median ratios along a curve: a row per method, a column per value."""
    values = sorted({row.at for row in rows})
    header = "| | " + " | ".join(f"{value:g}" for value in values) + " |"
    lines = [header, _rule(header)]
    for name in dict.fromkeys(row.method for row in rows):
        at = {row.at: row for row in rows if row.method == name}
        found = [at[value] if value in at else None for value in values]
        lines.append(f"| {name} | {' | '.join(_curve_entry(row) for row in found)} |")
    return "\n".join(lines)


def _curve_entry(row: Row | None) -> str:
    if row is None:
        return "-"
    return row.status if row.ratio is None else f"{row.ratio.p50 / row.products:.2f}"


def kernel_table(document: Document) -> str:
    """Time and distance to the floor of every case and implementation."""
    header = "| op | case | implementation | us p50 [p20-p80] | times the floor | bound by | error |"
    return "\n".join([header, _rule(header), *_kernel_lines(document)])


def _kernel_lines(document: Document) -> Iterator[str]:
    for row in document.kernels:
        start = f"| {row['op']} | {row['case']} | {row['implementation']} |"
        if not row.get("seconds"):
            yield f"{start} wrong: not timed | | | {row['error']:.0e} |"
            continue
        floor, bound = floor_seconds(row, document.ceilings)
        times = row["seconds"]["p50"] / floor
        yield f"{start} {spread(Spread(**row['seconds']), 1e6, '.0f')} | {times:.2f} | {bound} | {row['error']:.0e} |"


def floor_seconds(row: Json, ceilings: dict[str, float]) -> tuple[float, str]:
    """The time that memory traffic or arithmetic alone takes at the measured ceilings, and which of them it is."""
    moved, multiplied = row["bytes"] / ceilings["bytes_per_s"], row["flops"] / ceilings["flops_per_s"]
    return (moved, "memory") if moved > multiplied else (multiplied, "arithmetic")


def sources(documents: Sequence[Document]) -> str:
    """The files, and the commands that wrote them."""
    header = "| file | commit, date | command |"
    lines = [f"| [{one.name}](../bench/results/{one.name}) | {one.machine['commit']}, {str(one.machine['date'])[:10]} "
             f"| {quoted(str(one.settings.get('command')))} |" for one in documents]
    return "\n".join([header, _rule(header), *lines])
