"""Kernels of the norm layers that hold all numbers which are normalised together, and read each once.

Rows are (sample, group) pairs of K channels with P places each. A program of a derivative takes samples of one segment,
so that its sums over them belong to that segment.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.kernels.norm_affine.rows import cut, jacobian, of_rows, row_sum, second_order, wide


@triton.jit
def norm_kernel(
    x_ptr,  # [S, G, K, P]
    weight_ptr,  # [G, K], or None
    bias_ptr,  # [G, K], or None
    y_ptr,  # [S, G, K, P]
    mean_ptr,  # [S, G]
    rstd_ptr,  # [S, G]
    S,
    K,
    P,
    eps,
    CENTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    group = tl.program_id(1)
    samples = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows, exist = samples * tl.num_programs(1) + group, samples < S
    channels, inside, mask_w = cut(0, 0, K, P, BLOCK_C, BLOCK_P)
    offs, mask = rows[:, None, None] * (K * P) + inside, exist[:, None, None] & mask_w
    x = wide(x_ptr, offs, mask)  # [BLOCK_R, BLOCK_C, BLOCK_P]
    if CENTER:
        mean = row_sum(x) / (K * P)
        x = tl.where(mask, x - mean, 0.0)
    else:
        mean = tl.zeros([BLOCK_R, 1, 1], dtype=tl.float32)
    rstd = tl.math.rsqrt(row_sum(x * x) / (K * P) + eps)
    y = x * rstd
    if weight_ptr is not None:
        y *= wide(weight_ptr, group * K + channels, channels < K)
    if bias_ptr is not None:
        y += wide(bias_ptr, group * K + channels, channels < K)
    tl.store(y_ptr + offs, y, mask=mask)
    tl.store(rstd_ptr + rows[:, None, None], rstd, mask=exist[:, None, None])
    tl.store(mean_ptr + rows[:, None, None], mean, mask=exist[:, None, None])


@triton.jit
def norm_backward_kernel(
    x_ptr,  # [S, G, K, P]
    mean_ptr,  # [S, G], or None
    rstd_ptr,  # [S, G]
    weight_ptr,  # [G, K], or None
    d_ptr,  # [S, G, K, P]
    offsets_ptr,  # [m + 1]
    dx_ptr,  # [S, G, K, P]
    sums_ptr,  # scale and bias: [2, m, parts, G, K], or None
    K,
    P,
    parts,
    CENTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    run, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    segment, part = run // parts, run % parts
    begin, end = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    channels, inside, mask_w = cut(0, 0, K, P, BLOCK_C, BLOCK_P)
    scale = tl.zeros([BLOCK_R, BLOCK_C, 1], dtype=tl.float32)
    bias = tl.zeros([BLOCK_R, BLOCK_C, 1], dtype=tl.float32)
    for first in range(begin + part * BLOCK_R, end, parts * BLOCK_R):
        samples = first + tl.arange(0, BLOCK_R)
        rows, exist = samples * groups + group, samples < end
        offs, mask = rows[:, None, None] * (K * P) + inside, exist[:, None, None] & mask_w
        x = wide(x_ptr, offs, mask)  # [BLOCK_R, BLOCK_C, BLOCK_P]
        g = wide(d_ptr, offs, mask)  # [BLOCK_R, BLOCK_C, BLOCK_P]
        rstd = of_rows(rstd_ptr, rows, exist)  # [BLOCK_R, 1, 1]
        hat = x if mean_ptr is None else (x - of_rows(mean_ptr, rows, exist)) * rstd
        if weight_ptr is not None:
            scale += tl.sum(g * hat, axis=2, keep_dims=True)
            bias += tl.sum(g, axis=2, keep_dims=True)
            g *= wide(weight_ptr, group * K + channels, channels < K)
        along = row_sum(g * hat) / (K * P)
        mean = row_sum(g) / (K * P) if CENTER else 0.0
        tl.store(dx_ptr + offs, jacobian(g, hat, rstd, mean, along), mask=mask)
    if weight_ptr is not None:
        at = (run * groups + group) * K + channels
        tl.store(sums_ptr + at, tl.sum(scale, axis=0, keep_dims=True), mask=channels < K)
        at += tl.num_programs(0).to(tl.int64) * groups * K
        tl.store(sums_ptr + at, tl.sum(bias, axis=0, keep_dims=True), mask=channels < K)


@triton.jit
def norm_double_backward_kernel(
    x_ptr,  # [S, G, K, P]
    mean_ptr,  # [S, G], or None
    rstd_ptr,  # [S, G]
    weight_ptr,  # [G, K], or None
    d_ptr,  # [S, G, K, P]
    v_ptr,  # [S, G, K, P]
    v_scale_ptr,  # [m, G, K], or None
    v_bias_ptr,  # [m, G, K], or None
    offsets_ptr,  # [m + 1]
    grad_d_ptr,  # [S, G, K, P]
    grad_x_ptr,  # [S, G, K, P]
    grad_weight_ptr,  # [m, parts, G, K], or None
    K,
    P,
    parts,
    CENTER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    run, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    segment, part = run // parts, run % parts
    begin, end = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    channels, inside, mask_w = cut(0, 0, K, P, BLOCK_C, BLOCK_P)
    known, numbers = channels < K, K * P
    of_segment = (segment * groups + group) * K + channels
    grad_weight = tl.zeros([BLOCK_R, BLOCK_C, 1], dtype=tl.float32)
    for first in range(begin + part * BLOCK_R, end, parts * BLOCK_R):
        samples = first + tl.arange(0, BLOCK_R)
        rows, exist = samples * groups + group, samples < end
        offs, mask = rows[:, None, None] * numbers + inside, exist[:, None, None] & mask_w
        rstd = of_rows(rstd_ptr, rows, exist)  # [BLOCK_R, 1, 1]
        x = wide(x_ptr, offs, mask)  # [BLOCK_R, BLOCK_C, BLOCK_P]
        v = wide(v_ptr, offs, mask)  # [BLOCK_R, BLOCK_C, BLOCK_P]
        g = wide(d_ptr, offs, mask)  # [BLOCK_R, BLOCK_C, BLOCK_P]
        hat = x if mean_ptr is None else (x - of_rows(mean_ptr, rows, exist)) * rstd
        beta, mean_v = row_sum(v * hat) / numbers, row_sum(v) / numbers if CENTER else 0.0
        jv = jacobian(v, hat, rstd, mean_v, beta)
        if weight_ptr is None:
            tl.store(grad_d_ptr + offs, jv, mask=mask)
            grad_x = tl.zeros_like(jv)
        else:
            grad_weight += tl.sum(g * jv, axis=2, keep_dims=True)
            weight = wide(weight_ptr, group * K + channels, known)  # [1, BLOCK_C, 1]
            q = wide(v_scale_ptr, of_segment, known)  # [1, BLOCK_C, 1]
            grad_d = weight * jv + q * hat + wide(v_bias_ptr, of_segment, known)
            tl.store(grad_d_ptr + offs, grad_d, mask=mask)
            mean_h = row_sum(q * g) / numbers if CENTER else 0.0
            grad_x = jacobian(q * g, hat, rstd, mean_h, row_sum(q * g * hat) / numbers)
            g *= weight
        v, alpha = v - mean_v, row_sum(g * hat) / numbers
        kappa = row_sum(g * v) / numbers - alpha * beta
        mean_g = row_sum(g) / numbers if CENTER else 0.0
        grad_x += second_order(g - mean_g, v, hat, rstd, alpha, beta, kappa)
        tl.store(grad_x_ptr + offs, grad_x, mask=mask)
    if weight_ptr is not None:
        at = (run * groups + group) * K + channels
        tl.store(grad_weight_ptr + at, tl.sum(grad_weight, axis=0, keep_dims=True), mask=known)
