"""Epochs of SGD run in every order, against what expansions in the learning rate predict of them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from fastreg.curvature.linearization import LossFunction
from fastreg.curvature.traces import check_count
from fastreg.curvature.vectors import named_parameters
from fastreg.errors import FastregError
from fastreg.noise.epochs import Draws, Epochs, drawn_orders
from fastreg.noise.expansion import SAMPLINGS, epoch_expansion
from fastreg.noise.modified_loss import Batch, check_lr, check_sampling, count_batches
from fastreg.optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 150
HEADER = ("lr", "|mean|", "first order", "second order", "cosine", "standard error")


@dataclass(frozen=True)
class DisplacementReport:
    """Measured mean displacement of an epoch, and its distance from predictions; L learning rates.

    Attributes:
        sampling: as asked for.
        epochs: run for each learning rate.
        lr: ``[L]`` float64, ascending.
        measured: ``[L, D]``, the mean displacement.
        first, second: ``[L, D]``, the predictions of :func:`epoch_expansion` up to these orders.
        standard_error: ``[L]``, estimated from draws: the root of the total variance of the mean. 0 where all orders
            were run, NaN for a single draw.
    """

    sampling: str
    epochs: int
    lr: Tensor
    measured: Tensor
    first: Tensor
    second: Tensor
    standard_error: Tensor

    @property
    def lengths(self) -> Tensor:
        """``[L]``: ``||measured||``."""
        return self.measured.norm(dim=1)

    @property
    def first_error(self) -> Tensor:
        """``[L]``: ``||measured - first||``, of order lr^2."""
        return (self.measured - self.first).norm(dim=1)

    @property
    def second_error(self) -> Tensor:
        """``[L]``: ``||measured - second||``, of order lr^3 down to the standard error."""
        return (self.measured - self.second).norm(dim=1)

    @property
    def cosine(self) -> Tensor:
        """``[L]``: between what was measured and what is predicted beyond first order."""
        return torch.cosine_similarity(self.measured - self.first, self.second - self.first, dim=1)

    @property
    def slopes(self) -> tuple[float, float]:
        """Least squares slopes of the logarithms of both errors over that of lr; NaN for a single lr."""
        return _slope(self.lr, self.first_error), _slope(self.lr, self.second_error)

    def table(self) -> str:
        """Lines of text: errors relative to the length of the mean displacement, and the slopes of absolute ones."""
        lengths = self.lengths
        errors = (self.first_error / lengths, self.second_error / lengths, self.cosine, self.standard_error / lengths)
        rows = zip(*(column.tolist() for column in (self.lr, lengths, *errors)), strict=True)
        lines = ["".join(f"{name:>16}" for name in HEADER), *("".join(f"{x:16.4g}" for x in row) for row in rows)]
        slopes = "slopes of errors over lr: {:.2f} (2 expected), {:.2f} (3 expected)".format(*self.slopes)
        return "\n".join([f"{self.sampling}, {self.epochs} epochs; errors relative to |mean|", *lines, slopes])

    def plot(self, path: str | Path) -> Path:
        """Draw both errors over lr, on logarithmic scales, beside lines of slopes 2 and 3.

        Raises:
            FastregError: matplotlib is not installed.
        """
        # Figure without pyplot: no display is looked for and no global state is left behind.
        figure = require("matplotlib.figure").Figure(figsize=(7, 4.5), layout="constrained")
        self._draw(figure.add_subplot())
        figure.savefig(path, dpi=DPI)
        return Path(path)

    def _draw(self, axes: Axes) -> None:
        scale = self.lr / self.lr[-1]
        for order, error in ((1, self.first_error), (2, self.second_error)):
            axes.loglog(self.lr, error.cpu(), "o-", color=f"C{order}", label=f"up to order {order}")
            line = (error[-1].cpu() * scale ** (order + 1)).tolist()
            axes.loglog(self.lr, line, ":", color=f"C{order}", label=f"slope {order + 1}")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("distance from the mean displacement of an epoch")
        axes.set_title(f"{self.sampling}, {self.epochs} epochs", fontsize=9)
        axes.legend()


def measured_vs_predicted(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    batch_size: int,
    lr: float | Sequence[float],
    *,
    sampling: str = "shuffled",
    steps: int = 1,
    orders: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> DisplacementReport:
    r"""Run epochs of SGD on a copy of the model and compare their mean displacement with :func:`epoch_expansion`.

    ``shuffled`` runs every order of the m batches, or random ones, each with its reverse: the mean of such a pair is
    the mean over all orders up to ``O(lr^3)``. ``with_replacement`` runs every sequence of m batches, or random ones,
    each shifted by 0 .. m - 1 (modulo m): their mean is the expectation up to an error of ``O(lr^2)``. ``cyclic`` and
    ``gd`` are a single epoch. The same orders are run at every learning rate.

    Args:
        model, loss_fn, batch, batch_size, sampling, steps: as for :func:`epoch_expansion`.
        lr: one or several learning rates, each above 0.
        orders: how many to draw at random, each with its reverse or shifts; None for all of them, at most 720.
        dtype: of the copy and of floating point inputs and targets; ``torch.float64`` keeps rounding out of small
            learning rates. None leaves them as they are.
        seed: of the orders.

    Returns:
        :class:`DisplacementReport`. The model, its gradients and buffers, and torch's random state are left alone.

    Raises:
        FastregError: an argument is out of range; too many orders to run all; as :func:`epoch_expansion`.

    Source: the comparison checks Smith et al. 2021, arXiv:2101.12176 (shuffled); the others: derived here.

    Example:
        >>> import torch
        >>> from fastreg.noise.displacement import measured_vs_predicted
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        >>> batch, loss_fn = (torch.randn(6, 3), torch.randn(6, 1)), torch.nn.functional.mse_loss
        >>> report = measured_vs_predicted(model, loss_fn, batch, 2, [0.001, 0.002], dtype=torch.float64)
        >>> report.epochs, bool((report.second_error < report.first_error).all())
        (6, True)
    """
    rates = _rates(lr)
    check_sampling("measured_vs_predicted", sampling, SAMPLINGS)
    check_count("measured_vs_predicted", "steps", steps, 1)
    count = count_batches("measured_vs_predicted", batch, batch_size)
    draws = drawn_orders("measured_vs_predicted", sampling, count, orders, seed)
    device = next(iter(named_parameters(model).values())).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        copied, batch = _converted(deepcopy(model), dtype), (_converted(batch[0], dtype), _converted(batch[1], dtype))
        expansion = epoch_expansion(copied, loss_fn, batch, batch_size, sampling=sampling, steps=steps)
        epochs = Epochs(copied, loss_fn, batch, len(batch[1]) if sampling == "gd" else batch_size, steps)
        found = [_mean(epochs, draws, rate, orders is None) for rate in rates]
    means, errors = zip(*found, strict=True)
    first = torch.stack([rate * expansion.first for rate in rates])
    second = torch.stack([expansion.displacement(rate) for rate in rates])
    tensor = torch.tensor(rates, dtype=torch.float64)
    run = sum(len(draw) for draw in draws)
    return DisplacementReport(sampling, run, tensor, torch.stack(means), first, second, torch.stack(errors))


Holder = TypeVar("Holder", nn.Module, Tensor)


def _mean(epochs: Epochs, draws: Draws, lr: float, complete: bool) -> tuple[Tensor, Tensor]:
    """``[D]`` and its standard error, 0-d."""
    sums = [reduce(torch.add, (epochs.displacement(order, lr) for order in draw)) for draw in draws]
    found = torch.stack([total / len(draw) for total, draw in zip(sums, draws, strict=True)])
    mean, count = found.mean(0), len(draws)
    squares = (found - mean).square().sum()
    return mean, torch.zeros_like(squares) if complete else (squares / (count * (count - 1))).sqrt()


def _converted(holder: Holder, dtype: torch.dtype | None) -> Holder:
    kept = dtype is None or (isinstance(holder, Tensor) and not holder.is_floating_point())
    return holder if kept else holder.to(dtype)


def _rates(lr: float | Sequence[float]) -> list[float]:
    rates = lr if isinstance(lr, (list, tuple)) else [lr]
    if not rates:
        raise FastregError("measured_vs_predicted: lr must be a number > 0, or several, got none")
    for rate in rates:
        check_lr("measured_vs_predicted", rate)
    return sorted(rates)


def _slope(lr: Tensor, error: Tensor) -> float:
    x, y = lr.log(), error.double().cpu().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())
