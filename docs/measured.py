"""Measured figures in the text of pages: `python docs/measured.py` reads `bench/results` and writes them there.

A figure stands before a comment that names it, which neither GitHub nor the site shows: `<!-- penalty.mlp_8.exact -->`
is a ratio to a plain step, by part of the suite, model and m, and method, from the newest file that has it;
`<!-- memory.exact.block -->` comes from the table of memory, in MiB or as a ratio.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
NAMED = re.compile(r"[^\s|(]*<!-- (\w+(?:\.\w+){2}) -->")
MIB = 2**20


def figures(results: Path = ROOT / "bench" / "results") -> dict[str, str]:
    """Every figure by its name."""
    found: dict[str, str] = {}
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("cpu-*.json")]
    for document in sorted(documents, key=lambda one: one["machine"]["date"]):
        rows = document["rows"]
        found |= _ratios(rows) if "schema" in document else _memory(rows)
    return found


def _ratios(rows: list[dict]) -> dict[str, str]:
    """Medians; not those along a curve."""
    timed = [row for row in rows if row["ratio"] and row["curve"] is None]
    return {f"{row['part']}.{row['model']}_{row['m']}.{row['method']}": _digits(row["ratio"]["p50"]) for row in timed}


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _memory(rows: list[dict]) -> dict[str, str]:
    """Peaks by depth, growth per block between the two largest depths, and that over the plain step's."""
    peaks: dict[str, dict[int, float]] = {}
    for row in rows:
        peaks.setdefault(re.sub(r"\W+", "_", row["method"]), {})[row["depth"]] = row["bytes"] / MIB
    found, (*_, less, most) = {}, sorted(peaks["plain"])
    block = {method: (own[most] - own[less]) / (most - less) for method, own in peaks.items()}
    for method, own in peaks.items():
        found |= {f"memory.{method}.blocks_{depth}": f"{peak:.0f}" for depth, peak in own.items()}
        found[f"memory.{method}.block"] = f"{block[method]:.1f}"
        found[f"memory.{method}.to_plain"] = f"{block[method] / block['plain']:.2f}"
    return found


def current(text: str, by_name: dict[str, str]) -> str:
    """The text with the figures of today."""
    return NAMED.sub(lambda match: f"{by_name[match[1]]}<!-- {match[1]} -->", text)


if __name__ == "__main__":
    today = figures()
    for page in PAGES:
        page.write_text(current(page.read_text(encoding="utf-8"), today), encoding="utf-8")
