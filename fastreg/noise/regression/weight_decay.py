"""SGD on linear regression with weight decay: the decay alone causes noise."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from fastreg.errors import FastregError
from fastreg.noise.regression import arguments
from fastreg.noise.regression.arguments import Array
from fastreg.noise.regression.modes import check_noise_free, modes, rates
from fastreg.noise.regression.stationary import Shifted, gaussian_noise


def with_weight_decay(
    A: ArrayLike,
    decay: ArrayLike,
    u: ArrayLike,
    lr: ArrayLike,
    batch_size: int,
    noise_variance: float = 0.0,
    momentum: float = 0.0,
) -> Shifted:
    """Stationary SGD on the loss plus ``w' Gam w / 2``.

        K = A + Gam,    centre K^-1 A u,    d = u - centre = K^-1 Gam u,    M = Sig + d d'
        C = (1/S) (A M A + (Tr[A M] + sigma^2) A),     test_loss = Tr[A M] / 2

    with Sig from theorem 1 for the Hessian K. Exact for Gaussian inputs and samples drawn afresh. The paper's
    closed form of the test loss (theorem 4) takes a scalar learning rate, no momentum, no label noise and
    ``[A, Gam] = 0``; its closed form of Sig fails unless also ``[Gam, U] = 0``, ``U = u u'``. Here nothing has to
    commute: theorem 1 and proposition 3 are solved together as one symmetric linear system of D^2 unknowns
    (derived here; memory 8 D^4 bytes, time D^6). It is positive definite iff second moments stay finite.

    Args:
        A: ``E x x'``, ``[D, D]``, positive definite.
        decay: Gam, a number or a symmetric matrix ``[D, D]``, of either sign as long as K is positive definite.
        u: ``[D]``, the weights that generate the labels.
        lr: a number or a positive definite matrix ``[D, D]``.
        batch_size: S.
        noise_variance: sigma^2 of the labels.
        momentum: mu.

    Returns:
        A :class:`Shifted`; ``covariance`` is about its ``centre``.

    Raises:
        FastregError: an argument is not what is said above, or second moments diverge at this learning rate.

    Source: Ziyin et al. 2021, arXiv:2102.05375, proposition 3 and theorem 4.

    Example:
        >>> result = with_weight_decay([[1.0]], 1.0, [2.0], lr=0.5, batch_size=4)
        >>> result.centre, result.covariance
        (array([1.]), array([[0.14285714]]))
    """
    name = "with_weight_decay"
    A = arguments.matrix(name, "A", A)
    K = arguments.matrix(name, "A + decay", A + _decay(decay, len(A)))
    u = arguments.vector(name, "u", u, len(A))
    arguments.sgd(name, batch_size, momentum)
    variance = arguments.number(name, "noise_variance", noise_variance, least=0.0)
    centre = np.linalg.solve(K, A @ u)
    shift = np.outer(u - centre, u - centre)
    source = gaussian_noise(A, shift, batch_size, variance)
    covariance = _covariance(A, K, source, arguments.learning_rate(name, lr, len(A)), batch_size, momentum)
    noise = gaussian_noise(A, covariance + shift, batch_size, variance)
    return Shifted(covariance, noise, float(np.vdot(A, covariance + shift)) / 2, centre)


def _decay(value: ArrayLike, size: int) -> Array:
    """Gam as a matrix ``[size, size]``."""
    decay = np.asarray(value, dtype=np.float64)
    if decay.shape not in ((), (size, size)):
        raise FastregError(
            f"with_weight_decay: decay must be a number or of shape [{size}, {size}], got shape {decay.shape}"
        )
    return decay if decay.ndim else decay * np.eye(size)


def _covariance(A: Array, K: Array, source: Array, lr: Array, batch_size: int, momentum: float) -> Array:
    """Sig of theorem 1 with the Hessian K and the noise ``source + (A Sig A + Tr[A Sig] A) / S``."""
    h, basis = modes(K, lr)
    check_noise_free("with_weight_decay", h, momentum)
    inputs = basis.T @ A @ basis
    system = np.diag(rates(h, momentum).ravel())
    system -= (np.kron(inputs, inputs) + np.outer(inputs, inputs)) / batch_size
    lowest = np.linalg.eigvalsh(system)[0]
    if lowest <= 0:
        raise FastregError(
            f"with_weight_decay: lr must keep second moments finite, got smallest eigenvalue {lowest:.3g} of their "
            "equation (lower lr or raise batch_size; in one dimension see decay_window)"
        )
    in_modes = np.linalg.solve(system, (basis.T @ source @ basis).ravel()).reshape(inputs.shape)
    return basis @ ((in_modes + in_modes.T) / 2) @ basis.T


def decay_window(a: float, lr: float, batch_size: int) -> tuple[float, float]:
    """The weight decays at which SGD in one dimension has finite second moments, an open interval.

        lr ((a + gam)^2 + 2 a^2 / S) < 2 (a + gam)    <=>    |gam - (1/lr - a)| < sqrt(1 - 2 lr^2 a^2 / S) / lr

    For ``lr a > 2S/(S+2)``, where SGD without decay diverges, and S > 2 only decays below zero lie inside.

    Args:
        a: ``E x^2``, above 0.
        lr: the learning rate, above 0.
        batch_size: S.

    Returns:
        The two ends; their centre is ``1/lr - a``.

    Raises:
        FastregError: an argument is not what is said above, or no decay is stable: ``(lr a)^2 >= S/2``.

    Source: Ziyin et al. 2021, arXiv:2102.05375, corollary 1.

    Example:
        >>> decay_window(1.0, lr=1.0, batch_size=2)
        Traceback (most recent call last):
        fastreg.errors.FastregError: decay_window: lr must be below sqrt(S/2)/a = 1, got 1 (no decay is stable above)
        >>> low, high = decay_window(1.0, lr=0.5, batch_size=2)
        >>> low + high
        2.0
    """
    a = arguments.number("decay_window", "a", a, above=0.0)
    lr = arguments.number("decay_window", "lr", lr, above=0.0)
    arguments.sgd("decay_window", batch_size, 0.0)
    bound = math.sqrt(batch_size / 2) / a
    if lr >= bound:
        raise FastregError(
            f"decay_window: lr must be below sqrt(S/2)/a = {bound:g}, got {lr:g} (no decay is stable above)"
        )
    centre, half = 1 / lr - a, math.sqrt(1 - (lr / bound) ** 2) / lr
    return centre - half, centre + half
