"""Sinks that pass values on to TensorBoard and to Weights & Biases."""

from __future__ import annotations

from typing import Protocol

from fastreg.errors import FastregError
from fastreg.optional import require
from fastreg.sinks.base import Sink


class ScalarWriter(Protocol):
    """The part of ``torch.utils.tensorboard.SummaryWriter`` that a sink needs."""

    def add_scalar(self, tag: str, value: float, global_step: int) -> None: ...


class WandbRun(Protocol):
    """The part of a run of ``wandb`` that a sink needs."""

    def log(self, data: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


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


class WandbSink(Sink):
    """Logs every row with ``run.log(values, step=step)`` to Weights & Biases, which drops rows of earlier steps.

    Args:
        run: what ``wandb.init`` returned; it stays the caller's to finish. None: a run of the sink's own, which
            ``close`` finishes.
        settings: of ``wandb.init`` for the sink's own run: ``project``, ``name``, ``mode="offline"``, ...

    Raises:
        FastregError: wandb is not installed, or settings are given for a run that has begun.

    Example:
        >>> from fastreg.sinks import WandbSink
        >>> sink = WandbSink(project="penalties", mode="offline")  # doctest: +SKIP
        >>> sink.write(10, {"loss": 0.5})  # doctest: +SKIP
        >>> sink.close()  # doctest: +SKIP
    """

    def __init__(self, run: WandbRun | None = None, **settings: object) -> None:
        if run is not None and settings:
            raise FastregError(f"WandbSink: settings must be absent with a run, got {list(settings)} (see wandb.init)")
        self._owned = run is None
        self._run: WandbRun = require("wandb").init(**settings) if run is None else run

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({name: float(value) for name, value in values.items()}, step=step)

    def close(self) -> None:
        if self._owned:
            self._run.finish()
        self._owned = False
