"""Plain torch forms of attention's backward and double backward; every matrix of scores is stored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator


def _softmax_and_gradient(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """``P`` and ``dS = P (dP - rowsum(P dP))``, ``[B, H, T, T]``."""
    scores = torch.matmul(q, k.mT) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    p = (scores - lse.unsqueeze(3)).exp()
    dp = torch.matmul(d, v.mT)
    return p, p * (dp - (p * dp).sum(3, keepdim=True))


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, H, T, E]`` each, ``lse [B, H, T]`` -> gradients of q, k, v."""
    dtype, wide = q.dtype, accumulator(q.dtype)
    q, k, v, d = (t.to(wide) for t in (q, k, v, d))
    p, ds = _softmax_and_gradient(q, k, v, lse, d, scale, causal)
    grads = scale * torch.matmul(ds, k), scale * torch.matmul(ds.mT, q), torch.matmul(p.mT, d)
    return tuple(g.to(dtype) for g in grads)


def attention_double_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, vq: Tensor, vk: Tensor, vv: Tensor, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``[B, H, T, E]`` each, ``lse [B, H, T]`` -> gradients of d, q, k, v."""
    dtype, wide = q.dtype, accumulator(q.dtype)
    q, k, v, d, vq, vk, vv = (t.to(wide) for t in (q, k, v, d, vq, vk, vv))
    p, ds = _softmax_and_gradient(q, k, v, lse, d, scale, causal)
    tangent = scale * (torch.matmul(vq, k.mT) + torch.matmul(q, vk.mT))
    tangent = tangent - (p * tangent).sum(3, keepdim=True)
    z = p * torch.matmul(d, vv.mT) + ds * tangent
    z = z - p * z.sum(3, keepdim=True)
    pt = p * tangent
    grads = (
        torch.matmul(p, vv) + torch.matmul(pt, v),
        scale * (torch.matmul(z, k) + torch.matmul(ds, vk)),
        scale * (torch.matmul(z.mT, q) + torch.matmul(ds.mT, vq)),
        torch.matmul(pt.mT, d),
    )
    return tuple(g.to(dtype) for g in grads)
