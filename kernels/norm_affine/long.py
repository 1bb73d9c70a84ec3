"""Kernels of the norm layers for more numbers, normalised together, than a program holds: it walks them twice.

A program takes one row, a (sample, group) pair of K channels with P places each; its second walk finds the row in the
card's cache. Sums over places are written per sample.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastreg.kernels.norm_affine.rows import cut, jacobian, row_sum, second_order, wide


@triton.jit
def norm_long_kernel(
    x_ptr,  # [S, G, K, P]
    weight_ptr,  # [G, K], or None
    bias_ptr,  # [G, K], or None
    y_ptr,  # [S, G, K, P]
    mean_ptr,  # [S, G]
    rstd_ptr,  # [S, G]
    K,
    P,
    eps,
    CENTER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    group = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + group
    # Moments of tiles are joined as Chan et al. 1983 do, so that no square of the mean is subtracted.
    mean, squares, seen = tl.zeros([1, 1, 1], tl.float32), tl.zeros([1, 1, 1], tl.float32), 0.0
    for c in range(0, K, BLOCK_C):
        for p in range(0, P, BLOCK_P):
            _, inside, mask = cut(c, p, K, P, BLOCK_C, BLOCK_P)
            x = wide(x_ptr, row * (K * P) + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            if CENTER:
                fresh = (tl.minimum(BLOCK_C, K - c) * tl.minimum(BLOCK_P, P - p)).to(tl.float32)
                seen += fresh
                own = row_sum(x) / fresh
                shift = own - mean
                mean += shift * (fresh / seen)
                x = tl.where(mask, x - own, 0.0)
                squares += shift * shift * (fresh * ((seen - fresh) / seen))
            squares += row_sum(x * x)
    rstd = tl.math.rsqrt(squares / (K * P) + eps)
    for c in range(0, K, BLOCK_C):
        for p in range(0, P, BLOCK_P):
            channels, inside, mask = cut(c, p, K, P, BLOCK_C, BLOCK_P)
            y = (wide(x_ptr, row * (K * P) + inside, mask) - mean) * rstd  # [1, BLOCK_C, BLOCK_P]
            if weight_ptr is not None:
                y *= wide(weight_ptr, group * K + channels, channels < K)
            if bias_ptr is not None:
                y += wide(bias_ptr, group * K + channels, channels < K)
            tl.store(y_ptr + row * (K * P) + inside, y, mask=mask)
    at = row + tl.zeros([1, 1, 1], tl.int64)
    tl.store(rstd_ptr + at, rstd)
    tl.store(mean_ptr + at, mean)


@triton.jit
def norm_long_backward_kernel(
    x_ptr,  # [S, G, K, P]
    mean_ptr,  # [S, G], or None
    rstd_ptr,  # [S, G]
    weight_ptr,  # [G, K], or None
    d_ptr,  # [S, G, K, P]
    dx_ptr,  # [S, G, K, P]
    sums_ptr,  # scale and bias: [2, S, G, K], or None
    K,
    P,
    CENTER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    group, groups = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * groups + group
    rstd, numbers = tl.load(rstd_ptr + row), K * P
    mean_x, slope = (0.0, 1.0) if mean_ptr is None else (tl.load(mean_ptr + row), rstd)
    total, along = tl.zeros([1, BLOCK_C, 1], tl.float32), tl.zeros([1, BLOCK_C, 1], tl.float32)
    for c in range(0, K, BLOCK_C):
        of_scale = tl.zeros([1, BLOCK_C, BLOCK_P], tl.float32)
        of_bias = tl.zeros([1, BLOCK_C, BLOCK_P], tl.float32)
        for p in range(0, P, BLOCK_P):
            _, inside, mask = cut(c, p, K, P, BLOCK_C, BLOCK_P)
            x = wide(x_ptr, row * numbers + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            d = wide(d_ptr, row * numbers + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            hat = (x - mean_x) * slope
            of_scale += d * hat
            of_bias += d
        scale, bias = tl.sum(of_scale, axis=2, keep_dims=True), tl.sum(of_bias, axis=2, keep_dims=True)
        if weight_ptr is not None:
            channels, _, _ = cut(c, 0, K, P, BLOCK_C, BLOCK_P)
            at = row * K + channels
            tl.store(sums_ptr + at, scale, mask=channels < K)
            tl.store(sums_ptr + at + tl.num_programs(0).to(tl.int64) * groups * K, bias, mask=channels < K)
            weight = wide(weight_ptr, group * K + channels, channels < K)  # [1, BLOCK_C, 1]
            scale *= weight
            bias *= weight
        along += scale
        total += bias
    along = row_sum(along) / numbers
    mean = row_sum(total) / numbers if CENTER else 0.0
    for c in range(0, K, BLOCK_C):
        for p in range(0, P, BLOCK_P):
            channels, inside, mask = cut(c, p, K, P, BLOCK_C, BLOCK_P)
            x = wide(x_ptr, row * numbers + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            g = wide(d_ptr, row * numbers + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            if weight_ptr is not None:
                g *= wide(weight_ptr, group * K + channels, channels < K)
            dx = jacobian(g, (x - mean_x) * slope, rstd, mean, along)
            tl.store(dx_ptr + row * numbers + inside, dx, mask=mask)


@triton.jit
def norm_long_double_backward_kernel(
    x_ptr,  # [S, G, K, P]
    mean_ptr,  # [S, G], or None
    rstd_ptr,  # [S, G]
    weight_ptr,  # [G, K], or None
    d_ptr,  # [S, G, K, P]
    v_ptr,  # [S, G, K, P]
    v_scale_ptr,  # [m, G, K], or None
    v_bias_ptr,  # [m, G, K], or None
    segment_ptr,  # [S], or None
    grad_d_ptr,  # [S, G, K, P]
    grad_x_ptr,  # [S, G, K, P]
    grad_weight_ptr,  # [S, G, K], or None
    K,
    P,
    CENTER: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sample, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, numbers = sample * groups + group, K * P
    rstd, at_segment = tl.load(rstd_ptr + row), group.to(tl.int64) * K
    mean_x, slope = (0.0, 1.0) if mean_ptr is None else (tl.load(mean_ptr + row), rstd)
    if weight_ptr is not None:
        at_segment += tl.load(segment_ptr + sample) * groups * K
    zeros = tl.zeros([1, BLOCK_C, BLOCK_P], tl.float32)
    sum_g, sum_v, sum_h, g_hat, v_hat, h_hat, v_g = zeros, zeros, zeros, zeros, zeros, zeros, zeros
    for c in range(0, K, BLOCK_C):
        for p in range(0, P, BLOCK_P):
            channels, inside, mask = cut(c, p, K, P, BLOCK_C, BLOCK_P)
            x = wide(x_ptr, row * numbers + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            v = wide(v_ptr, row * numbers + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            g = wide(d_ptr, row * numbers + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            hat = (x - mean_x) * slope
            if weight_ptr is not None:
                h = g * wide(v_scale_ptr, at_segment + channels, channels < K)
                sum_h += h
                h_hat += h * hat
                g *= wide(weight_ptr, group * K + channels, channels < K)
            sum_g += g
            sum_v += v
            g_hat += g * hat
            v_hat += v * hat
            v_g += v * g
    mean_g, mean_v = (row_sum(sum_g) / numbers, row_sum(sum_v) / numbers) if CENTER else (0.0, 0.0)
    alpha, beta = row_sum(g_hat) / numbers, row_sum(v_hat) / numbers
    mean_h, gamma = row_sum(sum_h) / numbers if CENTER else 0.0, row_sum(h_hat) / numbers
    kappa = row_sum(v_g) / numbers - mean_v * mean_g - alpha * beta
    for c in range(0, K, BLOCK_C):
        grad_weight = tl.zeros([1, BLOCK_C, 1], tl.float32)
        for p in range(0, P, BLOCK_P):
            channels, inside, mask = cut(c, p, K, P, BLOCK_C, BLOCK_P)
            x = wide(x_ptr, row * numbers + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            v = wide(v_ptr, row * numbers + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            g = wide(d_ptr, row * numbers + inside, mask)  # [1, BLOCK_C, BLOCK_P]
            hat = (x - mean_x) * slope
            jv = jacobian(v, hat, rstd, mean_v, beta)
            grad_d, grad_x = jv, tl.zeros_like(jv)
            if weight_ptr is not None:
                grad_weight += tl.sum(g * jv, axis=2, keep_dims=True)
                q = wide(v_scale_ptr, at_segment + channels, channels < K)  # [1, BLOCK_C, 1]
                weight = wide(weight_ptr, group * K + channels, channels < K)  # [1, BLOCK_C, 1]
                grad_x = jacobian(q * g, hat, rstd, mean_h, gamma)
                grad_d = weight * jv + q * hat + wide(v_bias_ptr, at_segment + channels, channels < K)
                g *= weight
            grad_x += second_order(g - mean_g, v - mean_v, hat, rstd, alpha, beta, kappa)
            tl.store(grad_d_ptr + row * numbers + inside, grad_d, mask=mask)
            tl.store(grad_x_ptr + row * numbers + inside, grad_x, mask=mask)
        if weight_ptr is not None:
            channels, _, _ = cut(c, 0, K, P, BLOCK_C, BLOCK_P)
            tl.store(grad_weight_ptr + row * K + channels, grad_weight, mask=channels < K)
