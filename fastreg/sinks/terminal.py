"""Rows as lines on a terminal."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

from fastreg.errors import FastregError
from fastreg.sinks.base import Sink


class TerminalSink(Sink):
    """One line, rewritten in place on a terminal; a line per row where the stream is a file, a pipe or a dumb terminal.

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
        self._live = rewritable(self._stream)
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


def rewritable(stream: TextIO) -> bool:
    """Whether it is a terminal on which a line can be written again (``TERM=dumb`` says that it cannot).

    Example:
        >>> import io
        >>> from fastreg.sinks.terminal import rewritable
        >>> rewritable(io.StringIO())
        False
    """
    return stream.isatty() and os.environ.get("TERM") != "dumb"
