"""SGD on linear regression over a finite set of samples, with replacement, for N and D both large."""

from __future__ import annotations

from numpy.typing import ArrayLike

from fastreg.noise.regression import arguments
from fastreg.noise.regression.modes import amplification, range_modes
from fastreg.noise.regression.stationary import LabelNoise


def residual_variance(noise_variance: float, alpha: float) -> float:
    """The mean squared residual of least squares on ``N = alpha D`` samples: ``max(0, sigma^2 (1 - 1/alpha))``.

    Its mean over sample sets; a single one of N = 200 can be 20 % off, so prefer the realised value.

    Raises:
        FastregError: ``noise_variance`` below 0 or ``alpha`` not above 0.

    Source: Ziyin et al. 2021, arXiv:2102.05375, proposition 4.

    Example:
        >>> residual_variance(1.0, alpha=2.0), residual_variance(1.0, alpha=0.5)
        (0.5, 0.0)
    """
    variance = arguments.number("residual_variance", "noise_variance", noise_variance, least=0.0)
    return max(0.0, variance * (1 - 1 / arguments.number("residual_variance", "alpha", alpha, above=0.0)))


def overparametrised(
    A: ArrayLike, residual: float, lr: ArrayLike, batch_size: int, momentum: float = 0.0
) -> LabelNoise:
    """Stationary SGD on a finite sample set, about its least-squares solution.

        C   = (1/S) ((Tr[A Sig] + r) I - A Sig) A
        Sig = (r/S) (1 + kappa/S) Lam G^-1  on the range of A,     G = 2(1-mu) I - ((1-mu)/(1+mu) - 1/S) A Lam
        T   = Tr[A Lam G^-1],    kappa = T / (1 - T/S),    Tr[A Sig] = kappa r / S

    With N <= D samples the least-squares solution fits every label, r = 0, and SGD has no noise: Sig = 0. This is a
    limit of N, D -> infinity for traces and for variances along eigenvectors of A: the trace is some percent off for N
    of some hundreds and kappa/S < 1, more near the largest learning rate, the variances some 10 %. Covariances between
    eigenvectors, zero here, are not: in one sample set they were half of the Frobenius norm of Sig at every N tried.
    A matrix Lam and momentum are derived here, by theorem 1.

    Args:
        A: the empirical ``(1/N) sum x x'``, ``[D, D]``, positive semidefinite.
        residual: r, the mean squared residual of least squares on the samples, or :func:`residual_variance`.
        lr: Lam, a number or a positive definite matrix ``[D, D]``.
        batch_size: S, drawn with replacement.
        momentum: mu.

    Returns:
        A :class:`LabelNoise`, whose test loss is ``Tr[A Sig] / 2``: the mean loss over the samples is
        ``r / 2`` more. Directions in the null space of A, along which SGD does not move, have no variance.

    Raises:
        FastregError: an argument is not what is said above, or second moments diverge at this learning rate.

    Source: Ziyin et al. 2021, arXiv:2102.05375, proposition 4 and theorem 6.

    Example:
        >>> import numpy as np
        >>> overparametrised(np.diag([1.0, 0.0]), residual=1.0, lr=0.5, batch_size=1).covariance
        array([[0.33333333, 0.        ],
               [0.        , 0.        ]])
    """
    name = "overparametrised"
    A = arguments.matrix(name, "A", A, definite=False)
    residual = arguments.number(name, "residual", residual, least=0.0)
    arguments.sgd(name, batch_size, momentum)
    h, basis = range_modes(name, A, arguments.learning_rate(name, lr, len(A)))
    gaps, trace = amplification(name, h, batch_size, momentum, sign=-1)
    kappa = trace / (1 - trace / batch_size)
    covariance = residual / batch_size * (1 + kappa / batch_size) * (basis / gaps) @ basis.T
    noise = ((kappa / batch_size + 1) * residual * A - A @ covariance @ A) / batch_size
    return LabelNoise(covariance, noise, kappa * residual / (2 * batch_size), trace, kappa)
