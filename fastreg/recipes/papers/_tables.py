"""Tables of the recipes."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(header: Sequence[str], rows: Sequence[Sequence[object]], digits: int = 4) -> str:
    """Columns flush right, two spaces apart; floats with ``digits`` significant digits.

    Example:
        >>> print(aligned(("S", "lr"), [(1, 0.25), (16, 0.123456)]))
         S      lr
         1    0.25
        16  0.1235
    """
    cells = [list(header)] + [[_cell(value, digits) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def _cell(value: object, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
