"""C++ form of outer_apply, for short segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation
from fastreg.kernels._segments import of

_CALLS = _native.calls("outer_apply")

# Rows per segment up to which one pass beats two batched products: 1.1 to 5 times at 1 to 8 rows, and
# at 16 rows 1.3 to 2 times unless rows are short, when summing registers dominates (0.7); at 32 rows
# 0.4 to 1.5, at 128 rows 0.1 to 0.9 (float32, one thread).
LONGEST = 16
LONGEST_SHORT_ROWS = 8
SHORT_ROW = 256


def outer_apply(q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], bias: bool) -> Tensor:
    """``q [S, I], k [S, I], v [S, O] -> out [S, O]``."""
    q, k, v, found = q.contiguous(), k.contiguous(), v.contiguous(), of(offsets)
    out = torch.empty_like(v)
    _CALLS[v.dtype](
        q.data_ptr(), k.data_ptr(), v.data_ptr(), found.pointer, out.data_ptr(),
        q.shape[1], v.shape[1], found.count, bias, torch.get_num_threads(),
    )  # fmt: skip
    return out


def slower(q: Tensor, _k: Tensor, v: Tensor, offsets: Sequence[int], _bias: bool) -> str | None:
    """The measured reason to leave a call to the reference, or None."""
    size = q.shape[0] / (len(offsets) - 1)
    longest = LONGEST_SHORT_ROWS if q.shape[1] + v.shape[1] < SHORT_ROW else LONGEST
    if size > longest:
        return f"beyond {longest} rows per segment, torch.bmm is faster at these sizes"
    return None


IMPLEMENTATION = Implementation("native", outer_apply, _native.why_not, slower)
