"""Device code that the kernels of the norm layers share: tiles ``[R, C, P]`` of samples, channels and places."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cut(first_channel, first_place, K, P, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Channels ``[1, C, 1]`` of a group of K with P places each, where their numbers lie, and which of those exist."""
    channels = first_channel + tl.arange(0, BLOCK_C)[None, :, None]
    places = first_place + tl.arange(0, BLOCK_P)[None, None, :]
    return channels, channels * P + places, (channels < K) & (places < P)


@triton.jit
def wide(ptr, offs, mask):
    """Loaded in float32, zero where the mask is not set."""
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def of_rows(ptr, rows, exist):
    """What is known of each row, for ``rows [R]``: ``[R, 1, 1]``, zero for rows that do not exist."""
    # Expanded after the load: a thread would repeat the load for each number of the row that it holds.
    return tl.load(ptr + rows, mask=exist, other=0.0)[:, None, None]


@triton.jit
def row_sum(x):
    """``[R, C, P] -> [R, 1, 1]``."""
    return tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def jacobian(g, hat, rstd, mean, along):
    """``J g`` from ``mean = c mean(g)`` and ``along = mean(g xhat)``."""
    return rstd * (g - mean - hat * along)


@triton.jit
def second_order(g, v, hat, rstd, alpha, beta, kappa):
    """Gradient of ``<v, J g>`` with respect to x, for g and v less their means if those are removed."""
    return -rstd * rstd * (beta * g + alpha * v + hat * (kappa - 2 * alpha * beta))
