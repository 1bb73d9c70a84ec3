"""Triton forms of outer_sqnorm: rows for segments of one, pairs of rows for short segments, tiles for long ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels._launch import launch
from fastreg.kernels._segments import Segments, of
from fastreg.kernels._tiles import dot, precision
from fastreg.kernels.outer_sqnorm.config import LONG_PAIR, LONGEST_SHORT, ROW, RUN, SHORT_PAIR, SINGLE_PAIR, WIDE, Pair
from fastreg.kernels.outer_sum.config import NARROW, SINGLE, SLOWDOWN, tile_products
from fastreg.kernels.outer_sum.tiles import fitting, outer_tiles


@triton.jit
def row_sqnorm(x_ptr, rows, mask_s, N, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """Squared norms of rows of ``x [S, N]``."""
    total = tl.zeros([BLOCK_S, BLOCK_N], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = mask_s[:, None] & (offs_n < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        total += x * x
    return tl.sum(total, 1)


@triton.jit
def outer_row_kernel(
    a_ptr,  # [S, I]
    d_ptr,  # [S, O]
    offsets_ptr,  # [m + 1]
    sq_ptr,  # [m]
    bias,
    m,
    I,
    O,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    segments = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    rows = tl.load(offsets_ptr + segments, mask=segments < m, other=0)
    filled = rows < tl.load(offsets_ptr + segments + 1, mask=segments < m, other=0)
    a_sq = row_sqnorm(a_ptr, rows, filled, I, BLOCK_S, BLOCK_N)
    d_sq = row_sqnorm(d_ptr, rows, filled, O, BLOCK_S, BLOCK_N)
    tl.store(sq_ptr + segments, (a_sq + bias) * d_sq, mask=segments < m)


@triton.jit
def gram(
    x_ptr, left, left_rows, right, right_rows, N,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_S, BLOCK_S]``: inner products of two runs of rows of ``x [S, N]``, from ``left`` and ``right`` on."""
    offs_s = tl.arange(0, BLOCK_S)[:, None]
    products = tl.zeros([BLOCK_S, BLOCK_S], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)[None, :]
        offs, mask_n = offs_s * N + offs_n, offs_n < N
        x = tl.load(x_ptr + left * N + offs, mask=(offs_s < left_rows) & mask_n, other=0.0)  # [BLOCK_S, BLOCK_N]
        y = tl.load(x_ptr + right * N + offs, mask=(offs_s < right_rows) & mask_n, other=0.0)  # [BLOCK_S, BLOCK_N]
        products = dot(x, tl.trans(y), products, PRECISION)
    return products


@triton.jit
def outer_pair_kernel(
    a_ptr,  # [S, I]
    d_ptr,  # [S, O]
    segment_ptr,  # [S]
    blocks_ptr,  # [blocks, 5]: first row and number of rows of either side, where the left side's sums go
    partial_ptr,  # [rows of all left sides]
    bias,
    I,
    O,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block_ptr, offs_s = blocks_ptr + 5 * tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_S)
    left, left_rows = tl.load(block_ptr), tl.load(block_ptr + 1).to(tl.int32)
    right, right_rows = tl.load(block_ptr + 2), tl.load(block_ptr + 3).to(tl.int32)
    pairs = gram(a_ptr, left, left_rows, right, right_rows, I, BLOCK_S, BLOCK_N, PRECISION) + bias
    pairs *= gram(d_ptr, left, left_rows, right, right_rows, O, BLOCK_S, BLOCK_N, PRECISION)
    left_segment = tl.load(segment_ptr + left + offs_s, mask=offs_s < left_rows, other=-1)
    right_segment = tl.load(segment_ptr + right + offs_s, mask=offs_s < right_rows, other=-1)
    pairs = tl.where(left_segment[:, None] == right_segment[None, :], pairs, 0.0)
    # The matrices are symmetric: a block off the diagonal stands for its mirror image too.
    sums = tl.sum(pairs, 1) * tl.where(left == right, 1.0, 2.0)
    tl.store(partial_ptr + tl.load(block_ptr + 4) + offs_s, sums, mask=offs_s < left_rows)


@triton.jit
def run_sum_kernel(x_ptr, bounds_ptr, out_ptr, BLOCK: tl.constexpr):
    """Sums of runs of ``x``: ``out [m]`` for ``bounds [m + 1]``."""
    run = tl.program_id(0).to(tl.int64)
    end = tl.load(bounds_ptr + run + 1)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(tl.load(bounds_ptr + run), end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offs, mask=offs < end, other=0.0)
    tl.store(out_ptr + run, tl.sum(total))


@dataclass(frozen=True)
class Blocks:
    """Which rows the programs multiply with which.

    Attributes:
        table: [blocks, 5] int64, as in the kernel.
        bounds: [m + 1] int64: where the partial sums of every segment begin.
        segment: [S] int64: the segment of every row.
        partials: how many there are.
    """

    table: Tensor
    bounds: Tensor
    segment: Tensor
    partials: int


