"""Plain torch forms of attention's backward and double backward; every matrix of scores is stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator


def _softmax_and_gradient(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """``P`` and ``dS = P (dP - rowsum(P dP))``, ``[N, T, T]``."""
    scores = torch.bmm(q, k.mT) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    p = (scores - lse.unsqueeze(2)).exp()
    dp = torch.bmm(d, v.mT)
    return p, p * (dp - (p * dp).sum(2, keepdim=True))


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``[N, T, E]`` each, ``lse [N, T]`` -> gradients of q, k, v."""
    dtype, wide = q.dtype, accumulator(q.dtype)
    q, k, v, d = (t.to(wide) for t in (q, k, v, d))
    p, ds = _softmax_and_gradient(q, k, v, lse, d, scale, causal)
    grads = scale * torch.bmm(ds, k), scale * torch.bmm(ds.mT, q), torch.bmm(p.mT, d)
    return tuple(g.to(dtype) for g in grads)


def attention_double_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, vq: Tensor, vk: Tensor, vv: Tensor, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``[N, T, E]`` each, ``lse [N, T]`` -> gradients of d, q, k, v."""
    dtype, wide = q.dtype, accumulator(q.dtype)
    q, k, v, d, vq, vk, vv = (t.to(wide) for t in (q, k, v, d, vq, vk, vv))
    p, ds = _softmax_and_gradient(q, k, v, lse, d, scale, causal)
    tangent = scale * (torch.bmm(vq, k.mT) + torch.bmm(q, vk.mT))
    tangent = tangent - (p * tangent).sum(2, keepdim=True)
    z = p * torch.bmm(d, vv.mT) + ds * tangent
    z = z - p * z.sum(2, keepdim=True)
    pt = p * tangent
    grads = (
        torch.bmm(p, vv) + torch.bmm(pt, v),
        scale * (torch.bmm(z, k) + torch.bmm(ds, vk)),
        scale * (torch.bmm(z.mT, q) + torch.bmm(ds.mT, vq)),
        torch.bmm(pt.mT, d),
    )
    return tuple(g.to(dtype) for g in grads)
