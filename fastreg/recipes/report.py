"""What an experiment found: figures per method, a table, a verdict in words, a document."""

import math
import platform
from dataclasses import asdict, dataclass
from statistics import mean, median, stdev
from typing import Any

import torch

import fastreg
from fastreg.recipes.methods import LARGE_BATCH, PENALISED, SMALL_BATCH, TITLES, Method
from fastreg.recipes.settings import Settings

Results = list[dict[str, Any]]

# Half width of the 95 % confidence interval in standard errors, by degrees of freedom.
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
STUDENT_T_BEYOND = 2.23


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, sample standard deviation (nan for one seed) and number of seeds."""

    mean: float
    std: float
    count: int

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return self.std / math.sqrt(self.count) if self.count else math.nan


def estimate(values: list[float]) -> Estimate:
    """Estimate from one value per seed.

    Example:
        >>> estimate([1.0, 3.0]).mean
        2.0
    """
    return Estimate(
        mean(values) if values else math.nan,
        stdev(values) if len(values) > 1 else math.nan,
        len(values),
    )


@dataclass(frozen=True)
class Summary:
    """One row of the table; accuracies in [0, 1], diverged runs left out but counted.

    ``test`` is the accuracy at the epoch of the best validation accuracy, ``final`` that after the
    last epoch; ``overhead`` the time of an epoch over that of the large-batch run of the same seed.
    """

    method: Method
    test: Estimate
    final: Estimate
    validation: Estimate
    train_accuracy: float
    micro_batch_grad_norm: float
    seconds_per_epoch: float
    overhead: float
    diverged: int


def _of(results: Results, name: str) -> Results:
    return [r for r in results if r["method"] == name and not r["diverged"]]


def _seconds(result: dict[str, Any]) -> float:
    return median(entry["seconds"] for entry in result["history"])


def _overhead(results: Results, name: str) -> float:
    plain = {r["seed"]: _seconds(r) for r in _of(results, LARGE_BATCH)}
    ratios = [_seconds(r) / plain[r["seed"]] for r in _of(results, name) if r["seed"] in plain]
    return median(ratios) if ratios else math.nan


def summarise(settings: Settings, results: Results) -> list[Summary]:
    """Figures per method, in the order of the settings.

    Args:
        settings: of the experiment.
        results: of ``run_experiment``.

    Returns:
        One summary per method.

    Example:
        >>> from fastreg.recipes.settings import default_settings
        >>> summarise(default_settings("digits"), [])[0].test.count
        0
    """
    return [_summary(method, results) for method in settings.methods]


def _summary(method: Method, results: Results) -> Summary:
    runs = _of(results, method.name)
    last = [r["history"][-1] for r in runs]
    return Summary(
        method=method,
        test=estimate([r["best"]["test_accuracy"] for r in runs]),
        final=estimate([r["final"]["test_accuracy"] for r in runs]),
        validation=estimate([r["best"]["accuracy"] for r in runs]),
        train_accuracy=estimate([r["final"]["train_accuracy"] for r in runs]).mean,
        micro_batch_grad_norm=estimate([entry["micro_batch_grad_norm"] for entry in last]).mean,
        seconds_per_epoch=median(map(_seconds, runs)) if runs else math.nan,
        overhead=_overhead(results, method.name),
        diverged=sum(r["method"] == method.name and bool(r["diverged"]) for r in results),
    )


def paired_difference(results: Results, name: str, other: str) -> Estimate:
    """Test accuracy of ``name`` minus that of ``other``, seed by seed."""
    left, right = (
        {r["seed"]: r["best"]["test_accuracy"] for r in _of(results, which)}
        for which in (name, other)
    )
    return estimate([left[seed] - right[seed] for seed in left if seed in right])


def _percent(value: Estimate) -> str:
    spread = f" ± {100 * value.std:.2f}" if value.count > 1 else ""
    return f"{100 * value.mean:.2f}{spread}"


LEGEND = """\
ratio    weight / (lr / 4); 1 is the implicit penalty of SGD at the same learning rate
test     accuracy on held-out data at the epoch of best validation accuracy, mean ± std over seeds
final    the same after the last epoch;  train: accuracy on the training split then
||g_k||  mean norm of micro-batch gradients after the last epoch
overhead median time of an epoch over that of large-batch SGD"""


def table(summaries: list[Summary]) -> str:
    """The summaries as aligned text; ``LEGEND`` explains the columns.

    Example:
        >>> table([]).startswith("method")
        True
    """
    header = (
        "method", "lr", "weight", "ratio", "test %", "final %", "train %", "||g_k||", "s/epoch",
        "overhead",
    )  # fmt: skip
    rows = [header] + [_row(summary) for summary in summaries]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _row(summary: Summary) -> tuple[str, ...]:
    method = summary.method
    penalised = method.name in PENALISED
    title = method.title
    if summary.diverged:
        title += f" ({summary.diverged} diverged)"
    return (
        title,
        f"{method.lr:g}",
        f"{method.weight:g}" if penalised else "-",
        f"{method.rule_ratio:.3g}" if penalised else "-",
        _percent(summary.test),
        _percent(summary.final),
        f"{100 * summary.train_accuracy:.2f}",
        f"{summary.micro_batch_grad_norm:.4f}",
        f"{summary.seconds_per_epoch:.4f}",
        f"{summary.overhead:.2f}",
    )


def _clear(difference: Estimate) -> bool:
    width = STUDENT_T.get(difference.count - 1, STUDENT_T_BEYOND)
    return abs(difference.mean) > width * difference.standard_error


def _points(difference: Estimate) -> str:
    return f"{100 * difference.mean:+.2f} ± {100 * difference.standard_error:.2f} points"


def verdict(settings: Settings, results: Results) -> list[str]:
    """The outcome in sentences: differences of test accuracy, mean ± standard error over seeds.

    Returns:
        The gap between small and large batches, then what every other method makes of it; a difference whose 95 %
        confidence interval holds zero is not called one.

    Example:
        >>> from fastreg.recipes.settings import default_settings
        >>> verdict(default_settings("digits"), [])
        []
    """
    gap = paired_difference(results, SMALL_BATCH, LARGE_BATCH)
    if gap.count < 2:
        return []
    lines = [f"small batch - large batch: {_points(gap)}" + _gap_words(gap)]
    for method in settings.methods:
        if method.name not in (SMALL_BATCH, LARGE_BATCH):
            change = paired_difference(results, method.name, LARGE_BATCH)
            without = "without the penalty" if method.name in PENALISED else "the large batch's own steps"
            lines.append(f"{method.title} - large batch: {_points(change)}{_words(change, gap, without)}")
    return lines


def _gap_words(gap: Estimate) -> str:
    if not _clear(gap):
        return ": no clear gap to recover"
    return "" if gap.mean > 0 else ": small batches are worse here, there is nothing to recover"


def _words(change: Estimate, gap: Estimate, without: str) -> str:
    if not _clear(change):
        return ": no clear change"
    if change.mean < 0:
        return f": worse than {without}"
    if gap.mean > 0 and _clear(gap):
        return f": {100 * change.mean / gap.mean:.0f}% of the gap recovered"
    return f": better than {without}"


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware that timings depend on."""
    on_gpu = device.startswith("cuda")
    return {
        "fastreg": fastreg.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def document(settings: Settings, results: Results) -> dict[str, Any]:
    """Settings, environment, summaries and every run's history.

    Example:
        >>> from fastreg.recipes.settings import default_settings
        >>> document(default_settings("digits"), [])["runs"]
        []
    """
    return {
        "settings": settings.to_dict(),
        "environment": environment(settings.device),
        "summaries": [asdict(summary) for summary in summarise(settings, results)],
        "verdict": verdict(settings, results),
        "titles": TITLES,
        "runs": results,
    }
