"""Plain torch form of outer_apply."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._segments import Segments, of


def prefers_quadratic(size: int, inputs: int, outputs: int) -> bool:
    """Whether pairs of rows cost less than states: 2 s (I + O) against 4 I O per row."""
    return size * (inputs + outputs) < 2 * inputs * outputs


def quadratic(q: Tensor, k: Tensor, v: Tensor, bias: bool) -> Tensor:
    """``(Q K^T + bias) V`` of each segment."""
    pairs = torch.bmm(q, k.mT)
    if bias:
        pairs += 1
    return torch.bmm(pairs, v)


def state(q: Tensor, k: Tensor, v: Tensor, bias: bool) -> Tensor:
    """``Q (K^T V)`` of each segment, plus the sum of V with bias."""
    out = torch.bmm(q, torch.bmm(k.mT, v))
    return out + v.sum(1, keepdim=True) if bias else out


def equal_segments(q: Tensor, k: Tensor, v: Tensor, bias: bool) -> Tensor:
    """``[n, s, I], [n, s, I], [n, s, O] -> [n, s, O]`` by the cheapest form."""
    size = q.shape[1]
    if size == 1:
        return ((q * k).sum(2, keepdim=True) + int(bias)) * v
    if prefers_quadratic(size, q.shape[2], v.shape[2]):
        return quadratic(q, k, v, bias)
    return state(q, k, v, bias)


def by_states(
    q: Tensor, k: Tensor, v: Tensor, found: Segments, bias: bool, factors: Tensor | None, onto: Tensor | None
) -> Tensor:
    """:func:`outer_apply` through the states of the segments; bfloat16 products are multiplied as such."""
    wide = accumulator(q.dtype)
    # The sums of a state leave the range of float16.
    narrow = wide if q.dtype == torch.float16 else q.dtype
    parts = zip(*(found.split(x.to(narrow)) for x in (q, k, v)), strict=True)
    out = found.per_row([torch.bmm(qs, torch.bmm(ks.mT, vs)) for qs, ks, vs in parts]).to(wide)
    if bias:
        sums = [part.sum(1, keepdim=True, dtype=wide).expand(part.shape) for part in found.split(v)]
        out += found.per_row(sums)
    return added(out, found, factors, onto).to(v.dtype)


def added(out: Tensor, found: Segments, factors: Tensor | None, onto: Tensor | None) -> Tensor:
    """``onto + factors_k * out``, either of which may be missing; ``out`` is overwritten."""
    if factors is not None:
        out *= found.spread(factors.to(out.dtype)).unsqueeze(1)
    return out if onto is None else out.add_(onto)


def outer_apply(
    q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], bias: bool, factors: Tensor | None, onto: Tensor | None
) -> Tensor:
    """``q [S, I], k [S, I], v [S, O], factors [m], onto [S, O] -> out [S, O]``."""
    dtype = accumulator(q.dtype)
    found = of(offsets)
    qs, ks, vs = (found.split(x.to(dtype)) for x in (q, k, v))
    out = found.per_row([equal_segments(*part, bias) for part in zip(qs, ks, vs, strict=True)])
    return added(out, found, factors, onto).to(v.dtype)
