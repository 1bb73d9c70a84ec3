"""Print a GPU run's results file as tables: ``gpu_table.py FILE``."""

import json
import sys
from pathlib import Path


def kernel_lines(rows: list[dict[str, object]]) -> list[str]:
    """Time, distance to the floor and error of every implementation of every case."""
    lines = [f"{'op':<30}{'case':<34}{'dtype':<10}{'by':<26}{'ms':>9}{'x floor':>9}{'error':>9}"]
    for row in rows:
        start = f"{row['op']:<30}{row['case']:<34}{row['dtype']:<10}{row['implementation']:<26}"
        if "ms" not in row:
            lines.append(f"{start}  WRONG: error {row['error']:.0e}, not timed")
            continue
        middle = row["ms"]["p50"]
        lines.append(f"{start}{middle:>9.3f}{middle / row['floor_ms']:>9.2f}{row['error']:>9.0e}")
    return lines


def step_lines(name: str, part: dict[str, object]) -> list[str]:
    """Ratio to the plain step and peak memory of every method."""
    lines = ["", name, f"{'part':<14}{'model':<13}{'at':>6}{'m':>5}  {'method':<26}{'ms':>9}{'ratio':>8}{'GB':>8}"]
    for row in part["rows"]:
        start = f"{row['part']:<14}{row['model']:<13}{row['at'] or '':>6}{row['m']:>5}  {row['method']:<26}"
        if row["status"] != "ok":
            lines.append(f"{start}  {row['status'].upper()}: {row['message'] or 'not timed'}")
            continue
        memory = row["peak_bytes"] / 2**30
        lines.append(
            f"{start}{1e3 * row['seconds']['p50']:>9.1f}{row['ratio']['p50']:>8.2f}{memory:>8.2f}"
        )
    return lines


def main() -> None:
    """Print what the file holds; stages that did not run are named."""
    document = json.loads(Path(sys.argv[1]).read_text())
    machine, top = document["machine"], document.get("ceilings")
    print(f"{machine['device']}, torch {machine['versions']['torch']}, commit {machine['commit']}")
    if top is None:
        print("ceilings: not measured")
    else:
        print(f"copy {top['bytes_per_s'] / 1e12:.2f} TB/s, matmul {top['flops_per_s'] / 1e12:.0f} TFLOP/s")
    for stage in ("kernels", "lists"):
        print("\n".join(kernel_lines(document[stage])) if stage in document else f"{stage}: not measured")
    steps = [key for key in document if key.startswith("steps-")]
    for key in steps:
        print("\n".join(step_lines(key.removeprefix("steps-"), document[key])))
    if not steps:
        print("steps: not measured")


if __name__ == "__main__":
    main()
