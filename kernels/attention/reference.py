"""Plain torch forms of attention, its backward and its double backward; every matrix of scores is stored.

Heads of queries lie side by side with those of keys that they share: ``[B, J, g, T, U]`` with ``g = H / J``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._philox import halves, philox
from fastreg.kernels.attention.pattern import Pattern, factor, threshold


def attention_forward(q: Tensor, k: Tensor, v: Tensor, *pattern: Any) -> tuple[Tensor, Tensor]:
    """``q [B, H, T, E], k, v [B, J, U, E]`` -> out [B, H, T, E], lse [B, H, T]."""
    seen, dtype = Pattern(*pattern), q.dtype
    factors = _factors(q, k, seen)
    q, k, v = _grouped(k.shape[1], q, k, v)
    scores = _scores(q, k, seen)
    lse = scores.logsumexp(4)
    # A query that sees no key: exp(-inf - inf) = 0.
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    out = torch.matmul(_times((scores - lse.unsqueeze(4)).exp(), factors), v)
    return out.flatten(1, 2).to(dtype), lse.flatten(1, 2)


def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, *pattern: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``q, d [B, H, T, E], k, v [B, J, U, E], lse [B, H, T]`` -> gradients of q, k, v."""
    seen, dtype = Pattern(*pattern), q.dtype
    factors = _factors(q, k, seen)
    q, k, v, lse, d = _grouped(k.shape[1], q, k, v, lse, d)
    p, ds = _softmax_and_gradient(q, k, v, lse, d, factors, seen)
    dq, dk, dv = (
        (seen.scale * torch.matmul(ds, k)).flatten(1, 2),
        (seen.scale * torch.matmul(ds.mT, q)).sum(2),
        torch.matmul(_times(p, factors).mT, d).sum(2),
    )
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def attention_double_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, vq: Tensor, vk: Tensor, vv: Tensor, *pattern: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``q, d, vq [B, H, T, E], k, v, vk, vv [B, J, U, E], lse [B, H, T]`` -> gradients of d, q, k, v."""
    seen, dtype = Pattern(*pattern), q.dtype
    factors = _factors(q, k, seen)
    q, k, v, lse, d, vq, vk, vv = _grouped(k.shape[1], q, k, v, lse, d, vq, vk, vv)
    p, ds = _softmax_and_gradient(q, k, v, lse, d, factors, seen)
    tangent = seen.scale * (torch.matmul(vq, k.mT) + torch.matmul(q, vk.mT))
    tangent = tangent - (p * tangent).sum(4, keepdim=True)
    z = p * _times(torch.matmul(d, vv.mT), factors) + ds * tangent
    z = z - p * z.sum(4, keepdim=True)
    dropped = _times(p, factors)
    of_d, dq, dk, dv = (
        (torch.matmul(dropped, vv) + torch.matmul(dropped * tangent, v)).flatten(1, 2),
        (seen.scale * (torch.matmul(z, k) + torch.matmul(ds, vk))).flatten(1, 2),
        (seen.scale * (torch.matmul(z.mT, q) + torch.matmul(ds.mT, vq))).sum(2),
        torch.matmul((dropped * tangent).mT, d).sum(2),
    )
    return of_d.to(dtype), dq.to(dtype), dk.to(dtype), dv.to(dtype)


def kept(seed: Tensor, dropout: float, shape: tuple[int, int, int, int]) -> Tensor:
    """Which entries of ``[B, H, T, U]`` dropout leaves, bool: those whose random word reaches the threshold."""
    b, h, t, u = (torch.arange(n, device=seed.device) for n in shape)
    column, row = u.expand(shape), t.unsqueeze(1).expand(shape)
    head = (b.unsqueeze(1) * shape[1] + h).view(*shape[:2], 1, 1).expand(shape)
    word = philox((column, row, head, torch.zeros_like(head)), halves(seed))[0]
    return word >= threshold(dropout)


def _factors(q: Tensor, k: Tensor, seen: Pattern) -> Tensor | None:
    """``M [B, J, g, T, U]``, or None without dropout."""
    if seen.dropout == 0:
        return None
    assert seen.seed is not None  # with dropout there is one
    keep = kept(seen.seed, seen.dropout, (*q.shape[:3], k.shape[2])).unflatten(1, (k.shape[1], -1))
    return keep.to(accumulator(q.dtype)) * factor(seen.dropout)


def _times(p: Tensor, factors: Tensor | None) -> Tensor:
    return p if factors is None else p * factors


def _grouped(shared: int, *tensors: Tensor) -> list[Tensor]:
    """Widened, with heads of keys before heads of the group that shares each."""
    return [t.to(accumulator(t.dtype)).unflatten(1, (shared, t.shape[1] // shared)) for t in tensors]


def _scores(q: Tensor, k: Tensor, seen: Pattern) -> Tensor:
    """``c Q K^T + mask`` of ``q [B, J, g, T, E], k [B, J, 1, U, E]``, -inf where a query does not see a key."""
    scores = torch.matmul(q, k.mT) * seen.scale
    scores = scores.masked_fill(~_near(scores, seen), -math.inf)
    if seen.mask is None:
        return scores
    b, j, g, t, u = scores.shape
    mask = seen.mask.expand(b, j * g, t, u).unflatten(1, (j, g))
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _near(scores: Tensor, seen: Pattern) -> Tensor:
    """Whether window and spans let a query see a key, ``[T, U]``."""
    row = torch.arange(scores.shape[3], device=scores.device).unsqueeze(1)
    column = torch.arange(scores.shape[4], device=scores.device)
    near = torch.ones(scores.shape[3:], dtype=torch.bool, device=scores.device)
    if seen.left >= 0:
        near = near & (row - column <= seen.left)
    if seen.right >= 0:
        near = near & (column - row <= seen.right)
    if seen.spans is not None:
        first, end = seen.spans.unsqueeze(2)
        near = near & (first <= column) & (column < end)
    return near


def _softmax_and_gradient(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, d: Tensor, factors: Tensor | None, seen: Pattern
) -> tuple[Tensor, Tensor]:
    """``P`` and ``dS = P (dP - rowsum(P dP))``, ``[B, J, g, T, U]``."""
    p = (_scores(q, k, seen) - lse.unsqueeze(4)).exp()
    dp = _times(torch.matmul(d, v.mT), factors)
    return p, p * (dp - (p * dp).sum(4, keepdim=True))
