"""Weights at which penalties are those of other published codes."""

from __future__ import annotations

from fastreg.errors import FastregError
from fastreg.weights.base import Fixed, Rate, Weight, check_weight, current
from fastreg.weights.schedules import schedule


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
    return schedule(Fixed(strength / 4 / divisors[implementation], lr), lambda step: current(lr))


def gnp(radius: float, alpha: float) -> Weight:
    """The weight of ``GradNorm(unsquared=True)`` at which it is GNP of Zhao, Zhang, Hu 2022 (arXiv:2202.03599).

        (1 - alpha) g(w) + alpha g(w + radius g / ||g||)  ~  g + alpha radius H g / ||g||

    so the weight is ``alpha radius``. Their gradient differs from the penalty's by O(radius); ``alpha = 1`` is SAM.

    Example:
        >>> round(gnp(radius=0.1, alpha=0.8).at(0), 12)
        0.08
    """
    return Fixed(alpha * radius)
