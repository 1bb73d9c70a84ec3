"""What a training loop of others attaches to the model that it comes to train, and keeps in its checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from fastreg.errors import FastregError
from fastreg.monitor import Monitor
from fastreg.regularizer import Regularizer

if TYPE_CHECKING:
    from transformers import Trainer
else:
    # Mixed into Trainers, of which this module needs to know none.
    Trainer = object

Kind = TypeVar("Kind", Regularizer, Monitor)


class Attached(Generic[Kind]):
    """One for the model that is trained now.

    Args:
        build: makes it for a model.
        name: of its file in a checkpoint.

    Attributes:
        one: it, or None before the first step.
    """

    def __init__(self, build: Callable[[nn.Module], Kind], name: str) -> None:
        self._build: Callable[[nn.Module], Kind] = build
        self._name = name
        self._state: dict[str, Any] | None = None
        self.one: Kind | None = None

    def to(self, model: nn.Module) -> Kind:
        """The one for ``model``, attached now if it was to another or to none."""
        if isinstance(model, nn.DataParallel):
            raise FastregError("attach: model must not be DataParallel (start one process per device: torchrun)")
        if self.one is None or self.one.model is not model:
            if self.one is not None:
                self.one.remove()
            self.one = self._build(model)
        if self._state is not None:
            self.one.load_state_dict(self._state)
            self._state = None
        return self.one

    def logs(self, logs: dict[str, float]) -> dict[str, float]:
        """``logs``, with the scalar metrics of the last step where they are those of training steps."""
        if self.one is None or "loss" not in logs:
            return logs
        return logs | {name: value.item() for name, value in self.one.metrics.items() if not value.dim()}

    def save(self, folder: str, process: int) -> None:
        """Leave the state of one process among the files of a checkpoint."""
        if self.one is not None:
            torch.save(self.one.state_dict(), self._file(folder, process))

    def load(self, folder: str | None, process: int) -> None:
        """Continue from a checkpoint at the next step, if it has a state."""
        if folder is not None and (file := self._file(folder, process)).is_file():
            self._state = torch.load(file, weights_only=True)

    def _file(self, folder: str, process: int) -> Path:
        return Path(folder) / f"{self._name}_{process}.pt"


class Attaching(Trainer):
    """A Trainer with something attached to its model: in its logs and checkpoints."""

    def __init__(self, *args: Any, attached: type[Regularizer | Monitor], **kwargs: Any) -> None:
        names = tuple(inspect.signature(attached).parameters)[1:]
        options = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().__init__(*args, **kwargs)
        # Arguments are refused now rather than at the first step.
        attached(self.model, **options).remove()
        name = f"fastreg_{attached.__name__.lower()}"
        self._attached: Attached[Any] = Attached(lambda model: attached(model, **options), name)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's, with scalar metrics of the last step in the logs of training steps."""
        super().log(self._attached.logs(logs), *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._attached.save(output_dir, self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._attached.load(checkpoint, self.args.process_index)
