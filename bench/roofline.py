"""Measured ceilings and every operation against them: ``roofline.py FILE`` adds "ceilings" and "kernels" to FILE.

FILE is a results file of ``bench/suite.py``, or is made. What is wrong is kept with its error and not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from documents import Json, load, read
from fastreg.benchmark import machine, report
from fastreg.benchmark.measure import Spread, interleaved
from fastreg.errors import FastregError
from gpu_kernels import TOLERANCE, ceilings as gpu_ceilings, gate
from gpu_timing import interleaved as gpu_interleaved
from op_cases import CPU_CASES, OpCase, gpu_cases

# The dtype whose matrix products are the ceiling.
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Beyond the last-level cache of any processor there is, so that the copy is one of memory.
COPY_BYTES = 1 << 30
MATMUL_SIZE = 2048
WARM_UP = 2


def measured_ceilings(device: str, rounds: int) -> dict[str, float]:
    """Bytes per second of a large copy and FLOP/s of a large matrix product, medians of interleaved rounds."""
    if device != "cpu":
        return gpu_ceilings()
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE) for _ in "ab")
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    seconds = {name: Spread.of(times).p50 for name, times in interleaved(calls, rounds, WARM_UP, device).items()}
    return {
        "bytes_per_s": 2 * COPY_BYTES / seconds["copy"],
        "flops_per_s": 2 * MATMUL_SIZE**3 / seconds["matmul"],
    }


def timed(calls: Mapping[str, Callable[[], object]], device: str, rounds: int) -> dict[str, Spread]:
    """Seconds of every call; on a GPU with a cold cache and without what launching costs the host."""
    if device == "cpu":
        seconds = interleaved(calls, rounds, WARM_UP, device)
    else:
        milliseconds = gpu_interleaved(dict(calls), rounds)
        seconds = {name: [1e-3 * one for one in times] for name, times in milliseconds.items()}
    return {name: Spread.of(times) for name, times in seconds.items()}


def kernels(cases: Sequence[OpCase], device: str, rounds: int) -> list[Json]:
    """One row per case and implementation, rivals among them."""
    rows: list[Json] = []
    for case in cases:
        print(case.op, case.label, file=sys.stderr, flush=True)
        rows += measure(case, device, rounds)
    return rows


def measure(case: OpCase, device: str, rounds: int) -> list[Json]:
    """The rows of one case: seconds, what must be computed and moved at least, error against float64."""
    dtype = DTYPES[device]
    with torch.no_grad():
        calls, errors = gate(case, dtype, device)
        right = {name: call for name, call in calls.items() if errors[name] <= TOLERANCE[dtype]}
        spreads = timed(right, device, rounds) if right else {}
    common = {"op": case.op, "case": case.label, "dtype": str(dtype).removeprefix("torch."), "flops": case.flops}
    common["bytes"] = case.elements * dtype.itemsize
    return [
        {**common, "implementation": name, "error": found, "seconds": asdict(spreads[name]) if name in right else None}
        for name, found in errors.items()
    ]


def document(path: Path, device: str) -> Json:
    """What the file holds, or an empty results file.

    Raises:
        FastregError: the file is none, or its rows were measured elsewhere or on other threads.
    """
    if not path.exists():
        settings = {"command": shlex.join(["python", *sys.argv]), "dtype": str(DTYPES[device]).removeprefix("torch.")}
        report.write_json(path, report.document([], machine.describe(device), settings))
    found, here = read(path).machine, machine.describe(device)
    for key, (there, now) in {
        "device": (found["device"], here["device"]),
        "threads": (found["system"]["torch_threads"], here["system"]["torch_threads"]),
    }.items():
        if there != now:
            raise FastregError(
                f"roofline: FILE must be of this machine, got {path} with {key} {there}, where here it is {now} "
                "(name a new file, or set --threads)"
            )
    return load(path)


def run(args: argparse.Namespace) -> None:
    """Measure and write."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise FastregError("roofline: --device must be one that torch can use, got cuda (use --device cpu)")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = document(args.file, args.device)
    found["ceilings"] = measured_ceilings(args.device, args.rounds)
    found["kernels"] = kernels(CPU_CASES if args.device == "cpu" else gpu_cases(), args.device, args.rounds)
    args.file.write_text(json.dumps(found, indent=1) + "\n")
    top = found["ceilings"]
    print(f"copy {top['bytes_per_s'] / 1e9:.1f} GB/s, matmul {top['flops_per_s'] / 1e9:.0f} GFLOP/s, "
          f"{len(found['kernels'])} rows in {args.file}")


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 with what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--device", choices=[*DTYPES], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="timed rounds (default: 11)")
    try:
        run(parser.parse_args(arguments))
    except FastregError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
