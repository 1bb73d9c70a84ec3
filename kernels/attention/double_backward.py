"""Kernel of attention's double backward: gradients of one side's rows, queries or keys.

``x`` are the queries or the keys; ``y`` are the gradients of the queries' results, or the values; ``vx, vy`` are their
directions, of which d has none. With own rows and the others, whichever side is which: ``S = c x x'^T``,
``dP = M (y y'^T)``, ``R = c (vx x'^T + x vx'^T)``, ``Z = P M (y vy'^T or vy y'^T) + dS R``; gradient of ``x``:
``c (Z x' + dS vx')``; of ``y``: ``(M P R) y' + (M P) vy'``, where there is a ``vy'``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.kernels.attention.sight import extent, interval, kept, softmax
from fastreg.kernels.attention.tiles import block, pairs, read, scalars, step, weigh, write


@triton.jit
def attention_double_backward_kernel(
    x_ptr,  # [own heads, own_length, E]
    y_ptr,  # [own heads, own_length, E]
    vx_ptr,  # [own heads, own_length, E]
    vy_ptr,  # [own heads, own_length, E], or None
    other_x_ptr,  # [other heads, other_length, E]
    other_y_ptr,  # [other heads, other_length, E]
    other_vx_ptr,  # [other heads, other_length, E]
    other_vy_ptr,  # [other heads, other_length, E], or None
    lse_ptr,  # [heads, T]
    sums_ptr,  # rowsum(P dP), rowsum(P R), rowsum(Z): [heads, 3, T]
    grad_x_ptr,  # [own heads, own_length, E], or None
    grad_y_ptr,  # [own heads, own_length, E], or None
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
    x = read(x_ptr, own_head, first, own_length, E, BLOCK_OWN, DEPTH)
    y = read(y_ptr, own_head, first, own_length, E, BLOCK_OWN, DEPTH)
    vx = read(vx_ptr, own_head, first, own_length, E, BLOCK_OWN, DEPTH)
    vy = read(vy_ptr, own_head, first, own_length, E, BLOCK_OWN, DEPTH)
    if not KEYS:
        lse = scalars(lse_ptr, own_head, first, own_length, float("inf"), BLOCK_OWN)[:, None]
        delta = scalars(sums_ptr, 3 * own_head, first, own_length, 0.0, BLOCK_OWN)[:, None]
        rho = scalars(sums_ptr, 3 * own_head + 1, first, own_length, 0.0, BLOCK_OWN)[:, None]
        zeta = scalars(sums_ptr, 3 * own_head + 2, first, own_length, 0.0, BLOCK_OWN)[:, None]
    grad = tl.zeros([BLOCK_OWN, BLOCK_E], dtype=tl.float32)
    blank = tl.zeros([BLOCK_OWN, BLOCK_OTHER], dtype=tl.float32)
    for n in tl.range(0, count * (GROUP if KEYS else 1), disable_licm=True):
        head, other_head, start = step(n, begin, count, own_head, BLOCK_OTHER, KEYS, GROUP)
        other_x = read(other_x_ptr, other_head, start, other_length, E, BLOCK_OTHER, DEPTH)
        other_y = read(other_y_ptr, other_head, start, other_length, E, BLOCK_OTHER, DEPTH)
        other_vx = read(other_vx_ptr, other_head, start, other_length, E, BLOCK_OTHER, DEPTH)
        other_vy = read(other_vy_ptr, other_head, start, other_length, E, BLOCK_OTHER, DEPTH)
        if KEYS:
            lse = scalars(lse_ptr, head, start, other_length, float("inf"), BLOCK_OTHER)[None, :]
            delta = scalars(sums_ptr, 3 * head, start, other_length, 0.0, BLOCK_OTHER)[None, :]
            rho = scalars(sums_ptr, 3 * head + 1, start, other_length, 0.0, BLOCK_OTHER)[None, :]
            zeta = scalars(sums_ptr, 3 * head + 2, start, other_length, 0.0, BLOCK_OTHER)[None, :]
        other = start + tl.arange(0, BLOCK_OTHER)
        m = kept(rows, other, head, (seed_ptr, threshold, factor), KEYS)
        p = softmax(pairs(x, other_x, blank, E, DEPTH, PRECISION), lse, scale, rows, other, head, mask)
        r = pairs(vx, other_x, pairs(x, other_vx, blank, E, DEPTH, PRECISION), E, DEPTH, PRECISION)
        r = scale * r - rho
        if grad_y_ptr is not None:
            grad = weigh(m * p * r, other_y, grad, column, E, DEPTH, PRECISION)
            if other_vy_ptr is not None:
                grad = weigh(m * p, other_vy, grad, column, E, DEPTH, PRECISION)
        if grad_x_ptr is not None:
            ds = p * (m * pairs(y, other_y, blank, E, DEPTH, PRECISION) - delta)
            grad = weigh(ds, other_vx, grad, column, E, DEPTH, PRECISION)
            if KEYS:
                z = pairs(vy, other_y, blank, E, DEPTH, PRECISION)
            else:
                z = pairs(y, other_vy, blank, E, DEPTH, PRECISION)
            grad = weigh(p * (m * z - zeta) + ds * r, other_x, grad, column, E, DEPTH, PRECISION)
    if grad_x_ptr is not None:
        write(grad_x_ptr, scale * grad, own_head, first, own_length, column, E)
    if grad_y_ptr is not None:
        write(grad_y_ptr, grad, own_head, first, own_length, column, E)
