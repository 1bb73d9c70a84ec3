"""Triton form of segment_sum: sums of runs of rows, then their sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels._launch import launch, multiprocessors
from fastreg.kernels._segments import of
from fastreg.kernels.segment_sum.config import CONFIG


@triton.jit
def segment_sum_kernel(
    x_ptr,  # [S, N]
    offsets_ptr,  # [m + 1]
    partial_ptr,  # [m, parts, N]
    N,
    parts,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    segment, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    offs_s, offs_n = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    total = tl.zeros([BLOCK_S, BLOCK_N], dtype=tl.float32)
    for row in range(begin + part * BLOCK_S, end, parts * BLOCK_S):
        mask = (row + offs_s < end)[:, None] & (offs_n < N)[None, :]
        x = tl.load(x_ptr + (row + offs_s)[:, None] * N + offs_n[None, :], mask=mask, other=0.0)  # [BLOCK_S, BLOCK_N]
        total += x.to(tl.float32)
    tl.store(partial_ptr + (segment * parts + part) * N + offs_n, tl.sum(total, 0), mask=offs_n < N)


def segment_sum(x: Tensor, offsets: Sequence[int]) -> Tensor:
    """``x [S, N] -> [m, N]``."""
    x, found = x.contiguous(), of(offsets)
    width, columns = x.shape[1], triton.cdiv(x.shape[1], CONFIG.BLOCK_N)
    parts = CONFIG.parts(found, max(1, columns), multiprocessors(x.device))
    partial = x.new_empty(found.count, parts, width, dtype=torch.float32)
    launch(
        segment_sum_kernel, (found.count * parts, columns),
        x, found.on(x.device), partial, width, parts,
        BLOCK_S=CONFIG.BLOCK_S, BLOCK_N=CONFIG.BLOCK_N, warps=CONFIG.warps,
    )  # fmt: skip
    return partial[:, 0] if parts == 1 else partial.sum(1)


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of a transformer's size, by op; no memory behind them."""
    return {"segment_sum": [(torch.empty(8192, 3072, dtype=dtype, device="meta"), list(range(0, 8193, 1024)))]}
