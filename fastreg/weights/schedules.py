"""Weights that change by the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastreg.errors import FastregError
from fastreg.weights.base import Fixed, Rate, Weight, check_weight


@dataclass(frozen=True)
class Scheduled(Weight):
    """See :func:`schedule` and :func:`warm_up`."""

    weight: Weight
    factor: Callable[[int], float]

    @property
    def lr(self) -> Rate | None:  # type: ignore[override]  # the policy's own, which nobody sets here
        """Of the policy that is scheduled."""
        return self.weight.lr

    def fitted(self, *, centered: bool, micro_batch_size: int) -> Weight:
        return replace(self, weight=self.weight.fitted(centered=centered, micro_batch_size=micro_batch_size))

    def at(self, step: int) -> float:
        value = self.weight.at(step) * self.factor(step)
        check_weight("schedule", value)
        return value


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
