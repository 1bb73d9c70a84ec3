"""The whole benchmark of steps: what an explicit regularizer costs, ours and its peers, in one JSON document.

    python bench/suite.py --quick                       # minutes, a few models
    python bench/suite.py --json bench/results/cpu.json # everything
    python bench/suite.py --parts penalty scaling

Prints how long it will take before it starts. Every method shows its result to be right first, rounds interleave the
methods, and the document is written anew after each cell. Exit status 1 if a method of fastreg's is wrong or failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import get_args

from fastreg.benchmark import suite
from fastreg.benchmark.cli import add_machine, execute, on_machine
from fastreg.benchmark.method import Suite
from fastreg.benchmark.plan import plan
from fastreg.benchmark.report import Row
from fastreg.benchmark.run import Settings
from fastreg.errors import FastregError

# Rounds and the seconds they may take in a cell; the gate has warmed every step up.
FULL = Settings(rounds=11, warm_up=0, budget=8.0)
QUICK = Settings(rounds=5, warm_up=0, budget=2.0, peak_memory=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the plan; the exit status."""
    args = _arguments(argv)
    people = sys.stderr if args.json is True else sys.stdout
    cells = plan(args.device, args.quick, args.parts)
    try:
        settings = on_machine(QUICK if args.quick else FULL, args)
        minutes = suite.expected_seconds(cells, settings) / 60
        print(f"{len(cells)} cells, about {minutes:.0f} minutes", file=people, flush=True)
        start = time.perf_counter()
        rows = execute(cells, settings, args, {"plan": "quick" if args.quick else "full", "parts": args.parts})
    except FastregError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\n{_table(rows)}\n{(time.perf_counter() - start) / 60:.1f} minutes", file=people)
    return suite.exit_status(rows)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bench/suite.py", description=__doc__, formatter_class=form)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few models, fewer rounds, no memory: minutes")
    size.add_argument("--full", action="store_true", help="everything (the default)")
    parser.add_argument("--parts", nargs="+", choices=[*get_args(Suite), "scaling"], default=[], help="default: all")
    add_machine(parser)
    return parser.parse_args(argv)


def _table(rows: Sequence[Row]) -> str:
    """How many rows of each part came to which end."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row.part, Counter())[row.status] += 1
    return "\n".join(
        f"{part:<14}" + ", ".join(f"{count} {status}" for status, count in found.items())
        for part, found in counts.items()
    )


if __name__ == "__main__":
    sys.exit(main())
