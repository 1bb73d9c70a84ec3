"""Methods compared by held-out accuracy over seeds: the runs, and the table of what each recovers of a gap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastreg.recipes.data import Split
from fastreg.recipes.datasets import load_dataset
from fastreg.recipes.methods import Method
from fastreg.recipes.papers._sweep_report import gain, mean_and_error
from fastreg.recipes.papers._tables import aligned
from fastreg.recipes.progress import Progress
from fastreg.recipes.settings import Settings
from fastreg.recipes.training import Run

# One method: its title and settings, b, and one held-out accuracy per seed, None where the run diverged.
Row = dict[str, Any]


def measure(
    cases: list[tuple[Settings, Method]], directory: str, progress: Progress, train_size: int | None = None
) -> list[Row]:
    """Run every case with every seed of its settings; accuracies are those of the epoch of best validation accuracy.

    Args:
        cases: all on the same data set and device.
        directory: of its files; empty for data that is shipped.
        progress: counts epochs.
        train_size: the first so many training samples are used, the same for all; None for all of them.

    Returns:
        One row per case.

    Example:
        >>> from dataclasses import replace
        >>> from fastreg.recipes.settings import default_settings
        >>> settings = replace(default_settings("digits"), seeds=(0,), epochs=1)
        >>> len(measure([(settings, settings.methods[1])], "", Progress(1))[0]["accuracy"])
        1
    """
    first = cases[0][0]
    data = load_dataset(first.data, Path(directory) if directory else None).to(first.device)
    data = replace(data, train=Split(data.train.inputs[:train_size], data.train.targets[:train_size]))
    torch.set_num_threads(first.threads or torch.get_num_threads())
    rows = []
    for settings, method in cases:
        accuracies = [accuracy(Run(settings, method, seed, data), progress) for seed in settings.seeds]
        rows.append({
            "name": method.name, "title": method.title, "lr": method.lr, "weight": method.weight,
            "micro_batch_size": settings.micro_batch_size, "accuracy": accuracies,
        })  # fmt: skip
    return rows


def accuracy(run: Run, progress: Progress) -> float | None:
    """Train to the end; held-out accuracy at the epoch of best validation accuracy, None if the run diverged."""
    while not run.finished:
        run.train_epoch()
        progress.advance(f"{run.method.title}, b = {run.settings.micro_batch_size}, seed {run.seed}")
    progress.advance(run.method.title, run.settings.epochs - len(run.history))
    return None if run.diverged else run.best["test_accuracy"]


def percent(pair: tuple[float, float], signed: bool = False) -> str:
    """``mean +- standard error`` in percent.

    Example:
        >>> percent((0.5, 0.01))
        '50.00 +- 1.00'
    """
    return f"{100 * pair[0]:{'+' if signed else ''}.2f} +- {100 * pair[1]:.2f}"


def share(row: Row, small: Row, large: Row) -> float:
    """Of the gap between small and large batches, the part that ``row`` recovers; of means over seeds."""
    return gain(row, large, "accuracy")[0] / gain(small, large, "accuracy")[0]


def clear(pair: tuple[float, float]) -> bool:
    """Whether a difference is beyond twice its standard error, and positive."""
    return pair[0] > 2 * pair[1]


def comparison(rows: list[Row], small: Row, large: Row) -> str:
    """Accuracies, differences to the large batch seed by seed, shares of a clear gap; means +- standard errors."""
    header = ("method", "b", "lr", "weight", "held-out %", "- large batch, points", "of the gap")
    return aligned(header, [_cells(row, small, large) for row in rows])


def _cells(row: Row, small: Row, large: Row) -> tuple[object, ...]:
    change = "" if row is large else percent(gain(row, large, "accuracy"), signed=True)
    gap = row is not large and clear(gain(small, large, "accuracy"))
    recovered = f"{share(row, small, large):.0%}" if gap else ""
    setting = row["micro_batch_size"], row["lr"], row["weight"]
    return row["title"], *setting, percent(mean_and_error(row["accuracy"])), change, recovered
