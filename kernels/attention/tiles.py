"""Device code of the attention kernels: the order of programs, rows of a head, products of tiles.

A program holds a block of rows of one side, its own, and goes over the rows of the other side: queries over keys, or
keys over queries (KEYS). Letters: E features. Tensors are contiguous ``[heads, rows, E]``; a head of keys serves GROUP
consecutive heads of queries. Rows beyond the end read as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.kernels._tiles import dot, rounded


@triton.jit
def block(length, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Head and first row of this program's block; the blocks of a head follow each other."""
    blocks = tl.cdiv(length, BLOCK)
    place = tl.program_id(0) % blocks
    # In causal attention the last queries see most keys, and the first keys are seen most: long programs go first.
    if not KEYS:
        place = blocks - 1 - place
    return (tl.program_id(0) // blocks).to(tl.int64), place * BLOCK


@triton.jit
def step(n, begin, count, own_head, BLOCK: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr):
    """In step n of ``count`` for each head: head of queries, head of the other side, and the first row of it."""
    head, place = own_head, n
    if KEYS:
        head = own_head * GROUP
        if GROUP > 1:
            head += n // count
            place = n % count
    other_head = head
    if not KEYS:
        other_head = head // GROUP
    return head, other_head, begin + place * BLOCK


@triton.jit
def rows(x_ptr, head, first, length, E: tl.constexpr, BLOCK: tl.constexpr):
    """Addresses of BLOCK rows of a head, and which of them exist: ``[BLOCK, 1]`` each."""
    offs = first + tl.arange(0, BLOCK)
    return x_ptr + head * length * E + offs[:, None] * E, (offs < length)[:, None]


@triton.jit
def features(ptrs, exist, first, E: tl.constexpr, COUNT: tl.constexpr):
    """COUNT features of rows, ``[BLOCK, COUNT]``."""
    columns = first + tl.arange(0, COUNT)[None, :]
    return tl.load(ptrs + columns, mask=exist & (columns < E), other=0.0)


@triton.jit
def read(x_ptr, head, first, length, E: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """BLOCK rows of a head: ``[BLOCK, DEPTH]``; if they are longer than DEPTH, where they are. None of None."""
    found = None
    if x_ptr is not None:
        ptrs, exist = rows(x_ptr, head, first, length, E, BLOCK)
        found = ptrs, exist
        if E <= DEPTH:
            found = features(ptrs, exist, 0, E, DEPTH)
    return found


@triton.jit
def write(x_ptr, x, head, first, length, column, E: tl.constexpr):
    """``x [BLOCK, BLOCK_E]`` to features from ``column`` of the rows of a head that exist."""
    ptrs, exist = rows(x_ptr, head, first, length, E, x.shape[0])
    columns = column + tl.arange(0, x.shape[1])[None, :]
    tl.store(ptrs + columns, rounded(x, x_ptr.dtype.element_ty), mask=exist & (columns < E))


@triton.jit
def scalars(x_ptr, head, first, length, other, BLOCK: tl.constexpr):
    """One number for each of BLOCK rows of a head, ``[BLOCK]``; ``other`` for rows beyond the end."""
    offs = first + tl.arange(0, BLOCK)
    return tl.load(x_ptr + head * length + offs, mask=offs < length, other=other).to(tl.float32)


@triton.jit
def write_scalars(x_ptr, x, head, first, length):
    """``x [BLOCK]`` to the rows of a head that exist."""
    offs = first + tl.arange(0, x.shape[0])
    tl.store(x_ptr + head * length + offs, x, mask=offs < length)


@triton.jit
def pairs(a, b, acc, E: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + a b^T`` for ``a [M, E], b [N, E]``, ``acc [M, N]`` float32."""
    if E <= DEPTH:
        acc = dot(a, tl.trans(b), acc, PRECISION)
    else:
        for first in range(0, E, DEPTH):
            part = tl.trans(features(b[0], b[1], first, E, DEPTH))
            acc = dot(features(a[0], a[1], first, E, DEPTH), part, acc, PRECISION)
    return acc


@triton.jit
def weigh(weights, x, acc, column, E: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + weights x`` for float32 ``weights [M, N]``, rounded to the dtype of ``x [N, E]``.

    ``acc [M, BLOCK_E]`` has the features from ``column``: all of them, if a program holds rows as a whole.
    """
    if E > DEPTH:
        x = features(x[0], x[1], column, E, acc.shape[1])
    return dot(rounded(weights, x.dtype), x, acc, PRECISION)
