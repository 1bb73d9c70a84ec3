"""Unbiased moments of the gradient, and their averages over steps.

With per-sample gradients of mean ``G`` and covariance ``S``, and samples drawn independently, the squared norm of a
mean over b samples is ``||G||^2 + tr S / b`` in expectation. Two sizes b give both terms (McCandlish et al. 2018,
arXiv:1812.06162, appendix A.1). Each is an unbiased estimate and far from its mean in one step; their ratio is biased,
so they are averaged over steps before it is formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor


@dataclass(frozen=True)
class Sizes:
    """What one step's squared norms are means over.

    Attributes:
        small: mean over micro-batches of ``1 / b_k``.
        big: ``1 / B``, or what stands for it where the batch's gradient is another mean than that of all samples.
    """

    small: Number
    big: Number

    @property
    def one(self) -> bool:
        """Whether micro-batches are as large as the batch, so that nothing can be told from their difference."""
        return not isinstance(self.small, Tensor) and bool(self.small <= self.big)


def moments(small: Tensor, big: Tensor, sizes: Sizes) -> Tensor:
    """``[2, L]``: ``tr S`` and ``||G||^2`` from mean squared norms of micro-batches and of the batch, ``[L]`` each.

    NaN where micro-batches are as large as the batch.

    Example:
        >>> import torch
        >>> from fastreg.monitor.noise import Sizes, moments
        >>> moments(torch.tensor([5.0]), torch.tensor([2.0]), Sizes(small=1.0, big=0.25)).flatten()
        tensor([4., 1.])
    """
    if sizes.one:
        return torch.stack((small, big)) * float("nan")
    trace = (small - big) / (sizes.small - sizes.big)
    return torch.stack((trace, big - trace * sizes.big))


class Average:
    """An exponential moving average of tensors without the bias towards its start; what is not finite does not count.

    Args:
        decay: of the weights of earlier values, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        # The averages, and last the sum of the weights of what they are made of.
        self._sums: Tensor | None = None
        self._shape: tuple[int, ...] = ()

    def add(self, values: Tensor) -> None:
        """Take one step's values; decided on their device, without a look at them."""
        new = torch.cat((values.flatten(), values.new_ones(1)))
        if self._sums is None:
            self._sums, self._shape = torch.zeros_like(new), tuple(values.shape)
        known = self._sums.to(new.device)
        self._sums = torch.where(new.isfinite().all(), torch.lerp(new, known, self.decay), known)

    def value(self) -> Tensor:
        """The average; NaN before anything counted."""
        assert self._sums is not None
        return (self._sums[:-1] / self._sums[-1]).view(self._shape)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next value depends on."""
        return {"sums": self._sums, "shape": self._shape}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._sums = None if state["sums"] is None else state["sums"].clone()
        self._shape = tuple(state["shape"])
