r"""Scaled dot-product attention that can be differentiated twice, with both backward passes written by hand.

The general form, which stores the softmax: for whoever asks for it (``need_weights``), for operands without a dimension
of heads, for values of another width than keys. :mod:`fastreg.fused_attention` serves the rest.

Per head, with ``S = c Q K^T + mask``, ``P = softmax(S)`` and the dropout factors ``M`` (absent without dropout):

    forward          W = M P,  O = W V
    backward         dP = M (dO V^T + dW),  dS = P (dP - rowsum(dP P))
                     dQ = c dS K,  dK = c dS^T Q,  dV = W^T dO
    double backward  (given vQ, vK, vV: the gradients of dQ, dK, dV)
                     T = c (vQ K^T + Q vK^T),  T -= rowsum(P T)
                     Z = P M (dO vV^T) + dS T,  Z -= P rowsum(Z)
                     grad_dO = W vV + (M P T) V,  grad_dW = M P T,  grad_V = (M P T)^T dO
                     grad_Q = c (Z K + dS vK),  grad_K = c (Z^T Q + dS^T vQ)

Terms that are constant along a row of ``S`` drop out of ``Z``, which is why ``dS T`` may stand for ``P (dP T - dP
rowsum(P T))``. Every matrix is ``[N, R, S]``: N heads of the batch, R queries, S keys; half precision is computed
on in float32.

Source: Vaswani et al. 2017, arXiv:1706.03762.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.kernels._checks import accumulator


class Attention(Function):
    """``(W v, W)`` with ``W = dropout(softmax(scale q k^T + mask))``.

    Args:
        q: ``[N, R, E]``, any float dtype.
        k: ``[N, S, E]``.
        v: ``[N, S, F]``.
        scale: c.
        mask: added to the scores, broadcast against ``grid``; float32 or wider, no row of it all -inf; or None.
        grid: the shape in which ``mask`` meets the scores ``[N, R, S]``.
        dropout: the probability of an entry of P to be dropped.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None,
        grid: tuple[int, ...], dropout: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        with torch.autocast(q.device.type, enabled=False):
            scores = product(q, k.mT, scale)
            if mask is not None:
                scores.view(grid).add_(mask)
            p = torch.softmax(scores, -1)
            factors = _dropout_factors(p, dropout)
            dropped = p if factors is None else p * factors
            ctx.scale = scale
            ctx.set_materialize_grads(False)
            # Without dropout p is an output; the detached alias keeps the graph of that output out of the backward.
            ctx.save_for_backward(q, k, v, p.detach(), factors)
            return product(dropped, v).to(q.dtype), dropped

    @staticmethod
    def backward(ctx: Any, d: Tensor | None, dw: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, p, factors = ctx.saved_tensors
        if d is None:
            d = q.new_zeros(*q.shape[:-1], v.shape[-1])
        grads = AttentionBackward.apply(d, dw, q, k, v, p, factors, ctx.scale, ctx.needs_input_grad[:3])
        return *grads, None, None, None, None


class AttentionBackward(Function):
    """The backward of :class:`Attention`, differentiable once more by hand."""

    @staticmethod
    def forward(
        ctx: Any, d: Tensor, dw: Tensor | None, q: Tensor, k: Tensor, v: Tensor, p: Tensor, factors: Tensor | None,
        scale: float, needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        with torch.autocast(q.device.type, enabled=False):
            ds = dq = dk = dv = None
            if needs[2]:
                dv = product(_times(p, factors).mT, d).to(v.dtype)
            if needs[0] or needs[1]:
                dp = product(d, v.mT)
                dp = _times_(dp if dw is None else dp.add_(dw), factors)
                ds = torch._softmax_backward_data(dp, p, -1, dp.dtype)
                dq = product(ds, k, scale).to(q.dtype) if needs[0] else None
                dk = product(ds.mT, q, scale).to(k.dtype) if needs[1] else None
        ctx.save_for_backward(d, q, k, v, p, factors, ds)
        return dq, dk, dv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vq: Tensor | None, vk: Tensor | None, vv: Tensor | None) -> tuple[Tensor | None, ...]:
        d, q, k, v, p, factors, ds = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            grads = _double_backward(d, q, k, v, p, factors, ds, ctx.scale, vq, vk, vv)
        grad_d, grad_w, *rest = grads
        rest = [g if g is None else g.to(q.dtype) for g in rest]
        grad_d = None if grad_d is None else grad_d.to(d.dtype)
        return grad_d, grad_w if ctx.needs_input_grad[1] else None, *rest, None, None, None, None


def _double_backward(
    d: Tensor, q: Tensor, k: Tensor, v: Tensor, p: Tensor, factors: Tensor | None, ds: Tensor | None, scale: float,
    vq: Tensor | None, vk: Tensor | None, vv: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``(grad_dO, grad_dW, grad_Q, grad_K, grad_V)``; the names are those of the module's formulas."""
    z = pt = grad_d = grad_v = None
    if vv is not None:
        grad_d = product(_times(p, factors), vv)
        z = _times_(product(d, vv.mT), factors).mul_(p)
    t = _score_tangent(q, k, vq, vk, scale)
    if t is not None:
        assert ds is not None  # a tangent of the scores comes with a gradient by q or by k
        pt = p * t
        rho = pt.sum(-1, keepdim=True)
        t.sub_(rho)
        z = ds * t if z is None else z.addcmul_(ds, t)
        pt = _times_(pt.addcmul_(p, rho, value=-1), factors)
        grad_d = product(pt, v, onto=grad_d)
        grad_v = product(pt.mT, d)
    grad_q = grad_k = None
    if z is not None:
        z.addcmul_(p, z.sum(-1, keepdim=True), value=-1)
        grad_q, grad_k = product(z, k, scale), product(z.mT, q, scale)
    if vk is not None and ds is not None:
        grad_q = product(ds, vk, scale, onto=grad_q)
    if vq is not None and ds is not None:
        grad_k = product(ds.mT, vq, scale, onto=grad_k)
    return grad_d, pt, grad_q, grad_k, grad_v


def _score_tangent(q: Tensor, k: Tensor, vq: Tensor | None, vk: Tensor | None, scale: float) -> Tensor | None:
    """``scale (vq k^T + q vk^T)``, one product over twice the width when both terms are there."""
    if vq is None:
        return None if vk is None else product(q, vk.mT, scale)
    if vk is None:
        return product(vq, k.mT, scale)
    return product(torch.cat((vq, q), -1), torch.cat((k, vk), -1).mT, scale)


def product(a: Tensor, b: Tensor, scale: float = 1.0, *, onto: Tensor | None = None) -> Tensor:
    """``onto + scale a b`` for ``a [N, R, E]``, ``b [N, E, S]``, in float32 or wider; ``onto`` is overwritten."""
    wide = accumulator(a.dtype)
    a, b = a.to(wide), b.to(wide)
    if onto is not None:
        return onto.baddbmm_(a, b, alpha=scale)
    if scale == 1:
        return torch.bmm(a, b)
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _dropout_factors(p: Tensor, dropout: float) -> Tensor | None:
    """Zeros and ``1 / (1 - dropout)``, drawn as ``F.dropout`` draws them on the CPU; None without dropout."""
    if dropout == 0:
        return None
    keep = torch.empty_like(p).bernoulli_(1 - dropout)
    return keep.div_(1 - dropout) if dropout < 1 else keep


def _times(p: Tensor, factors: Tensor | None) -> Tensor:
    return p if factors is None else p * factors


def _times_(p: Tensor, factors: Tensor | None) -> Tensor:
    return p if factors is None else p.mul_(factors)
