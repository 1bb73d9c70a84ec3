"""The small search that the default settings come from; it never reads the test split.

Every method gets its own search by mean validation accuracy over seeds that the experiment does
not use: plain SGD over learning rates, a penalised method over learning rates times weights. The
weights are multiples of lr / 4, the value at which a penalty equals the implicit one of SGD at the
same learning rate (Smith et al. 2021); those of Novack et al. 2022 are 0.4 and 200 times it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from statistics import mean

from fastreg.recipes.data import Dataset
from fastreg.recipes.methods import (
    AVERAGE_JACOBIAN,
    EXTERNAL_GRAFTING,
    ITERATIVE_GRAFTING,
    LARGE_BATCH,
    NORMALIZED,
    PENALISED,
    SMALL_BATCH,
    UNIT_JACOBIAN,
    Method,
)
from fastreg.recipes.progress import Progress
from fastreg.recipes.settings import Settings
from fastreg.recipes.training import Run

LEARNING_RATES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(PENALISED, (0.1, 0.3, 1.0)),
    SMALL_BATCH: (0.01, 0.03, 0.1, 0.3, 1.0),
    LARGE_BATCH: (0.1, 0.3, 1.0, 3.0),
    ITERATIVE_GRAFTING: (0.03, 0.1, 0.3, 1.0),
    EXTERNAL_GRAFTING: (0.03, 0.1, 0.3, 1.0),
    NORMALIZED: (0.1, 0.3, 1.0, 3.0),
}
RULE_RATIOS = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
# Jacobians do not shrink as the model fits: the paper's weights are 0.002 to 0.04 times lr / 4.
JACOBIAN_RATIOS = (1 / 1024, 1 / 256, 1 / 64, 1 / 16, 1 / 4)
SWEEP_SEEDS = (1000, 1001)


@dataclass(frozen=True)
class Trial:
    """One candidate and its validation score, means over the sweep's seeds; nan if it diverged."""

    method: Method
    accuracy: float
    loss: float

    @property
    def rank(self) -> tuple[float, float]:
        """Orders trials: accuracy first, the lower loss among equals; diverged ones last."""
        if math.isnan(self.accuracy):
            return (-math.inf, -math.inf)
        return (self.accuracy, -self.loss)


def candidates(name: str) -> list[Method]:
    """The grid of a method.

    Example:
        >>> len(candidates("grad_norm"))
        15
    """
    rates = LEARNING_RATES[name]
    if name not in PENALISED:
        return [Method(name, lr) for lr in rates]
    ratios = JACOBIAN_RATIOS if name in (AVERAGE_JACOBIAN, UNIT_JACOBIAN) else RULE_RATIOS
    return [Method(name, lr, ratio * lr / 4) for lr in rates for ratio in ratios]


def _try(settings: Settings, method: Method, data: Dataset, progress: Progress) -> Trial:
    scores = []
    for seed in settings.seeds:
        run = Run(settings, method, seed, data, held_out=False)
        while not run.finished:
            run.train_epoch()
            progress.advance(method.title)
        progress.advance(method.title, settings.epochs - len(run.history))
        if run.diverged:
            return Trial(method, math.nan, math.nan)
        scores.append(run.best)
    return Trial(
        method, mean(s["accuracy"] for s in scores), mean(s["loss"] for s in scores)
    )


def sweep(settings: Settings, data: Dataset) -> list[Trial]:
    """Try every candidate of the settings' methods on the validation split.

    Args:
        settings: their learning rates, weights and seeds are replaced by the sweep's.
        data: the data set of the settings, on their device.

    Returns:
        All trials; the best of a method is its largest ``rank``.

    Example:
        >>> from fastreg.recipes.datasets import load_dataset
        >>> from fastreg.recipes.settings import default_settings
        >>> sweep(default_settings("digits"), load_dataset("digits", None))  # doctest: +SKIP
    """
    settings = replace(settings, seeds=SWEEP_SEEDS, measure_every=settings.epochs)
    grid = [method for chosen in settings.methods for method in candidates(chosen.name)]
    with Progress(len(grid) * len(SWEEP_SEEDS) * settings.epochs) as progress:
        trials = []
        for method in grid:
            trials.append(_try(settings, method, data, progress))
            progress.note(_line(trials[-1]))
        return trials


def sweep_table(trials: list[Trial]) -> str:
    """The trials as text, the best of each method marked.

    Example:
        >>> sweep_table([Trial(Method("large_batch", 0.1), 0.5, 1.0)]).splitlines()[1].endswith("*")
        True
    """
    lines = [f"{'method':30}{'lr':>8}{'weight':>12}{'ratio':>10}{'validation %':>14}{'loss':>9}"]
    best = _best(trials)
    lines += [_line(trial) + (" *" if trial is best[trial.method.name] else "") for trial in trials]
    return "\n".join(lines)


def sweep_document(settings: Settings, trials: list[Trial]) -> dict[str, object]:
    """The settings that were varied, and every trial with what :func:`sweep_table` shows.

    Example:
        >>> from fastreg.recipes.settings import default_settings
        >>> trial = Trial(Method("large_batch", 0.1), 0.5, 1.0)
        >>> sweep_document(default_settings("digits"), [trial])["trials"][0]["best"]
        True
    """
    best = _best(trials)
    rows = [{**asdict(trial), "best": trial is best[trial.method.name]} for trial in trials]
    return {"settings": settings.to_dict(), "seeds": list(SWEEP_SEEDS), "trials": rows}


def _best(trials: list[Trial]) -> dict[str, Trial]:
    """By method; the first among equals."""
    names = {trial.method.name for trial in trials}
    return {name: max((t for t in trials if t.method.name == name), key=lambda t: t.rank) for name in names}


def _line(trial: Trial) -> str:
    method = trial.method
    return (
        f"{method.title:30}{method.lr:8g}{method.weight:12.4g}{method.rule_ratio:10.3g}"
        f"{100 * trial.accuracy:14.2f}{trial.loss:9.4f}"
    )
