"""Triton form of segment_dot: partial sums of runs of elements, then their sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels._launch import launch, multiprocessors
from fastreg.kernels._segments import of
from fastreg.kernels.segment_dot.config import CONFIG


@triton.jit
def segment_dot_kernel(
    x_ptr,  # [S, N]
    y_ptr,  # [S, N]
    offsets_ptr,  # [m + 1]
    partial_ptr,  # [m, parts]
    N,
    parts,
    BLOCK: tl.constexpr,
):
    segment, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # A segment's rows follow one another, so its elements are one run.
    begin = tl.load(offsets_ptr + segment) * N
    end = tl.load(offsets_ptr + segment + 1) * N
    blocks = tl.cdiv(end - begin, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(part, blocks, parts):
        offs = begin + block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < end, other=0.0)  # [BLOCK]
        y = tl.load(y_ptr + offs, mask=offs < end, other=0.0)  # [BLOCK]
        total += x.to(tl.float32) * y.to(tl.float32)
    tl.store(partial_ptr + segment * parts + part, tl.sum(total))


def segment_dot(x: Tensor, y: Tensor, offsets: Sequence[int]) -> Tensor:
    """``x [S, N], y [S, N] -> [m]``."""
    x, y, found = x.contiguous(), y.contiguous(), of(offsets)
    parts = CONFIG.parts(found, x.shape[1], multiprocessors(x.device))
    partial = x.new_empty(found.count, parts, dtype=torch.float32)
    launch(
        segment_dot_kernel, (found.count, parts),
        x, y, found.on(x.device), partial, x.shape[1], parts,
        BLOCK=CONFIG.BLOCK, warps=CONFIG.warps,
    )  # fmt: skip
    return partial.sum(1)


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of a transformer's size, by op; no memory behind them."""
    x = torch.empty(8192, 768, dtype=dtype, device="meta")
    return {"segment_dot": [(x, x, list(range(0, 8193, 1024)))]}
