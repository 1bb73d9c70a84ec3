"""Results files read back: ``fastreg bench --json`` and ``bench/suite.py`` write them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastreg.benchmark.measure import Spread
from fastreg.benchmark.report import SCHEMA, Row
from fastreg.errors import FastregError

Json = dict[str, object]


@dataclass(frozen=True)
class Document:
    """One results file.

    Attributes:
        name: the file's name.
        machine: what :func:`fastreg.benchmark.machine.describe` said.
        settings: command, rounds, dtype.
        rows: one per method, model and m, or per point of a curve.
        ceilings: measured ``bytes_per_s`` and ``flops_per_s``, None without the roofline part.
        kernels: one per case and implementation of an op, times in seconds.
    """

    name: str
    machine: Json
    settings: Json
    rows: tuple[Row, ...]
    ceilings: dict[str, float] | None
    kernels: tuple[Json, ...]

    @property
    def device(self) -> str:
        """The name of what ran the steps."""
        return str(self.machine["device"])

    @property
    def on_cpu(self) -> bool:
        """Whether the steps ran on the host."""
        return self.machine["device"] == self.machine["cpu"]

    @property
    def dtype(self) -> str:
        """Of the timed forward passes."""
        return str(self.settings.get("dtype", "float32"))

    @property
    def caption(self) -> str:
        """Hardware, threads, versions, dtype of the steps, commit and date, in one line."""
        return self.described(self.dtype)

    def described(self, dtype: str) -> str:
        """The caption of what was measured in another dtype than the steps."""
        machine = self.machine
        count = machine["system"]["torch_threads"]
        threads = f", {count} thread{'s' * (count != 1)}" if self.on_cpu else ""
        return (f"{self.device}{threads}, torch {machine['versions']['torch']}, {dtype}, "
                f"commit {machine['commit']}, {str(machine['date'])[:10]}")


@dataclass(frozen=True)
class Cell:
    """The methods that were measured together, with the document they are in."""

    document: Document
    part: str
    model: str
    m: int
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """Model and number of micro-batches."""
        return f"{self.model}, m = {self.m}"


def read(path: Path) -> Document:
    """The results in a file.

    Raises:
        FastregError: the file is missing, is no JSON, or was not written by the benchmark.
    """
    found = load(path)
    if found.get("schema") != SCHEMA:
        raise FastregError(
            f"read: path must be a results file of schema {SCHEMA}, got {path} with schema {found.get('schema')} "
            "(write it again with bench/suite.py --json FILE)"
        )
    try:
        rows = tuple(_row(entry) for entry in found["rows"])
        kernels = tuple(found.get("kernels", ()))
        return Document(path.name, found["machine"], found["settings"], rows, found.get("ceilings"), kernels)
    except (KeyError, TypeError) as error:
        raise FastregError(
            f"read: path must be a whole results file, got {path} where something is missing or unknown: {error} "
            "(write it again with bench/suite.py --json FILE)"
        ) from error


def load(path: Path) -> Json:
    """The JSON object in a file.

    Raises:
        FastregError: the file is missing or holds no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FastregError(
            f"load: path must be a JSON file, got {path}: {error} (write one with bench/suite.py --json FILE)"
        ) from error
    if not isinstance(found, dict):
        raise FastregError(
            f"load: path must hold a JSON object, got a {type(found).__name__} in {path} "
            "(write one with bench/suite.py --json FILE)"
        )
    return found


def _row(entry: Json) -> Row:
    spreads = {name: Spread(**entry[name]) for name in ("seconds", "ratio") if entry.get(name)}
    return Row(**{**entry, **spreads})


def devices(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """The documents by device, in order of appearance."""
    found: dict[str, list[Document]] = {}
    for document in documents:
        found.setdefault(document.device, []).append(document)
    return found


def cells(documents: Sequence[Document]) -> list[Cell]:
    """What was measured together, without the curves; where several documents have a cell, that of the newest."""
    found: dict[tuple[str, ...], Cell] = {}
    for document in sorted(documents, key=lambda one: str(one.machine["date"])):
        for cell in _cells_of(document):
            found[document.device, document.dtype, cell.part, cell.model, str(cell.m)] = cell
    return list(found.values())


def _cells_of(document: Document) -> Iterator[Cell]:
    flat = [row for row in document.rows if row.curve is None]
    for part, model, m in dict.fromkeys((row.part, row.model, row.m) for row in flat):
        rows = tuple(row for row in flat if (row.part, row.model, row.m) == (part, model, m))
        yield Cell(document, part, model, m, rows)


def by_caption(found: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by what and where they were measured on, in order of appearance."""
    captions: dict[str, list[Cell]] = {}
    for cell in found:
        captions.setdefault(cell.document.caption, []).append(cell)
    return captions


def curves(documents: Sequence[Document]) -> dict[str, tuple[Document, list[Row]]]:
    """The points of every curve, from the newest document that has it."""
    found: dict[str, tuple[Document, list[Row]]] = {}
    for document in sorted(documents, key=lambda one: str(one.machine["date"])):
        for name in dict.fromkeys(row.curve for row in document.rows if row.curve is not None):
            found[name] = document, [row for row in document.rows if row.curve == name]
    return found


def with_kernels(documents: Sequence[Document]) -> Document | None:
    """The newest document that has measured operations."""
    measured = [one for one in documents if one.ceilings and any(row["seconds"] for row in one.kernels)]
    return max(measured, key=lambda one: str(one.machine["date"]), default=None)
