"""Launch numbers of the cross-entropy kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """A program's rows, the classes it reads at a time, and its warps."""

    ROWS: int
    BLOCK: int
    warps: int


# 16 numbers per thread of eight warps: two 16-byte loads in bfloat16, and at 64 to 80 registers three or four programs
# per multiprocessor hide each other's reductions; 8192 takes 128 registers and spills in float32. A vocabulary of
# 262,144 is 64 such blocks. Not measured.
LONGEST_BLOCK = 4096
# 32 bytes of bfloat16, one sector of memory: fewer classes would not read less.
SHORTEST_BLOCK = 16
# Numbers per program of few classes: four warps with eight per thread. Not measured.
SMALL_TILE = 1024


def config(classes: int) -> Config:
    """One long row per program, or several short ones."""
    block = min(LONGEST_BLOCK, max(SHORTEST_BLOCK, 1 << (classes - 1).bit_length()))
    rows = max(1, SMALL_TILE // block)
    return Config(rows, block, 4 if rows * block <= SMALL_TILE else 8)
