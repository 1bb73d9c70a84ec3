"""What every sink is, and the one that keeps rows in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from fastreg.errors import FastregError

if TYPE_CHECKING:
    from typing_extensions import Self


class Sink(ABC):
    """Receives rows of values; a context manager that closes itself."""

    @abstractmethod
    def write(self, step: int, values: dict[str, float]) -> None:
        """Take one row: what was measured at ``step``, by metric name; NaN is a value."""

    @abstractmethod
    def close(self) -> None:
        """Release what the sink opened; closing twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class MemorySink(Sink):
    """Keeps every row as ``{"step": step, **values}`` in the list ``rows``.

    Raises:
        FastregError: at a write: a metric is called "step".

    Example:
        >>> from fastreg.sinks import MemorySink
        >>> with MemorySink() as sink:
        ...     sink.write(10, {"loss": 0.5})
        >>> sink.rows
        [{'step': 10, 'loss': 0.5}]
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def write(self, step: int, values: dict[str, float]) -> None:
        self.rows.append(row_of(step, values))

    def close(self) -> None:
        """Nothing is open; ``rows`` stays."""


def row_of(step: int, values: dict[str, float]) -> dict[str, float]:
    if "step" in values:
        raise FastregError(f"Sink.write: values must have no key 'step', got {list(values)} (rename the metric)")
    return {"step": step, **{name: float(value) for name, value in values.items()}}
