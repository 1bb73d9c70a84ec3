"""Plain SGD on a small network, with the batches in each of the orders that the recipes compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat

import torch
from torch import Tensor, nn

from fastreg.sampling import EpochSampler, Shuffled, WithReplacement

Batch = tuple[Tensor, Tensor]
# Samples of one step; None for all of them.
Index = list[int] | Tensor | None

SAMPLERS: dict[str, type[EpochSampler] | None] = {
    "without replacement": Shuffled,
    "with replacement": WithReplacement,
    "full batch": None,
}


def batches(scheme: str, size: int, batch_size: int, seed: int) -> Iterator[Index]:
    """Samples of every step, without end; ``scheme`` is one of ``SAMPLERS``.

    Example:
        >>> drawn = batches("without replacement", 4, 2, seed=0)
        >>> sorted(next(drawn) + next(drawn))
        [0, 1, 2, 3]
    """
    sampler = SAMPLERS[scheme]
    if sampler is None:
        return repeat(None)
    epochs = sampler(size, batch_size, seed=seed)
    return (batch for _ in repeat(None) for batch in epochs)


def descend(
    model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor], data: Batch, steps: Iterable[Index], lr: float
) -> Iterator[int]:
    """One gradient step per entry of ``steps``; yields the number of steps taken, from 0, so that one can measure.

    Example:
        >>> model, data = nn.Linear(1, 1), (torch.ones(4, 1), torch.zeros(4, 1))
        >>> list(descend(model, nn.functional.mse_loss, data, [None, [0, 1]], 0.1))
        [0, 1, 2]
    """
    yield (done := 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for index in steps:
        inputs, targets = data if index is None else (data[0][index], data[1][index])
        loss_fn(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield (done := done + 1)
