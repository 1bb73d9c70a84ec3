"""Plain torch form of segment_sum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._segments import of


def segment_sum(x: Tensor, offsets: Sequence[int]) -> Tensor:
    """``x [S, N] -> [m, N]``."""
    found, wide = of(offsets), accumulator(x.dtype)
    return found.per_segment([part.sum(1, dtype=wide) for part in found.split(x)])
