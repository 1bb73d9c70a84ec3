"""Tail index of the stationary distribution of SGD in one dimension: exact, and as published."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fastreg.errors import FastregError
from fastreg.optional import require

# exp(-REACH^2 / 2) is below the square of a double's rounding error.
REACH = 12.0


@dataclass(frozen=True)
class TailIndex:
    """Three values for the exponent in ``P(|w - w*| > t) ~ t^-index``, all without unit.

    Args:
        exact: :func:`kesten_index`.
        paper: :func:`ziyin_index`.
        continuous: :func:`continuous_index`.
    """

    exact: float
    paper: float
    continuous: float


def tail_index(lr_times_a: float, batch_size: int) -> TailIndex:
    """The exact tail index of one-dimensional SGD, that of the paper and that of the continuous-time limit.

    Moments below the index are finite. The exact index and the paper's coincide ONLY where the variance starts to
    diverge, ``lr a = 2 S / (S + 2)``, at index 2. Below that learning rate the paper's value is too large, by a factor
    that tends to 1.114 with lr to 0 (derived here); above it, it is too small.

    Args:
        lr_times_a: learning rate times the mean square of the input, ``lr a``, without unit.
        batch_size: S, samples of a step, drawn with replacement.

    Returns:
        A :class:`TailIndex`.

    Raises:
        FastregError: as :func:`kesten_index`.

    Example:
        >>> from fastreg.noise.tails import tail_index
        >>> index = tail_index(1.0, batch_size=8)
        >>> f"{index.exact:.2f}, {index.paper:.2f}, {index.continuous:.2f}"
        '6.20, 8.00, 17.00'
    """
    arguments = lr_times_a, batch_size
    return TailIndex(kesten_index(*arguments), ziyin_index(*arguments), continuous_index(*arguments))


def kesten_index(lr_times_a: float, batch_size: int) -> float:
    """The exact tail index of SGD on one-dimensional linear regression with Gaussian inputs and label noise.

    A step is ``w - w* <- M (w - w*) + Q`` with ``M = 1 - (lr a / S) chi2_S``, and the index is the root ``beta > 0`` of

        E |1 - (lr a / S) chi2_S|^beta = 1

    (Kesten 1973; Goldie 1991). It exists and is unique when ``E log |M| < 0``, which is when a stationary
    distribution exists: ``log E |M|^beta`` is convex, zero at 0, of slope ``E log |M|`` there and without bound. As lr
    goes to 0, ``index lr a / S -> z / 2 = 1.796`` with ``z (log z - 1) = 1`` (derived here); it is 2 exactly at
    ``lr a = 2 S / (S + 2)``, where the variance starts to diverge. No variance of the label noise enters.

    Args:
        lr_times_a: learning rate times the mean square of the input, ``lr a``, without unit.
        batch_size: S, samples of a step, drawn with replacement.

    Returns:
        The root, from adaptive quadrature, to a relative accuracy of about 1e-10, or 1e-9 where it nears 0.

    Raises:
        FastregError: ``lr_times_a`` is not positive and finite, ``batch_size`` is not a positive integer, the weights
            have no stationary distribution, or scipy is missing.

    Example:
        >>> from fastreg.noise.tails import kesten_index
        >>> f"{kesten_index(1.0, batch_size=4):.2f}"
        '3.50'
    """
    _check("kesten_index", lr_times_a, batch_size)
    step = _Step(lr_times_a, batch_size)
    contraction = step.growth(0.0)
    if contraction >= 0:
        raise FastregError(
            "kesten_index: lr_times_a must be so small that E log|1 - (lr a / S) chi2_S| < 0, "
            f"got {lr_times_a}, where it is {contraction:.3g} (lower the learning rate: SGD has no stationary "
            "distribution here)"
        )
    above = 2.0
    while step.growth(above) <= 0:
        above *= 2
    return require("scipy.optimize").brentq(step.growth, 0.0, above, xtol=1e-13, rtol=1e-13)


def ziyin_index(lr_times_a: float, batch_size: int) -> float:
    """The smallest diverging moment ``2 S / (lr a) - S`` of Ziyin, Liu, Mori, Ueda 2021, arXiv:2102.05375.

    It coincides with :func:`kesten_index` ONLY at index 2, ``lr a = 2 S / (S + 2)``: take it for the bound of
    stability that it is there, not for a tail index elsewhere. It is not positive for ``lr a >= 2``, though a
    stationary distribution may exist.

    Args:
        lr_times_a: learning rate times the mean square of the input, ``lr a``, without unit.
        batch_size: S, samples of a step.

    Returns:
        The formula's value.

    Raises:
        FastregError: ``lr_times_a`` is not positive and finite, or ``batch_size`` is not a positive integer.

    Example:
        >>> from fastreg.noise.tails import ziyin_index
        >>> ziyin_index(1.0, batch_size=4)
        4.0
    """
    _check("ziyin_index", lr_times_a, batch_size)
    return 2 * batch_size / lr_times_a - batch_size


def continuous_index(lr_times_a: float, batch_size: int) -> float:
    """The tail index ``2 S / (lr a) + 1`` of the continuous-time limit, for comparison: far too large at any finite lr.

    Args:
        lr_times_a: learning rate times the mean square of the input, ``lr a``, without unit.
        batch_size: S, samples of a step.

    Returns:
        The formula's value.

    Raises:
        FastregError: ``lr_times_a`` is not positive and finite, or ``batch_size`` is not a positive integer.

    Example:
        >>> from fastreg.noise.tails import continuous_index
        >>> continuous_index(1.0, batch_size=4)
        9.0
    """
    _check("continuous_index", lr_times_a, batch_size)
    return 2 * batch_size / lr_times_a + 1


def _check(function: str, lr_times_a: float, batch_size: int) -> None:
    if not 0 < lr_times_a < math.inf:
        raise FastregError(f"{function}: lr_times_a must be positive and finite, got {lr_times_a!r}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise FastregError(f"{function}: batch_size must be an integer >= 1, got {batch_size!r}")


@dataclass(frozen=True)
class _Step:
    """The factor ``M = 1 - (lr a / S) chi2_S`` of a step, in terms of ``u = sqrt(chi2_S) - zero``: M vanishes at u = 0.

    In u the density is smooth whatever S, and u keeps its digits where the logarithm of M is singular.
    """

    lr_times_a: float
    batch_size: int

    def growth(self, beta: float) -> float:
        """``log E|M|^beta / beta``, increasing in beta; its limit ``E log|M|`` at 0."""
        if beta == 0:
            return self._integral(0.0, lambda u: math.exp(self._exponent(0.0, u)) * self._log_factor(u))
        # Scaled by its peak: for small learning rates the factors leave the range of a double.
        peak = max(self._exponent(beta, mode) for mode in self._modes(beta) if mode)
        return (peak + math.log(self._integral(beta, lambda u: math.exp(self._exponent(beta, u) - peak)))) / beta

    @property
    def _zero(self) -> float:
        return math.sqrt(self.batch_size / self.lr_times_a)

    def _log_factor(self, u: float) -> float:
        return math.log(abs(u) / self._zero) + math.log1p(1 + u / self._zero)

    def _exponent(self, beta: float, u: float) -> float:
        """Logarithm of ``|M|^beta`` times the density; on either side of 0 it is concave with curvature <= -1."""
        half, t = self.batch_size / 2, self._zero + u
        log_density = require("scipy.special").xlogy(2 * half - 1, t) - t * t / 2 - (half - 1) * math.log(2)
        return log_density - math.lgamma(half) + (beta * self._log_factor(u) if beta else 0.0)

    def _modes(self, beta: float) -> tuple[float, float]:
        """Where the exponent peaks below and above 0, from a quadratic equation in ``(zero + u)^2``."""
        scale, power = self.lr_times_a / self.batch_size, self.batch_size - 1
        total = 1 + scale * (power + 2 * beta)
        root = math.sqrt(total * total - 4 * scale * power)
        low, high = math.sqrt(2 * power / (total + root)), math.sqrt((total + root) / (2 * scale))
        return min(0.0, low - self._zero), max(0.0, high - self._zero)

    def _integral(self, beta: float, integrand: Callable[[float], float]) -> float:
        low, high = self._modes(beta)
        below, above = min(0.0, low + REACH), max(0.0, high - REACH)
        edges = (max(-self._zero, low - REACH), low), (low, below), (above, high), (high, high + REACH)
        # Of this order is the rounding error of an exponent, which no quadrature goes below.
        accuracy = 1e-15 * (100 + beta + self.batch_size)
        quad = partial(require("scipy.integrate").quad, epsabs=1e-14, epsrel=accuracy, limit=200)
        return sum(quad(integrand, *edge)[0] for edge in edges)
