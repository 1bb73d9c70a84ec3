"""The gradient-norm penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastreg.loss import Reduction
from fastreg.penalties.base import Penalty, Step


@dataclass(frozen=True)
class GradNorm(Penalty):
    """The mean squared norm of micro-batch gradients.

        R = (1/m) sum_k ||g_k||^2,      grad R = (2/m) sum_k H_k g_k

    ``g_k`` and ``H_k`` are gradient and Hessian of the mean loss of micro-batch ``k``. SGD with learning rate
    ``eta`` that visits the micro-batches in random order behaves as if it minimised ``C + (eta/4) R``
    (Smith, Dherin, Barrett, De 2021, arXiv:2101.12176, eq. 1), so ``weight = eta/4`` stands for ``eta``; Novack et
    al. 2022 (arXiv:2211.15853) use the same term with a tuned weight, without the factor 1/4.

    Args:
        weight: the coefficient of R, in units of (loss / gradient norm squared), that is of a learning rate.

    Raises:
        FastregError: the weight is not a finite number >= 0.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Linear(3, 1)
        >>> reg = fastreg.Regularizer(model, fastreg.GradNorm(weight=0.01), micro_batch_size=2)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> loss = reg(torch.nn.functional.mse_loss(model(x), y))
        >>> loss.backward()
    """

    weight: float
    name: ClassVar[str] = "grad_norm"
    squares_loss: ClassVar[bool] = True

    def value(self, step: Step) -> Tensor:
        return step.mean(step.sq_norms)

    def surrogate(
        self, loss: Tensor, outputs: Tensor | None, reduction: Reduction, *, again: bool
    ) -> tuple[Tensor, Reduction]:
        return loss.sum(), reduction if loss.dim() == 0 else Reduction("sum", reduction.scale, reduction.counts)
