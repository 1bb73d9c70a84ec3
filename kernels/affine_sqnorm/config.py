"""Launch numbers of affine_sqnorm."""

from __future__ import annotations

from dataclasses import dataclass

from fastreg.kernels.norm_affine.config import Tile, power_above, warps


@dataclass(frozen=True)
class Config:
    """How a program's numbers are spread over samples, channels and places.

    Attributes:
        numbers: of each tensor that a program takes at a time.
        channels: of one sample, with all places that fit, before a program takes more samples.
        per_thread: numbers that a thread holds.
        resident: programs for which a multiprocessor has room.
    """

    numbers: int
    channels: int
    per_thread: int
    resident: int

    def tile(self, samples: int, channels: int, places: int) -> Tile:
        """The tile for segments of at most ``samples`` samples ``[channels, places]``."""
        block_p = min(power_above(places), self.numbers)
        left = self.numbers // block_p
        block_r = min(power_above(samples), max(1, left // min(power_above(channels), self.channels)))
        block_c = min(power_above(channels), left // block_r)
        return Tile(block_r, block_c, block_p, warps(block_r * block_c * block_p, self.per_thread))


# 16 numbers a thread are two 16-byte loads per operand and 72 registers at most, so seven programs of four warps are
# resident; six keep 48 KB on their way to a multiprocessor, where 26 KB stream memory at 4.3 TB/s with a latency of
# 0.8 us. 128 channels of a sample are eight sectors of memory in 16 bits, and further samples cost no partial sums.
# The times are not measured.
CONFIG = Config(numbers=2048, channels=128, per_thread=16, resident=6)
