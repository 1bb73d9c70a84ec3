"""From what backward passes left to means over micro-batches, accumulation steps and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.monitor.noise import Number, Sizes
from fastreg.monitor.sources import Backward
from fastreg.ranks import axes, sq_norms


@dataclass(frozen=True)
class Means:
    """Sums over the backward passes of a step, of all ranks.

    Attributes:
        ranks: those of DistributedDataParallel or ``fully_shard``, whose gradient is the mean over them.
        squared: sum of the micro-batches' squared norms, ``[L]``.
        count: micro-batches.
        inverse: sum of ``1 / b_k``.
        passes: backward passes.
        inverse_samples: sum of ``1 / B_j``.
        samples: sum of ``B_j``.
    """

    ranks: int
    squared: Tensor
    count: Number
    inverse: Number
    passes: Number
    inverse_samples: Number
    samples: Number

    @classmethod
    def of(cls, passes: Sequence[Backward], squared: Tensor, model: nn.Module) -> Means:
        """Of the passes of this rank, with ``squared [m, L]`` of all their micro-batches, and of the other ranks'."""
        inverse = sum(one.inverse for one in passes)
        samples, inverse_samples = sum(one.samples for one in passes), sum(1 / one.samples for one in passes)
        numbers: list[Number] = [squared.shape[0], inverse, len(passes), inverse_samples, samples]
        groups = axes(model)
        if not groups:
            return cls(1, squared.sum(0), *numbers)
        rest = [x.reshape(1).to(squared.dtype) if isinstance(x, Tensor) else squared.new_full((1,), x) for x in numbers]
        joined = torch.cat([squared.sum(0), *rest])
        for group in groups:
            dist.all_reduce(joined, group=group)
        ranks = math.prod(group.size() for group in groups)
        return cls(ranks, joined[: -len(rest)], *joined[-len(rest) :].unbind())

    @property
    def small(self) -> Tensor:
        """The mean squared norm of a micro-batch's gradient."""
        return self.squared / self.count

    def sizes(self, reduction: Reduction) -> Sizes:
        """What the squared norms are means over; the mean of passes of different sizes is not that of all samples."""
        big = self.inverse_samples / self.passes**2 if reduction.kind == "mean" else 1 / self.samples
        return Sizes(self.inverse / self.count, big)

    def mean_gradient(self, reduction: Reduction) -> Number:
        """What the sum of the gradients of all passes must be multiplied by to be a mean."""
        return self.ranks / (reduction.scale * (self.passes if reduction.kind == "mean" else self.samples))


class Layers:
    """Modules with parameters of their own.

    Attributes:
        names: as in ``named_modules``; the model itself is ``(model)``.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        name_of = {id(p): name.rpartition(".")[0] or "(model)" for name, p in model.named_parameters()}
        owners = [name_of[id(p)] for p in parameters]
        self.names = list(dict.fromkeys(owners))
        self._index = torch.tensor([self.names.index(owner) for owner in owners])

    def sums(self, values: Tensor) -> Tensor:
        """``[..., P] -> [..., L]``."""
        self._index = self._index.to(values.device)
        return values.new_zeros(*values.shape[:-1], len(self.names)).index_add_(-1, self._index, values)


def squared_gradients(parameters: Sequence[nn.Parameter], like: Tensor) -> Tensor:
    """``[P]``: squared norms of what is in ``.grad``, 0 where there is nothing or only something older.

    Raises:
        FastregError: there is nothing in any.
    """
    there = {i: p.grad for i, p in enumerate(parameters) if p.requires_grad and p.grad is not None}
    if not there:
        raise FastregError("Monitor.step: gradients must be in .grad, got none (call it before zero_grad)")
    found = sq_norms([*there.values()]).to(like.dtype)
    if len(there) == len(parameters):
        return found
    by_number = dict(zip(there, found.unbind(), strict=True))
    zero = like.new_zeros(())
    return torch.stack([by_number.get(i, zero) for i in range(len(parameters))])