def packed(offsets: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    """First and past rows of runs of whole segments: as many as fit into a block, or a single longer one."""
    runs = [(0, 0)]
    for start, stop in pairwise(offsets):
        if stop - runs[-1][0] <= size:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def block_table(offsets: tuple[int, ...], size: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """The table and the bounds of :class:`Blocks`: of every run, the blocks on and to the right of the diagonal."""
    table: list[tuple[int, ...]] = []
    place = 0
    for start, stop in packed(offsets, size):
        for left in range(start, stop, size):
            for right in range(left, stop, size):
                table.append((left, min(size, stop - left), right, min(size, stop - right), place))
                place += min(size, stop - left)
    sums = (
        sum(min(size, rows - left) * -(-(rows - left) // size) for left in range(0, rows, size))
        for rows in (stop - start for start, stop in pairwise(offsets))
    )
    return table, [0, *accumulate(sums)]


@lru_cache(maxsize=512)
def _blocks(offsets: tuple[int, ...], size: int, device: torch.device) -> Blocks:
    table, bounds = block_table(offsets, size)
    runs, ends = (torch.tensor(x, dtype=torch.int64, device=device) for x in (table, bounds))
    return Blocks(runs, ends, of(offsets).segment_of_row(device), bounds[-1])


def outer_rows(a: Tensor, d: Tensor, found: Segments, bias: bool) -> Tensor:
    """``a [S, I], d [S, O] -> sq [m]`` for segments of at most one row."""
    sq = a.new_empty(found.count, dtype=torch.float32)
    width = min(ROW.BLOCK, triton.next_power_of_2(max(1, a.shape[1], d.shape[1])))
    height = ROW.BLOCK // width
    launch(
        outer_row_kernel, (triton.cdiv(found.count, height),),
        a, d, found.on(a.device), sq, int(bias), found.count, a.shape[1], d.shape[1],
        BLOCK_S=height, BLOCK_N=width, warps=ROW.warps,
    )  # fmt: skip
    return sq


def pair_config(a: Tensor, found: Segments) -> Pair:
    """The blocks of rows for a dtype and lengths of segments."""
    if a.dtype == torch.float32:
        return SINGLE_PAIR
    return LONG_PAIR if found.longest > LONGEST_SHORT else SHORT_PAIR


def outer_pairs(a: Tensor, d: Tensor, found: Segments, bias: bool, pair: Pair) -> Tensor:
    """``a [S, I], d [S, O] -> sq [m]`` from products of rows with rows of their segment; contiguous inputs."""
    blocks = _blocks(found.offsets, pair.BLOCK_S, a.device)
    partial = a.new_empty(blocks.partials, dtype=torch.float32)
    launch(
        outer_pair_kernel, (blocks.table.shape[0],),
        a, d, blocks.segment, blocks.table, partial, int(bias), a.shape[1], d.shape[1],
        BLOCK_S=pair.BLOCK_S, BLOCK_N=pair.BLOCK_N, PRECISION=precision(a.dtype), warps=pair.warps, stages=pair.stages,
    )  # fmt: skip
    sq = a.new_empty(found.count, dtype=torch.float32)
    launch(run_sum_kernel, (found.count,), partial, blocks.bounds, sq, BLOCK=RUN.BLOCK, warps=RUN.warps)
    return sq


def prefers_pairs(found: Segments, inputs: int, outputs: int, pair: Pair) -> bool:
    """Whether pairs of rows, with two accumulators, take less time by count than tiles of the gradients."""
    return SLOWDOWN * pair.products(found) * (inputs + outputs) < tile_products(found, inputs, outputs)


def outer_sqnorm(a: Tensor, d: Tensor, offsets: Sequence[int], bias: bool) -> Tensor:
    """``a [S, I], d [S, O] -> sq [m]``."""
    a, d, found = a.contiguous(), d.contiguous(), of(offsets)
    if found.longest <= 1:
        return outer_rows(a, d, found, bias)
    pair = pair_config(a, found)
    if prefers_pairs(found, a.shape[1], d.shape[1], pair):
        return outer_pairs(a, d, found, bias, pair)
    _, sq = outer_tiles(a, d, found, fitting(a, d, WIDE, NARROW, SINGLE), summed=False)
    if not bias:
        return sq
    # A bias is a weight whose input is one.
    ones = a.new_ones(a.shape[0], 1)
    _, bias_sq = outer_tiles(ones, d, found, fitting(ones, d, WIDE, NARROW, SINGLE), summed=False)
    return sq + bias_sq


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of a transformer's size, by op, one for each form; no memory behind them."""
    wide, narrow = (torch.empty(16384, width, dtype=dtype, device="meta") for width in (1024, 256))
    one, short, long = (list(range(0, 16385, rows)) for rows in (1, 64, 512))
    return {
        "outer_sqnorm": [
            (wide, wide, one, True), (wide, wide, short, True), (wide, wide, long, True), (narrow, narrow, long, True),
        ]
    }  # fmt: skip
