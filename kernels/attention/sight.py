"""Device code of the attention kernels: which keys a query sees, its softmax, and what dropout leaves of it.

Windows, documents and the ends of both sides make an interval of the other side for each row of a program's own, found
once; a mask is read tile by tile. What is not given is None and costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def interval(first, length, others, before, after, spans_ptr, BLOCK: tl.constexpr):
    """``own, low, high [BLOCK]``: row ``own`` sees no others but those in ``[low, high)``, and none beyond the end.

    A row sees at most ``before`` places back and ``after`` ahead, and ``spans_ptr [2, length]`` the document it is in.
    Without either at its lower end, ``low`` is None.
    """
    own = first + tl.arange(0, BLOCK)
    low, high = None, tl.where(own < length, others, 0)
    if before is not None:
        low = own - before
    if after is not None:
        high = tl.minimum(high, own + after + 1)
    if spans_ptr is not None:
        begin = tl.load(spans_ptr + own, mask=own < length, other=others)
        low = begin if low is None else tl.maximum(low, begin)
        high = tl.minimum(high, tl.load(spans_ptr + length + own, mask=own < length, other=0))
    return own, low, high


@triton.jit
def extent(low, high, BLOCK: tl.constexpr):
    """The first of the others that any row sees, down to a multiple of BLOCK, and how many blocks there are."""
    begin = 0
    if low is not None:
        begin = tl.maximum(tl.min(low, 0), 0) // BLOCK * BLOCK
    return begin, tl.cdiv(tl.maximum(tl.max(high, 0) - begin, 0), BLOCK)


@triton.jit
def scores(products, scale, rows, other, head, mask):
    """``scale products + mask`` where a row sees the other, else -inf: ``[BLOCK_OWN, BLOCK_OTHER]``.

    ``rows`` is what :func:`interval` returns, ``mask`` a pointer, the number of heads of queries, and the strides of
    samples, heads, own rows and others.
    """
    own, low, high = rows
    mask_ptr, heads, by_sample, by_head, by_own, by_other = mask
    seen = other[None, :] < high[:, None]
    if low is not None:
        seen = seen & (low[:, None] <= other[None, :])
    found = scale * products
    if mask_ptr is not None:
        at_own = mask_ptr + head // heads * by_sample + head % heads * by_head + own.to(tl.int64) * by_own
        value = tl.load(at_own[:, None] + (other.to(tl.int64) * by_other)[None, :], mask=seen, other=0)
        # Booleans come as bytes.
        if mask_ptr.dtype.element_ty == tl.uint8:
            seen = seen & (value != 0)
        else:
            found += value.to(tl.float32)
    return tl.where(seen, found, -float("inf"))


@triton.jit
def softmax(products, lse, scale, rows, other, head, mask):
    """``exp(scores - lse)``: 0 where a row does not see the other, also if it sees none and ``lse`` is +inf."""
    return tl.exp(scores(products, scale, rows, other, head, mask) - lse)


@triton.jit
def kept(rows, other, head, dropout, KEYS: tl.constexpr):
    """What dropout multiplies the softmax by, ``[BLOCK_OWN, BLOCK_OTHER]``; 1 without.

    ``dropout`` is a pointer to the seed, the threshold less 2^31 (numbers of 32 bits arrive with a sign), the factor.
    """
    seed_ptr, threshold, factor = dropout
    found = 1.0
    if seed_ptr is not None:
        t, u = rows[0][:, None], other[None, :]
        if KEYS:
            t, u = other[None, :], rows[0][:, None]
        word, _, _, _ = tl.philox(tl.load(seed_ptr), u, t, head.to(tl.uint32), 0)
        found = tl.where((word ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold, factor, 0.0)
    return found
