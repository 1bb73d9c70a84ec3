"""Attention by its definition: softmax and products of whole matrices, by plain autograd."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastreg.kernels import Pattern, attention_forward


def visible(shape: tuple[int, int, int, int], pattern: Pattern) -> Tensor:
    """``[B, H, T, U]`` bool."""
    i, j = torch.arange(shape[2])[:, None], torch.arange(shape[3])
    near = torch.ones(shape[2:], dtype=torch.bool)
    if pattern.left >= 0:
        near &= i - j <= pattern.left
    if pattern.right >= 0:
        near &= j - i <= pattern.right
    if pattern.spans is not None:
        near &= (pattern.spans[0][:, None] <= j) & (j < pattern.spans[1][:, None])
    if pattern.mask is None:
        return near.expand(shape)
    return near & (pattern.mask if pattern.mask.dtype == torch.bool else pattern.mask > -math.inf)


def explicit(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, factors: Tensor | float = 1.0) -> Tensor:
    """``(M softmax(c q k^T + mask)) v``; 0 where a query sees no key."""
    shape = (*q.shape[:3], k.shape[2])
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * pattern.scale
    if pattern.mask is not None and pattern.mask.is_floating_point():
        scores = scores + pattern.mask.clamp(min=-1e300)
    seen = visible(shape, pattern)
    alive = seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen & alive, -math.inf).softmax(-1) * alive
    return (weights * factors) @ v


def drawn_factors(shape: tuple[int, int, int, int], pattern: Pattern) -> Tensor:
    """The dropout factors ``[B, H, T, U]`` as an output shows them: uniform softmax, values one-hot."""
    _, _, queries, keys = shape
    zeros = torch.zeros(*shape[:2], queries, keys, dtype=torch.float64)
    values = torch.eye(keys, dtype=torch.float64).expand(*shape[:2], keys, keys)
    drop = Pattern(seed=pattern.seed, dropout=pattern.dropout)
    return keys * attention_forward(zeros, zeros[:, :, :1].expand_as(values), values, *drop)[0]


def second_order(function: Callable[..., Tensor], operands: list[Tensor], directions: list[Tensor]) -> list[Tensor]:
    """Output, gradients of ``<d, out>``, and those of ``<directions, gradients>`` for d and the operands."""
    d, *ways = directions
    d = d.detach().requires_grad_()
    out = function(*operands)
    grads = torch.autograd.grad(out, operands, d, create_graph=True)
    functional = sum((g * way).sum() for g, way in zip(grads, ways, strict=True))
    return [out, *grads, *torch.autograd.grad(functional, [d, *operands])]
