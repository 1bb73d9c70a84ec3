"""Who won: rows of one cell against each other, with the noise of both."""

from __future__ import annotations

from collections.abc import Sequence

from fastreg.benchmark.measure import Spread
from fastreg.benchmark.report import Row

# A later product on the same batch has the first one's forward and backward to build on: it competes with its like.
LATER = "_kept"
# Implementations of an operation: ours, and the composition of torch calls that they are held against.
OURS, REFERENCE = ("native", "triton"), "reference"


def contest(row: Row) -> tuple[str, bool]:
    """What a row competes in: rows of the same contest compute the same thing."""
    return row.quantity, row.method.endswith(LATER)


def overlap(one: Spread, other: Spread) -> bool:
    """Whether the intervals from p20 to p80 meet, which is what is called noise here."""
    return one.p20 <= other.p80 and other.p20 <= one.p80


def rivals(row: Row, rows: Sequence[Row]) -> list[Row]:
    """Timed rows of others that compute what ``row`` does; a gradient of the loss alone is no contest."""
    if row.quantity == "loss":
        return []
    return [other for other in rows if not other.ours and other.ratio is not None and contest(other) == contest(row)]


def best(rows: Sequence[Row]) -> Row | None:
    """The fastest row."""
    return min(rows, key=lambda row: row.ratio.p50, default=None)


def leads(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a row of ours has rivals and nobody, ours or not, is faster beyond noise."""
    if not row.ours or row.ratio is None or not rivals(row, rows):
        return False
    others = [other for other in rows if other.ratio is not None and contest(other) == contest(row)]
    first = best(others)
    return row is first or overlap(row.ratio, first.ratio)


def standing(row: Row, rows: Sequence[Row]) -> str:
    """A row of ours against the fastest rival, in words; empty where there is none."""
    against = best(rivals(row, rows)) if row.ours and row.ratio is not None else None
    if against is None:
        return ""
    if overlap(row.ratio, against.ratio):
        return f"level with `{against.method}`"
    factor = against.ratio.p50 / row.ratio.p50
    if factor > 1:
        return f"{factor:.2f} times faster than `{against.method}`"
    return f"**{1 / factor:.2f} times slower** than `{against.method}`"


def loses(row: Row, rows: Sequence[Row]) -> bool:
    """Whether the fastest rival of a row of ours is faster beyond noise."""
    return "slower" in standing(row, rows)
