"""Plain torch form of outer_sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._segments import of
from fastreg.kernels.outer_sqnorm.reference import DENSE_ELEMENTS, equal_segments, prefers_quadratic


def dense(a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """``[n, s, I], [n, s, O] -> [O, I], [n]``: each gradient is made once, squared and added."""
    inputs, outputs = a.shape[2], d.shape[2]
    block = max(1, DENSE_ELEMENTS // max(1, inputs * outputs))
    total = a.new_zeros(outputs, inputs)
    sq = []
    for a_block, d_block in zip(a.split(block), d.split(block), strict=True):
        gradients = torch.bmm(d_block.mT, a_block)
        total += gradients.sum(0)
        sq.append(gradients.square().sum((1, 2)))
    return total, torch.cat(sq)


def equal_segments_sum(a: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """``[n, s, I], [n, s, O] -> [O, I], [n]`` by the cheapest form."""
    if prefers_quadratic(a.shape[1], a.shape[2], d.shape[2]):
        return torch.mm(d.flatten(0, 1).mT, a.flatten(0, 1)), equal_segments(a, d, False)
    return dense(a, d)


def outer_sum(a: Tensor, d: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``a [S, I], d [S, O] -> total [O, I], sq [m]``."""
    dtype = accumulator(a.dtype)
    found = of(offsets)
    parts = zip(found.split(a.to(dtype)), found.split(d.to(dtype)), strict=True)
    totals, norms = zip(*(equal_segments_sum(*part) for part in parts), strict=True)
    total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
    return total.to(a.dtype), found.per_segment(list(norms))
