"""C++ form of outer_apply, for short segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation
from fastreg.kernels._segments import of
from fastreg.kernels.outer_apply.reference import added

_CALLS = _native.calls("outer_apply")

# Rows per segment up to which this beats two batched products, by 1.0 to 2.7 times (float32, two threads; one thread:
# 0.9 to 2.0). At 128 rows it is 0.8 to 0.9 where most of the work is the second product, and 1.1 to 1.3 where it is
# the symmetric first one.
LONGEST = 64
LONGEST_SYMMETRIC = 256


def outer_apply(
    q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], bias: bool, factors: Tensor | None, onto: Tensor | None
) -> Tensor:
    """``q [S, I], k [S, I], v [S, O], factors [m], onto [S, O] -> out [S, O]``."""
    # The symmetric case is told by identity.
    same = q.data_ptr() == k.data_ptr() and q.stride() == k.stride()
    q, v, found = q.contiguous(), v.contiguous(), of(offsets)
    k = q if same else k.contiguous()
    out = torch.empty_like(v)
    _CALLS[v.dtype](
        q.data_ptr(), k.data_ptr(), v.data_ptr(), found.pointer, out.data_ptr(),
        q.shape[1], v.shape[1], found.count, bias, torch.get_num_threads(),
    )  # fmt: skip
    return added(out, found, factors, onto)


def slower(q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], *_rest: object) -> str | None:
    """The measured reason to leave a call to the reference, or None."""
    symmetric = q.data_ptr() == k.data_ptr() and q.shape[1] >= v.shape[1]
    longest = LONGEST_SYMMETRIC if symmetric else LONGEST
    if q.shape[0] > longest * (len(offsets) - 1):
        return f"beyond {longest} rows per segment, torch.bmm is faster at these sizes"
    return None


IMPLEMENTATION = Implementation("native", outer_apply, _native.why_not, slower)
