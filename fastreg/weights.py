"""Weights of penalties as policies: the coefficient as a function of the step.

A penalty takes a number or a policy: ``GradNorm(weight=match_sgd(lr_target=0.1, lr=optimizer))``. A step is a call of
``reg`` while it is active. A policy that knows the learning rate has ``weight / (lr / 4)`` reported: 1 is the penalty
that SGD at that learning rate carries implicitly (Smith, Dherin, Barrett, De 2021, arXiv:2101.12176).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Scheduled(Weight):
    """See :func:`schedule` and :func:`warm_up`."""

    weight: Weight
    factor: Callable[[int], float]

    @property
    def lr(self) -> Rate | None:
        """Of the policy that is scheduled."""
        return self.weight.lr

    def fitted(self, *, centered: bool, micro_batch_size: int) -> Weight:
        return replace(self, weight=self.weight.fitted(centered=centered, micro_batch_size=micro_batch_size))

    def at(self, step: int) -> float:
        value = self.weight.at(step) * self.factor(step)
        check_weight("schedule", value)
        return value


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


def warm_up(weight: float | Weight, steps: int) -> Weight:
    """Linear from ``weight / steps`` at step 0 to the whole weight from step ``steps - 1`` on.

    Raises:
        FastregError: ``steps`` is not an integer >= 1.

    Example:
        >>> [warm_up(0.4, 4).at(step) for step in (0, 1, 3, 9)]
        [0.1, 0.2, 0.4, 0.4]
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise FastregError(f"warm_up: steps must be an integer >= 1, got {steps!r}")
    return schedule(weight, lambda step: min(step + 1, steps) / steps)


def schedule(weight: float | Weight, factor: Callable[[int], float]) -> Weight:
    """The weight times ``factor(step)``.

    Raises:
        FastregError: at a step: the product is negative or not finite.

    Example:
        >>> schedule(0.1, lambda step: 0.5**step).at(1)
        0.05
    """
    return Scheduled(weight if isinstance(weight, Weight) else Fixed(weight), factor)


def geiping(lr: Rate, strength: float = 0.5, implementation: str = "finite-differences") -> Weight:
    """The weight of ``GradNorm`` at which it is the regularizer of Geiping et al. 2022 (arXiv:2109.14119) and its code.

        strength * lr / 8     "finite-differences", "autograd": they add (lr / 4) strength H g, half the gradient
                              of strength (lr / 4) ||g||^2
        strength * lr / 4     "autograd-pen", which differentiates that penalty

    The implementations of that code differ by this factor of 2. ``strength=2`` with finite differences is the penalty
    of Smith et al. 2021 (arXiv:2101.12176).

    Args:
        lr: a number or the optimizer.
        strength: ``block_strength`` there.
        implementation: one of the three.

    Raises:
        FastregError: another implementation, or a negative strength.

    Example:
        >>> geiping(0.8).at(0)
        0.05
    """
    divisors = {"finite-differences": 2, "autograd": 2, "autograd-pen": 1}
    if implementation not in divisors:
        raise FastregError(f"geiping: implementation must be one of {list(divisors)}, got {implementation!r}")
    check_weight("geiping: strength", strength)
    matched = Fixed(strength / 4 / divisors[implementation], lr)
    return Scheduled(matched, lambda step: current(lr))


def gnp(radius: float, alpha: float) -> Weight:
    """The weight of ``GradNorm(unsquared=True)`` at which it is GNP of Zhao, Zhang, Hu 2022 (arXiv:2202.03599).

        (1 - alpha) g(w) + alpha g(w + radius g / ||g||)  ~  g + alpha radius H g / ||g||

    so the weight is ``alpha radius``. Their gradient differs from the penalty's by O(radius); ``alpha = 1`` is SAM.

    Example:
        >>> round(gnp(radius=0.1, alpha=0.8).at(0), 12)
        0.08
    """
    return Fixed(alpha * radius)


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
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf"):
        raise FastregError(f"{what}: weight must be a number >= 0, got {value!r}")
