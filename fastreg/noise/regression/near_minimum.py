"""Minibatch noise of the mean squared error near a minimum of any model."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fastreg.noise.regression import arguments
from fastreg.noise.regression.arguments import Array
from fastreg.noise.regression.modes import check_noise_free, range_modes


def noise_near_minimum(
    hessian: ArrayLike, loss: float, batch_size: int, penalty_gradient: ArrayLike | None = None
) -> Array:
    """The covariance of the minibatch gradient near a minimum of loss plus penalty.

        C = (2 L_0 / S) H_0 - (1/S) grad L_Gam grad L_Gam'  + o(L_0)

    ``L_0`` and ``H_0`` are without the penalty. Exact iff all samples have the same absolute residual, and then with
    the generalised Gauss-Newton matrix for ``H_0`` (derived here); of an interpolating minimum, ``L_0 = 0``, see
    :func:`overparametrised`, with residual 0.

    Args:
        hessian: ``H_0``, ``[D, D]``, positive semidefinite.
        loss: ``L_0``, the mean of half squared residuals.
        batch_size: S, drawn with replacement.
        penalty_gradient: ``[D]``, for weight decay ``Gam w*``; none by default.

    Returns:
        C, ``[D, D]``.

    Raises:
        FastregError: an argument is not what is said above.

    Source: Ziyin et al. 2021, arXiv:2102.05375, theorem 5 and corollary 2.

    Example:
        >>> noise_near_minimum([[2.0]], loss=0.5, batch_size=4)
        array([[0.5]])
    """
    H = arguments.matrix("noise_near_minimum", "hessian", hessian, definite=False)
    loss = arguments.number("noise_near_minimum", "loss", loss, least=0.0)
    arguments.sgd("noise_near_minimum", batch_size, 0.0)
    gradient = np.zeros(len(H)) if penalty_gradient is None else penalty_gradient
    gradient = arguments.vector("noise_near_minimum", "penalty_gradient", gradient, len(H))
    return (2 * loss * H - np.outer(gradient, gradient)) / batch_size


def near_minimum(hessian: ArrayLike, loss: float, lr: ArrayLike, batch_size: int, momentum: float = 0.0) -> Array:
    """The stationary covariance near a minimum without penalty, in the directions in which the loss is curved.

        Sig = 2 L_0 / (S (1-mu))  Lam (2I - H_0 Lam / (1+mu))^-1   on the range of H_0 (of Lam H_0 for a matrix Lam)

    The solution of theorem 1 for the noise of :func:`noise_near_minimum`, so up to o(L_0): the growth of the noise
    with Sig, kappa of :func:`stationary`, is left out. Lam and H_0 need not commute.

    Args:
        hessian: ``H_0``, ``[D, D]``, positive semidefinite.
        loss: ``L_0``, the mean of half squared residuals.
        lr: Lam, a number or a positive definite matrix ``[D, D]``.
        batch_size: S, drawn with replacement.
        momentum: mu.

    Returns:
        ``[D, D]``, of the rank of ``H_0``: the minibatch gradient leaves the rest alone.

    Raises:
        FastregError: an argument is not what is said above, or ``Lam H_0`` has an eigenvalue >= 2(1+mu).

    Source: Ziyin et al. 2021, arXiv:2102.05375, corollary 3.

    Example:
        >>> near_minimum([[1.0]], loss=0.5, lr=1.0, batch_size=4)
        array([[0.25]])
    """
    H = arguments.matrix("near_minimum", "hessian", hessian, definite=False)
    loss = arguments.number("near_minimum", "loss", loss, least=0.0)
    arguments.sgd("near_minimum", batch_size, momentum)
    h, basis = range_modes("near_minimum", H, arguments.learning_rate("near_minimum", lr, len(H)))
    check_noise_free("near_minimum", h, momentum)
    return 2 * loss / (batch_size * (1 - momentum)) * (basis / (2 - h / (1 + momentum))) @ basis.T
