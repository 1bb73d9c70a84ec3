"""Which keys a query sees, and what of its softmax is dropped: the arguments that all three ops share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pattern(NamedTuple):
    """Visibility, scale and dropout, in the order of the ops' schemas: passed as ``*pattern``.

    Query i sees key j where every field that is given allows it; positions count from 0 on both sides.

    Attributes:
        mask: [B, H, T, U] or size 1 in any of these, any strides; bool (True is seen) or float (added to the scores,
            -inf is not seen). It is never differentiated.
        spans: [2, T] int32 with T = U: ``spans[0, i] <= j < spans[1, i]``, the document that token i lies in.
        seed: [1] int64 on the device of the data, the key of dropout; None without dropout.
        scale: c in ``c Q K^T``.
        left: ``i - j <= left``, or negative for no such bound.
        right: ``j - i <= right``, or negative for no such bound. Causal is left = -1, right = 0.
        dropout: p, the probability to drop an entry of the softmax.
    """

    mask: Tensor | None = None
    spans: Tensor | None = None
    seed: Tensor | None = None
    scale: float = 1.0
    left: int = -1
    right: int = -1
    dropout: float = 0.0


SCHEMA = "Tensor? mask, Tensor? spans, Tensor? seed, float scale, int left, int right, float dropout"


def threshold(dropout: float) -> int:
    """The random word, of 32 bits, from which on an entry is kept."""
    return min(round(dropout * 2**32), 2**32 - 1)


def factor(dropout: float) -> float:
    """What kept entries are multiplied by; 0 where nothing is to be kept."""
    return 1 / (1 - dropout) if dropout < 1 else 0.0
