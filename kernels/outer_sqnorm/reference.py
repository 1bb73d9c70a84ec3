"""Plain torch form of outer_sqnorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._segments import of

# Elements of the transient gradients held at once by the dense form: 16 MB in float32, inside a
# last-level cache, so that squaring them does not go to memory.
DENSE_ELEMENTS = 1 << 22


def prefers_quadratic(size: float, inputs: int, outputs: int) -> bool:
    """Whether pairs of rows cost less than gradients: 2 s (I + O) against 2 I O per row."""
    return size * (inputs + outputs) < inputs * outputs


def rank_one(a: Tensor, d: Tensor, bias: bool) -> Tensor:
    """``[n, 1, I], [n, 1, O] -> [n]``: ``(|a|^2 + bias) |d|^2``."""
    return (a.square().sum((1, 2)) + int(bias)) * d.square().sum((1, 2))


def quadratic(a: Tensor, d: Tensor, bias: bool) -> Tensor:
    """``[n, s, I], [n, s, O] -> [n]``: sum over pairs of rows of ``(a_s.a_t + bias) (d_s.d_t)``."""
    pairs = torch.bmm(a, a.mT)
    if bias:
        pairs += 1
    return (pairs * torch.bmm(d, d.mT)).sum((1, 2))


def dense(a: Tensor, d: Tensor, bias: bool) -> Tensor:
    """``[n, s, I], [n, s, O] -> [n]``: squares of the gradients themselves, a block at a time."""
    block = max(1, DENSE_ELEMENTS // max(1, a.shape[2] * d.shape[2]))
    parts = [
        torch.bmm(d_block.mT, a_block).square().sum((1, 2))
        for a_block, d_block in zip(a.split(block), d.split(block), strict=True)
    ]
    sq = torch.cat(parts)
    return sq + d.sum(1).square().sum(1) if bias else sq


def equal_segments(a: Tensor, d: Tensor, bias: bool) -> Tensor:
    """``[n, s, I], [n, s, O] -> [n]`` by the cheapest form."""
    size = a.shape[1]
    if size == 1:
        return rank_one(a, d, bias)
    if prefers_quadratic(size, a.shape[2], d.shape[2]):
        return quadratic(a, d, bias)
    return dense(a, d, bias)


def outer_sqnorm(a: Tensor, d: Tensor, offsets: Sequence[int], bias: bool) -> Tensor:
    """``a [S, I], d [S, O] -> sq [m]``."""
    dtype = accumulator(a.dtype)
    found = of(offsets)
    parts = zip(found.split(a.to(dtype)), found.split(d.to(dtype)), strict=True)
    return found.per_segment([equal_segments(a_part, d_part, bias) for a_part, d_part in parts])
