"""Launch numbers of attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

# Rows of a product, at least.
SMALLEST = 16


@dataclass(frozen=True)
class Tile:
    """What a program multiplies at a time, and how it is run.

    Attributes:
        BLOCK_OWN, BLOCK_OTHER: rows that it holds, and rows of the other side.
        PART: features of its results that a program sums at most; there is a program for each part.
        DEPTH: features of a row that are read at once. Rows no longer than this are kept where a loop reads them again.
        warps: per program.
        stages: depth of the software pipeline.
    """

    BLOCK_OWN: int
    BLOCK_OTHER: int
    PART: int
    DEPTH: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """The tiles of one kernel by the width of a head: each serves up to the width it is listed under.

    Attributes:
        short: for bfloat16 and float16.
        single: for float32.
    """

    short: dict[int, Tile]
    single: dict[int, Tile]

    def of(self, dtype: torch.dtype, width: int, crowded: bool) -> Tile:
        """The tile for heads of ``width`` features; ``crowded`` by dropout, or by numbers added to the scores."""
        table = self.single if dtype == torch.float32 else self.short
        found = next(tile for limit, tile in table.items() if width <= limit)
        # A random number takes four registers for each entry, and more time than the shorter products lose.
        return replace(found, BLOCK_OTHER=max(SMALLEST, found.BLOCK_OTHER // 2)) if crowded else found


# Compiled for Hopper without spills; the times are not measured. Products there need 64 rows for four warps: those that
# a program owns. The others are as many as Ampere's registers allow, which hold the rows too. Beyond 128 features rows
# are read again instead, a few features at a time, and so they are in float32, whose products hold the whole depth of
# both factors in registers. On Ampere a few forms with a mask, documents or dropout spill: 8 to 56 bytes, and 288 in
# the sums of 64 features under a boolean mask, where half as many others would slow Hopper down.
FORWARD = Tiles(
    short={64: Tile(128, 64, 64, 64, 8, 3), 128: Tile(128, 64, 128, 128, 8, 2), 256: Tile(64, 32, 128, 32, 4, 2)},
    single={64: Tile(32, 32, 64, 16, 4, 1), 256: Tile(32, 16, 256, 16, 8, 1)},
)
SUMS = Tiles(
    short={64: Tile(64, 64, 64, 64, 4, 2), 128: Tile(64, 32, 128, 128, 4, 2), 256: Tile(64, 32, 256, 32, 4, 2)},
    single={64: Tile(64, 32, 64, 16, 8, 1), 256: Tile(32, 32, 256, 16, 8, 1)},
)
BACKWARD = Tiles(
    short={64: Tile(64, 64, 64, 64, 4, 2), 128: Tile(64, 32, 128, 128, 4, 2), 256: Tile(64, 32, 128, 32, 4, 2)},
    single={64: Tile(32, 32, 64, 16, 4, 1), 256: Tile(32, 16, 128, 16, 4, 1)},
)
DOUBLE = Tiles(
    short={64: Tile(64, 32, 64, 64, 4, 2), 128: Tile(64, 32, 128, 128, 4, 2), 256: Tile(64, 16, 128, 16, 8, 2)},
    single={64: Tile(32, 16, 64, 16, 4, 1), 256: Tile(64, 16, 64, 16, 8, 1)},
)
