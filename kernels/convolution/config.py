"""Launch numbers of the convolutions of segments."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """A program's part of a product ``[M, N]`` and the terms it takes per step.

    Attributes:
        BLOCK_M, BLOCK_N, BLOCK_K: rows, columns, terms.
        warps: per program.
        stages: depth of the software pipeline.
        resident: programs that share a multiprocessor.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    warps: int
    stages: int
    resident: int

    def count(self, rows: int, columns: int) -> int:
        """Tiles of one product."""
        return -(-rows // self.BLOCK_M) * -(-columns // self.BLOCK_N)

    def splits(self, tiles: int, terms: int, programs: int) -> int:
        """Runs that the terms are cut into, so that so many programs have work; none is shorter than a few steps."""
        return max(1, min(programs // max(1, tiles), terms // (SHORTEST * self.BLOCK_K)))

    @property
    def meta(self) -> dict[str, int]:
        """As the kernels' arguments."""
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N, "BLOCK_K": self.BLOCK_K}


def fitting(dtype: torch.dtype, rows: int, columns: int, channels: int) -> Tile:
    """The tile for a product ``[rows, columns]`` that reads images of so many channels."""
    if dtype == torch.float32:
        return SINGLE
    if channels % VECTOR:
        return SCATTERED
    return WIDE if min(rows, columns) > NARROWEST_WIDE else NARROW


# One accumulator of 128 x 128 is 64 registers a thread of eight warps, and the addresses of a gathered operand take
# about as many; four steps of 32 terms are 64 KB of shared memory, so that two programs share a multiprocessor.
WIDE = Tile(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, warps=8, stages=4, resident=2)
# Up to this many rows or columns half of a wide tile would be padding; 64 rows are the least that a Hopper matrix
# instruction of four warps fills.
NARROWEST_WIDE = 64
NARROW = Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, warps=4, stages=3, resident=4)
# Channels that one load of 16 bytes takes. With another number of them every element has an address of its own, and
# fewer at a time fit the registers.
VECTOR = 8
SCATTERED = Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, warps=4, stages=3, resident=2)
# Exact float32 products run on the ordinary cores out of registers: a small tile and few terms, so that nothing spills.
SINGLE = Tile(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, warps=4, stages=3, resident=4)
# Steps that a run of terms has at least: its partial product is written and read in float32, about the traffic of eight
# steps of operands in 16 bits. Not measured.
SHORTEST = 8
