"""Launch numbers of index_sqnorm."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Sorted rows and columns of a program, and its warps."""

    BLOCK_S: int
    BLOCK_D: int
    warps: int


# Rows are summed by one product with a matrix of zeros and ones: 64 of them are the least that a Hopper matrix
# instruction takes. A run of L equal indices spans L / 64 blocks, whose sums every one of them adds up. 128 columns of
# bfloat16 are 256 bytes of each gathered row. Not measured.
CONFIG = Config(BLOCK_S=64, BLOCK_D=128, warps=4)
# Exact float32 products run on the ordinary cores: half the rows are half the arithmetic per byte.
SINGLE = Config(BLOCK_S=32, BLOCK_D=128, warps=4)
