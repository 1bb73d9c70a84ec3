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
    """First and second derivative of ``x (1 + tanh u) / 2``, ``u = sqrt(2/pi) (x + 0.044715 x^3)``."""
    rate = math.sqrt(2 / math.pi)
    t = torch.tanh(rate * (x + CUBIC * x.pow(3)))
    slope = rate * (1 + 3 * CUBIC * x.square())
    bend = 6 * rate * CUBIC * x
    t_slope = (1 - t.square()) * slope
    t_bend = (1 - t.square()) * bend - 2 * t * t_slope * slope
    return 0.5 * (1 + t + x * t_slope), t_slope + 0.5 * x * t_bend


def gelu_double_backward(x: Tensor, d: Tensor, v: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    """``v gelu'(x)`` and ``v d gelu''(x)``, elementwise."""
    wide, d, v = (t.to(accumulator(x.dtype)) for t in (x, d, v))
    first, second = tanh_derivatives(wide) if approximate else exact_derivatives(wide)
    return (v * first).to(x.dtype), (v * d * second).to(x.dtype)
