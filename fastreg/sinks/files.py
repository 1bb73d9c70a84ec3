"""Sinks that write text files, which ``fastreg monitor`` reads."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import TextIO

from fastreg.errors import FastregError
from fastreg.sinks.base import Sink, row_of


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
        row = row_of(step, values)
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
        row = {name: value if math.isfinite(value) else None for name, value in row_of(step, values).items()}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _existing_lines(sink: str, path: Path) -> list[str]:
    """Lines of the file to be continued; a row appended to a cut-off line would be lost with it."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if text and not text.endswith("\n"):
        raise FastregError(f"{sink}: path must end with a whole line, got a cut-off one in {path} (remove that line)")
    return text.splitlines()


def _open(path: Path) -> TextIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", newline="", encoding="utf-8")
