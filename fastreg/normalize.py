"""Normalisation to second order, its double backward by hand: rows of one sample, and batch norm by micro-batch.

``J = d xhat / d x`` is symmetric, so with ``L = <v, J g>`` the double backward is ``dL/dg = J v`` and a closed form for
``dL/dx`` (see :func:`fastreg.kernels.normalize_double_backward`), in a few passes over memory; torch's own double
backward of a norm layer is a long composite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.kernels import affine_sqnorm, normalize, normalize_backward, normalize_double_backward
from fastreg.micro_batches import MicroBatches


def normalize_rows(x: Tensor, width: int, eps: float, center: bool) -> Tensor:
    r"""``(x - c mean(x)) / sqrt(var(x) + eps)`` over runs of ``width`` consecutive entries; differentiable twice.

    Args:
        x: any shape whose number of entries is a multiple of ``width``, float.
        width: N, entries normalised together.
        eps: added to the (biased) variance.
        center: True for layer, group and instance norm; False for RMS norm, whose variance is ``mean(x^2)``.

    Returns:
        xhat, contiguous, in the shape and dtype of ``x``.

    Raises:
        FastregError: ``x`` is not a float tensor.

    Source: Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.

    Example:
        >>> import torch
        >>> from fastreg.normalize import normalize_rows
        >>> normalize_rows(torch.tensor([[3.0, 1.0, 5.0, 7.0]]), 2, 0.0, True)
        tensor([[ 1., -1., -1.,  1.]])
    """
    if not torch.is_grad_enabled():
        return normalize(x.reshape(-1, width), eps, center)[0].view(x.shape)
    xhat, _ = NormalizeRows.apply(x, width, eps, center)
    return xhat


def tether_to(x: Tensor) -> Tensor:
    """Zeros shaped as ``x`` that occupy one element.

    Returned as a second output and saved, they lead the double backward's gradient to ``x`` without keeping ``x``.
    """
    return x.new_zeros(()).expand(x.shape)


def _with(dx: Tensor, from_tether: Tensor | None) -> Tensor:
    """The gradient of the input from both outputs; ``dx`` is this backward's own, so it is added to if it may be."""
    if from_tether is None:
        return dx
    return dx + from_tether if torch.is_grad_enabled() else dx.add_(from_tether)


