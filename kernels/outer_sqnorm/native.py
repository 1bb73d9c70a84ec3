"""C++ forms of outer_sqnorm: pairs of rows for short segments, register tiles for long ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation
from fastreg.kernels._segments import Segments, of
from fastreg.kernels.outer_sqnorm.reference import prefers_quadratic

_PAIRS = _native.calls("outer_sqnorm")
_TILES = _native.calls("outer_sum")

# Rows per segment up to which pairs of rows beat batched matrix products, which form both halves of a symmetric
# product: 1.1 to 4 times at 1 to 32 rows, 1.3 to 1.7 at 64 to 512 (I and O from 256 to 1,024, float32). Beyond, the
# pairs of a segment leave the cache.
LONGEST_PAIRS = 512
# Rows per segment up to which pairs beside torch's product beat tiles that make both.
LONGEST_BESIDE = 16
# From here on the operands come from memory, and a narrow product is bound by packing them, which the
# batched products do better: 0.4 to 0.95 of their speed at 4,096 rows and more.
FEWEST_STREAMED_ROWS = 4096
WIDEST_STREAMED = 128


def mean_rows(a: Tensor, offsets: Sequence[int]) -> float:
    """Average rows per segment."""
    return a.shape[0] / (len(offsets) - 1)


def prefers_pairs(size: float, inputs: int, outputs: int) -> bool:
    """Whether pairs beat tiles: tiles run at twice the rate, but not on segments of few rows."""
    return size <= LONGEST_BESIDE and 2 * size * (inputs + outputs) < inputs * outputs


def streamed(a: Tensor, d: Tensor) -> str | None:
    """The reason tiles lose on long narrow operands, or None."""
    if a.shape[0] >= FEWEST_STREAMED_ROWS and min(a.shape[1], d.shape[1]) <= WIDEST_STREAMED:
        return f"from {FEWEST_STREAMED_ROWS} rows on, narrow products are faster as torch.bmm"
    return None


def pairs(a: Tensor, d: Tensor, found: Segments, bias: bool) -> Tensor:
    """``a [S, I], d [S, O] -> sq [m]`` from ``s (s + 1) / 2`` pairs of rows per segment."""
    sq = a.new_empty(found.count)
    _PAIRS[a.dtype](
        a.data_ptr(), d.data_ptr(), found.pointer, sq.data_ptr(),
        a.shape[1], d.shape[1], found.count, bias, torch.get_num_threads(),
    )  # fmt: skip
    return sq


def tiles(a: Tensor, d: Tensor, found: Segments, bias: bool) -> Tensor:
    """``a [S, I], d [S, O] -> sq [m]`` from the gradients, which never leave registers."""
    sq, no_total = a.new_empty(found.count), 0
    _TILES[a.dtype](
        a.data_ptr(), d.data_ptr(), found.pointer, no_total, sq.data_ptr(),
        a.shape[1], d.shape[1], found.count, torch.get_num_threads(),
    )  # fmt: skip
    if not bias:
        return sq
    return sq + found.per_segment([part.sum(1).square().sum(1) for part in found.split(d)])


def outer_sqnorm(a: Tensor, d: Tensor, offsets: Sequence[int], bias: bool) -> Tensor:
    """``a [S, I], d [S, O] -> sq [m]``."""
    a, d, found = a.contiguous(), d.contiguous(), of(offsets)
    size = mean_rows(a, offsets)
    if prefers_quadratic(size, a.shape[1], d.shape[1]):
        return pairs(a, d, found, bias)
    return tiles(a, d, found, bias)


def slower(a: Tensor, d: Tensor, offsets: Sequence[int], _bias: bool) -> str | None:
    """The measured reason to leave a call to the reference, or None."""
    size = mean_rows(a, offsets)
    if not prefers_quadratic(size, a.shape[1], d.shape[1]):
        return streamed(a, d)
    if size > LONGEST_PAIRS:
        return f"beyond {LONGEST_PAIRS} rows per segment, pairs of rows are faster as torch.bmm"
    return None


IMPLEMENTATION = Implementation("native", outer_sqnorm, _native.why_not, slower)
