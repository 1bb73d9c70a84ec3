"""A flat plateau that only SGD without replacement leaves in a direction (Beneventano 2023, arXiv:2312.16143).

    L_i(x, y) = s_i x (1 + y),   sum_i s_i = 0,   so that the full loss is 0 everywhere

Derived here: with ``u = x + 1 + y`` and ``v = x - 1 - y`` a step on batch i multiplies u by ``1 - lr s_i`` and v by
``1 + lr s_i``. An epoch without replacement therefore multiplies them by ``prod (1 - lr s_i)`` and
``prod (1 + lr s_i)`` in every order, both below 1: it descends the trace of the noise covariance, which is
``mean s_i^2 (x^2 + (1 + y)^2)``. With replacement the mean stays where it is, and ``E[x^2 + (1 + y)^2]`` grows by
``1 + lr^2 mean s_i^2`` per step. Gradient descent does not move.
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

START = (0.5, 0.0)


@dataclass(frozen=True)
class Config:
    """Options of the recipe."""

    lr: float = field(default=0.1, metadata={"help": "learning rate"})
    slopes: tuple[float, ...] = field(default=(1.0, -1.0, 0.5, -0.5), metadata={"help": "s_i, of sum 0"})
    runs: int = field(default=10000, metadata={"help": "independent runs"})
    epochs: int = field(default=30, metadata={"help": "passes over the batches"})
    seed: int = field(default=0, metadata={"help": "of the orders"})


def batch_loss(slopes: Tensor) -> BatchLoss:
    """``s_i x (1 + y)`` of batch i at a point ``(x, y)`` of every run.

    Example:
        >>> batch_loss(torch.tensor([3.0, -3.0]))(torch.tensor([0]), torch.tensor([[2.0, 1.0]]))
        tensor([12.])
    """
    return lambda batch, w: slopes[batch] * w[..., 0] * (1 + w[..., 1])


def along(points: Tensor) -> Tensor:
    """``(u, v) = (x + 1 + y, x - 1 - y)`` of points ``[..., 2]``."""
    x, y = points.unbind(-1)
    return torch.stack([x + 1 + y, x - 1 - y], -1)


def epoch_factors(slopes: Tensor, lr: float) -> Tensor:
    """``(prod (1 - lr s_i), prod (1 + lr s_i))``: what an epoch without replacement multiplies (u, v) by, exactly.

    Example:
        >>> epoch_factors(torch.tensor([1.0, -1.0]), 0.5).tolist()
        [0.75, 0.75]
    """
    return torch.stack([(1 - lr * slopes).prod(), (1 + lr * slopes).prod()])


def step_growth(slopes: Tensor, lr: float) -> float:
    """``1 + lr^2 mean s_i^2``: growth of ``E[x^2 + (1 + y)^2]`` per step with replacement, exactly.

    Example:
        >>> step_growth(torch.tensor([1.0, -1.0]), 0.5)
        1.25
    """
    return 1 + lr**2 * float(slopes.square().mean())


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """Both orders of drawing from the same start, beside the closed forms.

    Raises:
        FastregError: the slopes do not sum to zero, or a size is too small.
    """
    slopes = _checked(config)
    generator = torch.Generator().manual_seed(config.seed)
    found = {}
    for scheme in ORDERS:
        order = torch.cat([epoch_order(scheme, config.runs, len(slopes), generator) for _ in range(config.epochs)])
        points = follow(batch_loss(slopes), slopes.new_tensor(START).expand(config.runs, 2), order, config.lr)
        found[scheme] = along(points[:: len(slopes)] if scheme == ORDERS[0] else points)
        progress.advance(scheme)
    return {**_contraction(found[ORDERS[0]], slopes, config), **_growth(found[ORDERS[1]], slopes, config)}


def _checked(config: Config) -> Tensor:
    slopes = torch.tensor(config.slopes, dtype=torch.float64)
    if len(slopes) < 2 or abs(float(slopes.sum())) > 1e-12 or not slopes.any():
        raise FastregError(f"plateau: slopes must be two or more that sum to 0, not all 0, got {config.slopes}")
    if config.runs < 2 or config.epochs < 1:
        raise FastregError(f"plateau: runs must be >= 2 and epochs >= 1, got {config.runs} and {config.epochs}")
    return slopes


def _contraction(uv: Tensor, slopes: Tensor, config: Config) -> dict[str, Any]:
    """Of ``[epochs + 1, runs, 2]`` without replacement: ``(u^2 + v^2) / 2``, its prediction, and how far runs stray."""
    epochs = torch.arange(config.epochs + 1)[:, None, None]
    expected = uv[0] * epoch_factors(slopes, config.lr) ** epochs
    return {
        "factors": epoch_factors(slopes, config.lr).tolist(),
        "largest_deviation": float(((uv - expected).abs() / expected.abs()).max()),
        "without": _squares(uv).mean(1).tolist(),
        "without_predicted": _squares(expected)[:, 0].tolist(),
    }


def _squares(uv: Tensor) -> Tensor:
    return uv.square().sum(-1) / 2


def _growth(uv: Tensor, slopes: Tensor, config: Config) -> dict[str, Any]:
    """Of ``[steps + 1, runs, 2]`` with replacement, over steps; the mean at the end in standard errors."""
    squares, expected = _squares(uv), step_growth(slopes, config.lr)
    # One step at a time: ratios over many steps have tails that no number of runs averages out.
    growth, error = mean_and_error(squares[1:] / squares[:-1])
    shift = uv[-1].mean(0) - uv[0, 0]
    return {
        "growth": growth,
        "growth_error": error,
        "growth_predicted": expected,
        "mean_shift": shift.tolist(),
        "mean_shift_error": (uv[-1].std(0) / config.runs**0.5).tolist(),
        "with": squares[:: len(slopes)].mean(1).tolist(),
        "with_predicted": [float(squares[0, 0]) * expected ** (len(slopes) * n) for n in range(config.epochs + 1)],
    }


def table(result: dict[str, Any]) -> str:
    """Contraction and growth beside their closed forms."""
    start, shrunk = result["without"][0], "without replacement: final / first x^2 + (1+y)^2"
    shifts = zip("uv", result["mean_shift"], result["mean_shift_error"])
    growth = result["growth"] - 1, result["growth_predicted"] - 1, result["growth_error"]
    rows = [
        (shrunk, result["without"][-1] / start, result["without_predicted"][-1] / start, 0.0),
        ("with replacement: growth per step, minus 1", *growth),
        *((f"with replacement: shift of the mean of {name}", shift, 0.0, error) for name, shift, error in shifts),
    ]
    seen = result["largest_deviation"] < 1e-9 and all(abs(got - want) <= 4 * e for _, got, want, e in rows[1:])
    strays = f"largest relative deviation of a run without replacement: {result['largest_deviation']:.1e}"
    verdict = "contracts in every order, only without replacement: " + ("seen" if seen else "not seen")
    return "\n".join([aligned(("", "measured", "exact", "std error"), rows), strays, verdict])


def draw(figure: Figure, result: dict[str, Any]) -> None:
    """``E[x^2 + (1 + y)^2]`` over epochs; the loss is the same, 0, all along."""
    axes = figure.add_subplot()
    epochs = range(len(result["with"]))
    for place, (name, scheme) in enumerate(zip(("without", "with"), ORDERS)):
        axes.plot(epochs, result[name], f"C{place}o", markersize=4, label=scheme)
        axes.plot(epochs, result[f"{name}_predicted"], f"C{place}-", lw=1, label=f"{scheme}, closed form")
    axes.axhline(result["with"][0], color="0.6", ls=":", label="gradient descent")
    axes.set(xlabel="epoch", ylabel="mean of x^2 + (1 + y)^2", yscale="log")
    axes.legend(fontsize=8)


RECIPE = Recipe(
    name="plateau",
    paper="Beneventano 2023, arXiv:2312.16143",
    claim="Where the loss is flat, SGD without replacement still descends the trace of the noise covariance.",
    config=Config,
    quick=Config(runs=200, epochs=10),
    steps=lambda config: len(ORDERS),
    run=run,
    table=table,
    draw=draw,
)
