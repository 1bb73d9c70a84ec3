"""Launch numbers of the gradient tiles that outer_sum and outer_sqnorm share."""

from __future__ import annotations

from dataclasses import dataclass

from fastreg.kernels._segments import Segments


@dataclass(frozen=True)
class Tile:
    """A program's part of the gradient and the rows it takes per step.

    Attributes:
        BLOCK_S, BLOCK_O, BLOCK_I: rows, outputs, inputs.
        GROUP: rows of tiles walked column by column, so that programs side by side read the same operands.
        warps: per program.
        stages: depth of the software pipeline.
        resident: programs that share a multiprocessor.
    """

    BLOCK_S: int
    BLOCK_O: int
    BLOCK_I: int
    GROUP: int
    warps: int
    stages: int
    resident: int

    def count(self, inputs: int, outputs: int) -> int:
        """Tiles of a gradient ``[outputs, inputs]``."""
        return -(-outputs // self.BLOCK_O) * -(-inputs // self.BLOCK_I)


# A thread's 255 registers bound the tile: the segment's and the total's accumulators take 64 each of eight warps, and
# 128 x 256 would take all. 64 rows a step, four steps deep, are 128 KB of shared memory, which an A100 has too.
WIDE = Tile(BLOCK_S=64, BLOCK_O=128, BLOCK_I=128, GROUP=8, warps=8, stages=4, resident=1)
# Up to this many inputs or outputs half of a wide tile would be padding; the product is then bound by its operands, and
# 64 is the least that a Hopper matrix instruction of four warps fills.
NARROWEST_WIDE = 64
NARROW = Tile(BLOCK_S=64, BLOCK_O=64, BLOCK_I=64, GROUP=8, warps=4, stages=4, resident=3)
# Exact float32 products run on the ordinary cores out of registers: a small tile and few rows, so that nothing spills.
SINGLE = Tile(BLOCK_S=16, BLOCK_O=64, BLOCK_I=64, GROUP=8, warps=4, stages=3, resident=4)

# What a partial total costs, in rows of a program's work: it is written and read once in float32, 8 bytes an element at
# the 4.3 TB/s of an H200, while a row is 2 operations an element at an assumed 600 TFLOP/s. Not measured.
ROWS_PER_PARTIAL_TOTAL = 560

# What ends a segment, in rows of a tile's work: per element an addition, a square and the drained product queue, as
# long as one step of 64 rows by the instruction count. Not measured.
ROWS_PER_SEGMENT = 64
# How many times longer a product takes with two accumulators: its tile is half that of a plain product, so it reads 4
# operands where that reads 3. Not measured.
SLOWDOWN = 4 / 3


def tile_products(found: Segments, inputs: int, outputs: int) -> int:
    """Multiplications of tiles of the gradients, with what ends a segment."""
    return (found.offsets[-1] + ROWS_PER_SEGMENT * found.count) * inputs * outputs
