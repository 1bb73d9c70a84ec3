"""The gradient-norm penalty and the variance of micro-batch gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.micro_batches import MicroBatches
from fastreg.penalties.base import Penalty, Step
from fastreg.weights import Weight


@dataclass(frozen=True)
class GradNorm(Penalty):
    """The mean squared norm of micro-batch gradients.

        R = (1/m) sum_k ||g_k||^2,      grad R = (2/m) sum_k H_k g_k

    ``g_k`` and ``H_k`` are gradient and Hessian of the mean loss of micro-batch ``k``. SGD with learning rate
    ``eta`` that visits the micro-batches in random order behaves as if it minimised ``C + (eta/4) R``
    (Smith, Dherin, Barrett, De 2021, arXiv:2101.12176, eq. 1), so ``weight = eta/4`` stands for ``eta``; Novack et
    al. 2022 (arXiv:2211.15853) use the same term with a tuned weight, without the factor 1/4.

    With ``w_k = b_k / B``, the share of micro-batch k's samples, and ``g = sum_k w_k g_k`` the batch's gradient:

        centered               V = sum_k w_k ||g_k - g||^2 = sum_k w_k ||g_k||^2 - ||g||^2
        centered, unbiased     m / (m - 1) V: expects the variance of a micro-batch's gradient over draws of samples
        unbiased               ||g||^2 - V / (m - 1): expects ||grad L||^2 of the loss L that the samples are drawn from
        unsquared              (1/m) sum_k ||g_k||: the penalty of Zhao, Zhang, Hu 2022 (arXiv:2202.03599)

    The first is what large-batch steps at the same learning rate lack (their own give (eta/4) ||g||^2); the
    expectations hold for independent samples, ragged micro-batches included. All are exact, value and gradient, in
    the one batched pass; with ``centered`` or ``unbiased`` it forms g too, three layer products more.

    Args:
        weight: the coefficient of R, in units of (loss / gradient norm squared), that is of a learning rate; a number
            or a policy of :mod:`fastreg.weights`.
        centered, unbiased, unsquared: as above; the last goes with neither of the others.

    Raises:
        FastregError: the weight is not a finite number >= 0; ``unsquared`` with another option; at the call:
            ``unbiased`` with a single micro-batch.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 1)
        >>> reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=0.01), micro_batch_size=2)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> loss = reg(torch.nn.functional.mse_loss(model(x), y))
        >>> loss.backward()
    """

    weight: float | Weight
    centered: bool = False
    unbiased: bool = False
    unsquared: bool = False
    squares_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unsquared and self.needs_gradient:
            raise FastregError("GradNorm: unsquared must go with neither centered nor unbiased, got both")

    @property
    def name(self) -> str:
        """``grad_norm``, or ``grad_variance`` where it is one."""
        return "grad_variance" if self.centered else "grad_norm"

    @property
    def needs_gradient(self) -> bool:
        """Whether it needs the gradient of the whole batch."""
        return self.centered or self.unbiased

    def value(self, step: Step) -> Tensor:
        if not self.needs_gradient:
            return step.mean(_roots(step.sq_norms) if self.unsquared else step.sq_norms)
        variance = step.variance()
        if not self.unbiased:
            return variance
        count = several(step, "GradNorm(unbiased=True)")
        return variance * (count / (count - 1)) if self.centered else step.sq_norm_of_mean - variance / (count - 1)

    def surrogate(
        self, loss: Tensor, outputs: Tensor | None, reduction: Reduction, cut: MicroBatches, *, again: bool
    ) -> tuple[Tensor, Reduction]:
        if self.needs_gradient or self.unsquared:
            return super().surrogate(loss, outputs, reduction, cut, again=again)
        return loss.sum(), reduction if loss.dim() == 0 else Reduction("sum", reduction.scale, reduction.counts)


def several(step: Step, what: str) -> int:
    """m, of which an estimate of a variance needs two."""
    count = step.session.micro_batches.count
    if count < 2:
        raise FastregError(f"{what}: the batch must have at least 2 micro-batches, got 1 (lower micro_batch_size)")
    return count


def _roots(squared: Tensor) -> Tensor:
    """Square roots whose gradient is 0 at 0."""
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0)
