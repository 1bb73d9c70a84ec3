"""C++ form of affine_sqnorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation
from fastreg.kernels._segments import of

_CALLS = _native.calls("affine_sqnorm")


def affine_sqnorm(
    x: Tensor, d: Tensor, offsets: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x [S, C, P], d [S, C, P] -> sq_scale [m], sq_bias [m], scale [m, C], bias [m, C]``."""
    x, d, found = x.contiguous(), d.contiguous(), of(offsets)
    channels, places = x.shape[1:]
    sq_scale, sq_bias = x.new_empty(found.count), x.new_empty(found.count)
    scale, bias = x.new_empty(found.count, channels), x.new_empty(found.count, channels)
    _CALLS[x.dtype](
        x.data_ptr(), d.data_ptr(), found.pointer, sq_scale.data_ptr(), sq_bias.data_ptr(),
        scale.data_ptr(), bias.data_ptr(), channels, places, found.count, torch.get_num_threads(),
    )  # fmt: skip
    return sq_scale, sq_bias, scale, bias


IMPLEMENTATION = Implementation("native", affine_sqnorm, _native.why_not)
