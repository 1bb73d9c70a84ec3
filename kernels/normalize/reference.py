"""Plain torch forms of row normalisation, its backward and its double backward."""

from __future__ import annotations

from torch import Tensor

from fastreg.kernels._checks import accumulator


def normalize(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """``x [R, N] -> xhat [R, N], rstd [R]``."""
    wide = x.to(accumulator(x.dtype))
    if center:
        wide = wide - wide.mean(1, keepdim=True)
    rstd = (wide.square().mean(1, keepdim=True) + eps).rsqrt()
    return (wide * rstd).to(x.dtype), rstd.squeeze(1)


def normalize_backward(xhat: Tensor, rstd: Tensor, g: Tensor, center: bool) -> Tensor:
    """``rstd * (g - center * mean(g) - xhat * mean(g * xhat))``, row by row."""
    hat, wide = xhat.to(rstd.dtype), g.to(rstd.dtype)
    inner = wide - hat * (wide * hat).mean(1, keepdim=True)
    if center:
        inner = inner - wide.mean(1, keepdim=True)
    return (rstd.unsqueeze(1) * inner).to(g.dtype)


def normalize_double_backward(
    xhat: Tensor, rstd: Tensor, g: Tensor, v: Tensor, center: bool
) -> tuple[Tensor, Tensor]:
    r"""Derivatives of ``L = <v, normalize_backward(g)>`` with respect to g and x.

    Write ``J = rstd (1 - c 11^T / N - xhat xhat^T / N)`` for the Jacobian of xhat: it is symmetric
    and ``L = v.J g``, so ``grad_g = J v``. With ``alpha = mean(g xhat)``, ``beta = mean(v xhat)``
    and ``kappa = mean(v g) - c mean(v) mean(g) - alpha beta``, ``L = N rstd kappa``. From
    ``d rstd = -rstd^2 mean(xhat dx)`` and ``d xhat = J dx`` follows
    ``grad_x = -rstd^2 (beta (g - c mean(g)) + alpha (v - c mean(v)) + xhat (kappa - 2 alpha beta))``.
    """
    hat, g, v = (t.to(rstd.dtype) for t in (xhat, g, v))
    alpha, beta = ((t * hat).mean(1, keepdim=True) for t in (g, v))
    if center:
        g, v = (t - t.mean(1, keepdim=True) for t in (g, v))
    kappa = (g * v).mean(1, keepdim=True) - alpha * beta
    scale = rstd.unsqueeze(1)
    grad_g = scale * (v - hat * beta)
    grad_x = -scale.square() * (beta * g + alpha * v + hat * (kappa - 2 * alpha * beta))
    return grad_g.to(xhat.dtype), grad_x.to(xhat.dtype)
