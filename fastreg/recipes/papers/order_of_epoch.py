"""How far one epoch of SGD moves, against the modified loss (Smith, Dherin, Barrett, De 2021, arXiv:2101.12176, eq. 1).

    shuffled           mean over orders follows the gradient flow of  C + (lr/4) mean_k ||g_k||^2
    with replacement   mean over draws:  C + (lr/4) ||grad C||^2  alone (derived here)
    cyclic             one fixed order: an antisymmetric bracket of the batches enters (derived here)

The error of the prediction of first order falls like lr^2, that of second order like lr^3. Shuffled SGD is also held
against ``C + (lr/4) ||grad C||^2``, which leaves out the variance of the batches: that error falls like lr^2 again. A
small tanh network on a few digits, in float64, where all orders can be run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fastreg.models import mlp
from fastreg.noise.displacement import DisplacementReport, measured_vs_predicted
from fastreg.noise.expansion import EpochExpansion, epoch_expansion
from fastreg.recipes.catalogue import Recipe
from fastreg.recipes.data import digits
from fastreg.recipes.papers._tables import aligned
from fastreg.recipes.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLINGS = ("shuffled", "with_replacement", "cyclic")
# How far a fitted slope may lie from 2 or 3.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Config:
    """Options of the recipe."""

    samplings: tuple[str, ...] = field(default=SAMPLINGS, metadata={"help": "of batches", "choices": SAMPLINGS})
    lrs: tuple[float, ...] = field(
        default=tuple(2.0**power for power in range(-10, -4)), metadata={"help": "learning rates"}
    )
    batches: int = field(default=4, metadata={"help": "m, steps of an epoch; all m! orders are run, or m^m draws"})
    batch_size: int = field(default=16, metadata={"help": "b, samples of a step"})
    hidden: int = field(default=16, metadata={"help": "width of the network"})
    seed: int = field(default=0, metadata={"help": "of weights and of the choice of samples"})


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """Errors relative to the mean displacement, and slopes of absolute errors over the learning rate."""
    torch.manual_seed(config.seed)
    data = digits().train
    index = torch.randperm(len(data))[: config.batches * config.batch_size]
    batch = data.inputs[index].double(), data.targets[index]
    arguments = mlp((64, config.hidden, 10), "tanh").double(), F.cross_entropy, batch, config.batch_size
    flow = epoch_expansion(*arguments, sampling="with_replacement")
    samplings = {}
    for sampling in config.samplings:
        report = measured_vs_predicted(*arguments, list(config.lrs), sampling=sampling)
        samplings[sampling] = _figures(report, flow)
        progress.advance(sampling)
    return {"samplings": samplings}


def _figures(report: DisplacementReport, flow: EpochExpansion) -> dict[str, list[float]]:
    predicted = torch.stack([flow.displacement(lr) for lr in report.lr.tolist()])
    without = (report.measured - predicted).norm(dim=1)
    return {
        "lr": report.lr.tolist(),
        "first": (report.first_error / report.lengths).tolist(),
        "without": (without / report.lengths).tolist(),
        "second": (report.second_error / report.lengths).tolist(),
        "slopes": [float(slope) for slope in report.slopes],
    }


def table(result: dict[str, Any]) -> str:
    """Relative errors by learning rate, slopes, and whether they are 2 and 3."""
    found = result["samplings"]
    names = "lr", "first", "without", "second"
    rows = [(sampling, *values) for sampling, s in found.items() for values in zip(*(s[name] for name in names))]
    header = ("sampling", "lr", "first order", "second without variance", "second order")
    slopes = [(sampling, *s["slopes"]) for sampling, s in found.items()]
    seen = all(abs(value - want) < TOLERANCE for s in found.values() for value, want in zip(s["slopes"], (2, 3)))
    return (
        f"errors relative to the mean displacement\n{aligned(header, rows)}\n\n"
        f"{aligned(('sampling', 'slope, first order', 'slope, second order'), slopes)}\n\n"
        f"slopes 2 and 3 were {'seen' if seen else 'not seen'} (within {TOLERANCE})"
    )


def draw(figure: Figure, result: dict[str, Any]) -> None:
    """Relative errors against the learning rate: slopes 1 and 2, as the displacement has slope 1."""
    found = result["samplings"]
    for axes, (sampling, s) in zip(figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items()):
        axes.loglog(s["lr"], s["without"], "x-", color="C0", label="second order without variance")
        for name, slope in (("first", 1), ("second", 2)):
            axes.loglog(s["lr"], s[name], "o-", color=f"C{slope}", label=f"{name} order")
            line = [s[name][-1] * (lr / s["lr"][-1]) ** slope for lr in s["lr"]]
            axes.loglog(s["lr"], line, ":", color="0.5")
        axes.set(title=sampling.replace("_", " "), xlabel="lr")
    figure.axes[0].set_ylabel("error / displacement (dots: slopes 1, 2)")
    figure.axes[0].legend()


RECIPE = Recipe(
    name="order-of-epoch",
    paper="Smith, Dherin, Barrett, De 2021, arXiv:2101.12176",
    claim="The mean epoch of shuffled SGD follows the flow of C + (lr/4) mean ||g_k||^2 up to O(lr^3).",
    config=Config,
    quick=Config(lrs=(2.0**-8, 2.0**-7, 2.0**-6), batches=3, hidden=8),
    steps=lambda config: len(config.samplings),
    run=run,
    table=table,
    draw=draw,
)
