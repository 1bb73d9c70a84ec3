"""The average-Jacobian penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastreg.micro_batches import MicroBatches
from fastreg.penalties.targets import TargetPenalty
from fastreg.weights import Weight


@dataclass(frozen=True)
class AverageJacobian(TargetPenalty):
    """The squared norm of the gradient of the outputs' sum over classes.

        R = (1/m) sum_k ||J_k^T 1||^2,      J_k = (1/b) sum_{i in k} d outputs_i / dw  [C, P]

    1 is the vector of ones: a sum over classes, not their mean (that of the paper's code; with ``1 / sqrt(C)`` R would
    be C times smaller). Exact, value and gradient; no labels. Cross entropy does not see a common shift of all logits,
    which is what this penalises (observed here). In models linear in their parameters it is a constant.

    Source: Novack, Kaur, Marwah, Garg, Lipton 2022, arXiv:2211.15853, section 3 and its code.

    Args:
        weight: the coefficient of R, a number or a policy of :mod:`fastreg.weights`.
        class_dim: the dimension of ``outputs`` that holds the classes; other dimensions after the first hold
            predictions, over which J_k averages.

    Raises:
        FastregError: the weight is not a finite number >= 0; at the call: ``outputs`` were not passed, or are not
            floating point ``[B, ..., C]``.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
        >>> reg = fastreg.Regularizer(model, fastreg.AverageJacobian(weight=0.001), micro_batch_size=2)
        >>> out = model(torch.randn(8, 3))
        >>> reg(torch.nn.functional.cross_entropy(out, torch.randint(4, (8,))), out).backward()
    """

    weight: float | Weight
    class_dim: int = -1
    name: ClassVar[str] = "average_jacobian"

    def target(self, logits: Tensor, cut: MicroBatches, *, again: bool) -> Tensor:
        return logits.sum()
