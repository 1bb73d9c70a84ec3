"""Results as rows, and the rows as a table, as JSON and as a plot."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fastreg.benchmark.measure import Spread

SCHEMA = 2


@dataclasses.dataclass
class Row:
    """One method on one model with m micro-batches.

    Attributes:
        model: preset's name.
        m: micro-batches.
        method: method's name.
        status: ``"ok"``; ``"wrong"`` if the error is above the tolerance, ``"failed"`` if the
            step raised, ``"not installed"`` if its package is missing, ``"skipped"`` if it was not
            tried. Only rows that are ok are timed.
        error_float64: relative error in float64 of what the method adds to the gradient of the
            loss, or of its product, which the gate judges.
        error: the same in the dtype that is timed.
        message: what a failed step raised, or why one was skipped.
        seconds: time of a step.
        ratio: median over rounds of the time over that of the plain step in the same round.
        flops: floating point operations of a step, None for a compiled one.
        flops_ratio: those over the plain step's.
        peak_bytes: memory that the step needs beyond what is held before it.
        products: how many products a step gives.
        quantity: what the method computes.
        part: the part of the plan that measured it, such as ``"penalty"``.
        curve: the curve that the row is a point of, such as ``"mlp width"``.
        at: the varied value on that curve.
        ours: whether the method is fastreg's, not a plain step's or a peer's.
    """

    model: str
    m: int
    method: str
    status: Literal["ok", "wrong", "failed", "not installed", "skipped"] = "ok"
    error_float64: float | None = None
    error: float | None = None
    message: str | None = None
    seconds: Spread | None = None
    ratio: Spread | None = None
    flops: int | None = None
    flops_ratio: float | None = None
    peak_bytes: int | None = None
    products: int = 1
    quantity: str = "loss"
    part: str = ""
    curve: str | None = None
    at: float | None = None
    ours: bool = False


HEADER = (
    f"{'model':<12}{'m':>4}  {'method':<26}{'error64':>9}{'error':>9}"
    f"{'ms p20':>9}{'p50':>9}{'p80':>9}{'ratio':>8}{'p20-p80':>13}{'flops':>8}{'MB':>9}"
)


def line(row: Row) -> str:
    """The row as a line under :data:`HEADER`."""
    start = f"{row.model:<12}{row.m:>4}  {row.method:<26}"
    start += f"{_number(row.error_float64, '.0e'):>9}"
    if row.status == "not installed":
        return f"{start}  not installed"
    if row.status == "wrong":
        return f"{start}  WRONG: not timed"
    if row.status == "skipped":
        return f"{start}  skipped: {row.message}"
    if row.status == "failed":
        return f"{start}  FAILED: {row.message}"
    assert row.seconds is not None and row.ratio is not None
    memory = None if row.peak_bytes is None else row.peak_bytes / 2**20
    return (
        f"{start}{_number(row.error, '.0e'):>9}"
        f"{1e3 * row.seconds.p20:>9.1f}{1e3 * row.seconds.p50:>9.1f}{1e3 * row.seconds.p80:>9.1f}"
        f"{row.ratio.p50:>8.2f}{f'{row.ratio.p20:.2f}-{row.ratio.p80:.2f}':>13}"
        f"{_number(row.flops_ratio, '.2f'):>8}{_number(memory, '.1f'):>9}{_per_product(row.ratio, row.products)}"
    )


def _per_product(ratio: Spread, products: int) -> str:
    return "" if products == 1 else f"  {ratio.p50 / products:.2f} per product"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def document(rows: Sequence[Row], machine: dict[str, object], settings: dict[str, object]) -> dict[str, object]:
    """All rows with the machine and settings that made them."""
    found = [dataclasses.asdict(row) for row in rows]
    return {"schema": SCHEMA, "machine": machine, "settings": settings, "rows": found}


def write_json(path: Path, contents: dict[str, object]) -> None:
    """Write a document; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=1) + "\n")


def draw(path: Path, rows: Sequence[Row], title: str) -> None:
    """Bars of the ratio to the plain step, one panel per model and m; whiskers are p20 and p80."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [(row, row.ratio) for row in rows if row.ratio is not None]
    panels = list(dict.fromkeys((row.model, row.m) for row, _ in timed))
    figure = Figure(figsize=(7, 0.8 + 2.2 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels):
        shown = [(row.method, ratio) for row, ratio in timed if (row.model, row.m) == panel]
        middle = [ratio.p50 for _, ratio in shown]
        low = [ratio.p50 - ratio.p20 for _, ratio in shown]
        high = [ratio.p80 - ratio.p50 for _, ratio in shown]
        bars = axis.barh([method for method, _ in shown], middle, xerr=(low, high), capsize=3)
        axis.bar_label(bars, fmt="%.2f", padding=6)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set(title=f"{panel[0]}, m = {panel[1]}", xlabel="time / plain step")
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
