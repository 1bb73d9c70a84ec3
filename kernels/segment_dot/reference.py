"""Plain torch form of segment_dot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._segments import of


def segment_dot(x: Tensor, y: Tensor, offsets: Sequence[int]) -> Tensor:
    """``x [S, N], y [S, N] -> [m]``; a batched vector product, so ``x * y`` is never stored."""
    dtype = accumulator(x.dtype)
    found = of(offsets)
    parts = zip(found.split(x.to(dtype)), found.split(y.to(dtype)), strict=True)
    dots = [torch.bmm(xs.flatten(1).unsqueeze(1), ys.flatten(1).unsqueeze(2)).flatten() for xs, ys in parts]
    return found.per_segment(dots)
