"""Micro-batches side by side along the channels, and back to rows, for one convolution over all of them.

Segments are ``[m, b, C, *S]``, rows ``[m b, C, *S]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.micro_batches import aligned


def beside(x: Tensor) -> Tensor:
    """``[m, b, C, *S] -> [b, m C, *S]``: segments side by side along the channels; a copy if ``b > 1``."""
    return x.transpose(0, 1).flatten(1, 2)


def apart(x: Tensor, count: int) -> Tensor:
    """``[b, m C, *S] -> [m, b, C, *S]``, the inverse of :func:`beside`; a view."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def scaled_rows(segments: Tensor, factors: Tensor, onto: Tensor | None) -> Tensor:
    """``onto + factors_k * segments`` in rows, in one pass over any layout of segments; ``onto`` is overwritten."""
    factors = aligned(factors, segments)
    if onto is not None:
        onto.unflatten(0, segments.shape[:2]).addcmul_(segments, factors)
        return onto
    return torch.mul(segments, factors, out=segments.new_empty(segments.shape)).flatten(0, 1)
