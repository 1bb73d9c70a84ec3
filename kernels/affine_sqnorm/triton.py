"""Triton form of affine_sqnorm: sums over runs of samples, then over the runs of a segment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels._launch import launch, multiprocessors
from fastreg.kernels._segments import of
from fastreg.kernels.affine_sqnorm.config import CONFIG
from fastreg.kernels.norm_affine.rows import cut, wide
from fastreg.kernels.norm_affine.triton import over_runs


@triton.jit
def affine_sqnorm_kernel(
    x_ptr,  # [S, C, P]
    d_ptr,  # [S, C, P]
    offsets_ptr,  # [m + 1]
    sums_ptr,  # scale and bias: [2, m, parts, C]
    C,
    P,
    parts,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    run, first_channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C
    segment, part = run // parts, run % parts
    begin, end = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    scale = tl.zeros([BLOCK_R, BLOCK_C, 1], dtype=tl.float32)
    bias = tl.zeros([BLOCK_R, BLOCK_C, 1], dtype=tl.float32)
    for first in range(begin + part * BLOCK_R, end, parts * BLOCK_R):
        samples = first + tl.arange(0, BLOCK_R)[:, None, None]
        for p in range(0, P, BLOCK_P):
            _, inside, mask_w = cut(first_channel, p, C, P, BLOCK_C, BLOCK_P)
            offs, mask = samples * (C * P) + inside, (samples < end) & mask_w
            x = wide(x_ptr, offs, mask)  # [BLOCK_R, BLOCK_C, BLOCK_P]
            d = wide(d_ptr, offs, mask)  # [BLOCK_R, BLOCK_C, BLOCK_P]
            scale += tl.sum(d * x, axis=2, keep_dims=True)
            bias += tl.sum(d, axis=2, keep_dims=True)
    channels, _, _ = cut(first_channel, 0, C, P, BLOCK_C, BLOCK_P)
    at = run * C + channels
    tl.store(sums_ptr + at, tl.sum(scale, axis=0, keep_dims=True), mask=channels < C)
    at += tl.num_programs(0).to(tl.int64) * C
    tl.store(sums_ptr + at, tl.sum(bias, axis=0, keep_dims=True), mask=channels < C)


def affine_sqnorm(x: Tensor, d: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x [S, C, P], d [S, C, P] -> sq_scale [m], sq_bias [m], scale [m, C], bias [m, C]``."""
    x, d, found = x.contiguous(), d.contiguous(), of(offsets)
    channels, places = x.shape[1:]
    tile = CONFIG.tile(found.longest, channels, places)
    blocks = -(-channels // tile.BLOCK_C)
    parts = tile.parts(found, blocks, CONFIG.resident * multiprocessors(x.device))
    partial = x.new_empty(2, found.count, parts, channels, dtype=torch.float32)
    launch(
        affine_sqnorm_kernel, (found.count * parts, blocks),
        x, d, found.on(x.device), partial, channels, places, parts,
        BLOCK_R=tile.BLOCK_R, **tile.row, warps=tile.warps,
    )  # fmt: skip
    scale, bias = over_runs(partial)
    # The square of the norm reads the sums once, the sum of squares would write them first.
    sq_scale, sq_bias = (torch.linalg.vector_norm(sums, dim=1).square() for sums in (scale, bias))
    return sq_scale, sq_bias, scale, bias


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """A transformer's layer norm, by sequences and by rows, and an image's channels; no memory behind them."""
    rows, image = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((8192, 768, 1), (64, 256, 32 * 32)))
    calls = [(rows, rows, list(range(0, 8193, 1024))), (rows, rows, list(range(8193)))]
    return {"affine_sqnorm": [*calls, (image, image, list(range(0, 65, 8)))]}
