"""Launch numbers of segment_sum."""

from __future__ import annotations

from dataclasses import dataclass

from fastreg.kernels._segments import Segments


@dataclass(frozen=True)
class Config:
    """Rows and columns that a program reads per step, its warps, and programs per multiprocessor."""

    BLOCK_S: int
    BLOCK_N: int
    warps: int
    waves: int

    def parts(self, found: Segments, columns: int, multiprocessors: int) -> int:
        """Programs that share the rows of a segment: enough to fill the card, none without a block of its own."""
        filling = -(-self.waves * multiprocessors // (found.count * columns))
        return max(1, min(filling, -(-found.longest // self.BLOCK_S)))


# 32 elements a thread: four 16-byte loads in bfloat16, along rows of 256 bytes. Not measured.
CONFIG = Config(BLOCK_S=32, BLOCK_N=128, warps=4, waves=8)
