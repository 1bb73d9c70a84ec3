"""Plain torch form of index_sqnorm: sort, segment-sum, scatter back; no data-dependent shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._segments import of


def equal_runs(segment: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """``[S], [S] -> order [S], run [S]``: rows sorted by (segment, index) and the run each is in."""
    order = torch.argsort(index, stable=True)
    order = order[torch.argsort(segment[order], stable=True)]
    segment, index = segment[order], index[order]
    starts = torch.zeros_like(order)
    starts[1:] = (segment[1:] != segment[:-1]) | (index[1:] != index[:-1])
    return order, starts.cumsum(0)


def index_sqnorm(index: Tensor, d: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``index [S], d [S, D] -> sq [m], shared [S, D]``."""
    found = of(offsets)
    rows = d.to(accumulator(d.dtype))
    order, run = equal_runs(found.segment_of_row(d.device), index)
    sums = torch.zeros_like(rows).index_add(0, run, rows[order])
    shared = torch.empty_like(rows).index_copy(0, order, sums[run])
    products = (rows * shared).sum(1)
    sq = found.per_segment([part.sum(1) for part in found.split(products)])
    return sq, shared.to(d.dtype)
