"""Results files as Markdown tables and figures: ``report.py FILE... [--out DIR]``, ``report.py --docs``.

``--docs`` writes docs/benchmarks.md, its figures and the README's table from every file of the current schema in
bench/results, or from the files that are named.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import tables
import targets
from documents import Cell, Document, by_caption, cells, devices, read
from fastreg.benchmark.report import SCHEMA
from fastreg.errors import FastregError
from sections import Drawings, body, by_part, prefix

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
FIGURES = ROOT / "docs" / "figures" / "benchmarks"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
IN_README = ("penalty", "sam")

HEAD = """# Benchmarks

What an explicit regularizer costs, in plain steps (forward, loss, backward) of the same round; a smaller number is
better. Losses are listed first, and why they are in the [notes](../bench/NOTES.md#the-suite). `python bench/report.py
--docs` writes this page from `bench/results`.

## How it was measured

1. A method is timed only if it is right: in float64 its gradient, minus that of the loss, must be the oracle's (one
   double backward per micro-batch in plain autograd) to 1e-9. What is wrong is shown with its error.
2. Rounds interleave all methods of a cell, and each starts with another one; the ratio is the median over rounds of a
   method's time over the plain step's in the same round, with the 20th and 80th percentile.
3. Memory is what a step needs beyond what is held before it: growth of the resident set in a fresh process on a CPU,
   the allocator's peak on a GPU. FLOPs are counted (products and convolutions; none for compiled steps).
4. Bold: ours, where nobody who computes the same is faster beyond noise, that is with an interval below ours.

```
python bench/suite.py --quick                      # minutes; --json FILE keeps the rows
fastreg bench --model gpt --m 8                    # one model, one suite
python bench/roofline.py FILE                      # ceilings and single operations, added to FILE
python bench/compare.py OLD NEW                    # what became slower
pytest bench --benchmark-only --benchmark-json out.json
```

What the floors are, what bounds each figure and what was predicted is in the [notes](../bench/NOTES.md#steps).
"""
NOTES = """<!--
```{include} ../bench/NOTES.md
:start-after: "# Measurements"
```
-->
"""


def report(documents: Sequence[Document], drawn: Drawings) -> str:
    """The Markdown of ``report.py FILE...``."""
    return "\n\n".join(["# Benchmark results", *body(documents, drawn, "figures")]) + "\n"


def page(documents: Sequence[Document], drawn: Drawings) -> str:
    """The text of docs/benchmarks.md."""
    parts = [HEAD.rstrip(), *body(documents, drawn, "figures/benchmarks"), f"## Files\n\n{tables.sources(documents)}"]
    return "\n\n".join([*parts, NOTES])


def readme(documents: Sequence[Document], text: str) -> str:
    """The README with the newest table and figure between its markers.

    Raises:
        FastregError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FastregError(f"readme: text must hold {BEGIN} and {END}, got a README without (put them where the table "
                           "belongs)")  # fmt: skip
    return "\n".join([before + BEGIN, *_readme(documents), end + after])


def _readme(documents: Sequence[Document]) -> Iterator[str]:
    yield tables.paragraph(
        "Ratio to a plain step (forward, loss, backward) in the same run, medians of interleaved rounds; in bold where "
        "nobody who computes the same is faster beyond noise. Intervals, times, memory, losses, what was not timed: "
        "[benchmarks](docs/benchmarks.md).") + "\n"  # fmt: skip
    yield tables.models([cell for cell in cells(documents) if cell.part in IN_README]) + "\n"
    for own in devices(documents).values():
        for part, found in by_part(own).items():
            if part in IN_README:
                yield from _readme_tables(part, found)
    yield f"Targets that were set before: {targets.summary(documents)} ([table](docs/benchmarks.md#targets))."


def _readme_tables(part: str, found: Sequence[Cell]) -> Iterator[str]:
    for caption, group in by_caption(found).items():
        heading = tables.paragraph(f"{tables.title(part)} ({caption}):")
        yield f"{heading}\n\n{tables.pivot(group)}\n"
    if part == "penalty":
        figure = f"{FIGURES.relative_to(ROOT)}/{prefix(found[0].document)}-{part}.png"
        yield f"![{tables.title(part)}, ratios to a plain step]({figure})\n"


def current() -> list[Path]:
    """The files in bench/results that the page is made of."""
    return [path for path in sorted(RESULTS.glob("*.json")) if json.loads(path.read_text()).get("schema") == SCHEMA]


def write_docs(documents: Sequence[Document]) -> None:
    """Write the page, its figures and the README's part."""
    drawn: Drawings = {}
    PAGE.write_text(page(documents, drawn), encoding="utf-8")
    README.write_text(readme(documents, README.read_text(encoding="utf-8")), encoding="utf-8")
    for old in FIGURES.glob("*.*"):
        old.unlink()
    _draw(drawn, FIGURES)


def _draw(drawn: Drawings, folder: Path) -> None:
    for name, draw in drawn.items():
        draw(folder / name)


def run(args: argparse.Namespace) -> None:
    """Write the documentation, a folder, or to standard output."""
    documents = [read(path) for path in args.files or (current() if args.docs else [])]
    if not documents:
        raise FastregError("report: FILE must be at least one results file, got none (write one with "
                           "bench/suite.py --json FILE)")  # fmt: skip
    if args.docs:
        write_docs(documents)
        return
    drawn: Drawings = {}
    text = report(documents, drawn)
    if args.out is None:
        print(text)
        return
    _draw(drawn, args.out / "figures")
    (args.out / "report.md").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 with what is wrong with a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md and figures/ there (default: print)")
    parser.add_argument("--docs", action="store_true", help="write docs/benchmarks.md, its figures, the README's part")
    try:
        run(parser.parse_args(arguments))
    except FastregError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
