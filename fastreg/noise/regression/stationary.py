"""The stationary covariance of SGD on linear regression with label noise: theorems 1 to 3."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from fastreg.noise.regression import arguments
from fastreg.noise.regression.arguments import Array
from fastreg.noise.regression.modes import amplification, check_noise_free, modes, rates


@dataclass(frozen=True)
class Stationary:
    """Second moments of stationary SGD.

    Args:
        covariance: Sig, ``[D, D]``, of the weights about their mean; weights squared.
        noise: C, ``[D, D]``, the covariance of the minibatch gradient, averaged over the stationary weights.
        test_loss: ``E (w - u)' A (w - u) / 2``, the expected loss on noiseless inputs and labels. With label noise
            the expected training loss is ``sigma^2 / 2`` more.
    """

    covariance: Array
    noise: Array
    test_loss: float


@dataclass(frozen=True)
class LabelNoise(Stationary):
    """Stationary SGD whose noise is due to labels alone.

    Args:
        trace: ``T = Tr[Lam A G^-1]``; second moments are finite iff T < S (and G > 0).
        kappa: ``T / (1 - T/S)``, the amplification: ``Tr[A Sig] = kappa sigma^2 / S``.
    """

    trace: float
    kappa: float


@dataclass(frozen=True)
class Shifted(Stationary):
    """Stationary SGD about a mean that is not ``u``.

    Args:
        centre: ``[D]``, the mean weights.
    """

    centre: Array


def minibatch_noise(A: ArrayLike, covariance: ArrayLike, batch_size: int, noise_variance: float) -> Array:
    """The covariance of the minibatch gradient at weights spread about ``u`` with covariance Sig.

        C = (1/S) (A Sig A + Tr[A Sig] A + sigma^2 A)

    Exact for Gaussian inputs and samples drawn afresh (N -> infinity, with replacement), at any learning rate.

    Args:
        A: ``E x x'``, ``[D, D]``, positive definite.
        covariance: Sig, ``[D, D]``, positive semidefinite; zero gives the noise at ``u``.
        batch_size: S.
        noise_variance: sigma^2 of the labels.

    Returns:
        ``[D, D]``, in units of gradients squared.

    Raises:
        FastregError: an argument is not what is said above.

    Source: Ziyin et al. 2021, arXiv:2102.05375, lemma 1.

    Example:
        >>> minibatch_noise([[1.0]], [[0.5]], batch_size=2, noise_variance=1.0)
        array([[1.]])
    """
    A = arguments.matrix("minibatch_noise", "A", A)
    covariance = arguments.matrix("minibatch_noise", "covariance", covariance, definite=False, size=len(A))
    arguments.sgd("minibatch_noise", batch_size, 0.0)
    variance = arguments.number("minibatch_noise", "noise_variance", noise_variance, least=0.0)
    return gaussian_noise(A, covariance, batch_size, variance)


def gaussian_noise(A: Array, moment: Array, batch_size: int, variance: float) -> Array:
    """:func:`minibatch_noise` of checked arguments; ``moment`` is about ``u``, not about the mean."""
    return (A @ moment @ A + (np.vdot(A, moment) + variance) * A) / batch_size


def stationary_covariance(hessian: ArrayLike, noise: ArrayLike, lr: ArrayLike, momentum: float = 0.0) -> Array:
    """The stationary covariance of SGD on a quadratic whose gradient noise has the covariance C.

        (1-mu) (Lam H Sig + Sig H Lam) - (1+mu^2)/(1-mu^2) Lam H Sig H Lam
            + mu/(1-mu^2) (Lam H Lam H Sig + Sig H Lam H Lam)  =  Lam C Lam

    Exact for any noise of mean zero, independent from step to step; Lam and H need not commute: the equation is
    solved mode by mode in the basis V with ``V V' = Lam``, ``V' H V`` diagonal (derived here).

    Args:
        hessian: H, ``[D, D]``, positive definite.
        noise: C, ``[D, D]``, positive semidefinite.
        lr: Lam, a number or a positive definite matrix ``[D, D]``.
        momentum: mu of ``m' = mu m + g``, ``w' = w - Lam m'``.

    Returns:
        Sig, ``[D, D]``.

    Raises:
        FastregError: an argument is not what is said above, or ``Lam H`` has an eigenvalue >= 2(1+mu).

    Source: Ziyin et al. 2021, arXiv:2102.05375, theorem 1.

    Example:
        >>> stationary_covariance([[1.0]], [[1.0]], lr=1.0)
        array([[1.]])
    """
    H = arguments.matrix("stationary_covariance", "hessian", hessian)
    C = arguments.matrix("stationary_covariance", "noise", noise, definite=False, size=len(H))
    h, basis = modes(H, arguments.learning_rate("stationary_covariance", lr, len(H)))
    arguments.sgd("stationary_covariance", 1, momentum)
    check_noise_free("stationary_covariance", h, momentum)
    return basis @ (basis.T @ C @ basis / rates(h, momentum)) @ basis.T


def stationary(
    A: ArrayLike, lr: ArrayLike, batch_size: int, noise_variance: float, momentum: float = 0.0
) -> LabelNoise:
    """Stationary SGD on linear regression with label noise.

        Sig = (sigma^2/S) (1 + kappa/S) Lam G^-1,      G = 2(1-mu) I - ((1-mu)/(1+mu) + 1/S) A Lam
        C   = (sigma^2/S) A + (sigma^2/S^2) (1 + kappa/S) (A Lam G^-1 + T I) A
        T   = Tr[A Lam G^-1],      kappa = T / (1 - T/S),      test_loss = Tr[A Sig]/2 = kappa sigma^2 / (2S)

    Exact for Gaussian inputs, samples drawn afresh (N -> infinity, with replacement) and any stable learning rate. The
    paper takes ``[Lam, A] = 0``; with the factors in this order the formulas hold without it (derived here), and
    ``Lam G^-1 = (2(1-mu) Lam^-1 - ((1-mu)/(1+mu) + 1/S) A)^-1`` is symmetric. For a small learning rate Sig tends to
    ``Lam sigma^2 / (2S(1-mu))``, which is too small. Scaling Lam and S together keeps neither Sig nor the test loss:
    kappa changes them at the order 1/S^2, the part of G without S at the order of Lam A.

    Args:
        A: ``E x x'``, ``[D, D]``, positive definite.
        lr: Lam, a number or a positive definite matrix ``[D, D]``.
        batch_size: S.
        noise_variance: sigma^2 of the labels.
        momentum: mu of ``m' = mu m + g``, ``w' = w - Lam m'``.

    Returns:
        A :class:`LabelNoise`.

    Raises:
        FastregError: an argument is not what is said above, or second moments diverge at this learning rate.

    Source: Ziyin et al. 2021, arXiv:2102.05375, theorems 2 and 3.

    Example:
        >>> import numpy as np
        >>> result = stationary(np.eye(2), lr=0.5, batch_size=4, noise_variance=1.0)
        >>> result.covariance.round(6), round(result.test_loss, 6)
        (array([[0.111111, 0.      ],
               [0.      , 0.111111]]), 0.111111)
    """
    A = arguments.matrix("stationary", "A", A)
    arguments.sgd("stationary", batch_size, momentum)
    variance = arguments.number("stationary", "noise_variance", noise_variance, least=0.0)
    h, basis = modes(A, arguments.learning_rate("stationary", lr, len(A)))
    gaps, trace = amplification("stationary", h, batch_size, momentum)
    kappa = trace / (1 - trace / batch_size)
    covariance = variance / batch_size * (1 + kappa / batch_size) * (basis / gaps) @ basis.T
    noise = gaussian_noise(A, covariance, batch_size, variance)
    return LabelNoise(covariance, noise, kappa * variance / (2 * batch_size), trace, kappa)
