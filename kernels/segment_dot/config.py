"""Launch numbers of segment_dot."""

from __future__ import annotations

from dataclasses import dataclass

from fastreg.kernels._segments import Segments


@dataclass(frozen=True)
class Config:
    """Elements per step of a program, warps, and programs per multiprocessor."""

    BLOCK: int
    warps: int
    waves: int

    def parts(self, found: Segments, width: int, multiprocessors: int) -> int:
        """Programs per segment: enough to fill the card, none without a block of its own."""
        filling = -(-self.waves * multiprocessors // found.count)
        blocks = -(-found.longest * width // self.BLOCK)
        return max(1, min(filling, blocks))


# 16 elements a thread are two 16-byte loads per operand in bfloat16; eight programs of four warps fill half of a
# multiprocessor's warp slots, which streams memory at full rate on the cards it was planned for. Not measured.
CONFIG = Config(BLOCK=2048, warps=4, waves=8)
