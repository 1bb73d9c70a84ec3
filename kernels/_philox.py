"""Random bits that depend on a counter and a key alone: the same on any device, backend and launch grid."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

LOW = 0xFFFFFFFF
# Multipliers and key increments of Philox-4x32.
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_RAISES = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# 64 bits.
Word = TypeVar("Word", int, Tensor)


def philox(counter: tuple[Tensor, ...], key: tuple[Word, Word]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four words of 32 random bits per counter of four words, all held in int64.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products wrap around 64 bits, which leaves both halves as they are.
        first, second = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1 = (second >> 32 & LOW) ^ c1 ^ k0, second & LOW
        c2, c3 = (first >> 32 & LOW) ^ c3 ^ k1, first & LOW
        k0, k1 = (k0 + _RAISES[0]) & LOW, (k1 + _RAISES[1]) & LOW
    return c0, c1, c2, c3


def halves(number: Word) -> tuple[Word, Word]:
    """The low and the high 32 bits of 64."""
    return number & LOW, number >> 32 & LOW
