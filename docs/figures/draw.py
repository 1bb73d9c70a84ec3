"""Draws the pictures of the documentation: `python docs/figures/draw.py [FOLDER]`, a few seconds each on one core."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))

from one_pass import one_pass
from problem import batch, model, train, value

import fastreg
from fastreg.curvature import Hessian
from fastreg.noise import NoiseCovariance, flat_drift_weight

SIZES = (1, 2, 4, 8, 16, 32, 64)


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """Side by side."""
    figure, axes = pyplot.subplots(1, count, figsize=(3.6 * count, 2.8), layout="constrained", squeeze=False)
    return figure, list(axes[0])


def smooth(values: list[float], width: int = 10) -> np.ndarray:
    """Means over a moving window: the batches are fresh at every step."""
    return np.convolve(values, np.full(width, 1 / width), "valid")


def trained(penalty: Callable[[float], fastreg.Penalty], weights: tuple[float, ...], label: str) -> Figure:
    """Loss and R over training, for several weights."""
    figure, (left, right) = panels(2)
    for weight in weights:
        losses, values = train(model(), penalty(weight))
        left.plot(smooth(losses), label=f"weight {weight:g}")
        right.plot(smooth(values))
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="step", ylabel=label, ylim=(0, None))
    left.legend(frameon=False)
    return figure


def grad_norm() -> Figure:
    """The penalty of training runs."""
    return trained(fastreg.GradNorm, (0.0, 0.025, 0.25), r"$R = \mathrm{mean}_k\, ||g_k||^2$")


def average_jacobian() -> Figure:
    """The penalty of training runs."""
    return trained(fastreg.AverageJacobian, (0.0, 0.001, 0.01), r"$R = \mathrm{mean}_k\, ||J_k^T 1||^2$")


def noise_trace() -> Figure:
    """How the penalties on one batch depend on the size of micro-batches."""
    net, data = model(), batch(512, seed=0)
    figure, (axes,) = panels(1)
    named = {
        "GradNorm": fastreg.GradNorm(1.0),
        "GradNorm, centered": fastreg.GradNorm(1.0, centered=True),
        "NoiseTrace": fastreg.NoiseTrace(1.0),
    }
    for name, penalty in named.items():
        axes.loglog(SIZES, [value(penalty, net, data, size) for size in SIZES], "o-", label=name)
    exact = float(NoiseCovariance(net, F.cross_entropy, data).trace())
    axes.axhline(exact, color="grey", lw=0.8, label="covariance of the 512 samples")
    axes.set(xlabel="micro-batch size b", ylabel="R", ylim=(0.1, 60))
    axes.legend(frameon=False, fontsize=8)
    return figure


def fisher_trace() -> Figure:
    """Draws of labels against the sum over all of them."""
    net, data = model(), batch(64, seed=0)
    figure, (axes,) = panels(1)
    exact = value(fastreg.FisherTrace(1.0, gradient="frozen", labels="exact"), net, data, 1)
    for size in (1, 8):
        draws = [size * value(fastreg.FisherTrace(1.0, seed=seed), net, data, size) for seed in range(200)]
        axes.hist(draws, bins=np.linspace(12, 23, 34), alpha=0.6, label=f"b R, b = {size}")
    axes.axvline(exact, color="black", lw=1, label='labels="exact"')
    axes.set(xlabel="tr F", ylabel="draws, of 200")
    axes.legend(frameon=False, fontsize=8)
    return figure


def unit_jacobian() -> Figure:
    """The spread of the estimate by the number of directions."""
    net, data = model(), batch(64, seed=0)
    figure, (axes,) = panels(1)
    for orthogonal, marker in ((False, "s-"), (True, "o-")):
        spreads = []
        for count in (1, 2, 3):
            options = {"directions": count, "orthogonal": orthogonal}
            draws = [value(fastreg.UnitJacobian(1.0, seed=s, **options), net, data, 8) for s in range(100)]
            spreads.append(np.std(draws) / np.mean(draws))
        axes.plot((1, 2, 3), spreads, marker, label="orthogonal" if orthogonal else "independent")
    axes.set(xlabel="directions n, of C = 3 classes", ylabel="relative spread of R", xticks=(1, 2, 3))
    axes.legend(frameon=False)
    return figure


def without_replacement() -> Figure:
    """The factor of an eigendirection, and where the eigenvalues of a Hessian lie after some training."""
    net, lr = model(), 0.1
    train(net, fastreg.GradNorm(0.0))
    eigenvalues = torch.linalg.eigvalsh(Hessian(net, F.cross_entropy, batch(512, seed=0)).dense().double())
    figure, (axes,) = panels(1)
    line = torch.linspace(-3, 30, 400, dtype=torch.float64)
    axes.plot(line, 2 * flat_drift_weight(line), color="grey", lw=1)
    for steps in (128, 32):
        at = lr * steps * eigenvalues
        axes.plot(at, 2 * flat_drift_weight(at), "o", ms=3, label=f"eigenvalues, K = {steps}")
    axes.set(xlabel=r"$\eta K \lambda$", ylabel=r"$S = 2 \varphi_2(-\eta K \lambda)$", xscale="symlog")
    axes.legend(frameon=False, fontsize=8)
    return figure


PICTURES = (one_pass, grad_norm, noise_trace, fisher_trace, average_jacobian, unit_jacobian, without_replacement)


def main(folder: Path) -> None:
    """Write every picture to ``folder``."""
    matplotlib.use("Agg")
    for draw in PICTURES:
        figure = draw()
        # Without the date and versions, the same figure gives the same file.
        figure.savefig(folder / f"{draw.__name__}.png", dpi=110, metadata={"Software": None})
        pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
