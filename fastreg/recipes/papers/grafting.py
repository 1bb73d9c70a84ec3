"""Is it the length of the small batch's steps that helps?  (Novack, Kaur, Marwah, Garg, Lipton 2022, arXiv:2211.15853)

Steps along the gradient g of a large batch, as long as those of small-batch SGD:

    iterative     w -= lr ||g_k|| g / ||g||,   g_k one micro-batch's gradient at the same weights
    external      w -= lr n_t g / ||g||,       n_t the norm at step t of a small-batch run from the same seed
    normalized    w -= lr g / ||g||

beside small- and large-batch SGD. No momentum, no weight decay, constant rates, equal epochs. Rates are each method's
best on the validation split. What is compared is held-out accuracy at the epoch of best validation accuracy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastreg.errors import FastregError
from fastreg.recipes.catalogue import Recipe
from fastreg.recipes.methods import EXTERNAL_GRAFTING, ITERATIVE_GRAFTING, LARGE_BATCH, NORMALIZED, SMALL_BATCH, Method
from fastreg.recipes.papers._comparison import clear, comparison, measure, percent, share
from fastreg.recipes.papers._sweep_report import gain, mean_and_error
from fastreg.recipes.presets import MODELS
from fastreg.recipes.progress import Progress
from fastreg.recipes.settings import Settings, default_settings, preset

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = (SMALL_BATCH, LARGE_BATCH, ITERATIVE_GRAFTING, EXTERNAL_GRAFTING, NORMALIZED)
# "Most" of the gap.
MOST = 0.5


@dataclass(frozen=True)
class Config:
    """Options of the recipe."""

    model: str = field(default="mlp", metadata={"help": "it fixes data and rates", "choices": tuple(MODELS)})
    data_dir: str = field(default="", metadata={"help": "folder of the data; none for digits"})
    batch_size: int = field(default=512, metadata={"help": "B, samples of a large-batch step"})
    micro_batch_size: int = field(default=16, metadata={"help": "b, samples of a small-batch step"})
    epochs: int = field(default=150, metadata={"help": "passes over the training samples"})
    seeds: int = field(default=8, metadata={"help": "runs of every method"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda[:N]"})


def paper_scale(model: str, directory: str) -> Config:
    """A ResNet-18 with B = 5120 and b = 128; the paper's values, but for the rates of grafted steps (0.1)."""
    return Config(model, directory, batch_size=5120, micro_batch_size=128, seeds=3, device="cuda")


def cases(config: Config) -> list[tuple[Settings, Method]]:
    """Every method with the experiment's settings.

    Example:
        >>> [method.lr for _, method in cases(Config("resnet18"))]
        [0.1, 0.1, 0.1, 0.1, 0.2626]
    """
    if config.seeds < 1:
        raise FastregError(f"grafting: seeds must be at least 1, got {config.seeds}")
    settings = replace(
        default_settings(MODELS[config.model].data, config.model),
        methods=tuple(preset(config.model, name) for name in METHODS),
        seeds=tuple(range(config.seeds)),
        epochs=config.epochs,
        batch_size=config.batch_size,
        chunk_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        measure_every=config.epochs,
        device=config.device,
    )
    return [(settings, method) for method in settings.methods]


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """One row per method."""
    return {"rows": measure(cases(config), config.data_dir, progress)}


def table(result: dict[str, Any]) -> str:
    """Accuracies, what each recovers, and whether both graftings recover most of a gap."""
    small, large = result["rows"][:2]
    return f"{comparison(result['rows'], small, large)}\n\n{_verdict(result['rows'])}"


def _verdict(rows: list[dict[str, Any]]) -> str:
    small, large, *grafted = rows
    gap = gain(small, large, "accuracy")
    sentence = f"small - large batch: {percent(gap, signed=True)} points"
    if not clear(gap):
        return f"{sentence}, no gap beyond twice the standard error: the claim is not seen here"
    shares = [share(row, small, large) for row in grafted[:2]]
    worse = all(clear(gain(large, row, "accuracy")) for row in grafted[:2])
    word = "seen" if all(value > MOST for value in shares) else "opposite" if worse else "not seen"
    return f"{sentence}; grafting recovers {shares[0]:.0%} (iterative) and {shares[1]:.0%} (external): {word}"


def draw(figure: Figure, result: dict[str, Any]) -> None:
    """Accuracy per method: every seed, and mean with standard error."""
    axes = figure.subplots()
    for place, row in enumerate(result["rows"]):
        found = [100 * (math.nan if value is None else value) for value in row["accuracy"]]
        axes.plot([place] * len(found), found, "o", color="0.7", markersize=4)
        middle, error = mean_and_error(row["accuracy"])
        axes.errorbar(place, 100 * middle, 100 * error, fmt="o", color=f"C{place}", capsize=6)
    axes.set_xticks(range(len(result["rows"])), [row["title"] for row in result["rows"]])
    axes.set_ylabel("held-out accuracy, %")


RECIPE = Recipe(
    name="grafting",
    paper="Novack, Kaur, Marwah, Garg, Lipton 2022, arXiv:2211.15853",
    claim="Steps along the large batch's gradient, as long as the small batch's, recover most of the gap between them.",
    config=Config,
    quick=Config(epochs=4, seeds=2),
    steps=lambda config: len(METHODS) * config.seeds * config.epochs,
    run=run,
    table=table,
    draw=draw,
    presets=(
        ("cifar10", paper_scale("resnet18", "cifar-10-batches-py")),
        ("cifar100", paper_scale("resnet18-cifar100", "cifar-100-python")),
    ),
)
