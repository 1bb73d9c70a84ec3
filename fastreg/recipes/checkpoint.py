"""Checkpoints of an experiment: written atomically, read without running anything they contain."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastreg.errors import FastregError
from fastreg.recipes.inert_pickle import DAMAGED
from fastreg.recipes.settings import Settings

FORMAT = 1


@dataclass
class Checkpoint:
    """Where an experiment stands.

    Args:
        settings: what it was started with.
        results: of the finished runs, in order.
        current: state of the run under way, None between two runs.
    """

    settings: Settings
    results: list[dict[str, Any]] = field(default_factory=list)
    current: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Write to ``path``; an interruption leaves the previous checkpoint whole.

        Example:
            >>> from fastreg.recipes.settings import default_settings
            >>> Checkpoint(default_settings("digits")).save(Path("checkpoint.pt"))  # doctest: +SKIP
        """
        contents = {
            "format": FORMAT,
            "settings": self.settings.to_dict(),
            "results": self.results,
            "current": self.current,
        }
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as stream:
            torch.save(contents, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)


def load_checkpoint(path: Path, device: str | None = None) -> Checkpoint:
    """Read a checkpoint; tensors and plain values are admitted, code is not.

    Args:
        path: what ``Checkpoint.save`` wrote.
        device: continue there; by default where the experiment ran.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        FastregError: missing or damaged file, another format, or contents other than tensors and
            plain values.

    Example:
        >>> load_checkpoint(Path("checkpoint.pt"))  # doctest: +SKIP
    """
    if not path.is_file():
        raise FastregError(f"resume: checkpoint must be an existing file, got {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        return _parse(contents, device)
    except (*DAMAGED, RuntimeError) as error:
        raise FastregError(
            f"resume: checkpoint must be a file that fastreg train wrote, got {path}: {error}"
        ) from error


def _parse(contents: dict[str, Any], device: str | None) -> Checkpoint:
    if contents["format"] != FORMAT:
        raise ValueError(f"format {contents['format']}, not {FORMAT}")
    values = contents["settings"]
    settings = Settings.from_dict({**values, "device": device or values["device"]})
    return Checkpoint(settings, contents["results"], contents["current"])
