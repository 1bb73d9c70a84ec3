"""Launch numbers of outer_sqnorm."""

from __future__ import annotations

from dataclasses import dataclass

from fastreg.kernels._segments import Segments
from fastreg.kernels.outer_sum.config import Tile


@dataclass(frozen=True)
class Pair:
    """A program's rows, on each side of a product of rows with rows, and the columns it takes per step."""

    BLOCK_S: int
    BLOCK_N: int
    warps: int
    stages: int

    def products(self, found: Segments) -> int:
        """Pairs of rows that are multiplied: half the blocks of a long segment, one block for several short ones."""
        total = 0.0
        for group in found.groups:
            blocks = -(-group.size // self.BLOCK_S)
            each = blocks * (blocks + 1) / 2 if blocks > 1 else 1 / (self.BLOCK_S // max(1, group.size))
            total += each * len(group.ids)
        return round(total * self.BLOCK_S**2)


@dataclass(frozen=True)
class Run:
    """Elements that a program reads at a time."""

    BLOCK: int
    warps: int


# Two accumulators of 64 registers a thread, as in outer_sum: a 128 x 128 tile of each Gram matrix.
LONG_PAIR = Pair(BLOCK_S=128, BLOCK_N=64, warps=8, stages=4)
# Rows up to which a small block holds a segment. Four of its programs share a multiprocessor, so that some compute
# while others wait for their first rows; and less is multiplied in vain where several segments share a block.
LONGEST_SHORT = 64
SHORT_PAIR = Pair(BLOCK_S=64, BLOCK_N=64, warps=4, stages=3)
# Exact float32 products: see outer_sum.config.SINGLE.
SINGLE_PAIR = Pair(BLOCK_S=64, BLOCK_N=16, warps=4, stages=3)
# Without a total there is one accumulator, so the tile of a plain product fits.
WIDE = Tile(BLOCK_S=64, BLOCK_O=128, BLOCK_I=256, GROUP=8, warps=8, stages=4, resident=1)
# 16 elements a thread are two 16-byte loads in bfloat16. Not measured.
ROW = Run(BLOCK=2048, warps=4)
# A thousand rows' sums are one step; there are few enough to come from the cache.
RUN = Run(BLOCK=1024, warps=4)
