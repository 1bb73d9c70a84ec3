"""How the sweep over learning rates and explicit penalties is shown."""

from __future__ import annotations

import math
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from fastreg.recipes.papers._tables import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]


def families(result: dict[str, Any]) -> tuple[Row, list[Row], list[Row]]:
    """The baseline, the implicit runs with it, the explicit runs."""
    rows = result["rows"]
    return rows[0], [row for row in rows if not row["penalty"]], [row for row in rows if row["penalty"]]


def mean_and_error(values: list[float | None]) -> tuple[float, float]:
    """Mean and standard error; nan where a run diverged before its first evaluation, or a single run has no spread.

    Example:
        >>> mean_and_error([1.0, 3.0])
        (2.0, 1.0)
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return math.nan, math.nan
    return mean(known), stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan


def gain(row: Row, baseline: Row, name: str) -> tuple[float, float]:
    """Mean difference to the baseline's runs of the same seeds, and its standard error."""
    pairs = zip(row[name], baseline[name])
    return mean_and_error([None if None in pair else pair[0] - pair[1] for pair in pairs])


def peak(rows: list[Row]) -> Row:
    """The row of the highest mean held-out accuracy."""
    return max(rows, key=lambda row: -1.0 if None in row["accuracy"] else mean(row["accuracy"]))


def table(result: dict[str, Any]) -> str:
    """Accuracies, losses and gains, and what the two peaks say about the claim."""
    baseline, implicit, explicit = families(result)
    cells = [_cells(row, baseline) for row in [*implicit, *explicit]]
    header = ("eta", "lambda", "held-out %", "held-out loss", "train loss", "gain in %-points", "gain in loss")
    return aligned(header, cells) + "\n\n" + _verdict(baseline, implicit, explicit)


def _cells(row: Row, baseline: Row) -> tuple[object, ...]:
    percent, loss = _scaled(mean_and_error(row["accuracy"])), mean_and_error(row["loss"])
    more, less = _scaled(gain(row, baseline, "accuracy")), gain(row, baseline, "loss")
    train = mean_and_error(row["train_loss"])[0]
    shown = (f"{percent[0]:.2f} +- {percent[1]:.2f}", f"{loss[0]:.3f} +- {loss[1]:.3f}", train)
    return row["lr"], row["penalty"], *shown, f"{more[0]:+.2f} +- {more[1]:.2f}", f"{less[0]:+.3f} +- {less[1]:.3f}"


def _scaled(pair: tuple[float, float]) -> tuple[float, float]:
    return 100 * pair[0], 100 * pair[1]


def _verdict(baseline: Row, implicit: list[Row], explicit: list[Row]) -> str:
    if not explicit:
        return "no explicit runs: the claim was not examined"
    large, penalised = peak(implicit), peak(explicit)
    ratio = penalised["penalty"] / large["lr"]
    gains = [_scaled(gain(row, baseline, "accuracy")) for row in (large, penalised)]
    recovered = all(value > 2 * error for value, error in gains)
    similar = 0.5 <= ratio <= 2
    return (
        f"accuracy peaks at eta = {large['lr']:g}, {gains[0][0]:+.2f} +- {gains[0][1]:.2f} %-points over "
        f"eta = {baseline['lr']:g}, and at lambda = {penalised['penalty']:g}, {gains[1][0]:+.2f} +- {gains[1][1]:.2f}\n"
        f"a gain of both (beyond two standard errors) was {'seen' if recovered else 'not seen'}; peaks within a factor "
        f"of 2, a step of the grid, were {'seen' if similar else 'not seen'}: lambda / eta = {ratio:g}\n"
        "peaks are chosen on the held-out data that is reported"
    )


def draw(figure: Figure, result: dict[str, Any]) -> None:
    """Held-out accuracy and loss against eta and lambda on one axis; settings that collapse lie beyond the frame."""
    left, right = figure.subplots(1, 2)
    _panel(left, result, "accuracy", "held-out accuracy")
    _panel(right, result, "loss", "held-out loss")
    left.legend()


def _panel(axes: Axes, result: dict[str, Any], name: str, label: str) -> None:
    baseline, implicit, explicit = families(result)
    level, shown = mean_and_error(baseline[name])[0], []
    for rows, key, legend in ((implicit, "lr", "SGD at eta"), (explicit, "penalty", "explicit lambda at small eta")):
        means, errors = zip(*(mean_and_error(row[name]) for row in rows)) if rows else ((), ())
        shown += [abs(mean - level) + error for mean, error in zip(means, errors)]
        axes.errorbar([row[key] for row in rows], means, errors, fmt="o-", capsize=3, label=legend)
    axes.axhline(level, color="0.7", label=f"SGD at {baseline['lr']:g}")
    # Half of the settings decide the scale: a collapsed one would leave nothing of the others to be seen.
    reach = 2 * sorted(shown)[len(shown) // 2] if shown else 0.0
    if reach:
        axes.set_ylim(level - reach, level + reach)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="eta, lambda", ylabel=label)
