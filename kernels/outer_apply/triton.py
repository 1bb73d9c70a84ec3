"""Triton form of outer_apply: the pairs ``Q K^T`` of every segment, then their product with V.

Layer widths are larger than segments, so attention's way, a tile of pairs made anew for every tile of the output, would
repeat the first product ``O / BLOCK_N`` times. The pairs are written instead: ``S s`` numbers, for ``2 S s (I + O)``
operations. Long segments go through their states ``K^T V``, equal ones at a time, as torch.bmm has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels._launch import launch
from fastreg.kernels._segments import Segments, of
from fastreg.kernels._tiles import dot, precision, rounded
from fastreg.kernels.outer_apply import reference
from fastreg.kernels.outer_apply.config import (
    APPLY,
    LONGEST_SHORT,
    PAIRS,
    ROW_MULTIPLE,
    SHORT_APPLY,
    SHORT_PAIRS,
    SINGLE_APPLY,
    SINGLE_PAIRS,
    Product,
)


@triton.jit
def pairs_kernel(
    q_ptr,  # [S, I]
    k_ptr,  # [S, I]
    offsets_ptr,  # [m + 1]
    blocks_ptr,  # [blocks, 2]: first row, segment
    pairs_ptr,  # [S, W]
    bias,
    I,
    W,
    SYMMETRIC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block_ptr = blocks_ptr + 2 * tl.program_id(0).to(tl.int64)
    row, segment = tl.load(block_ptr), tl.load(block_ptr + 1)
    start, end = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    first = tl.program_id(1) * BLOCK_N
    column = start + first
    # A program to the right of the segment, or whose mirror image is another's, has nothing to do.
    if (column >= end) | (SYMMETRIC & (column > row)):
        return
    offs_s, offs_n, offs_k = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_s, mask_n = offs_s < (end - row).to(tl.int32), offs_n < (end - column).to(tl.int32)
    q_ptrs = q_ptr + row * I + offs_s[:, None] * I + offs_k[None, :]
    k_ptrs = k_ptr + column * I + offs_n[None, :] * I + offs_k[:, None]
    pairs = tl.zeros([BLOCK_S, BLOCK_N], dtype=tl.float32)
    for depth in range(0, I, BLOCK_K):
        mask_k = offs_k < I - depth
        q = tl.load(q_ptrs + depth, mask=mask_s[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_S, BLOCK_K]
        k = tl.load(k_ptrs + depth, mask=mask_n[None, :] & mask_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        pairs = dot(q, k, pairs, PRECISION)
    pairs = rounded(pairs + bias, pairs_ptr.dtype.element_ty)
    # The padding of a row is written too: what reads it multiplies it by zero, so it must be finite.
    mask = mask_s[:, None] & (first + offs_n < W)[None, :]
    tl.store(pairs_ptr + row * W + offs_s[:, None] * W + first + offs_n[None, :], pairs, mask=mask)
    if SYMMETRIC:
        places = (row - start).to(tl.int32) + offs_s
        mirrored = pairs_ptr + column * W + offs_n[None, :] * W + places[:, None]
        tl.store(mirrored, pairs, mask=mask_n[None, :] & (places < W)[:, None])


@triton.jit
def apply_kernel(
    pairs_ptr,  # [S, W]
    v_ptr,  # [S, O]
    offsets_ptr,  # [m + 1]
    blocks_ptr,  # [blocks, 2]: first row, segment
    factors_ptr,  # [m], or None
    onto_ptr,  # [S, O], or None
    out_ptr,  # [S, O]
    blocks,
    O,
    W,
    GROUP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = tl.cdiv(O, BLOCK_N)
    group, inside = tl.program_id(0) // (GROUP * columns), tl.program_id(0) % (GROUP * columns)
    height = tl.minimum(blocks - group * GROUP, GROUP)
    block_ptr = blocks_ptr + 2 * (group * GROUP + inside % height).to(tl.int64)
    row, segment = tl.load(block_ptr), tl.load(block_ptr + 1)
    start, end = tl.load(offsets_ptr + segment), tl.load(offsets_ptr + segment + 1)
    offs_s, offs_k = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    offs_o = (inside // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_s, mask_o, length = offs_s < (end - row).to(tl.int32), offs_o < O, (end - start).to(tl.int32)
    pair_ptrs = pairs_ptr + row * W + offs_s[:, None] * W + offs_k[None, :]
    v_ptrs = v_ptr + start * O + offs_k[:, None] * O + offs_o[None, :]
    out = tl.zeros([BLOCK_S, BLOCK_N], dtype=tl.float32)
    for depth in range(0, length, BLOCK_K):
        # Pairs are masked by the length of their rows, which is a multiple of a load, not by that of the segment.
        mask = mask_s[:, None] & (offs_k < W - depth)[None, :]
        pairs = tl.load(pair_ptrs + depth, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_K]
        mask = (offs_k < length - depth)[:, None] & mask_o[None, :]
        v = tl.load(v_ptrs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        out = dot(pairs, v.to(pairs.dtype), out, PRECISION)
        v_ptrs += BLOCK_K * O
    if factors_ptr is not None:
        out *= tl.load(factors_ptr + segment)
    offs, mask = row * O + offs_s[:, None] * O + offs_o[None, :], mask_s[:, None] & mask_o[None, :]
    if onto_ptr is not None:
        out += tl.load(onto_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, rounded(out, out_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=512)
def _blocks(offsets: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """``[blocks, 2]``: first row and segment of every run of at most ``size`` rows of one segment."""
    runs = [
        (row, segment)
        for segment, (start, stop) in enumerate(pairwise(offsets))
        for row in range(start, stop, size)
    ]
    return torch.tensor(runs, dtype=torch.int64, device=device).reshape(-1, 2)


def configs(dtype: torch.dtype, found: Segments) -> tuple[Product, Product]:
    """The tiles of the two products for a dtype and lengths of segments."""
    if dtype == torch.float32:
        return SINGLE_PAIRS, SINGLE_APPLY
    return (SHORT_PAIRS, SHORT_APPLY) if found.longest <= LONGEST_SHORT else (PAIRS, APPLY)


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, found: Segments, bias: bool, factors: Tensor | None, onto: Tensor | None
) -> Tensor:
    """``(Q K^T + bias) V`` of each segment, scaled and added; contiguous inputs."""
    (rows, inputs), outputs, offsets = q.shape, v.shape[1], found.on(q.device)
    of_pairs, of_apply = configs(q.dtype, found)
    width = -(-max(1, found.longest) // ROW_MULTIPLE) * ROW_MULTIPLE
    # Products of half-precision numbers can leave their range: they are kept in float32, or in bfloat16, which has it.
    kept = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    pairs, out = q.new_empty(rows, width, dtype=kept), torch.empty_like(v)
    blocks = _blocks(found.offsets, of_pairs.BLOCK_S, q.device)
    launch(
        pairs_kernel, (blocks.shape[0], -(-found.longest // of_pairs.BLOCK_N)),
        q, k, offsets, blocks, pairs, int(bias), inputs, width,
        SYMMETRIC=q.data_ptr() == k.data_ptr(), BLOCK_S=of_pairs.BLOCK_S, BLOCK_N=of_pairs.BLOCK_N,
        BLOCK_K=of_pairs.BLOCK_K, PRECISION=precision(q.dtype), warps=of_pairs.warps, stages=of_pairs.stages,
    )  # fmt: skip
    blocks = _blocks(found.offsets, of_apply.BLOCK_S, q.device)
    launch(
        apply_kernel, (blocks.shape[0] * -(-outputs // of_apply.BLOCK_N),),
        pairs, v, offsets, blocks, factors, onto, out, blocks.shape[0], outputs, width,
        GROUP=of_apply.GROUP, BLOCK_S=of_apply.BLOCK_S, BLOCK_N=of_apply.BLOCK_N, BLOCK_K=of_apply.BLOCK_K,
        # TF32 has the significand of float16.
        PRECISION="tf32" if q.dtype == torch.float16 else precision(q.dtype),
        warps=of_apply.warps, stages=of_apply.stages,
    )  # fmt: skip
    return out


def outer_apply(
    q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], bias: bool, factors: Tensor | None, onto: Tensor | None
) -> Tensor:
    """``q [S, I], k [S, I], v [S, O], factors [m], onto [S, O] -> out [S, O]``."""
    found = of(offsets)
    if not reference.prefers_quadratic(found.longest, q.shape[1], v.shape[1]):
        return reference.by_states(q, k, v, found, bias, factors, onto)
    same = q.data_ptr() == k.data_ptr() and q.stride() == k.stride()
    q, v = q.contiguous(), v.contiguous()
    factors, onto = (None if x is None else x.contiguous() for x in (factors, onto))
    return quadratic(q, q if same else k.contiguous(), v, found, bias, factors, onto)


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of a transformer's size, by op; no memory behind them."""
    wide, narrow = (torch.empty(8192, width, dtype=dtype, device="meta") for width in (1024, 512))
    other, factors = torch.empty_like(wide), torch.empty(16, device="meta")
    long, short = list(range(0, 8193, 512)), list(range(0, 8193, 32))
    return {
        "outer_apply": [
            (wide, wide, narrow, long, True, None, None),
            (narrow, narrow, wide, long, False, factors, other),
            (wide, wide, wide, short, False, None, None),
        ]
    }
