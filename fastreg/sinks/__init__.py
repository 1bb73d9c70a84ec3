"""Where measured values go: memory, CSV, JSON lines, TensorBoard, Weights & Biases, the terminal.

A monitor calls ``write(step, values)`` after a step that it measured and ``close()`` at the end.
"""

from __future__ import annotations

from fastreg.sinks.base import MemorySink, Sink
from fastreg.sinks.files import CSVSink, JSONLSink
from fastreg.sinks.terminal import TerminalSink
from fastreg.sinks.trackers import ScalarWriter, TensorBoardSink, WandbRun, WandbSink

__all__ = [
    "CSVSink", "JSONLSink", "MemorySink", "ScalarWriter", "Sink", "TensorBoardSink", "TerminalSink", "WandbRun",
    "WandbSink",
]  # fmt: skip
