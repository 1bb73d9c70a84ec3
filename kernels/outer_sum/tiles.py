"""A tile of every segment's gradient, made in registers: squared there, and added there to the tile of the total."""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels._launch import launch, multiprocessors
from fastreg.kernels._segments import Segments, of
from fastreg.kernels._tiles import dot, precision
from fastreg.kernels.outer_sum.config import NARROWEST_WIDE, ROWS_PER_PARTIAL_TOTAL, Tile


@triton.jit
def tile_place(number, tiles_o, tiles_i, GROUP: tl.constexpr):
    """Row and column of a tile: ``GROUP`` rows of tiles at a time, column by column."""
    group, inside = number // (GROUP * tiles_i), number % (GROUP * tiles_i)
    height = tl.minimum(tiles_o - group * GROUP, GROUP)
    return group * GROUP + inside % height, inside // height


@triton.jit
def outer_tile_kernel(
    a_ptr,  # [S, I]
    d_ptr,  # [S, O]
    offsets_ptr,  # [m + 1]
    shares_ptr,  # [splits, 3]: first segment, segment past the last, steps
    total_ptr,  # [splits, O, I], or None
    partial_ptr,  # [m, tiles * BLOCK_O]
    I,
    O,
    BLOCK_S: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    number, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile_o, tile_i = tile_place(number, tl.cdiv(O, BLOCK_O), tl.cdiv(I, BLOCK_I), GROUP)
    offs_s = tl.arange(0, BLOCK_S)
    offs_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    # The gradients are read transposed by their pointers: on Ampere a transposed tile would be copied synchronously.
    a_offs, d_offs = offs_s[:, None] * I + offs_i[None, :], offs_s[None, :] * O + offs_o[:, None]
    mask_o, mask_i = offs_o < O, offs_i < I
    segment, past = tl.load(shares_ptr + 3 * split), tl.load(shares_ptr + 3 * split + 1)
    row, end = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    gradient = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    total = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    # One loop over the steps of all segments: a loop per segment would drain the pipeline of loads at the end of each.
    for _ in range(0, tl.load(shares_ptr + 3 * split + 2)):
        mask_s = offs_s < tl.minimum(end - row, BLOCK_S).to(tl.int32)
        a = tl.load(a_ptr + row * I + a_offs, mask=mask_s[:, None] & mask_i[None, :], other=0.0)  # [BLOCK_S, BLOCK_I]
        d = tl.load(d_ptr + row * O + d_offs, mask=mask_s[None, :] & mask_o[:, None], other=0.0)  # [BLOCK_O, BLOCK_S]
        current, row = segment, row + BLOCK_S
        ended = row >= end
        # Where to read next must not wait for the product, so it is decided before it and apart from the epilogue.
        if ended:
            segment += 1
            row = end
            end = tl.load(offsets_ptr + segment + 1, mask=segment < past, other=0)
        gradient = dot(d, a, gradient, PRECISION)
        if ended:
            # A warp holds whole rows of the tile: their sums need no exchange between warps.
            sums = partial_ptr + (current * tl.num_programs(0) + number) * BLOCK_O + tl.arange(0, BLOCK_O)
            tl.store(sums, tl.sum(gradient * gradient, 1))
            if total_ptr is not None:
                total += gradient
            gradient = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    if total_ptr is not None:
        outs = total_ptr + (split * O + offs_o[:, None]) * I + offs_i[None, :]
        tl.store(outs, total.to(total_ptr.dtype.element_ty), mask=mask_o[:, None] & mask_i[None, :])


def shares(found: Segments, block: int, splits: int) -> list[tuple[int, int, int]]:
    """First segment, segment past the last and steps of at most ``splits`` runs of segments, about equal in steps."""
    # An empty segment takes a step too: the one that writes its zero.
    steps = [max(1, -(-(stop - start) // block)) for start, stop in pairwise(found.offsets)]
    ends = [0, *accumulate(steps)]
    cuts = [0, *(bisect_left(ends, ends[-1] * n / splits) for n in range(1, splits)), found.count]
    return [(first, past, ends[past] - ends[first]) for first, past in pairwise(cuts) if first < past]


@lru_cache(maxsize=512)
def _shares_on(offsets: tuple[int, ...], tile: Tile, tiles: int, summed: bool, device: torch.device) -> Tensor:
    """``[splits, 3]``: the shares of the number of splits, a power of two, that takes the least time by count."""

    def rows(runs: list[tuple[int, int, int]]) -> float:
        waves, longest = -(-tiles * len(runs) // slots), max(steps for _, _, steps in runs)
        totals = tiles * len(runs) / slots if summed and len(runs) > 1 else 0
        return waves * longest * tile.BLOCK_S + totals * ROWS_PER_PARTIAL_TOTAL

    found, slots = of(offsets), tile.resident * multiprocessors(device)
    most = max(1, min(found.count, 4 * slots // max(1, tiles)))
    best = min((shares(found, tile.BLOCK_S, 1 << n) for n in range(most.bit_length())), key=rows)
    return torch.tensor(best, dtype=torch.int64, device=device)


def fitting(a: Tensor, d: Tensor, wide: Tile, narrow: Tile, single: Tile) -> Tile:
    """The tile for a dtype and gradient ``[O, I]``."""
    if a.dtype == torch.float32:
        return single
    return wide if min(a.shape[1], d.shape[1]) > NARROWEST_WIDE else narrow


def outer_tiles(a: Tensor, d: Tensor, found: Segments, tile: Tile, summed: bool) -> tuple[Tensor | None, Tensor]:
    """``a [S, I], d [S, O] -> total [O, I], sq [m]``, contiguous inputs; the total is None unless ``summed``."""
    inputs, outputs = a.shape[1], d.shape[1]
    tiles = tile.count(inputs, outputs)
    runs = _shares_on(found.offsets, tile, tiles, summed, a.device)
    splits = runs.shape[0]
    totals = a.new_empty(splits, outputs, inputs, dtype=a.dtype if splits == 1 else torch.float32) if summed else None
    partial = a.new_empty(found.count, tiles * tile.BLOCK_O, dtype=torch.float32)
    launch(
        outer_tile_kernel, (tiles, splits),
        a, d, found.on(a.device), runs, totals, partial, inputs, outputs,
        BLOCK_S=tile.BLOCK_S, BLOCK_O=tile.BLOCK_O, BLOCK_I=tile.BLOCK_I, GROUP=tile.GROUP,
        PRECISION=precision(a.dtype), warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if totals is not None:
        totals = totals[0] if splits == 1 else totals.sum(0).to(a.dtype)
    return totals, partial.sum(1)
