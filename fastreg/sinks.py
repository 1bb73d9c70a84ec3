"""Where measured values go: memory, CSV, JSON lines, TensorBoard, the terminal.

A monitor calls ``write(step, values)`` after a step that it measured and ``close()`` at the end.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

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


class ScalarWriter(Protocol):
    """The part of ``torch.utils.tensorboard.SummaryWriter`` that a sink needs."""

    def add_scalar(self, tag: str, value: float, global_step: int) -> None: ...


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
        self.rows.append(_row(step, values))

    def close(self) -> None:
        """Nothing is open; ``rows`` stays."""


class CSVSink(Sink):
    """A CSV file with the columns ``step`` and one per metric, every row on disk when ``write`` returns.

    An existing file is continued, so that a resumed run keeps one file. Missing folders are created.

    Args:
        path: the file.

    Raises:
        FastregError: the existing file has no such header or ends within a line; at a write: the metrics are not those
            of the header, or one is called "step".

    Example:
        >>> import tempfile
        >>> from fastreg.sinks import CSVSink
        >>> path = tempfile.mkdtemp() + "/run.csv"
        >>> with CSVSink(path) as sink:
        ...     sink.write(10, {"loss": 0.5})
        >>> open(path).read()
        'step,loss\\n10,0.5\\n'
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        lines = _existing_lines("CSVSink", path)
        self._header = next(csv.reader(lines[:1]), None)
        if self._header is not None and self._header[:1] != ["step"]:
            raise FastregError(
                f"CSVSink: path must be a new file or one with the header 'step,...', got {lines[0]!r} in {path} "
                "(choose another file)"
            )
        self._stream = _open(path)
        self._writer = csv.writer(self._stream, lineterminator="\n")

    def write(self, step: int, values: dict[str, float]) -> None:
        row = _row(step, values)
        if self._header is None:
            self._header = list(row)
            self._writer.writerow(self._header)
        if row.keys() != set(self._header):
            raise FastregError(
                f"CSVSink.write: values must have the keys {self._header[1:]} of the header, got {list(values)} "
                "(JSONLSink takes rows of any keys)"
            )
        self._writer.writerow([row[name] for name in self._header])
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class JSONLSink(Sink):
    """One JSON object per line, ``{"step": 10, "loss": 0.5}``, on disk when ``write`` returns.

    NaN and infinities become null: JSON has no other word for them. Rows may have different keys. An existing file is
    continued; missing folders are created.

    Args:
        path: the file.

    Raises:
        FastregError: the existing file ends within a line; at a write: a metric is called "step".

    Example:
        >>> import tempfile
        >>> from fastreg.sinks import JSONLSink
        >>> path = tempfile.mkdtemp() + "/run.jsonl"
        >>> with JSONLSink(path) as sink:
        ...     sink.write(10, {"loss": float("nan")})
        >>> open(path).read()
        '{"step": 10, "loss": null}\\n'
    """

    def __init__(self, path: str | Path) -> None:
        _existing_lines("JSONLSink", Path(path))
        self._stream = _open(Path(path))

    def write(self, step: int, values: dict[str, float]) -> None:
        row = {name: value if math.isfinite(value) else None for name, value in _row(step, values).items()}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class TensorBoardSink(Sink):
    """Passes every value to ``writer.add_scalar(name, value, global_step=step)``.

    Args:
        writer: such as ``torch.utils.tensorboard.SummaryWriter``; it stays the caller's to close.

    Example:
        >>> from fastreg.sinks import TensorBoardSink
        >>> class Writer:
        ...     def add_scalar(self, tag, value, global_step):
        ...         print(tag, value, global_step)
        >>> TensorBoardSink(Writer()).write(10, {"loss": 0.5})
        loss 0.5 10
    """

    def __init__(self, writer: ScalarWriter) -> None:
        self._writer = writer

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, float(value), global_step=step)

    def close(self) -> None:
        """The writer stays open."""


class TerminalSink(Sink):
    """One line, rewritten in place on a terminal; a line per row where the stream is a file or a pipe.

    Args:
        stream: ``sys.stderr`` by default.
        every: rows of steps that are multiples of it are shown; at least 1.

    Raises:
        FastregError: ``every`` is out of range.

    Example:
        >>> import sys
        >>> from fastreg.sinks import TerminalSink
        >>> TerminalSink(sys.stdout, every=10).write(20, {"fastreg/loss": 0.5})
        step 20  loss 0.5
    """

    def __init__(self, stream: TextIO | None = None, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise FastregError(f"TerminalSink: every must be an integer >= 1, got {every!r}")
        self._stream, self._every = stream or sys.stderr, every
        self._live = False

    def write(self, step: int, values: dict[str, float]) -> None:
        if step % self._every:
            return
        line = "  ".join([f"step {step}", *(f"{n.removeprefix('fastreg/')} {v:.4g}" for n, v in values.items())])
        self._live = self._stream.isatty()
        if self._live:
            # A line that wraps could not be rewritten by a carriage return.
            line = "\r" + line[: shutil.get_terminal_size().columns - 1] + "\x1b[K"
        self._stream.write(line if self._live else line + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._live:
            self._stream.write("\n")
            self._stream.flush()
        self._live = False


def _row(step: int, values: dict[str, float]) -> dict[str, float]:
    if "step" in values:
        raise FastregError(f"Sink.write: values must have no key 'step', got {list(values)} (rename the metric)")
    return {"step": step, **{name: float(value) for name, value in values.items()}}


def _existing_lines(sink: str, path: Path) -> list[str]:
    """Lines of the file to be continued; a row appended to a cut-off line would be lost with it."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if text and not text.endswith("\n"):
        raise FastregError(f"{sink}: path must end with a whole line, got a cut-off one in {path} (remove that line)")
    return text.splitlines()


def _open(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", newline="", encoding="utf-8")
