"""The four methods that the experiment compares, and their settings."""

from dataclasses import dataclass

from torch import nn

import fastreg
from fastreg.errors import FastregError

SMALL_BATCH = "small_batch"
LARGE_BATCH = "large_batch"
GRAD_NORM = "grad_norm"
FISHER_TRACE = "fisher_trace"

TITLES = {
    SMALL_BATCH: "small batch",
    LARGE_BATCH: "large batch",
    GRAD_NORM: "large batch + GradNorm",
    FISHER_TRACE: "large batch + FisherTrace",
}
PENALISED = (GRAD_NORM, FISHER_TRACE)


@dataclass(frozen=True)
class Method:
    """Plain SGD on small or large batches, or on large batches with a penalty.

    A step descends C + weight * R with no momentum, no weight decay and a constant ``lr``
    (Novack et al. 2022, arXiv 2211.15853): C is the mean loss of the batch, R the mean over its
    micro-batches of a squared gradient norm.

    Args:
        name: ``"small_batch"``, ``"large_batch"``, ``"grad_norm"`` or ``"fisher_trace"``.
        lr: learning rate, positive.
        weight: factor of R; positive for the penalised methods and 0 for the others.

    Raises:
        FastregError: unknown name, or ``lr`` or ``weight`` out of range.

    Example:
        >>> Method("grad_norm", lr=0.1, weight=0.025).rule_ratio
        1.0
    """

    name: str
    lr: float
    weight: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in TITLES:
            raise FastregError(f"Method: name must be one of {list(TITLES)}, got {self.name!r}")
        if not self.lr > 0:
            raise FastregError(f"Method: lr of {self.name} must be positive, got {self.lr}")
        if (self.weight > 0) != (self.name in PENALISED):
            expected = "positive" if self.name in PENALISED else "0, as it has no penalty"
            raise FastregError(
                f"Method: weight of {self.name} must be {expected}, got {self.weight}"
            )

    @property
    def title(self) -> str:
        """The name in tables and plots."""
        return TITLES[self.name]

    @property
    def rule_ratio(self) -> float:
        """weight / (lr / 4), 1 where the penalty is the one that SGD at ``lr`` carries implicitly.

        Shuffled SGD follows the gradient flow of C + (lr / 4) mean_k ||g_k||^2 (Smith et al. 2021,
        arXiv 2101.12176).
        """
        return self.weight / (self.lr / 4)

    def samples_per_step(self, batch_size: int, micro_batch_size: int) -> int:
        """A micro-batch for small-batch SGD, otherwise the whole batch."""
        return micro_batch_size if self.name == SMALL_BATCH else batch_size

    def regularizer(
        self, model: nn.Module, micro_batch_size: int
    ) -> "fastreg.Regularizer | None":
        """The penalty attached to ``model``; None for the methods without one."""
        if self.name not in PENALISED:
            return None
        penalty = fastreg.GradNorm if self.name == GRAD_NORM else fastreg.FisherTrace
        return fastreg.Regularizer(
            model, penalty(weight=self.weight), micro_batch_size=micro_batch_size
        )


def matched(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    """Every method at the learning rate of small-batch SGD, penalties at the weight of the rule.

    Nothing is tuned for the large batch: weight = lr / 4 is what small-batch SGD at ``lr`` carries
    implicitly (Smith et al. 2021, arXiv 2101.12176).

    Args:
        methods: one of them is small-batch SGD.

    Returns:
        The same methods with the new settings.

    Raises:
        FastregError: small-batch SGD is missing.

    Example:
        >>> matched((Method("small_batch", lr=0.2), Method("grad_norm", lr=1.0, weight=1.0)))[1]
        Method(name='grad_norm', lr=0.2, weight=0.05)
    """
    rates = [method.lr for method in methods if method.name == SMALL_BATCH]
    if not rates:
        raise FastregError(
            f"matched: methods must contain {SMALL_BATCH}, got {[method.name for method in methods]}"
        )
    lr = rates[0]
    return tuple(
        Method(method.name, lr, lr / 4 if method.name in PENALISED else 0.0) for method in methods
    )
