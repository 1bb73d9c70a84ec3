"""Normalisation to second order: rows of one sample (layer, group, instance, RMS norm) with a double backward by hand.

``J = d xhat / d x`` is symmetric, so with ``L = <v, J g>`` the double backward is ``dL/dg = J v`` and a closed form for
``dL/dx`` (see :func:`fastreg.kernels.normalize_double_backward`): three passes over memory where torch's own double
backward of a norm layer is a composite of about twenty.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.kernels import normalize, normalize_backward, normalize_double_backward


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
    xhat, _ = NormalizeRows.apply(x, width, eps, center)
    return xhat


def tether_to(x: Tensor) -> Tensor:
    """Zeros shaped as ``x`` that occupy one element.

    Returned as a second output and saved, they lead the double backward's gradient to ``x`` without keeping ``x``.
    """
    return x.new_zeros(()).expand(x.shape)


class NormalizeRows(Function):
    """``x -> xhat, tether``; the gradient of the tether is a gradient of ``x``."""

    @staticmethod
    def forward(ctx, x: Tensor, width: int, eps: float, center: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        xhat, rstd = normalize(x.reshape(-1, width), eps, center)
        xhat, tether = xhat.view(x.shape), tether_to(x)
        ctx.width, ctx.center = width, center
        ctx.save_for_backward(xhat, rstd, tether)
        return xhat, tether

    @staticmethod
    def backward(ctx, g: Tensor | None, from_tether: Tensor | None):
        if g is None:
            return from_tether, None, None, None
        xhat, rstd, tether = ctx.saved_tensors
        dx = NormalizeRowsBackward.apply(g, xhat, rstd, tether, ctx.width, ctx.center)
        return dx if from_tether is None else dx + from_tether, None, None, None


class NormalizeRowsBackward(Function):
    """``g -> J g``, differentiable in ``g`` and, through the tether, in ``x``."""

    @staticmethod
    def forward(ctx, g: Tensor, xhat: Tensor, rstd: Tensor, tether: Tensor, width: int, center: bool) -> Tensor:
        rows, hats = g.reshape(-1, width), xhat.detach().view(-1, width)
        ctx.center = center
        ctx.save_for_backward(rows, hats, rstd)
        return normalize_backward(hats, rstd, rows, center).view(g.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, v: Tensor):
        rows, hats, rstd = ctx.saved_tensors
        grad_g, grad_x = normalize_double_backward(hats, rstd, rows, v.reshape(rows.shape), ctx.center)
        return grad_g.view(v.shape), None, None, grad_x.view(v.shape), None, None
