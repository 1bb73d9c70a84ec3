"""Kernel of attention's forward pass: softmax as the keys go by, and its log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.kernels.attention.sight import extent, interval, kept, scores
from fastreg.kernels.attention.tiles import block, pairs, read, step, weigh, write, write_scalars


@triton.jit
def attention_forward_kernel(
    q_ptr,  # [heads, T, E]
    k_ptr,  # [heads / GROUP, U, E]
    v_ptr,  # [heads / GROUP, U, E]
    out_ptr,  # [heads, T, E]
    lse_ptr,  # [heads, T]
    own_length,
    other_length,
    scale,
    before,
    after,
    spans_ptr,  # [2, own_length], or None
    mask_ptr,  # strides below, or None
    heads,
    by_sample,
    by_head,
    by_own,
    by_other,
    seed_ptr,  # [1], or None
    threshold,
    factor,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    E: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    own_head, first = block(own_length, BLOCK_OWN, KEYS)
    column = tl.program_id(1) * BLOCK_E
    rows = interval(first, own_length, other_length, before, after, spans_ptr, BLOCK_OWN)
    begin, count = extent(rows[1], rows[2], BLOCK_OTHER)
    mask = mask_ptr, heads, by_sample, by_head, by_own, by_other
    q = read(q_ptr, own_head, first, own_length, E, BLOCK_OWN, DEPTH)
    largest = tl.full([BLOCK_OWN], -float("inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_OWN], dtype=tl.float32)
    out = tl.zeros([BLOCK_OWN, BLOCK_E], dtype=tl.float32)
    blank = tl.zeros([BLOCK_OWN, BLOCK_OTHER], dtype=tl.float32)
    for n in tl.range(0, count, disable_licm=True):
        head, other_head, start = step(n, begin, count, own_head, BLOCK_OTHER, KEYS, GROUP)
        k = read(k_ptr, other_head, start, other_length, E, BLOCK_OTHER, DEPTH)
        v = read(v_ptr, other_head, start, other_length, E, BLOCK_OTHER, DEPTH)
        other = start + tl.arange(0, BLOCK_OTHER)
        found = scores(pairs(q, k, blank, E, DEPTH, PRECISION), scale, rows, other, head, mask)
        largest_yet = tl.maximum(largest, tl.max(found, 1))
        # A query that has seen no key yet: differences of infinities are NaN.
        shift = tl.where(largest_yet == -float("inf"), 0.0, largest_yet)
        shrink, p = tl.exp(largest - shift), tl.exp(found - shift[:, None])
        total = total * shrink + tl.sum(p, 1)
        p *= kept(rows, other, head, (seed_ptr, threshold, factor), KEYS)
        out = weigh(p, v, out * shrink[:, None], column, E, DEPTH, PRECISION)
        largest = largest_yet
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    write(out_ptr, out / total[:, None], own_head, first, own_length, column, E)
    lse = tl.where(blind, float("inf"), largest + tl.log(total))
    write_scalars(lse_ptr, lse, own_head, first, own_length)
