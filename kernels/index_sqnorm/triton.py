"""Triton form of index_sqnorm: rows sorted by (segment, index), summed over runs of equal ones in blocks of rows.

The first pass leaves the sums of every block's first and last run; the second sums the runs again, adds what lies in
other blocks, and writes every row's sum to the place it came from. No ``[S, S]`` mask, no shape that depends on data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels._launch import launch
from fastreg.kernels._segments import Segments, of
from fastreg.kernels._tiles import dot, rounded
from fastreg.kernels.index_sqnorm.config import CONFIG, SINGLE
from fastreg.kernels.segment_dot.triton import segment_dot

# Of a sort key, the bits that hold the index.
INDEX_BITS = 40


@triton.jit
def block_runs(d_ptr, order_ptr, begin_ptr, first, S, D, offs_d, BLOCK_S: tl.constexpr):
    """Of a block of sorted rows: their places, the rows, their runs, and the run's sum over the block for each."""
    offs_s = tl.arange(0, BLOCK_S)
    mask_s = first + offs_s < S
    places = tl.load(order_ptr + first + offs_s, mask=mask_s, other=0)  # [BLOCK_S]
    mask = mask_s[:, None] & (offs_d < D)[None, :]
    d = tl.load(d_ptr + places[:, None] * D + offs_d[None, :], mask=mask, other=0.0)  # [BLOCK_S, BLOCK_D]
    runs = tl.load(begin_ptr + first + offs_s, mask=mask_s, other=-1)  # [BLOCK_S]
    equal = runs[:, None] == runs[None, :]
    sums = dot(equal.to(tl.float32).to(d.dtype), d, tl.zeros(d.shape, dtype=tl.float32), "ieee")
    return places, d, runs, sums


@triton.jit
def edge_kernel(
    d_ptr,  # [S, D]
    order_ptr,  # [S]: the place of every sorted row
    begin_ptr,  # [S]: the first sorted row of its run
    edges_ptr,  # [blocks, 2, D]
    S,
    D,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    _, _, _, sums = block_runs(d_ptr, order_ptr, begin_ptr, block * BLOCK_S, S, D, offs_d, BLOCK_S)
    last = tl.minimum(S - block * BLOCK_S, BLOCK_S) - 1
    edge_ptrs = edges_ptr + 2 * block * D + offs_d
    tl.store(edge_ptrs, tl.sum(tl.where((offs_s == 0)[:, None], sums, 0.0), 0), mask=offs_d < D)
    tl.store(edge_ptrs + D, tl.sum(tl.where((offs_s == last)[:, None], sums, 0.0), 0), mask=offs_d < D)


@triton.jit
def edge_sum(edges_ptr, low, high, side, D, offs_d):
    """Sum over blocks ``low <= b < high`` of one side of their edges: ``[BLOCK_D]``."""
    total = tl.zeros(offs_d.shape, dtype=tl.float32)
    for block in range(low, high):
        total += tl.load(edges_ptr + (2 * block + side) * D + offs_d, mask=offs_d < D, other=0.0)
    return total


@triton.jit
def shared_kernel(
    d_ptr,  # [S, D]
    order_ptr,  # [S]: the place of every sorted row
    begin_ptr,  # [S]: the first sorted row of its run
    past_ptr,  # [S]: the sorted row behind its run
    edges_ptr,  # [blocks, 2, D]
    shared_ptr,  # [S, D]
    partial_ptr,  # [S, column tiles]
    S,
    D,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first, offs_s = block * BLOCK_S, tl.arange(0, BLOCK_S)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    places, d, runs, sums = block_runs(d_ptr, order_ptr, begin_ptr, first, S, D, offs_d, BLOCK_S)
    last = tl.minimum(first + BLOCK_S, S) - 1
    # Blocks in front of this one end with the run it begins with; those behind begin with the run it ends with.
    of_first, of_last = tl.load(begin_ptr + first), tl.load(begin_ptr + last)
    before = edge_sum(edges_ptr, of_first // BLOCK_S, block, 1, D, offs_d)
    behind = edge_sum(edges_ptr, block + 1, tl.cdiv(tl.load(past_ptr + last), BLOCK_S), 0, D, offs_d)
    sums += tl.where((runs == of_first)[:, None], before[None, :], 0.0)
    sums += tl.where((runs == of_last)[:, None], behind[None, :], 0.0)
    mask_s = first + offs_s < S
    mask = mask_s[:, None] & (offs_d < D)[None, :]
    out = rounded(sums, shared_ptr.dtype.element_ty)
    tl.store(shared_ptr + places[:, None] * D + offs_d[None, :], out, mask=mask)
    products = tl.sum(tl.where(mask, d.to(tl.float32) * sums, 0.0), 1)
    tl.store(partial_ptr + (first + offs_s) * tl.num_programs(1) + tl.program_id(1), products, mask=mask_s)


def sorted_runs(index: Tensor, found: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """``order, begin, past [S]``: places sorted by (segment, index), and the bounds of the run each is in."""
    keys, order = torch.sort((found.segment_of_row(index.device) << INDEX_BITS) | index, stable=True)
    return order, torch.searchsorted(keys, keys), torch.searchsorted(keys, keys, right=True)


def index_sqnorm(index: Tensor, d: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``index [S], d [S, D] -> sq [m], shared [S, D]``."""
    d, found = d.contiguous(), of(offsets)
    rows, width = d.shape
    order, begin, past = sorted_runs(index, found)
    config = SINGLE if d.dtype == torch.float32 else CONFIG
    grid = triton.cdiv(rows, config.BLOCK_S), triton.cdiv(width, config.BLOCK_D)
    edges = d.new_empty(grid[0], 2, width, dtype=torch.float32)
    shared, partial = torch.empty_like(d), d.new_empty(rows, grid[1], dtype=torch.float32)
    blocks = {"BLOCK_S": config.BLOCK_S, "BLOCK_D": config.BLOCK_D, "warps": config.warps}
    launch(edge_kernel, grid, d, order, begin, edges, rows, width, **blocks)
    launch(shared_kernel, grid, d, order, begin, past, edges, shared, partial, rows, width, **blocks)
    # Sorting leaves every segment where it was.
    return segment_dot(partial, torch.ones_like(partial), offsets), shared


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of a transformer's size, by op; no memory behind them."""
    index, d = torch.empty(8192, dtype=torch.int64, device="meta"), torch.empty(8192, 768, dtype=dtype, device="meta")
    return {"index_sqnorm": [(index, d, list(range(0, 8193, 1024)))]}
