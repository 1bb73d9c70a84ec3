r"""Stationary SGD on linear regression in closed form: Ziyin, Liu, Mori, Ueda 2021, arXiv:2102.05375.

    y = u . x + e,    x ~ N(0, A),    e ~ N(0, sigma^2),    l(w) = (w . x - y)^2 / 2
    m' = mu m + g,    w' = w - Lam m',    g the mean gradient of S samples drawn afresh at every step

``Lam`` is the learning rate, a number or a symmetric positive definite matrix; ``v = w - E w`` is counted from the mean
of the stationary distribution, ``Sig = E v v'``, ``C`` is the covariance of ``g`` averaged over that distribution.
Everything is float64 numpy, of cost D^3 unless a function says otherwise.
"""

from fastreg.noise.regression.input_noise import with_input_noise
from fastreg.noise.regression.near_minimum import near_minimum, noise_near_minimum
from fastreg.noise.regression.overparametrised import overparametrised, residual_variance
from fastreg.noise.regression.second_order import Natural, damped_newton, natural_gradient
from fastreg.noise.regression.stability import maximal_lr
from fastreg.noise.regression.stationary import (
    LabelNoise,
    Shifted,
    Stationary,
    minibatch_noise,
    stationary,
    stationary_covariance,
)
from fastreg.noise.regression.weight_decay import decay_window, with_weight_decay

__all__ = [
    "LabelNoise",
    "Natural",
    "Shifted",
    "Stationary",
    "damped_newton",
    "decay_window",
    "maximal_lr",
    "minibatch_noise",
    "natural_gradient",
    "near_minimum",
    "noise_near_minimum",
    "overparametrised",
    "residual_variance",
    "stationary",
    "stationary_covariance",
    "with_input_noise",
    "with_weight_decay",
]
