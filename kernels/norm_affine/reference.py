"""Plain torch forms of a norm layer with its scale and bias, its backward and its double backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._segments import of


def norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``x [S, C, P], weight [C], bias [C] -> y [S, C, P], mean [S, G], rstd [S, G]``."""
    wide = _grouped(x, groups).to(accumulator(x.dtype))
    mean = _row_mean(wide) if center else wide.new_zeros(x.shape[0], groups, 1, 1)
    rstd = (_row_mean((wide - mean).square()) + eps).rsqrt()
    y = (wide - mean) * rstd * _per_channel(weight, groups)
    if bias is not None:
        y = y + _per_channel(bias, groups)
    return y.to(x.dtype).reshape(x.shape), mean.flatten(1), rstd.flatten(1)


def norm_affine_backward(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, d: Tensor, offsets: Sequence[int], center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``x, d [S, C, P], mean, rstd [S, G], weight [C] -> dx [S, C, P], scale [m, C], bias [m, C]``."""
    found, groups = of(offsets), rstd.shape[1]
    hat, wide = _normalised(x, mean, rstd), _grouped(d, groups).to(rstd.dtype)
    dx = _jacobian(wide * _per_channel(weight, groups), hat, rstd, center)
    products, sums = ((t.sum(3).flatten(1)) for t in (wide * hat, wide))
    scale, bias = (found.per_segment([part.sum(1) for part in found.split(t)]) for t in (products, sums))
    return dx.to(x.dtype).reshape(x.shape), scale, bias


def norm_affine_double_backward(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    d: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_bias: Tensor,
    offsets: Sequence[int],
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradients of ``<v, dx> + sum_k <v_scale_k, scale_k> + <v_bias_k, bias_k>`` with respect to d, x and weight.

    ``J``, the Jacobian of xhat, is symmetric. So ``<v, J (w d)>`` has the gradients ``w J v``, ``d J v`` and the one
    with respect to x that :func:`~fastreg.kernels.normalize_double_backward` derives; ``<v_scale_k, sum d xhat>`` adds
    ``v_scale_k xhat`` to that of d and ``J (v_scale_k d)`` to that of x.
    """
    groups = rstd.shape[1]
    hat = _normalised(x, mean, rstd)
    d, v = (_grouped(t, groups).to(rstd.dtype) for t in (d, v))
    w = _per_channel(weight, groups).to(rstd.dtype)
    segment = of(offsets).segment_of_row(x.device)
    q, shift = (t[segment].unflatten(1, (groups, -1)).unsqueeze(3) for t in (v_scale, v_bias))
    jv = _jacobian(v, hat, rstd, center)
    grad_d = w * jv + hat * q + shift
    grad_x = _second_order(w * d, v, hat, rstd, center) + _jacobian(q * d, hat, rstd, center)
    grad_weight = (d * jv).sum((0, 3)).flatten()
    return grad_d.to(x.dtype).reshape(x.shape), grad_x.to(x.dtype).reshape(x.shape), grad_weight.to(weight.dtype)


def _second_order(g: Tensor, v: Tensor, hat: Tensor, rstd: Tensor, center: bool) -> Tensor:
    """Gradient of ``<v, J g>`` with respect to x."""
    alpha, beta = _row_mean(g * hat), _row_mean(v * hat)
    if center:
        g, v = g - _row_mean(g), v - _row_mean(v)
    kappa = _row_mean(g * v) - alpha * beta
    return -rstd[:, :, None, None].square() * (beta * g + alpha * v + hat * (kappa - 2 * alpha * beta))


def _jacobian(g: Tensor, hat: Tensor, rstd: Tensor, center: bool) -> Tensor:
    inner = g - hat * _row_mean(g * hat)
    if center:
        inner = inner - _row_mean(g)
    return rstd[:, :, None, None] * inner


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """xhat ``[S, G, C / G, P]``."""
    wide = _grouped(x, rstd.shape[1]).to(rstd.dtype)
    return (wide - mean[:, :, None, None]) * rstd[:, :, None, None]


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, x.shape[1] // groups))


def _per_channel(parameter: Tensor, groups: int) -> Tensor:
    """``[C] -> [G, C / G, 1]``."""
    return parameter.reshape(groups, -1, 1)


def _row_mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)
