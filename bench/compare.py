"""What became slower: ``compare.py OLD NEW``, two results files or two of pytest-benchmark's.

What is compared is the ratio to the baseline of the same run: the plain step, or an operation's reference. A change
counts if the intervals of the ratio (p20 to p80, or the quartiles) are apart and its median moved by more than the
threshold. Exit status: 0 nothing of ours is slower, 1 something is (or is no longer right), 2 the files cannot be
compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from documents import Json, load, read
from fastreg.benchmark.measure import Spread
from fastreg.errors import FastregError
from verdicts import OURS, REFERENCE, overlap

THRESHOLD = 0.05
# Their own times say nothing about us.
BASELINES = ("plain", REFERENCE)
SLOWER, BROKEN = "slower", "no longer timed"


@dataclass(frozen=True)
class Entry:
    """One measurement: its ratio to the baseline, None where it was not timed, and whether it is ours."""

    ratio: Spread | None
    ours: bool


@dataclass(frozen=True)
class Change:
    """A row of the comparison; ``new / old`` is the quotient of the median ratios."""

    name: str
    verdict: str
    ours: bool
    old: float | None = None
    new: float | None = None

    @property
    def factor(self) -> float | None:
        """How many times as long it takes now."""
        return self.new / self.old if self.old and self.new else None


def entries(path: Path) -> dict[str, Entry]:
    """The measurements in a file, by name."""
    found = load(path)
    return dict(_of_pytest(found) if "benchmarks" in found else _of_suite(path))


def _of_suite(path: Path) -> Iterator[tuple[str, Entry]]:
    document = read(path)
    for row in document.rows:
        place = f"{row.part}: {row.model}, m = {row.m}" if row.curve is None else f"{row.curve} = {row.at:g}"
        yield f"{place}, {row.method}", Entry(row.ratio, row.ours)
    seconds = {_kernel_name(row): row["seconds"]["p50"] for row in document.kernels if row["seconds"]}
    for row in document.kernels:
        base = seconds.get(_kernel_name({**row, "implementation": REFERENCE}), 1.0)
        spread = _over(row["seconds"], base, ("p20", "p50", "p80")) if row["seconds"] else None
        yield _kernel_name(row), Entry(spread, row["implementation"] in OURS)


def _kernel_name(row: Json) -> str:
    return ", ".join(str(row[key]) for key in ("op", "case", "dtype", "implementation"))


def _of_pytest(found: Json) -> Iterator[tuple[str, Entry]]:
    medians = {(one["group"], one["extra_info"].get("method")): one["stats"]["median"] for one in found["benchmarks"]}
    for one in found["benchmarks"]:
        base = next((medians[one["group"], name] for name in BASELINES if (one["group"], name) in medians), 1.0)
        ours = bool(one["extra_info"].get("ours", True))
        yield str(one["fullname"]), Entry(_over(one["stats"], base, ("q1", "median", "q3")), ours)


def _over(values: Mapping[str, float], base: float, names: Sequence[str]) -> Spread:
    return Spread(*(values[name] / base for name in names))


def conditions(path: Path) -> tuple[object, ...]:
    """Device, threads and dtype that a file was measured with.

    Raises:
        FastregError: the file does not say.
    """
    found = load(path)
    machine = found.get("machine") or found.get("machine_info", {}).get("fastreg")
    if not isinstance(machine, dict):
        raise FastregError(f"conditions: path must be a file that names its machine, got {path} "
                           "(write it with bench/suite.py or with pytest bench, or pass --any-machine)")  # fmt: skip
    return machine["device"], machine["system"]["torch_threads"], found.get("settings", {}).get("dtype")


def check_conditions(old: Path, new: Path) -> None:
    """Refuse files of different machines, numbers of threads or dtypes.

    Raises:
        FastregError: they differ.
    """
    there, here = conditions(old), conditions(new)
    if there != here:
        raise FastregError(
            f"compare: OLD and NEW must be of one machine, number of threads and dtype, got {there} and {here} "
            "(measure again on one, or pass --any-machine)"
        )


def compare(old: Mapping[str, Entry], new: Mapping[str, Entry], threshold: float) -> list[Change]:
    """One change per name: slower, faster, same, no longer timed, timed again, gone, new."""
    changes = [_change(name, old[name], new[name], threshold) for name in old if name in new]
    changes += [Change(name, "gone", entry.ours) for name, entry in old.items() if name not in new]
    return changes + [Change(name, "new", entry.ours) for name, entry in new.items() if name not in old]


def _change(name: str, old: Entry, new: Entry, threshold: float) -> Change:
    if old.ratio is None or new.ratio is None:
        timed = "same" if old.ratio is new.ratio else BROKEN if new.ratio is None else "timed again"
        return Change(name, timed, new.ours)
    factor = new.ratio.p50 / old.ratio.p50
    beyond = not overlap(old.ratio, new.ratio) and abs(factor - 1) > threshold
    verdict = "same" if not beyond else SLOWER if factor > 1 else "faster"
    return Change(name, verdict, new.ours, old.ratio.p50, new.ratio.p50)


def table(changes: Sequence[Change]) -> str:
    """What changed, slowest first, then what is gone and new."""
    moved = sorted((one for one in changes if one.factor and one.verdict != "same"), key=lambda one: -one.factor)
    rest = [one for one in changes if not one.factor and one.verdict != "same"]
    lines = ["| what | old | new | new / old | |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {_owned(one)} | {one.old:.3g} | {one.new:.3g} | {one.factor:.2f} | {one.verdict} |" for one in moved]
    lines += [f"| {_owned(one)} | | | | {one.verdict} |" for one in rest]
    same = sum(one.verdict == "same" for one in changes)
    return "\n".join([*lines, "", f"{same} the same, {len(changes) - same} not."])


def _owned(change: Change) -> str:
    return change.name.replace("|", "/") + ("" if change.ours else " (not ours)")


def run(args: argparse.Namespace) -> int:
    """Compare and print."""
    if not args.any_machine:
        check_conditions(args.old, args.new)
    changes = compare(entries(args.old), entries(args.new), args.threshold)
    print(json.dumps([asdict(one) for one in changes], indent=1) if args.json else table(changes))
    return int(any(one.ours and one.verdict in (SLOWER, BROKEN) for one in changes))


def main(arguments: Sequence[str] | None = None) -> int:
    """See the exit status above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    add = parser.add_argument
    add("--threshold", type=float, default=THRESHOLD, metavar="SHARE", help="least change of a median (default: 0.05)")
    add("--any-machine", action="store_true", help="compare files of different machines or threads")
    add("--json", action="store_true", help="print all rows as JSON")
    try:
        return run(parser.parse_args(arguments))
    except FastregError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
