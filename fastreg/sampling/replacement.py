"""Sampling with replacement: independent batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fastreg.sampling.base import EpochSampler


@dataclass(eq=False)
class WithReplacement(EpochSampler):
    r"""Independent batches, identically distributed: of independent samples, or drawn whole from the fixed partition.

    At second order in the learning rate the mean iterate follows ``C + (eta / 4) ||grad C||^2``, the loss of full-batch
    gradient descent: against :class:`Shuffled` the variance between batches is missing (derived here; compare Smith,
    Dherin, Barrett, De 2021, arXiv:2101.12176, and Beneventano 2023, arXiv:2312.16143). With ``unit="batch"`` and
    ``Shuffled(partition="fixed")`` of the same seed, the two differ in nothing but the replacement.

    Args:
        unit: what is drawn. "sample": every index of every batch, so that batches are always full; "batch": whole
            batches of the fixed partition, all with the same probability (a short last one too).
        batches: in an epoch; by default as many as a partition has.

    The other arguments, epochs, ranks, resuming: :class:`EpochSampler`.

    Raises:
        FastregError: an argument is out of its range.

    Example:
        >>> from fastreg.sampling import Cyclic, WithReplacement
        >>> [len(batch) for batch in WithReplacement(10, 4, batches=5)]
        [4, 4, 4, 4, 4]
        >>> partition = list(Cyclic(10, 4))
        >>> all(batch in partition for batch in WithReplacement(10, 4, unit="batch"))
        True
    """

    unit: Literal["sample", "batch"] = field(default="sample", kw_only=True)
    batches: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._check_choice("unit", self.unit, ("sample", "batch"))
        super().__post_init__()
        if self.batches is not None:
            self._check_integer("batches", self.batches, 1)

    def __len__(self) -> int:
        return self._parts if self.batches is None else self.batches

    def _samples(self, epoch: int) -> np.ndarray:
        if self.unit == "batch":
            return self._fixed()
        return self._random(epoch).integers(self.size, size=len(self) * self.batch_size)

    def _order(self, epoch: int) -> np.ndarray:
        if self.unit == "sample":
            return np.arange(len(self))
        return self._random(epoch).integers(self._parts, size=len(self))

    @property
    def _shortest(self) -> int:
        return self.batch_size if self.unit == "sample" else super()._shortest
