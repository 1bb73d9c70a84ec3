"""Plain torch form of gelu_double_backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator

# The cubic coefficient of the tanh approximation, Hendrycks and Gimpel 2016.
CUBIC = 0.044715


def exact_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of ``x Phi(x)``: ``Phi + x phi`` and ``phi (2 - x^2)``."""
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return 0.5 * torch.erfc(-x * math.sqrt(0.5)) + x * density, density * (2 - x.square())


def tanh_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of ``x sigma(w)``, ``w = 2 sqrt(2/pi) (x + 0.044715 x^3)``.

    That is ``x (1 + tanh(w / 2)) / 2`` without the difference that cancels for negative ``x``.
    """
    rate = 2 * math.sqrt(2 / math.pi)
    w = rate * (x + CUBIC * x.pow(3))
    sigma, complement = torch.sigmoid(w), torch.sigmoid(-w)
    slope, bend = rate * (1 + 3 * CUBIC * x.square()), 6 * rate * CUBIC * x
    sigma_slope = sigma * complement
    second = sigma_slope * (2 * slope + x * (bend + slope.square() * (complement - sigma)))
    return sigma + x * sigma_slope * slope, second


def gelu_double_backward(x: Tensor, d: Tensor, v: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    """``v gelu'(x)`` and ``v d gelu''(x)``, elementwise."""
    wide, d, v = (t.to(accumulator(x.dtype)) for t in (x, d, v))
    first, second = tanh_derivatives(wide) if approximate else exact_derivatives(wide)
    return (v * first).to(x.dtype), (v * d * second).to(x.dtype)
