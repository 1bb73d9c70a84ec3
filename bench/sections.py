"""The report's sections: targets, losses, then tables and figures by device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import figures
import tables
import targets
from documents import Cell, Document, by_caption, cells, curves, devices, with_kernels

# What draws a figure at a path; by its name.
Drawings = dict[str, Callable[[Path], list[Path]]]


def body(documents: Sequence[Document], drawn: Drawings, folder: str) -> Iterator[str]:
    """Targets, losses, then tables and figures by device; ``drawn`` receives the figures that are referred to."""
    yield f"## Targets\n\n{targets.summary(documents)}.\n\n{targets.table(documents)}"
    yield f"## Where others are faster\n\n{tables.losses(documents)}"
    for device, own in devices(documents).items():
        yield f"## Results: {device}\n\n{tables.models(cells(own))}"
        yield from _parts(own, drawn, folder)
        yield from _curves(own, drawn, folder)
        yield from _kernels(own, drawn, folder)
    yield f"## What was not timed\n\n{tables.not_timed(documents)}"


def slug(text: str) -> str:
    """A file name made of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def prefix(document: Document) -> str:
    """What the names of a device's figures begin with."""
    return "cpu" if document.on_cpu else slug(document.device)


def by_part(documents: Sequence[Document]) -> dict[str, list[Cell]]:
    """The cells of every part, in the order of :data:`tables.PARTS`."""
    order = [*tables.PARTS]
    found = sorted(cells(documents), key=lambda one: order.index(one.part) if one.part in order else len(order))
    return {part: list(group) for part, group in groupby(found, key=lambda one: one.part)}


def _parts(documents: Sequence[Document], drawn: Drawings, folder: str) -> Iterator[str]:
    for part, found in by_part(documents).items():
        yield f"### {tables.title(part)}"
        if any(row.ratio and row.method != "plain" for cell in found for row in cell.rows):
            name = f"{prefix(documents[0])}-{slug(part)}"
            drawn[name] = partial(figures.bars, cells=found)
            yield f"![{tables.title(part)}, ratios to a plain step]({folder}/{name}.png)"
        for caption, group in by_caption(found).items():
            tabled = (f"**{cell.label}**\n\n{tables.step_table(cell)}" for cell in group)
            yield "\n\n".join([f"{caption}.", *tabled])


def _curves(documents: Sequence[Document], drawn: Drawings, folder: str) -> Iterator[str]:
    found = curves(documents)
    if found:
        yield "### Growth with size"
    for name, (document, rows) in found.items():
        text = f"**{name}**: {document.caption}.\n\n{tables.curve_table(rows)}"
        if any(row.ratio for row in rows):
            file = f"{prefix(document)}-{slug(name)}"
            drawn[file] = partial(figures.curve, name=name, document=document, rows=rows)
            text += f"\n\n![{name}, ratios to a plain step]({folder}/{file}.png)"
        yield text


def _kernels(documents: Sequence[Document], drawn: Drawings, folder: str) -> Iterator[str]:
    document = with_kernels(documents)
    if document is None:
        return
    top = document.ceilings
    name = f"{prefix(document)}-roofline"
    drawn[name] = partial(figures.roofline, document=document)
    text = tables.paragraph(
        f"{document.described(document.kernels[0]['dtype'])}. Measured ceilings: copy "
        f"{top['bytes_per_s'] / 1e9:.1f} GB/s, matrix product {top['flops_per_s'] / 1e9:.0f} GFLOP/s. The floor is the "
        "larger of the bytes that must move and the operations that cannot be left out, each at its ceiling; on a CPU "
        "operands that stay in cache can beat it."
    )
    yield (
        f"### Single operations\n\n{text}\n\n"
        f"![Operations against the measured ceilings]({folder}/{name}.png)\n\n{tables.kernel_table(document)}"
    )
