"""How heavy the tails of SGD are on one-dimensional regression (Ziyin, Liu, Mori, Ueda 2021, arXiv:2102.05375).

    w <- (1 - lr a c / S) w + (lr / S) sqrt(a c) e,      c ~ chi2 with S degrees of freedom,  e ~ N(0, 1)

is SGD with S fresh Gaussian samples a step, exactly. Its stationary density falls like ``|w|^(-1 - beta)``. The exact
``beta`` solves ``E |1 - lr a c / S|^beta = 1`` (Kesten 1973, doi:10.1007/BF02392040); the paper gives
``2 S / (lr a) - S``. Both say 2 at the largest stable learning rate, and only there. A Hill estimate from the ends of
many independent chains decides between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastreg.errors import FastregError
from fastreg.noise.hill import hill_estimator
from fastreg.noise.tails import kesten_index, ziyin_index
from fastreg.recipes.catalogue import Recipe
from fastreg.recipes.papers._tables import aligned
from fastreg.recipes.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Config:
    """Options of the recipe."""

    lr_times_a: float = field(default=1.0, metadata={"help": "learning rate times curvature"})
    batch_sizes: tuple[int, ...] = field(default=(1, 2, 3, 4, 6, 8), metadata={"help": "S, samples of a step"})
    chains: int = field(default=1_000_000, metadata={"help": "independent chains, of which the last iterate is kept"})
    steps: int = field(default=100, metadata={"help": "steps of a chain"})
    tails: tuple[float, ...] = field(
        default=(0.01, 0.003, 0.001), metadata={"help": "largest share of the chains that the estimate rests on"}
    )
    seed: int = field(default=0, metadata={"help": "of the samples"})


def simulate(lr_times_a: float, batch_size: int, chains: int, steps: int, generator: np.random.Generator) -> np.ndarray:
    """The last iterate of every chain, from ``w = 0``, in units of ``sigma / sqrt(a)``.

    Args:
        lr_times_a: learning rate times curvature.
        batch_size: S.
        chains: independent ones.
        steps: of each.
        generator: of the samples.

    Returns:
        ``[chains]``.

    Example:
        >>> simulate(0.5, 4, 10, 20, np.random.default_rng(0)).shape
        (10,)
    """
    w, rate = np.zeros(chains), lr_times_a / batch_size
    for _ in range(steps):
        squares = generator.chisquare(batch_size, chains)
        w = (1 - rate * squares) * w + rate * np.sqrt(squares) * generator.standard_normal(chains)
    return w


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """Hill estimates beside the exact index and the paper's."""
    fewest = min(config.tails, default=0) * config.chains
    if fewest < 2:
        raise FastregError(f"tail-index: tails must each leave 2 or more of {config.chains} chains, got {config.tails}")
    generator, rows = np.random.default_rng(config.seed), []
    for size in config.batch_sizes:
        rows.append(_row(config, size, generator))
        progress.advance(f"S = {size}")
    return {"lr_times_a": config.lr_times_a, "tails": list(config.tails), "rows": rows}


def _row(config: Config, batch_size: int, generator: np.random.Generator) -> dict[str, Any]:
    ends = torch.from_numpy(simulate(config.lr_times_a, batch_size, config.chains, config.steps, generator))
    estimates = [hill_estimator(ends, round(share * config.chains)) for share in config.tails]
    return {
        "batch_size": batch_size,
        "exact": kesten_index(config.lr_times_a, batch_size),
        "paper": ziyin_index(config.lr_times_a, batch_size),
        "hill": [float(estimate.index) for estimate in estimates],
        "error": [float(estimate.error) for estimate in estimates],
    }


def table(result: dict[str, Any]) -> str:
    """Indices by batch size, and how often the deepest tail rules out each formula."""
    names = [f"Hill, top {share:g}" for share in result["tails"]]
    rows = [
        (r["batch_size"], r["exact"], r["paper"], *(f"{h:.3g} +- {e:.1g}" for h, e in zip(r["hill"], r["error"])))
        for r in result["rows"]
    ]
    exact, paper = (sum(_ruled_out(result, r, name) for r in result["rows"]) for name in ("exact", "paper"))
    return (
        f"lr a = {result['lr_times_a']:g}\n{aligned(('S', 'exact', 'paper', *names), rows)}\n\n"
        f"the deepest tail rules out, by more than two standard errors, the paper's index in {paper} of {len(rows)} "
        f"cases and the exact one in {exact}; estimates of large indices are too small, as the power law begins far out"
    )


def _ruled_out(result: dict[str, Any], row: dict[str, Any], name: str) -> bool:
    # The index is a limit, so the estimate that reaches farthest has the least bias.
    deepest = int(np.argmin(result["tails"]))
    return abs(row["hill"][deepest] - row[name]) > 2 * row["error"][deepest]


def draw(figure: Figure, result: dict[str, Any]) -> None:
    """Indices against batch size."""
    axes, rows = figure.subplots(), result["rows"]
    sizes = [r["batch_size"] for r in rows]
    axes.plot(sizes, [r["exact"] for r in rows], "-", label="exact (Kesten)")
    axes.plot(sizes, [r["paper"] for r in rows], ":", label="2 S / (lr a) - S")
    for place, share in enumerate(result["tails"]):
        values = [r["hill"][place] for r in rows], [r["error"][place] for r in rows]
        axes.errorbar(sizes, *values, fmt="o", markersize=4, label=f"Hill, top {share:g}")
    axes.set(xlabel="S", ylabel="tail index")
    axes.legend()


RECIPE = Recipe(
    name="tail-index",
    paper="Ziyin, Liu, Mori, Ueda 2021, arXiv:2102.05375",
    claim="The stationary distribution of SGD on 1-D regression has a power-law tail of index 2 S / (lr a) - S.",
    config=Config,
    quick=Config(batch_sizes=(2, 4), chains=50_000, steps=50, tails=(0.01, 0.002)),
    steps=lambda config: len(config.batch_sizes),
    run=run,
    table=table,
    draw=draw,
)
