"""Unbiased moments of the gradient, and their averages over steps.

With per-sample gradients of mean ``G`` and covariance ``S``, and samples drawn independently, the squared norm of a
mean over b samples is ``||G||^2 + tr S / b`` in expectation. Two sizes b give both terms (McCandlish et al. 2018,
arXiv:1812.06162, appendix A.1). Each is an unbiased estimate and far from its mean in one step; their ratio is biased,
so they are averaged over steps before it is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        return not isinstance(self.small, Tensor) and self.small <= self.big


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
        self.total: Tensor | None = None
        self.weight: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Take one step's values; decided on their device, without a look at them."""
        if self.total is None:
            self.total, self.weight = torch.zeros_like(values), values.new_zeros(())
        self.total, self.weight = self.total.to(values.device), self.weight.to(values.device)
        counts = values.isfinite().all()
        self.total = torch.where(counts, self.decay * self.total + (1 - self.decay) * values, self.total)
        self.weight = torch.where(counts, self.decay * self.weight + (1 - self.decay), self.weight)

    def value(self) -> Tensor:
        """The average; NaN before anything counted."""
        return self.total / self.weight

    def state_dict(self) -> dict[str, Tensor | None]:
        """Everything that the next value depends on."""
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Restore :meth:`state_dict`."""
        self.total, self.weight = (None if state[k] is None else state[k].clone() for k in ("total", "weight"))
