"""Triton form of outer_sum: tiles of the gradient, or the norms alone beside torch's product for short segments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels._segments import Segments, of
from fastreg.kernels.outer_sqnorm.config import Pair
from fastreg.kernels.outer_sqnorm.triton import outer_pairs, outer_rows, pair_config
from fastreg.kernels.outer_sum.config import NARROW, SINGLE, SLOWDOWN, WIDE, tile_products
from fastreg.kernels.outer_sum.tiles import fitting, outer_tiles


def prefers_pairs(found: Segments, inputs: int, outputs: int, pair: Pair) -> bool:
    """Whether torch's product and pairs of rows take less time by count than tiles with two accumulators."""
    saved = tile_products(found, inputs, outputs) - pair.products(found) * (inputs + outputs)
    return SLOWDOWN * saved > found.offsets[-1] * inputs * outputs


def outer_sum(a: Tensor, d: Tensor, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``a [S, I], d [S, O] -> total [O, I], sq [m]``."""
    a, d, found = a.contiguous(), d.contiguous(), of(offsets)
    if found.longest <= 1:
        return torch.mm(d.mT, a), outer_rows(a, d, found, False)
    pair = pair_config(a, found)
    if prefers_pairs(found, a.shape[1], d.shape[1], pair):
        return torch.mm(d.mT, a), outer_pairs(a, d, found, False, pair)
    total, squared = outer_tiles(a, d, found, fitting(a, d, WIDE, NARROW, SINGLE), summed=True)
    assert total is not None
    return total, squared


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of a transformer's size, by op; no memory behind them."""
    wide, narrow = (torch.empty(16384, width, dtype=dtype, device="meta") for width in (1024, 32))
    long, short = list(range(0, 16385, 1024)), list(range(0, 16385, 64))
    return {"outer_sum": [(wide, wide, long), (wide, narrow, long), (wide, wide, short)]}
