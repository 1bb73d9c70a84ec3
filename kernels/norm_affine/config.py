"""Launch numbers of the norm layers."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from fastreg.kernels._segments import Segments


@dataclass(frozen=True)
class Tile:
    """What a program holds at a time.

    Attributes:
        BLOCK_R, BLOCK_C, BLOCK_P: samples, channels, places; powers of two.
        warps: per program.
    """

    BLOCK_R: int
    BLOCK_C: int
    BLOCK_P: int
    warps: int

    @property
    def row(self) -> dict[str, int]:
        """What it holds of one sample, as the kernels' arguments."""
        return {"BLOCK_C": self.BLOCK_C, "BLOCK_P": self.BLOCK_P}

    def holds(self, channels: int, places: int) -> bool:
        """Whether that many channels with all their places are in one tile."""
        return channels <= self.BLOCK_C and places <= self.BLOCK_P

    def parts(self, found: Segments, others: int, programs: int) -> int:
        """Runs that each segment is cut into, for ``others`` programs each, where ``programs`` run side by side."""
        share = programs / max(1, found.count * others)
        filling = int(share) if share >= ROUNDS else ceil(ROUNDS * share)
        return max(1, min(filling, ceil(found.longest / self.BLOCK_R)))


@dataclass(frozen=True)
class Config:
    """How many numbers of each tensor a program of one op holds.

    Attributes:
        numbers: that a program takes at a time, if it has as many.
        widest: numbers normalised together that a program still holds as a whole.
        per_thread: numbers that a thread holds, more if the program then had too many warps.
        resident: programs for which a multiprocessor has room; None where a program takes one tile.
    """

    numbers: int
    widest: int
    per_thread: int
    resident: int | None

    def tile(self, samples: int, channels: int, places: int) -> Tile:
        """The tile for runs of ``samples`` rows of ``[channels, places]`` numbers that are normalised together."""
        block_c, block_p = power_above(channels), power_above(places)
        block_r = min(power_above(samples), max(1, self.numbers // (block_c * block_p)))
        if block_c * block_p > self.widest:
            block_p = min(block_p, self.numbers)
            block_c = min(block_c, self.numbers // block_p)
        return Tile(block_r, block_c, block_p, warps(block_r * block_c * block_p, self.per_thread))


def power_above(size: int) -> int:
    """The least power of two that is not less than ``size``, and at least one."""
    return 1 << max(0, size - 1).bit_length()


def warps(numbers: int, per_thread: int) -> int:
    """Warps that hold so many numbers at so many a thread."""
    return min(MOST_WARPS, max(1, numbers // (32 * per_thread)))


# Programs run in one round if there is choice enough, so that few partial sums are written; else in so many that the
# last one, which need not be full, costs at most a fifth.
ROUNDS = 4
# Half of a multiprocessor's threads; with more, a thread has no 128 registers.
MOST_WARPS = 16

# A multiprocessor must keep 26 KB on their way to stream at 4.3 TB/s with a latency of 0.8 us: two tensors of 2048
# numbers in 16 bits are 8 KB, so three or four programs of that size. Occupancy is by the compiler's count of
# registers; the times are not measured.
# One tensor is held, of which 32 numbers a thread still leave 64 registers.
FORWARD = Config(numbers=4096, widest=16384, per_thread=16, resident=None)
# x, d and, where a channel has one place, two sums for each number: 80 registers at 8 numbers a thread, 176 at 16. The
# most that 16 warps hold without spills are 16 a thread.
BACKWARD = Config(numbers=2048, widest=8192, per_thread=8, resident=3)
# x, d, v and a sum: 128 registers at 8 numbers a thread. 16 warps hold 16 a thread if the tensors are of 16 bits.
DOUBLE_BACKWARD = Config(numbers=2048, widest=8192, per_thread=8, resident=2)
DOUBLE_BACKWARD_SINGLE = Config(numbers=2048, widest=4096, per_thread=8, resident=2)
