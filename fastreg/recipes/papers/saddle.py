"""Leaving a saddle in a predictable direction (Beneventano 2023, arXiv:2312.16143).

    L_i(x, y) = x^2 / 2 - curvature y^2 / 2 + s_i x + r_i x y,   sum_i s_i = sum_i r_i = 0

The full loss has a saddle at the origin, from which every run starts. Derived here: to first order in y an epoch of k
batches without replacement moves the mean of y by

    -(lr^2 / (k - 1)) mean_i(s_i r_i) sum_{0 <= t < u < k} (1 - lr)^(u-1-t)

since ``E[r_{i_u} s_{i_t}] = -mean(s r) / (k - 1)`` for two different steps. The sign of ``-mean(s r)`` is the side on
which runs escape. With replacement that expectation is 0, the mean of y stays 0, and only its spread takes runs away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.recipes.catalogue import Recipe
from fastreg.recipes.papers._tables import aligned
from fastreg.recipes.papers._toy import ORDERS, BatchLoss, epoch_order, follow, mean_and_error
from fastreg.recipes.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Runs drawn as curves.
DRAWN = 20


@dataclass(frozen=True)
class Config:
    """Options of the recipe."""

    lr: float = field(default=0.1, metadata={"help": "learning rate"})
    forces: tuple[float, ...] = field(default=(1.0, -1.0) * 4, metadata={"help": "s_i, of sum 0"})
    couplings: tuple[float, ...] = field(default=(0.5, -0.5) * 4, metadata={"help": "r_i, of sum 0, as many"})
    curvature: float = field(default=0.05, metadata={"help": "of the escape direction, > 0"})
    distance: float = field(default=1.0, metadata={"help": "|y| at which a run has escaped"})
    runs: int = field(default=4000, metadata={"help": "independent runs"})
    epochs: int = field(default=300, metadata={"help": "passes over the batches"})
    seed: int = field(default=0, metadata={"help": "of the orders"})


def batch_loss(forces: Tensor, couplings: Tensor, curvature: float) -> BatchLoss:
    """``L_i`` at a point ``(x, y)`` of every run.

    Example:
        >>> loss = batch_loss(torch.tensor([1.0, -1.0]), torch.tensor([0.5, -0.5]), 0.05)
        >>> loss(torch.tensor([0, 1]), torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
        tensor([ 4.0000, -2.1000])
    """

    def loss(batch: Tensor, w: Tensor) -> Tensor:
        x, y = w.unbind(-1)
        return x**2 / 2 - curvature * y**2 / 2 + forces[batch] * x + couplings[batch] * x * y

    return loss


def first_drift(forces: Tensor, couplings: Tensor, lr: float) -> float:
    """Mean of y after one epoch without replacement from the origin, to first order in y: the formula above.

    Example:
        >>> first_drift(torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0]), 0.1) # -lr^2 for k = 2
        -0.010000000000000002
    """
    k = len(forces)
    pairs = sum((k - gap) * (1 - lr) ** (gap - 1) for gap in range(1, k))
    return -(lr**2) / (k - 1) * float((forces * couplings).mean()) * pairs


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """Both orders of drawing from the origin, beside the predicted side and drift.

    Raises:
        FastregError: forces and couplings differ in number, do not sum to zero or are uncorrelated; a size too small.
    """
    forces, couplings = _checked(config)
    loss = batch_loss(forces, couplings, config.curvature)
    drift, generator = first_drift(forces, couplings, config.lr), torch.Generator().manual_seed(config.seed)
    found: dict[str, Any] = {"drift_predicted": drift, "distance": config.distance}
    for scheme in ORDERS:
        w, heights = forces.new_zeros(config.runs, 2), []
        for _ in range(config.epochs):
            w = follow(loss, w, epoch_order(scheme, config.runs, len(forces), generator), config.lr)[-1]
            heights.append(w[:, 1])
            progress.advance(scheme)
        found[scheme] = _escapes(torch.stack(heights), config.distance, drift)
    return found


def _checked(config: Config) -> tuple[Tensor, Tensor]:
    forces, couplings = (torch.tensor(v, dtype=torch.float64) for v in (config.forces, config.couplings))
    got = f"{config.forces} and {config.couplings}"
    if len(forces) < 2 or len(forces) != len(couplings):
        raise FastregError(f"saddle: forces and couplings must be equally many, two or more, got {got}")
    if max(abs(float(forces.sum())), abs(float(couplings.sum()))) > 1e-12 or not forces @ couplings:
        raise FastregError(f"saddle: forces and couplings must sum to 0 and be correlated, got {got}")
    if config.runs < 2 or config.epochs < 1 or config.distance <= 0:
        got = f"{config.runs}, {config.epochs} and {config.distance}"
        raise FastregError(f"saddle: runs must be >= 2, epochs >= 1 and distance > 0, got {got}")
    return forces, couplings


def _escapes(y: Tensor, distance: float, drift: float) -> dict[str, Any]:
    """Of y after every epoch, ``[epochs, runs]``: who escapes when and to which side; and y after the first epoch."""
    beyond = y.abs() > distance
    escaped = beyond.any(0)
    first = beyond.int().argmax(0)[escaped]  # the first of equal maxima
    sides = y[:, escaped].gather(0, first[None])[0].sign()
    mean, error = mean_and_error(y[0])
    return {
        "escaped": float(escaped.double().mean()),
        "predicted_side": float((sides * drift > 0).double().mean()),
        "median_epochs": float(first.double().median()) + 1,
        "epochs": (first + 1).sort().values.tolist(),
        "drift": mean,
        "drift_error": error,
        "curves": y[:, :DRAWN].T.clamp(-2 * distance, 2 * distance).tolist(),
    }


def table(result: dict[str, Any]) -> str:
    """Side and time of escape, and the drift of the first epoch, in both orders of drawing."""
    names = ("escaped", "predicted_side", "median_epochs", "drift", "drift_error")
    without, with_ = (result[scheme] for scheme in ORDERS)
    rows = [(scheme, *(result[scheme][name] for name in names)) for scheme in ORDERS]
    header = ("", "escaped", "predicted side", "median epochs", "y after 1 epoch", "std error")
    drift = f"y after 1 epoch, predicted: {result['drift_predicted']:.4g} without, 0 with replacement"
    seen = without["predicted_side"] > max(0.95, with_["predicted_side"])
    seen = seen and without["median_epochs"] < with_["median_epochs"]
    verdict = "without replacement escapes sooner, on the predicted side: " + ("seen" if seen else "not seen")
    return "\n".join([aligned(header, rows), drift, verdict])


def draw(figure: Figure, result: dict[str, Any]) -> None:
    """y of some runs over epochs, and the share of runs that have escaped."""
    left, right = figure.subplots(1, 2)
    for place, scheme in enumerate(ORDERS):
        found = result[scheme]
        left.plot(list(zip(*found["curves"])), f"C{place}", lw=0.6, alpha=0.7)
        count = len(found["epochs"])
        shares = [found["escaped"] * (number + 1) / count for number in range(count)]
        right.step(found["epochs"], shares, f"C{place}", where="post", label=scheme)
    for sign in (-1, 1):
        left.axhline(sign * result["distance"], color="0.6", ls=":")
    left.set(xlabel="epoch", ylabel="y", xlim=(0, result[ORDERS[1]]["median_epochs"] * 2))
    right.set(xlabel="epoch", ylabel="share of runs escaped")
    right.legend()


RECIPE = Recipe(
    name="saddle",
    paper="Beneventano 2023, arXiv:2312.16143",
    claim="SGD without replacement leaves a saddle sooner, and on a side that the batches predict.",
    config=Config,
    quick=Config(runs=200, epochs=150),
    steps=lambda config: len(ORDERS) * config.epochs,
    run=run,
    table=table,
    draw=draw,
)
