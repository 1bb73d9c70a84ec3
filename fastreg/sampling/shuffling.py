"""Samplers without replacement: an epoch takes every batch of a partition of the samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastreg.sampling.base import EpochSampler, Partition


@dataclass(eq=False)
class Shuffled(EpochSampler):
    r"""Random shuffling: every epoch takes each batch of a partition once, in random order.

    To second order in the learning rate the mean iterate of an epoch over m fixed batches follows the gradient flow of

        C + (eta / 4 m) sum_k ||grad C_k||^2

    (Smith, Dherin, Barrett, De 2021, arXiv:2101.12176; without replacement in general: Beneventano 2023,
    arXiv:2312.16143). Over redrawn partitions the sum is replaced by its expectation.

    Args:
        partition: "redrawn", a new partition in every epoch; "fixed", one for all epochs (drawn by ``seed``), of which
            only the order changes.

    The other arguments, epochs, ranks, resuming: :class:`EpochSampler`.

    Raises:
        FastregError: an argument is out of its range.

    Example:
        >>> from fastreg.sampling import Shuffled
        >>> [len(batch) for batch in Shuffled(10, 4)]
        [4, 4, 2]
        >>> fixed = Shuffled(10, 4, partition="fixed")
        >>> sorted(fixed) == sorted(fixed)
        True
    """

    partition: Partition = field(default="redrawn", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("partition", self.partition, ("redrawn", "fixed"))

    def _samples(self, epoch: int) -> np.ndarray:
        return self._fixed() if self.partition == "fixed" else self._random(epoch).permutation(self.size)

    def _order(self, epoch: int) -> np.ndarray:
        return self._random(epoch).permutation(self._parts) if self.partition == "fixed" else np.arange(self._parts)


@dataclass(eq=False)
class RepeatedBatches(Shuffled):
    r"""Every batch of :class:`Shuffled` ``steps`` times in a row: m * steps steps in an epoch.

    With learning rate alpha the mean iterate follows ``C + (alpha / 4 m) sum_k ||grad C_k||^2`` for any ``steps``: the
    regularization of ``steps`` small steps on a batch is not that of one step of their length. It tells the
    discretisation of SGD from its noise (the experiment of Smith et al. 2021, arXiv:2101.12176; formula derived here).

    Args:
        steps: in a row on each batch, >= 1.

    The other arguments, epochs, ranks, resuming: :class:`Shuffled` and :class:`EpochSampler`; a position counts steps.

    Raises:
        FastregError: an argument is out of its range.

    Example:
        >>> from fastreg.sampling import RepeatedBatches
        >>> first, again, *rest = RepeatedBatches(10, 5, steps=2)
        >>> first == again, len(rest)
        (True, 2)
    """

    steps: int = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("steps", self.steps, 1)

    def __len__(self) -> int:
        return super().__len__() * self.steps

    def _order(self, epoch: int) -> np.ndarray:
        return super()._order(epoch).repeat(self.steps)


@dataclass(eq=False)
class Cyclic(EpochSampler):
    r"""The batches of the fixed partition in the same order in every epoch; ``list(Cyclic(...))`` is that partition.

    At second order in the learning rate its path is that of no gradient flow: to the drift of :class:`Shuffled` it adds
    ``(eta^2 / 2) sum_{j<k} (H_k g_j - H_j g_k)`` per epoch, which in general is no gradient (derived here).

    Arguments, epochs, ranks, resuming: :class:`EpochSampler`.

    Raises:
        FastregError: an argument is out of its range.

    Example:
        >>> from fastreg.sampling import Cyclic
        >>> sampler = Cyclic(10, 4)
        >>> list(sampler) == list(sampler)
        True
    """

    def _samples(self, epoch: int) -> np.ndarray:
        return self._fixed()

    def _order(self, epoch: int) -> np.ndarray:
        return np.arange(self._parts)


@dataclass(eq=False)
class OrderAndReverse(EpochSampler):
    r"""Epochs in pairs: the fixed partition in a random order (even epochs), then in the reverse of it (odd epochs).

    The order-dependent term of an epoch changes sign in the reverse. So a pair already has the modified loss of
    :class:`Shuffled` at second order in the learning rate, without a mean over all m! orders: as the mean of two epochs
    from the same weights, or as two epochs one after the other (derived here, from the expansion of Smith et al. 2021,
    arXiv:2101.12176).

    Arguments, epochs, ranks, resuming: :class:`EpochSampler`.

    Raises:
        FastregError: an argument is out of its range.

    Example:
        >>> from fastreg.sampling import OrderAndReverse
        >>> sampler = OrderAndReverse(10, 4)
        >>> list(sampler) == list(sampler)[::-1]
        True
    """

    def _samples(self, epoch: int) -> np.ndarray:
        return self._fixed()

    def _order(self, epoch: int) -> np.ndarray:
        order = self._random(epoch // 2).permutation(self._parts)
        return order[::-1] if epoch % 2 else order
