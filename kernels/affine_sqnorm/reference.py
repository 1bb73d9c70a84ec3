"""Plain torch form of affine_sqnorm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._segments import of


def affine_sqnorm(
    x: Tensor, d: Tensor, offsets: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x [S, C, P], d [S, C, P] -> sq_scale [m], sq_bias [m], scale [m, C], bias [m, C]``."""
    dtype = accumulator(x.dtype)
    found = of(offsets)
    x, d = x.to(dtype), d.to(dtype)
    scale = found.per_segment([part.sum(1) for part in found.split((x * d).sum(2))])
    bias = found.per_segment([part.sum(1) for part in found.split(d.sum(2))])
    return scale.square().sum(1), bias.square().sum(1), scale, bias
