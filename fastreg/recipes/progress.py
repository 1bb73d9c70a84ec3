"""Progress on standard error: a bar on a terminal, one line per finished run elsewhere."""

import sys
from types import TracebackType

from fastreg.optional import require
from fastreg.sinks.terminal import rewritable


class Progress:
    """Counts epochs; a context manager.

    Args:
        total: epochs of the whole command.

    Example:
        >>> with Progress(2) as progress:
        ...     progress.advance("large batch, seed 0")
    """

    def __init__(self, total: int) -> None:
        self._bar = None
        if rewritable(sys.stderr):
            self._bar = require("tqdm").tqdm(total=total, unit="epoch", dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, run: str, epochs: int = 1) -> None:
        """Count ``epochs`` more of ``run``."""
        if self._bar is not None:
            self._bar.set_description(run, refresh=False)
            self._bar.update(epochs)

    def note(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)
