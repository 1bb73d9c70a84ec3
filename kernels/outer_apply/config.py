"""Launch numbers of outer_apply."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """A program's tile of a product, the depth it takes per step, and how both are run.

    ``GROUP`` rows of tiles are walked column by column, so that programs running side by side read the same operands.
    """

    BLOCK_S: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    warps: int
    stages: int


# The tile of a plain product on Hopper: 64 accumulator registers for each of eight warps leave room for the epilogue's
# row of factors, and four stages of 64 are 128 KB of shared memory, which an A100 has too. Not measured.
PAIRS = Product(BLOCK_S=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, warps=8, stages=4)
APPLY = Product(BLOCK_S=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, warps=8, stages=4)
# Segments that fill no more than half of such a tile: smaller ones, three programs to a multiprocessor.
LONGEST_SHORT = 64
SHORT_PAIRS = Product(BLOCK_S=64, BLOCK_N=64, BLOCK_K=64, GROUP=8, warps=4, stages=4)
SHORT_APPLY = Product(BLOCK_S=64, BLOCK_N=64, BLOCK_K=64, GROUP=8, warps=4, stages=4)
# Exact float32 products run on the ordinary cores out of registers: a small tile, so that nothing spills.
SINGLE_PAIRS = Product(BLOCK_S=64, BLOCK_N=64, BLOCK_K=16, GROUP=8, warps=4, stages=3)
SINGLE_APPLY = Product(BLOCK_S=64, BLOCK_N=64, BLOCK_K=16, GROUP=8, warps=4, stages=3)
# Products of a row with its segment are laid out in rows of a multiple of this many: 16-byte loads in bfloat16.
ROW_MULTIPLE = 16
