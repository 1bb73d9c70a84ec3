"""C++ form of segment_dot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation
from fastreg.kernels._segments import of

_CALLS = _native.calls("segment_dot")


def segment_dot(x: Tensor, y: Tensor, offsets: Sequence[int]) -> Tensor:
    """``x [S, N], y [S, N] -> [m]``."""
    x, y, found = x.contiguous(), y.contiguous(), of(offsets)
    out = x.new_empty(found.count)
    _CALLS[x.dtype](
        x.data_ptr(), y.data_ptr(), found.pointer, out.data_ptr(),
        x.shape[1], found.count, torch.get_num_threads(),
    )  # fmt: skip
    return out


IMPLEMENTATION = Implementation("native", segment_dot, _native.why_not)
