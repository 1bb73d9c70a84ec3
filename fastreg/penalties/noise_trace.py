"""The trace of the covariance of per-sample gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastreg.penalties.base import Penalty, Step
from fastreg.penalties.grad_norm import several
from fastreg.weights import Weight


@dataclass(frozen=True)
class NoiseTrace(Penalty):
    """The trace of the covariance of per-sample gradients, estimated from micro-batches.

        R = B / (m - 1) sum_k w_k ||g_k - g||^2,      w_k = b_k / B,  g = sum_k w_k g_k

    Over draws of independent samples ``E R = tr Cov(g^(i))``, whatever the micro-batches (ragged ones included); at
    ``micro_batch_size=1`` it is the unbiased sample covariance of the batch. It is
    ``b m / (m - 1)`` times the variance of ``GradNorm(centered=True)``: the same gradient in units of one sample, so
    that the weight need not follow the batch size. Value and gradient are those of the estimate, exactly. The noise of
    SGD on batches of S has the trace ``R / S`` (with replacement).

    Source: Ziyin, Liu, Mori, Ueda 2021, arXiv:2102.05375, Prop. 1 (the covariance); the estimate is derived here.

    Args:
        weight: the coefficient of R; ``eta / (4 S)`` is what SGD at ``eta`` on batches of S carries (Smith et al. 2021,
            arXiv:2101.12176).

    Raises:
        FastregError: the weight is not a finite number >= 0; at the call: there is a single micro-batch.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 1)
        >>> reg = fastreg.Regularizer(model, fastreg.NoiseTrace(weight=0.001), micro_batch_size=2)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> reg(torch.nn.functional.mse_loss(model(x), y)).backward()
    """

    weight: float | Weight
    name: ClassVar[str] = "noise_trace"
    squares_loss: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True
    centered: ClassVar[bool] = True

    def value(self, step: Step) -> Tensor:
        return step.variance() * (step.session.micro_batches.samples / (several(step, "NoiseTrace") - 1))
