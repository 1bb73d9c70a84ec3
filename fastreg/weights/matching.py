"""The weight at which one run behaves as another."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastreg.errors import FastregError
from fastreg.weights.base import Rate, Weight, current


@dataclass(frozen=True)
class MatchSGD(Weight):
    """See :func:`match_sgd`."""

    lr_target: float
    batch_target: int | None = None
    lr: Rate = 0.0
    momentum: float = 0.0
    centered: bool = False

    def fitted(self, *, centered: bool, micro_batch_size: int) -> Weight:
        if self.batch_target not in (None, micro_batch_size):
            raise FastregError(
                f"match_sgd: batch_target must be the regularizer's micro_batch_size, {micro_batch_size}, got "
                f"{self.batch_target} (the gradients squared are those of the batches to be matched)"
            )
        return replace(self, centered=centered)

    def at(self, step: int) -> float:
        lr = current(self.lr)
        if lr > self.lr_target:
            raise FastregError(
                f"match_sgd: lr must be at most lr_target = {self.lr_target}, got {lr} (SGD at the larger rate carries "
                "more of the penalty than is to be matched)"
            )
        carried = 0.0 if self.centered else lr
        return (self.lr_target - carried) / 4 * (1 + self.momentum) / (1 - self.momentum) ** 2


def match_sgd(lr_target: float, batch_target: int | None = None, lr: Rate = 0.0, momentum: float = 0.0) -> Weight:
    r"""The weight at which a run at ``lr`` behaves as shuffled SGD at ``lr_target`` on batches of ``batch_target``.

        (lr_target - lr) / 4 * f      for GradNorm: what is missing of (lr_target / 4) mean ||g_k||^2
        lr_target / 4 * f             for GradNorm(centered=True): the run's own steps have the rest

    with ``f = (1 + mu) / (1 - mu)^2`` for heavy-ball momentum mu in both runs. The first is for steps on single
    micro-batches; the second for steps on large batches at ``lr = lr_target``. Large batches at another ``lr`` need
    both: ``[GradNorm(match_sgd(lr_target, b, lr)), GradNorm(fixed(lr / 4), centered=True)]``. It holds to second order
    in the learning rate, for the mean over random orders; f is exact for full batches, and taken over for the rest.

    Args:
        lr_target: learning rate of the SGD to be matched.
        batch_target: its batch size; the regularizer's micro-batches must be that large. None: whatever they are.
        lr: of the run, a number or its optimizer (read at every step, so that schedules are followed).
        momentum: mu, in [0, 1).

    Raises:
        FastregError: an argument is out of range; when used: ``lr`` beyond ``lr_target``, or another micro-batch size.

    Source: Smith et al. 2021, arXiv:2101.12176, eq. 1; the difference and f are derived here.

    Example:
        >>> match_sgd(lr_target=0.1, lr=0.02).at(0)
        0.02
    """
    if isinstance(lr_target, bool) or not isinstance(lr_target, (int, float)) or not 0 < lr_target < float("inf"):
        raise FastregError(f"match_sgd: lr_target must be a positive number, got {lr_target!r}")
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        raise FastregError(f"match_sgd: momentum must be in [0, 1), got {momentum!r}")
    current(lr)
    return MatchSGD(lr_target, batch_target, lr, momentum)
