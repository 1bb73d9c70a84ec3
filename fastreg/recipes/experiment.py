"""All runs of an experiment, one after the other, with checkpoints."""

from pathlib import Path
from typing import Any

from fastreg.recipes.checkpoint import Checkpoint
from fastreg.recipes.data import Dataset
from fastreg.recipes.methods import Method
from fastreg.recipes.progress import Progress
from fastreg.recipes.settings import Settings
from fastreg.recipes.training import Run


def schedule(settings: Settings) -> list[tuple[int, Method]]:
    """Seeds outside, methods inside: timings of the methods stay close together."""
    return [(seed, method) for seed in settings.seeds for method in settings.methods]


def _describe(run: Run) -> str:
    return f"{run.method.title}, seed {run.seed}"


def _finish(run: Run, checkpoint: Checkpoint, path: Path, progress: Progress) -> None:
    settings = run.settings
    while not run.finished:
        run.train_epoch()
        progress.advance(_describe(run))
        if len(run.history) % settings.checkpoint_every == 0 and not run.finished:
            checkpoint.current = run.state_dict()
            checkpoint.save(path)
    result = run.result()
    checkpoint.results.append(result)
    checkpoint.current = None
    checkpoint.save(path)
    if run.diverged:
        progress.advance(_describe(run), settings.epochs - len(run.history))
    outcome = "diverged" if run.diverged else f"test accuracy {run.best['test_accuracy']:.2%}"
    progress.note(f"{_describe(run)}: {outcome}")


def run_experiment(
    checkpoint: Checkpoint, data: Dataset, path: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Do the runs that ``checkpoint`` does not hold yet.

    Args:
        checkpoint: a new one to start, a loaded one to continue: bit-identical to an experiment
            that was never interrupted, on the same machine and versions.
        data: the data set of the settings, on their device.
        path: where checkpoints are written.
        progress: counts epochs.

    Returns:
        One result of ``Run.result`` per seed and method.

    Example:
        >>> from fastreg.recipes.datasets import load_dataset
        >>> from fastreg.recipes.settings import default_settings
        >>> start = Checkpoint(default_settings("digits"))
        >>> data = load_dataset("digits", None)
        >>> with Progress(4000) as progress:  # doctest: +SKIP
        ...     results = run_experiment(start, data, Path("checkpoint.pt"), progress)
    """
    settings = checkpoint.settings
    done = len(checkpoint.results)
    if done:
        progress.advance("resuming", done * settings.epochs)
    for seed, method in schedule(settings)[done:]:
        run = Run(settings, method, seed, data)
        if checkpoint.current is not None:
            run.load_state_dict(checkpoint.current)
            progress.advance(_describe(run), len(run.history))
        _finish(run, checkpoint, path, progress)
        run.remove()
    return checkpoint.results