class NormalizeRows(Function):
    """``x -> xhat, tether``; the gradient of the tether is a gradient of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, eps: float, center: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        xhat, rstd = normalize(x.reshape(-1, width), eps, center)
        xhat, tether = xhat.view(x.shape), tether_to(x)
        ctx.width, ctx.center = width, center
        ctx.save_for_backward(xhat, rstd, tether)
        return xhat, tether

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, from_tether: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return from_tether, None, None, None
        xhat, rstd, tether = ctx.saved_tensors
        dx = NormalizeRowsBackward.apply(g, xhat, rstd, tether, ctx.width, ctx.center)
        return _with(dx, from_tether), None, None, None


class NormalizeRowsBackward(Function):
    """``g -> J g``, differentiable in ``g`` and, through the tether, in ``x``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, xhat: Tensor, rstd: Tensor, tether: Tensor, width: int, center: bool) -> Tensor:
        rows, hats = g.reshape(-1, width), xhat.detach().view(-1, width)
        ctx.center = center
        ctx.save_for_backward(rows, hats, rstd)
        return normalize_backward(hats, rstd, rows, center).view(g.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        rows, hats, rstd = ctx.saved_tensors
        grad_g, grad_x = normalize_double_backward(hats, rstd, rows, v.reshape(rows.shape), ctx.center)
        return grad_g.view(v.shape), None, None, grad_x.view(v.shape), None, None


def normalize_micro_batches(x: Tensor, cut: MicroBatches, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Batch normalisation of each micro-batch alone: ``(x - mean_kc) / sqrt(var_kc + eps)``; differentiable twice.

    Args:
        x: [n, C, ...] float, samples along dimension 0.
        cut: the micro-batches; mean and (biased) variance of k are over its rows and all places, channel by channel.
        eps: added to the variance.

    Returns:
        xhat, contiguous, in the shape and dtype of ``x``; mean and var [m, C], float32 or float64, not differentiable.

    Raises:
        FastregError: ``x`` does not keep its samples along dimension 0.

    Source: Hoffer et al. 2017, arXiv:1705.08741 (ghost batch norm).

    Example:
        >>> import torch
        >>> from fastreg.micro_batches import MicroBatches
        >>> from fastreg.normalize import normalize_micro_batches
        >>> xhat, mean, var = normalize_micro_batches(torch.tensor([[1.0], [3.0], [5.0]]), MicroBatches(3, 2), 0.0)
        >>> mean.flatten()
        tensor([2., 5.])
    """
    cut.rows_per_sample(x, "the input of batch norm")
    xhat, _, mean, var = NormalizeMicroBatches.apply(x, cut, eps)
    return xhat, mean, var


class NormalizeMicroBatches(Function):
    """``x -> xhat, tether, mean, var``; the gradient of the tether is a gradient of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cut: MicroBatches, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        rows = x.reshape(x.shape[0], x.shape[1], -1)
        mean, var = _statistics(rows, cut)
        rstd = (var + eps).rsqrt()
        xhat, tether = _combine(cut, -mean * rstd, (rows, rstd)).view(x.shape), tether_to(x)
        ctx.cut = cut
        ctx.save_for_backward(xhat, rstd, tether)
        ctx.mark_non_differentiable(mean, var)
        return xhat, tether, mean, var

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, from_tether: Tensor | None, _mean: None, _var: None
    ) -> tuple[Tensor | None, ...]:
        if g is None:
            return from_tether, None, None
        dx = NormalizeMicroBatchesBackward.apply(g, *ctx.saved_tensors, ctx.cut)
        return _with(dx, from_tether), None, None


class NormalizeMicroBatchesBackward(Function):
    """``g -> J g``, differentiable in ``g`` and, through the tether, in ``x``."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, xhat: Tensor, rstd: Tensor, tether: Tensor, cut: MicroBatches) -> Tensor:
        shape = (*xhat.shape[:2], -1)
        rows, hats = g.reshape(shape), xhat.detach().view(shape)
        along, mean = _means(hats, rows, cut)
        ctx.cut = cut
        ctx.save_for_backward(rows, hats, rstd, along, mean)
        return _combine(cut, -rstd * mean, (rows, rstd), (hats, -rstd * along)).view(g.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        g, hats, rstd, alpha, mean_g = ctx.saved_tensors
        cut, shape, v = ctx.cut, v.shape, v.reshape(g.shape)
        beta, mean_v = _means(hats, v, cut)
        kappa = _means(g, v, cut)[0] - mean_v * mean_g - alpha * beta
        grad_g = _combine(cut, -rstd * mean_v, (v, rstd), (hats, -rstd * beta))
        square = -rstd.square()
        grad_x = _combine(
            cut,
            -square * (beta * mean_g + alpha * mean_v),
            (g, square * beta),
            (v, square * alpha),
            (hats, square * (kappa - 2 * alpha * beta)),
        )
        return grad_g.view(shape), None, None, grad_x.view(shape), None


def _statistics(rows: Tensor, cut: MicroBatches) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``[m, C]`` of rows ``[n, C, P]``: within samples, then of their means."""
    wide = rows.float() if rows.dtype.itemsize < 4 else rows
    within, means = torch.var_mean(wide, 2, correction=0)
    between = cut.fold(lambda t: torch.stack(torch.var_mean(t, 1, correction=0), 1), means)
    return between[:, 1], between[:, 0] + cut.fold(lambda t: t.mean(1), within)


def _means(x: Tensor, g: Tensor, cut: MicroBatches) -> tuple[Tensor, Tensor]:
    """``mean(x g), mean(g)`` of rows ``[n, C, P]`` by micro-batch and channel: ``[m, C]`` each."""
    _, _, products, sums = affine_sqnorm(x, g, cut.offsets(x.shape[0]))
    values = cut.sizes(x.device, sums.dtype).unsqueeze(1) * (x.shape[0] // cut.samples * x.shape[2])
    return products / values, sums / values


def _combine(cut: MicroBatches, constant: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """``constant_kc + sum_i coefficient_i,kc rows_i`` for rows ``[n, C, P]`` and coefficients ``[m, C]``."""
    (first, _), count = terms[0], len(terms)

    def combined(*cuts: Tensor) -> Tensor:
        rows, coefficients = cuts[:count], cuts[count:-1]
        out = torch.addcmul(cuts[-1], rows[0], coefficients[0])
        for row, coefficient in zip(rows[1:], coefficients[1:]):
            out.addcmul_(row, coefficient)
        return out

    segments = (*(c for _, c in terms), constant)
    aligned = tuple(c.to(first.dtype)[:, None, :, None] for c in segments)
    return cut.map(combined, tuple(rows for rows, _ in terms), aligned)
