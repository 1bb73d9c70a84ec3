"""SGD on linear regression whose inputs are seen through noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fastreg.noise.regression import arguments
from fastreg.noise.regression.stationary import Shifted, stationary


def with_input_noise(
    A: ArrayLike,
    B: ArrayLike,
    u: ArrayLike,
    lr: ArrayLike,
    batch_size: int,
    noise_variance: float = 0.0,
    momentum: float = 0.0,
) -> Shifted:
    """Stationary SGD where the model sees ``x + n``, n ~ N(0, B), and the labels are ``u . x + e``.

        K = A + B,    centre K^-1 A u
        Sig and C of :func:`stationary` with A -> K,  sigma^2 -> sigma^2 + u' A K^-1 B u

    Exact: for Gaussians the residual at the centre is independent of the noisy input. The paper states it without
    label noise; with it, ``sigma^2`` adds up. ``test_loss`` is that of clean inputs and labels,
    ``(Tr[A Sig] + u' B K^-1 A K^-1 B u) / 2`` (derived here).

    Args:
        A: ``E x x'``, ``[D, D]``, positive definite.
        B: ``E n n'``, ``[D, D]``, positive semidefinite.
        u: ``[D]``, the weights that generate the labels.
        lr: a number or a positive definite matrix ``[D, D]``.
        batch_size: S.
        noise_variance: sigma^2 of the labels.
        momentum: mu.

    Returns:
        A :class:`Shifted`; ``covariance`` is about its ``centre``, ``noise`` that of gradients at noisy inputs.

    Raises:
        FastregError: an argument is not what is said above, or second moments diverge at this learning rate.

    Source: Ziyin et al. 2021, arXiv:2102.05375, the section on input noise.

    Example:
        >>> result = with_input_noise([[1.0]], [[1.0]], [2.0], lr=0.5, batch_size=4)
        >>> result.centre
        array([1.])
    """
    A = arguments.matrix("with_input_noise", "A", A)
    B = arguments.matrix("with_input_noise", "B", B, definite=False, size=len(A))
    u = arguments.vector("with_input_noise", "u", u, len(A))
    variance = arguments.number("with_input_noise", "noise_variance", noise_variance, least=0.0)
    missing = np.linalg.solve(A + B, B @ u)  # u - centre
    around = stationary(A + B, lr, batch_size, variance + max(0.0, float(u @ A @ missing)), momentum)
    test_loss = float(np.vdot(A, around.covariance) + missing @ A @ missing) / 2
    return Shifted(around.covariance, around.noise, test_loss, u - missing)
