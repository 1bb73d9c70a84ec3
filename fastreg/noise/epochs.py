"""Epochs of plain SGD from one start, and the orders of batches that a mean over them takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product
from math import factorial

import torch
from torch import Tensor, nn

from fastreg.curvature.linearization import LossFunction
from fastreg.curvature.traces import check_count
from fastreg.curvature.vectors import named_parameters
from fastreg.errors import FastregError
from fastreg.noise.modified_loss import Batch

# As many epochs as a mean over all orders may take: those of 6 batches without replacement, of 4 with.
MOST_ORDERS = factorial(6)
# Of each random draw, the orders whose mean is taken.
Draws = list[list[tuple[int, ...]]]


class Epochs:
    """Epochs of SGD from one start.

    Args:
        model: changed by every epoch.
        loss_fn: the mean loss over samples.
        batch: ``(inputs, targets)``, the epoch, cut into consecutive batches.
        batch_size: samples per batch.
        steps: taken on each batch in a row.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, batch: Batch, batch_size: int, steps: int) -> None:
        self._model, self._loss_fn, self._steps = model, loss_fn, steps
        self._batches = list(zip(*(part.split(batch_size) for part in batch), strict=True))
        self._parameters: list[Tensor] = list(named_parameters(model).values())
        self._start = [p.detach().clone() for p in self._parameters]

    def displacement(self, order: Sequence[int], lr: float) -> Tensor:
        """``[D]``, of an epoch that takes the batches in this order."""
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._start)
        for k in order:
            for _ in range(self._steps):
                inputs, targets = self._batches[k]
                self._step(inputs, targets, lr)
        with torch.no_grad():
            moved = torch._foreach_sub(self._parameters, self._start)
        return torch.cat([part.flatten() for part in moved])

    def _step(self, inputs: Tensor, targets: Tensor, lr: float) -> None:
        loss = self._loss_fn(self._model(inputs), targets)
        found = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_add_(self._parameters, found, alpha=-lr)


def drawn_orders(function: str, sampling: str, count: int, orders: int | None, seed: int) -> Draws:
    """Orders of ``count`` batches: all there are, as one draw, or ``orders`` random draws.

    Raises:
        FastregError: too many to take all; ``orders`` is no count, or given where there is only one.
    """
    if sampling in ("cyclic", "gd"):
        if orders is not None:
            raise FastregError(f"{function}: orders must be None for {sampling!r}, got {orders!r}")
        return [[tuple(range(count)) if sampling == "cyclic" else (0,) * count]]
    if orders is None:
        return [_all(function, sampling, count)]
    check_count(function, "orders", orders, 1)
    generator = torch.Generator().manual_seed(seed)
    return [(_pair if sampling == "shuffled" else _shifts)(count, generator) for _ in range(orders)]


def _all(function: str, sampling: str, count: int) -> list[tuple[int, ...]]:
    total = factorial(count) if sampling == "shuffled" else count**count
    if total > MOST_ORDERS:
        raise FastregError(
            f"{function}: orders must be a number where there are more than {MOST_ORDERS} orders, got None for {total}"
        )
    return list(permutations(range(count)) if sampling == "shuffled" else product(range(count), repeat=count))


def _pair(count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    order = torch.randperm(count, generator=generator)
    return [tuple(order.tolist()), tuple(order.flip(0).tolist())]


def _shifts(count: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Each is drawn uniformly, and together they take every batch equally often."""
    drawn = torch.randint(count, (count,), generator=generator)
    return [tuple(((drawn + shift) % count).tolist()) for shift in range(count)]
