"""Sharpness against ``2 / lr`` while SGD trains (Beneventano 2023, arXiv:2312.16143).

SGD does not train at the edge of stability of gradient descent: the largest eigenvalue of the Hessian stays below
``2 / lr``. What settles near that value is the batch sharpness, ``mean_B g_B^T H_B g_B / ||g_B||^2`` (Andreyev and
Beneventano 2024, arXiv:2412.20553). A tanh network learns the digits with half the squared error in three ways, at one
learning rate, from the same weights. Measured besides: the mean over batches of the largest eigenvalue of ``H_B``.

With the defaults, over the second half of a run and in units of ``2 / lr``: the largest eigenvalue is 1.04 for gradient
descent, 0.39 and 0.42 for SGD without and with replacement; the batch sharpness 1.00, 0.77 and 0.76, below ``2 / lr``
for SGD; the mean largest eigenvalue of ``H_B`` 1.15 and 1.12.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreg.curvature import Hessian, batch_sharpness, sharpness_margin, top_eigenvalues
from fastreg.errors import FastregError
from fastreg.models import mlp
from fastreg.recipes.catalogue import Recipe
from fastreg.recipes.data import Split, digits
from fastreg.recipes.papers._tables import aligned
from fastreg.recipes.papers._training import SAMPLERS, Batch, batches, descend
from fastreg.recipes.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# 1% of the sharpness is finer than the plot shows.
TOLERANCE = 0.01
# Batches over which a batch sharpness is averaged: its standard error is then near 2%.
DRAWN = 128
FULL = "full batch"


@dataclass(frozen=True)
class Config:
    """Options of the recipe."""

    lr: float = field(default=0.4, metadata={"help": "learning rate of all three"})
    batch_size: int = field(default=4, metadata={"help": "samples of an SGD step"})
    steps: int = field(default=10000, metadata={"help": "of SGD"})
    full_steps: int = field(default=1500, metadata={"help": "of gradient descent"})
    points: int = field(default=40, metadata={"help": "measured in each run, besides the start"})
    drawn: int = field(default=DRAWN, metadata={"help": "batches over which the batch sharpness is averaged"})
    tops: int = field(default=8, metadata={"help": "batches over which the largest eigenvalue is averaged"})
    width: int = field(default=64, metadata={"help": "units of each of the two hidden layers"})
    seed: int = field(default=0, metadata={"help": "of weights and batches"})


@dataclass(frozen=True)
class Point:
    """What is measured at one step."""

    step: int
    loss: float
    sharpness: float
    batch_sharpness: float


def prepare(split: Split) -> Batch:
    """Centred pixels, twice as large, ``[N, 64]``, and one-hot targets, ``[N, 10]``.

    With the mean image left in, all samples share one sharp direction, and their batches differ less.
    """
    pixels = split.inputs.flatten(1)
    return 2 * (pixels - pixels.mean(0)), F.one_hot(split.targets, 10).float()


def half_squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """``1/2 ||f(x) - y||^2``, a mean over samples.

    Example:
        >>> half_squared(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
        tensor(2.5000)
    """
    return (outputs - targets).square().sum(1).mean() / 2


def drawn(data: Batch, count: int, generator: torch.Generator | None) -> Batch:
    """``count`` samples, with replacement."""
    index = torch.randint(len(data[0]), (count,), generator=generator)
    return data[0][index], data[1][index]


def measure(
    hessian: Hessian,
    data: Batch,
    size: int | None,
    lr: float,
    step: int,
    generator: torch.Generator,
    count: int = DRAWN,
) -> Point:
    """The largest eigenvalue over all data, and the batch sharpness over ``count`` fresh batches of ``size`` samples.

    With ``size=None`` the one batch is all data.
    """
    with torch.no_grad():
        loss = half_squared(hessian.model(data[0]), data[1]).item()
    top = sharpness_margin(hessian, lr, tol=TOLERANCE, generator=generator).sharpness.item()
    fresh = data if size is None else drawn(data, count * size, generator)
    return Point(step, loss, top, batch_sharpness(hessian.model, half_squared, fresh, size or len(data[0])).item())


def mean_top(model: nn.Module, batch: Batch, size: int, generator: torch.Generator) -> float:
    """Mean over the micro-batches of ``size`` samples of the largest eigenvalue of their Hessian."""
    parts = zip(batch[0].split(size), batch[1].split(size))
    hessians = (Hessian(model, half_squared, part) for part in parts)
    return fmean(float(top_eigenvalues(hessian, 1, tol=TOLERANCE, generator=generator)) for hessian in hessians)


def train(data: Batch, config: Config, scheme: str, progress: Progress) -> list[dict[str, float]]:
    """One run, measured at the start and ``points`` times: fields of :class:`Point`, and ``batch_top``."""
    torch.manual_seed(config.seed)
    model = mlp((data[0].shape[1], config.width, config.width, data[1].shape[1]), "tanh")
    size, steps = (None, config.full_steps) if scheme == FULL else (config.batch_size, config.steps)
    # Not the random numbers of training: measured more or less often, a run stays the same.
    generator = torch.Generator().manual_seed(config.seed)
    hessian, found = Hessian(model, half_squared, data), []
    measured = {steps * number // config.points for number in range(config.points + 1)}
    order = islice(batches(scheme, len(data[0]), config.batch_size, config.seed), steps)
    for step in descend(model, half_squared, data, order, config.lr):
        if step in measured:
            point = measure(hessian, data, size, config.lr, step, generator, config.drawn)
            top = point.sharpness
            if size is not None:
                top = mean_top(model, drawn(data, config.tops * size, generator), size, generator)
            found.append({**asdict(point), "batch_top": top})
            progress.advance(f"{scheme}, step {step}")
    return found


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """All three runs.

    Raises:
        FastregError: a size is out of range.
    """
    data = prepare(digits().train)
    if not 1 <= config.points <= min(config.steps, config.full_steps):
        got = f"{config.points} of {config.steps} and {config.full_steps}"
        raise FastregError(f"sharpness: points must be from 1 to the number of steps, got {got}")
    if not 1 <= config.batch_size < len(data[0]) or min(config.tops, config.drawn) < 1:
        got = f"{config.batch_size}, {config.tops} and {config.drawn}"
        raise FastregError(
            f"sharpness: batch_size must be in [1, {len(data[0]) - 1}], tops and drawn >= 1, got {got}"
        )
    return {"threshold": 2 / config.lr, "runs": {scheme: train(data, config, scheme, progress) for scheme in SAMPLERS}}


def settled(found: list[dict[str, float]], name: str, threshold: float) -> float:
    """Mean of one quantity over the second half of a run, over the threshold."""
    return fmean(point[name] for point in found[len(found) // 2 :]) / threshold


def table(result: dict[str, Any]) -> str:
    """Where the three runs settle, as shares of ``2 / lr``."""
    names, threshold = ("sharpness", "batch_sharpness", "batch_top"), result["threshold"]
    shares = {s: [settled(found, name, threshold) for name in names] for s, found in result["runs"].items()}
    rows = [(scheme, *values, result["runs"][scheme][-1]["loss"]) for scheme, values in shares.items()]
    header = ("second half, over 2 / lr", "lambda max(H)", "batch sharpness", "mean lambda max(H_B)", "final loss")
    # Below the edge says something only of a learning rate at which gradient descent gets there.
    below = all((values[0] < 0.9) == (scheme != FULL) for scheme, values in shares.items())
    near = all(values[1] > 0.9 for values in shares.values())
    verdict = [
        f"2 / lr = {threshold:.4g}",
        "SGD below the edge of stability, gradient descent at it: " + ("seen" if below else "not seen"),
        "batch sharpness within 10 % of 2 / lr or above: " + ("seen" if near else "not seen"),
    ]
    return "\n".join([aligned(header, rows, 3), *verdict])


def draw(figure: Figure, result: dict[str, Any]) -> None:
    """One panel per run: the three curvatures over steps, and ``2 / lr``."""
    labels = {"batch_top": "mean lambda max(H_B)", "batch_sharpness": "batch sharpness", "sharpness": "lambda max(H)"}
    panels = figure.subplots(1, len(result["runs"]), sharey=True)
    for axes, (scheme, found) in zip(panels, result["runs"].items(), strict=True):
        steps = [point["step"] for point in found]
        for name, label in labels.items():
            axes.plot(steps, [point[name] for point in found], label=label)
        axes.axhline(result["threshold"], color="black", linestyle="--", lw=1, label="2 / learning rate")
        axes.locator_params(axis="x", nbins=4)
        axes.set_title(scheme, fontsize=9)
        axes.set(xlabel="step")
    panels[0].set(ylabel="curvature of the loss", ylim=(0, None))
    panels[-1].legend(fontsize=8, loc="lower right")


RECIPE = Recipe(
    name="sharpness",
    paper="Beneventano 2023, arXiv:2312.16143",
    claim="SGD does not train at the edge of stability: the largest eigenvalue of the Hessian stays below 2 / lr.",
    config=Config,
    quick=Config(steps=200, full_steps=60, points=3, drawn=8, tops=2, width=8),
    steps=lambda config: len(SAMPLERS) * (config.points + 1),
    run=run,
    table=table,
    draw=draw,
)
