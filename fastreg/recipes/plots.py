"""Plots of an experiment, and how every figure is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from fastreg.optional import require
from fastreg.recipes.methods import Method
from fastreg.recipes.report import Results, Summary, summarise
from fastreg.recipes.settings import Settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
DPI = 150


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write the figure in every format; the files written.

    Example:
        >>> import pathlib, tempfile
        >>> from matplotlib.figure import Figure
        >>> [path.name for path in save(Figure(), pathlib.Path(tempfile.mkdtemp()), "empty")]
        ['empty.png', 'empty.svg']
    """
    paths = [folder / f"{name}.{extension}" for extension in FORMATS]
    for path in paths:
        figure.savefig(path, dpi=DPI)
    return paths


def _subtitle(settings: Settings) -> str:
    return (
        f"{settings.data}, {settings.model}, B = {settings.batch_size}, "
        f"b = {settings.micro_batch_size}, {settings.epochs} epochs, {len(settings.seeds)} seeds"
    )


def _names(summaries: list[Summary]) -> list[str]:
    return [summary.method.title.replace(" + ", "\n+ ") for summary in summaries]


def _accuracy(axes: Axes, summaries: list[Summary], results: Results) -> None:
    for place, summary in enumerate(summaries):
        accuracies = [
            100 * result["best"]["test_accuracy"]
            for result in results
            if result["method"] == summary.method.name and not result["diverged"]
        ]
        axes.plot([place] * len(accuracies), accuracies, "o", color="0.7", markersize=4)
        axes.errorbar(
            place, 100 * summary.test.mean, 100 * summary.test.std,
            fmt="o", color=f"C{place}", capsize=6, markersize=8,
        )  # fmt: skip
    axes.set_xticks(range(len(summaries)), _names(summaries))
    axes.set_xlim(-0.5, len(summaries) - 0.5)
    axes.set_ylabel("held-out accuracy, % (seeds, mean, std)")


def _seconds(axes: Axes, summaries: list[Summary]) -> None:
    colours = [f"C{place}" for place in range(len(summaries))]
    heights = [summary.seconds_per_epoch for summary in summaries]
    axes.bar(_names(summaries), heights, color=colours)
    axes.set_ylabel("seconds per epoch (median)")


def _norm_curve(results: Results, method: Method) -> tuple[list[int], list[float]]:
    by_epoch: dict[int, list[float]] = {}
    for result in results:
        if result["method"] == method.name:
            for entry in result["history"]:
                if "micro_batch_grad_norm" in entry:
                    by_epoch.setdefault(entry["epoch"], []).append(entry["micro_batch_grad_norm"])
    return list(by_epoch), [mean(values) for values in by_epoch.values()]


def _norms(axes: Axes, settings: Settings, results: Results) -> None:
    for method in settings.methods:
        axes.plot(*_norm_curve(results, method), label=method.title)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean micro-batch gradient norm")
    axes.legend()


def write_plots(folder: Path, settings: Settings, results: Results) -> list[Path]:
    """Draw accuracy, micro-batch gradient norm over training, and time.

    Args:
        folder: exists.
        settings: of the experiment.
        results: of ``run_experiment``.

    Returns:
        The files written: ``accuracy``, ``gradient_norm`` and ``seconds``, each as PNG and SVG.

    Raises:
        FastregError: matplotlib is not installed.

    Example:
        >>> write_plots(Path("."), settings, results)  # doctest: +SKIP
    """
    summaries = [s for s in summarise(settings, results) if s.test.count]
    drawings = {
        "accuracy": lambda axes: _accuracy(axes, summaries, results),
        "gradient_norm": lambda axes: _norms(axes, settings, results),
        "seconds": lambda axes: _seconds(axes, summaries),
    }
    width = max(7.0, 1.4 * len(summaries))
    figures = {name: _draw(_subtitle(settings), draw, width) for name, draw in drawings.items()}
    return [path for name, figure in figures.items() for path in save(figure, folder, name)]


def _draw(title: str, draw: Callable[[Axes], None], width: float) -> Figure:
    # Figure without pyplot: no display is looked for and no global state is left behind.
    figure = require("matplotlib.figure").Figure(figsize=(width, 4.5), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=9)
    return figure
