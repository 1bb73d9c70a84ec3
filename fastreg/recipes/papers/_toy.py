"""Gradient steps of many runs at once on a problem of two parameters, in both orders of drawing batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Batch numbers of some runs and points of these runs, [..., runs] and [..., runs, 2], to losses, [..., runs].
BatchLoss = Callable[[Tensor, Tensor], Tensor]

ORDERS = ("without replacement", "with replacement")


def epoch_order(scheme: str, runs: int, batches: int, generator: torch.Generator) -> Tensor:
    """Batch numbers of one epoch, ``[batches, runs]``: a permutation for every run, or independent draws.

    Example:
        >>> order = epoch_order("without replacement", 3, 4, torch.Generator())
        >>> order.sort(0).values[:, 0].tolist()
        [0, 1, 2, 3]
    """
    if scheme == "with replacement":
        return torch.randint(batches, (batches, runs), generator=generator)
    return torch.rand(batches, runs, generator=generator).argsort(0)


def follow(loss: BatchLoss, start: Tensor, order: Tensor, lr: float) -> Tensor:
    """Points after every step of gradient descent on one batch a step.

    Args:
        loss: of one batch per run.
        start: ``[runs, 2]``.
        order: ``[steps, runs]``, the batch of every step.
        lr: learning rate.

    Returns:
        ``[steps + 1, runs, 2]``, the start first.

    Example:
        >>> points = follow(lambda batch, w: w.square().sum(-1) / 2, torch.ones(3, 2), torch.zeros(4, 3).long(), 0.5)
        >>> points[:, 0, 0].tolist()
        [1.0, 0.5, 0.25, 0.125, 0.0625]
    """
    points = [start]
    for batch in order:
        w = points[-1].requires_grad_()
        (gradient,) = torch.autograd.grad(loss(batch, w).sum(), w)
        points[-1] = w.detach()
        points.append(points[-1] - lr * gradient)
    return torch.stack(points)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of all entries and its standard error, entries taken as uncorrelated."""
    return float(values.mean()), float(values.std() / values.numel() ** 0.5)
