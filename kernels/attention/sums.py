"""Kernel of the sums over keys that the derivatives of attention need before any gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.kernels.attention.sight import extent, interval, kept, softmax
from fastreg.kernels.attention.tiles import block, pairs, read, scalars, step, write_scalars


@triton.jit
def attention_sums_kernel(
    q_ptr,  # [heads, T, E]
    d_ptr,  # [heads, T, E]
    vq_ptr,  # [heads, T, E], or None
    k_ptr,  # [heads / GROUP, U, E]
    v_ptr,  # [heads / GROUP, U, E]
    vk_ptr,  # [heads / GROUP, U, E], or None
    vv_ptr,  # [heads / GROUP, U, E], or None
    lse_ptr,  # [heads, T]
    sums_ptr,  # rowsum(P dP); with directions also rowsum(P R) and rowsum(Z): [heads, 1 or 3, T]
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
    SUMS: tl.constexpr,
    E: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    own_head, first = block(own_length, BLOCK_OWN, KEYS)
    rows = interval(first, own_length, other_length, before, after, spans_ptr, BLOCK_OWN)
    begin, count = extent(rows[1], rows[2], BLOCK_OTHER)
    mask = mask_ptr, heads, by_sample, by_head, by_own, by_other
    q = read(q_ptr, own_head, first, own_length, E, BLOCK_OWN, DEPTH)
    d = read(d_ptr, own_head, first, own_length, E, BLOCK_OWN, DEPTH)
    vq = read(vq_ptr, own_head, first, own_length, E, BLOCK_OWN, DEPTH)
    lse = scalars(lse_ptr, own_head, first, own_length, float("inf"), BLOCK_OWN)[:, None]
    blank = tl.zeros([BLOCK_OWN, BLOCK_OTHER], dtype=tl.float32)
    total = tl.zeros([BLOCK_OWN], dtype=tl.float32)
    delta = tl.zeros([BLOCK_OWN], dtype=tl.float32)
    rho = tl.zeros([BLOCK_OWN], dtype=tl.float32)
    zeta = tl.zeros([BLOCK_OWN], dtype=tl.float32)
    for n in tl.range(0, count, disable_licm=True):
        head, other_head, start = step(n, begin, count, own_head, BLOCK_OTHER, KEYS, GROUP)
        k = read(k_ptr, other_head, start, other_length, E, BLOCK_OTHER, DEPTH)
        v = read(v_ptr, other_head, start, other_length, E, BLOCK_OTHER, DEPTH)
        other = start + tl.arange(0, BLOCK_OTHER)
        m = kept(rows, other, head, (seed_ptr, threshold, factor), KEYS)
        p = softmax(pairs(q, k, blank, E, DEPTH, PRECISION), lse, scale, rows, other, head, mask)
        dp = m * pairs(d, v, blank, E, DEPTH, PRECISION)
        if SUMS == 1:
            delta += tl.sum(p * dp, 1)
        else:
            vk = read(vk_ptr, other_head, start, other_length, E, BLOCK_OTHER, DEPTH)
            vv = read(vv_ptr, other_head, start, other_length, E, BLOCK_OTHER, DEPTH)
            # Means of R and dP, and their covariance, as the keys go by: Welford's update, a tile at a time. The
            # difference of a mean product and a product of means would lose the digits that all keys have in common.
            total += tl.sum(p, 1)
            weight = tl.maximum(total, 1e-30)
            r = scale * pairs(vq, k, pairs(q, vk, blank, E, DEPTH, PRECISION), E, DEPTH, PRECISION)
            rho += tl.sum(p * (r - rho[:, None]), 1) / weight
            dp -= delta[:, None]
            delta += tl.sum(p * dp, 1) / weight
            # Rows of dS sum to zero, so those of dS R to the covariance.
            zeta += tl.sum(p * (m * pairs(d, vv, blank, E, DEPTH, PRECISION) + dp * (r - rho[:, None])), 1)
    write_scalars(sums_ptr, delta, own_head * SUMS, first, own_length)
    if SUMS == 3:
        write_scalars(sums_ptr, rho, own_head * SUMS + 1, first, own_length)
        write_scalars(sums_ptr, zeta, own_head * SUMS + 2, first, own_length)
