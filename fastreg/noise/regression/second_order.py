"""Second-order methods on linear regression: the damped Newton method and natural gradient descent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fastreg.noise.regression import arguments
from fastreg.noise.regression.arguments import Array
from fastreg.noise.regression.stationary import LabelNoise, Stationary, gaussian_noise, stationary


@dataclass(frozen=True)
class Natural(Stationary):
    """Stationary natural gradient descent.

    Args:
        lr: Lam, ``[D, D]``, the learning rate times the inverse Fisher information that it settles at.
    """

    lr: Array


def damped_newton(
    A: ArrayLike, lr: float, batch_size: int, noise_variance: float, momentum: float = 0.0
) -> LabelNoise:
    """Stationary SGD with the preconditioner ``Lam = lr A^-1``: the noise no longer depends on the spectrum.

        Sig = lr sigma^2 / (g S - lr D) A^-1,      g = 2(1-mu) - ((1-mu)/(1+mu) + 1/S) lr

    :func:`stationary` with that matrix, exact as it is; stable iff ``lr D / g < S``.

    Args:
        A: ``E x x'``, ``[D, D]``, positive definite.
        lr: a number above 0.
        batch_size: S.
        noise_variance: sigma^2 of the labels.
        momentum: mu.

    Returns:
        A :class:`LabelNoise`.

    Raises:
        FastregError: an argument is not what is said above, or second moments diverge at this learning rate.

    Source: Ziyin et al. 2021, arXiv:2102.05375, the section on second-order methods.

    Example:
        >>> damped_newton([[4.0]], lr=0.5, batch_size=4, noise_variance=1.0).covariance
        array([[0.025]])
    """
    inverse = np.linalg.inv(arguments.matrix("damped_newton", "A", A))
    lr = arguments.number("damped_newton", "lr", lr, above=0.0)
    return stationary(A, lr * inverse, batch_size, noise_variance, momentum)


def natural_gradient(
    A: ArrayLike, lr: float, batch_size: int, noise_variance: float = 0.0, momentum: float = 0.0
) -> Natural:
    """Stationary natural gradient descent, ``Lam = lr J^-1`` with the Fisher information ``J = S C``.

        Sig = s A^-1,    J = ((1+D) s + sigma^2) A,    2(1-mu) s = lr ((1-mu)/(1+mu) s / ((1+D) s + sigma^2) + 1/S)

    J is that of the second moments of the distribution, not of each iterate. Without label noise the paper's

        s = (lr/2) (1 / ((1+D)(1+mu)) + 1 / ((1-mu) S))

    remains: SGD whose preconditioner grows as its fluctuations shrink, until it sits at the edge of stability. The
    positive root for sigma^2 > 0 is derived here, as is that no other covariance, but zero for sigma^2 = 0, is
    stationary: in the basis where ``A = I`` and Sig is diagonal, every eigenvalue has to be that same root. Whether a
    run settles there is another matter: with J renewed at every step, mu = 0 and sigma^2 = 0, second moments do so
    iff S < D + 1 and oscillate otherwise (derived here).

    Args:
        A: ``E x x'``, ``[D, D]``, positive definite.
        lr: a number above 0, in units of the loss: J carries gradients squared.
        batch_size: S.
        noise_variance: sigma^2 of the labels.
        momentum: mu.

    Returns:
        A :class:`Natural`.

    Raises:
        FastregError: an argument is not what is said above.

    Source: Ziyin et al. 2021, arXiv:2102.05375, the section on second-order methods.

    Example:
        >>> natural_gradient([[1.0]], lr=1.0, batch_size=2).covariance
        array([[0.5]])
    """
    A = arguments.matrix("natural_gradient", "A", A)
    lr = arguments.number("natural_gradient", "lr", lr, above=0.0)
    arguments.sgd("natural_gradient", batch_size, momentum)
    variance = arguments.number("natural_gradient", "noise_variance", noise_variance, least=0.0)
    inverse, size = np.linalg.inv(A), len(A)
    spread = _spread(size, lr, batch_size, variance, momentum)
    covariance = spread * inverse
    noise = gaussian_noise(A, covariance, batch_size, variance)
    return Natural(covariance, noise, size * spread / 2, lr / ((1 + size) * spread + variance) * inverse)


def _spread(size: int, lr: float, batch_size: int, variance: float, momentum: float) -> float:
    """The positive root s of ``(1+D) s^2 - p s - q = 0``."""
    floor = lr / (2 * (1 - momentum) * batch_size)
    linear = lr / (2 * (1 + momentum)) + (1 + size) * floor - variance
    root = math.sqrt(linear**2 + 4 * (1 + size) * variance * floor)
    # Of the two forms of the root, the one that subtracts nothing.
    return (linear + root) / (2 * (1 + size)) if linear > 0 else 2 * variance * floor / (root - linear)
