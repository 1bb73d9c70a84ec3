"""Peak memory of one step of a GPT by method and depth: ``python bench/memory_table.py --json FILE``.

Every figure is from a fresh process (see :mod:`fastreg.benchmark.memory`); the Markdown table goes to the standard
output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastreg
from fastreg.benchmark import machine, memory, monitoring, peers, penalties, sam
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem, mean_cross_entropy
from fastreg.models import GPT, GPTConfig

DEPTHS = (2, 4, 8)
BATCH, MICRO_BATCHES = 8, 8
SIZES = {"vocab": 1024, "context": 128, "width": 256, "heads": 4}
Prepare = Callable[[Problem], Step]


def perturb(problem: Problem) -> Step:
    """``method="perturb"``, forward differences."""
    model, penalty = problem.model, fastreg.GradNorm(problem.weight)
    reg = fastreg.Regularizer(model, penalty, micro_batch_size=problem.micro_batch_size, method="perturb")

    def run() -> None:
        model.zero_grad(set_to_none=True)
        reg(lambda: mean_cross_entropy(model(problem.inputs), problem.targets)).backward()

    return Step(model, run)


def by_torch(blocks: nn.Sequential) -> None:
    """Have every block run by ``torch.utils.checkpoint``."""
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def checkpointed(prepare: Prepare, wrap: Callable[[nn.Sequential], None]) -> Prepare:
    """``prepare`` on a model whose blocks keep their inputs alone."""

    def prepare_wrapped(problem: Problem) -> Step:
        wrap(problem.model.blocks)
        return prepare(problem)

    return prepare_wrapped


METHODS: dict[str, Prepare] = {
    "plain": peers.plain,
    "plain, torch checkpoint": checkpointed(peers.plain, by_torch),
    "exact": penalties.exact,
    "exact, torch checkpoint": checkpointed(penalties.exact, by_torch),
    "exact, fastreg.checkpoint_blocks": checkpointed(penalties.exact, fastreg.checkpoint_blocks),
    "perturb, forward": perturb,
    "SAM": sam.sam,
    "m-SAM": sam.m_sam,
    "Monitor": monitoring.monitored,
}


@dataclass(frozen=True)
class Row:
    """Peak bytes of one step beyond what is held before it (weights, inputs)."""

    method: str
    depth: int
    bytes: int


def problem(depth: int) -> Problem:
    """A GPT of this depth and a batch of tokens."""
    torch.manual_seed(0)
    tokens = torch.randint(SIZES["vocab"], (BATCH, SIZES["context"] + 1))
    model = GPT(GPTConfig(**SIZES, layers=depth))
    return Problem(model, tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), MICRO_BATCHES)


def measured(method: str, depth: int) -> Row:
    """One row."""
    return Row(method, depth, memory.in_fresh_process([__file__, "--one", method, str(depth)]))


def table(rows: list[Row]) -> str:
    """Megabytes by method and depth; last, the growth per block between the two largest depths, in MB and to plain."""
    found = {(row.method, row.depth): row.bytes / 2**20 for row in rows}
    low, high = DEPTHS[-2:]

    def slope(method: str) -> float:
        return (found[method, high] - found[method, low]) / (high - low)

    lines = ["| MB | " + " | ".join(f"{depth} blocks" for depth in DEPTHS) + " | a block | to plain |"]
    lines.append("| --- |" + " --- |" * (len(DEPTHS) + 2))
    for method in METHODS:
        sizes = " | ".join(f"{found[method, depth]:.0f}" for depth in DEPTHS)
        lines.append(f"| {method} | {sizes} | {slope(method):.1f} | {slope(method) / slope('plain'):.2f} |")
    return "\n".join(lines)


def write(path: Path, rows: list[Row]) -> None:
    """Rows with the machine and settings that made them."""
    settings = {"command": "python bench/memory_table.py", "threads": 1, "dtype": "float32", "batch": BATCH}
    settings |= {"micro_batches": MICRO_BATCHES, **SIZES}
    document = {"machine": machine.describe("cpu"), "settings": settings, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Measure everything, or print the bytes of one method at one depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "DEPTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        print(memory.growth(METHODS[args.one[0]](problem(int(args.one[1])))))
        return
    rows = [measured(method, depth) for method in METHODS for depth in DEPTHS]
    print(table(rows))
    if args.json:
        write(args.json, rows)


if __name__ == "__main__":
    main()
