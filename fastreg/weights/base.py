"""What a weight policy is, and the one that does not change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch.optim import Optimizer

from fastreg.errors import FastregError

Rate = float | Optimizer


class Weight(ABC):
    """The coefficient of a penalty at each step.

    Attributes:
        lr: the learning rate that the weight is compared with, a number or the optimizer that has it; None: unknown.
    """

    lr: Rate | None = None

    @abstractmethod
    def at(self, step: int) -> float:
        """The coefficient at a step, counted from 0; at least 0."""

    def fitted(self, *, centered: bool, micro_batch_size: int) -> Weight:
        """The policy for a penalty, which may be the variance part alone, on micro-batches of this size.

        Raises:
            FastregError: it is not for such a penalty.
        """
        return self

    def rule_ratio(self, step: int) -> float | None:
        """``weight / (lr / 4)``; None without a learning rate, or at 0."""
        lr = None if self.lr is None else current(self.lr)
        return self.at(step) / (lr / 4) if lr else None


@dataclass(frozen=True)
class Fixed(Weight):
    """See :func:`fixed`."""

    value: float
    lr: Rate | None = None

    def __post_init__(self) -> None:
        check_weight("fixed", self.value)

    def at(self, step: int) -> float:
        return self.value


def fixed(value: float, lr: Rate | None = None) -> Weight:
    """The same coefficient at every step.

    Args:
        value: at least 0, in the penalty's own units (for ``GradNorm`` those of a learning rate).
        lr: if given, ``weight / (lr / 4)`` is reported.

    Raises:
        FastregError: the value is negative or not finite.

    Example:
        >>> fixed(0.01, lr=0.04).rule_ratio(0)
        1.0
    """
    return Fixed(value, lr)


def current(rate: Rate) -> float:
    """The learning rate now.

    Raises:
        FastregError: it is negative or no number, or the optimizer's groups have several.
    """
    rates = {float(group["lr"]) for group in rate.param_groups} if isinstance(rate, Optimizer) else {rate}
    if len(rates) > 1:
        raise FastregError(f"weights: lr must be one for all parameter groups, got {sorted(rates)} (pass a number)")
    (lr,) = rates
    check_weight("weights: lr", lr)
    return lr


def check_weight(what: str, value: object) -> None:
    """Refuse what is no finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise FastregError(f"{what}: weight must be a number >= 0, got {value!r}")
