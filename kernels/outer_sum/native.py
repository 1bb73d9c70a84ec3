"""C++ form of outer_sum: register tiles, or pairs of rows beside torch's product for short segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation
from fastreg.kernels._segments import of
from fastreg.kernels.outer_sqnorm.native import mean_rows, pairs, prefers_pairs, streamed

_CALLS = _native.calls("outer_sum")


def outer_sum(a: Tensor, d: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``a [S, I], d [S, O] -> total [O, I], sq [m]``."""
    a, d, found = a.contiguous(), d.contiguous(), of(offsets)
    if prefers_pairs(mean_rows(a, offsets), a.shape[1], d.shape[1]):
        return torch.mm(d.mT, a), pairs(a, d, found, False)
    total, sq = a.new_empty(d.shape[1], a.shape[1]), a.new_empty(found.count)
    _CALLS[a.dtype](
        a.data_ptr(), d.data_ptr(), found.pointer, total.data_ptr(), sq.data_ptr(),
        a.shape[1], d.shape[1], found.count, torch.get_num_threads(),
    )  # fmt: skip
    return total, sq


def slower(a: Tensor, d: Tensor, _offsets: Sequence[int]) -> str | None:
    """The measured reason to leave a call to the reference, or None."""
    return streamed(a, d)


IMPLEMENTATION = Implementation("native", outer_sum, _native.why_not, slower)
