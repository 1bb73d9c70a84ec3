"""C++ form of index_sqnorm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation
from fastreg.kernels._segments import of

_CALLS = _native.calls("index_sqnorm")


def index_sqnorm(index: Tensor, d: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``index [S], d [S, D] -> sq [m], shared [S, D]``."""
    index, d, found = index.contiguous(), d.contiguous(), of(offsets)
    sq, shared = d.new_empty(found.count), torch.empty_like(d)
    _CALLS[d.dtype](
        index.data_ptr(), d.data_ptr(), found.pointer, sq.data_ptr(), shared.data_ptr(),
        d.shape[1], found.count, torch.get_num_threads(),
    )  # fmt: skip
    return sq, shared


def why_not(_index: Tensor, d: Tensor, _offsets: Sequence[int]) -> str | None:
    """As for every native op, asked of the data."""
    return _native.why_not(d)


IMPLEMENTATION = Implementation("native", index_sqnorm, why_not)
