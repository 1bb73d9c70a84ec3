"""Stationary covariance of SGD on linear regression (Ziyin, Liu, Mori, Ueda 2021, arXiv:2102.05375).

    y = u . x + e,   x ~ N(0, A),   e ~ N(0, sigma^2)

``w`` is counted from ``u``; D weights, S fresh samples a step, learning rate lr. Many chains run side by side
from ``w = 0``. Their second moments are compared with the exact stationary covariance of theorem 2 and with its limit
of small learning rates, ``lr sigma^2 / (2 S)`` in every direction. A second experiment without label noise measures
the growth of ``E |w|^2`` per step, which passes one at the largest stable learning rate ``lr*``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fastreg.errors import FastregError
from fastreg.noise.regression import maximal_lr, stationary
from fastreg.recipes.catalogue import Recipe
from fastreg.recipes.papers._regression_chains import growth, simulate
from fastreg.recipes.papers._tables import aligned
from fastreg.recipes.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Config:
    """Options of the recipe; learning rates are fractions of the largest stable one."""

    spectrum: tuple[float, ...] = field(default=(1.0, 0.5), metadata={"help": "eigenvalues of A, D of them"})
    batch_sizes: tuple[int, ...] = field(default=(1, 4, 16), metadata={"help": "S, samples of a step"})
    fractions: tuple[float, ...] = field(default=(0.05, 0.1, 0.2, 0.4, 0.6), metadata={"help": "lr / lr*, below 1"})
    around: tuple[float, ...] = field(
        default=(0.9, 0.95, 1.0, 1.05, 1.1), metadata={"help": "lr / lr* at which growth is measured"}
    )
    noise_variance: float = field(default=1.0, metadata={"help": "sigma^2 of the labels"})
    chains: int = field(default=4000, metadata={"help": "independent chains"})
    relaxations: float = field(
        default=8.0, metadata={"help": "relaxation times before measuring, and again while measuring"}
    )
    growth_steps: int = field(
        default=200, metadata={"help": "steps before measuring growth, and again while measuring"}
    )
    seed: int = field(default=0, metadata={"help": "of the samples"})


def _row(config: Config, batch_size: int, fraction: float, generator: torch.Generator) -> dict[str, float]:
    """Measured and predicted mean variance per direction, ``tr Sigma / D``."""
    spectrum = torch.tensor(config.spectrum, dtype=torch.float64)
    A, size = spectrum.diag().numpy(), len(spectrum)
    lr = fraction * float(maximal_lr(A, batch_size))
    # The second moments forget at rate 2 lr a (1 - lr / lr*) in the slowest direction, exactly so for D = 1.
    steps = math.ceil(config.relaxations / (2 * lr * float(spectrum.min()) * (1 - fraction)))
    sigma = math.sqrt(config.noise_variance)
    moments = simulate(spectrum, lr, batch_size, sigma, config.chains, steps, generator)
    variances = moments.diagonal(dim1=1, dim2=2).mean(1)  # [chains]
    exact = float(stationary(A, lr, batch_size, config.noise_variance).covariance.trace()) / size
    return {
        "batch_size": batch_size, "lr": lr, "fraction": fraction, "steps": steps,
        "measured": float(variances.mean()), "error": float(variances.std()) / math.sqrt(config.chains),
        "exact": exact, "naive": lr * config.noise_variance / (2 * batch_size),
    }  # fmt: skip


def _check(config: Config) -> None:
    if not config.fractions or not all(0 < fraction < 1 for fraction in config.fractions):
        raise FastregError(f"covariance: fractions must be above 0 and below 1, got {config.fractions}")
    if config.growth_steps < 2:
        raise FastregError(f"covariance: growth_steps must be at least 2, got {config.growth_steps}")


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """Stationary variances and growth factors, each beside what is predicted."""
    _check(config)
    generator = torch.Generator().manual_seed(config.seed)
    spectrum = torch.tensor(config.spectrum, dtype=torch.float64)
    variances, growths = [], []
    for batch_size in config.batch_sizes:
        for fraction in config.fractions:
            variances.append(_row(config, batch_size, fraction, generator))
            progress.advance(f"S = {batch_size}")
        limit = float(maximal_lr(spectrum.diag().numpy(), batch_size))
        for fraction in config.around:
            arguments = spectrum, fraction * limit, batch_size, config.chains, config.growth_steps
            value, error = growth(*arguments, generator)
            growths.append({"batch_size": batch_size, "fraction": fraction, "growth": value, "error": error})
            progress.advance(f"S = {batch_size}")
    return {"variances": variances, "growths": growths}


def table(result: dict[str, Any]) -> str:
    """Both experiments as text, the largest deviation in standard errors, and whether growth turns at lr*."""
    names = "batch_size", "lr", "fraction", "measured", "error", "exact", "naive"
    rows = [(*(r[name] for name in names), r["exact"] / r["naive"]) for r in result["variances"]]
    header = ("S", "lr", "lr/lr*", "measured", "+-", "exact", "lr s^2/2S", "exact/naive")
    growths = [tuple(r[name] for name in ("batch_size", "fraction", "growth", "error")) for r in result["growths"]]
    return (
        f"variance per direction, tr Sigma / D\n{aligned(header, rows)}\n\n"
        f"{aligned(('S', 'lr/lr*', 'growth of E|w|^2', '+-'), growths)}\n\n{_verdict(result)}"
    )


def _verdict(result: dict[str, Any]) -> str:
    rows = result["variances"]
    off = max(abs(r["measured"] - r["exact"]) / r["error"] for r in rows)
    naive = max(abs(r["exact"] / r["naive"] - 1) for r in rows)
    sides = [r for r in result["growths"] if r["fraction"] != 1]
    right = sum((r["growth"] > 1) == (r["fraction"] > 1) for r in sides)
    return (
        f"theorem 2 is met within {off:.1f} standard errors; the small-lr value is off by up to {naive:.0%}; "
        f"E|w|^2 shrinks below lr* and grows beyond it in {right} of {len(sides)} cases"
    )


def draw(figure: Figure, result: dict[str, Any]) -> None:
    """Variance against learning rate, and growth against lr / lr*."""
    left, right = figure.subplots(1, 2)
    for place, size in enumerate(dict.fromkeys(r["batch_size"] for r in result["variances"])):
        lrs, measured, errors, exact, naive = _columns(
            result["variances"], size, "lr", "measured", "error", "exact", "naive"
        )
        left.errorbar(lrs, measured, errors, fmt=f"C{place}o", label=f"S = {size}")
        left.plot(lrs, exact, f"C{place}-")
        left.plot(lrs, naive, f"C{place}:")
        right.errorbar(*_columns(result["growths"], size, "fraction", "growth", "error"), fmt=f"C{place}o-")
    left.set(xscale="log", yscale="log", xlabel="lr", ylabel="tr Sigma / D (line exact, dots small-lr limit)")
    left.legend()
    right.axhline(1, color="0.7")
    right.axvline(1, color="0.7")
    right.set(xlabel="lr / lr*", ylabel="growth of E|w|^2 per step")


def _columns(rows: list[dict[str, float]], batch_size: int, *names: str) -> list[list[float]]:
    kept = [r for r in rows if r["batch_size"] == batch_size]
    return [[r[name] for r in kept] for name in names]


RECIPE = Recipe(
    name="covariance",
    paper="Ziyin, Liu, Mori, Ueda 2021, arXiv:2102.05375",
    claim="SGD on linear regression has the stationary covariance of theorem 2, above lr sigma^2 / (2 S), up to lr*.",
    config=Config,
    quick=Config(batch_sizes=(1, 4), fractions=(0.1, 0.4), around=(0.9, 1.0, 1.1), chains=500),
    steps=lambda config: len(config.batch_sizes) * (len(config.fractions) + len(config.around)),
    run=run,
    table=table,
    draw=draw,
)
