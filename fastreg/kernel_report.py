"""``fastreg env --kernels``: the GPU kernels compiled on this machine, which need not have a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from fastreg.errors import FastregError
from fastreg.kernels import registry
from fastreg.kernels._aot import Compiled, report
from fastreg.kernels._usage import Usage, usage

HEADER = (
    f"{'op':<28}{'kernel':<34}{'dtype':<10}{'sm':>4}{'warps':>6}{'registers':>10}{'local':>7}{'shared':>8}  products"
)


def run(ops: list[str], as_json: bool) -> int:
    """Compile and print; 1 if a kernel spills, asks for too much shared memory or misses the tensor cores.

    Raises:
        FastregError: an unknown op, no Triton on this machine, or Triton told to interpret.
    """
    unknown = sorted(set(ops) - set(registry()))
    if unknown:
        raise FastregError(f"env: --kernels must name ops among {', '.join(registry())}, got {', '.join(unknown)}")
    if importlib.util.find_spec("triton") is None:
        raise FastregError("env: --kernels must have triton to compile with, got none (pip install triton)")
    compiled, cuda = report(ops or None), [] if ops else cuda_kernels()
    faults = [f"{row.op} {row.kernel} {row.dtype} sm_{row.capability}: {f}" for row in compiled for f in row.faults()]
    faults += [f"{row.kernel} sm_{row.capability}: {row.local} bytes in local memory" for row in cuda if row.local]
    if as_json:
        found = {"triton": [asdict(row) for row in compiled], "cuda": [asdict(row) for row in cuda], "faults": faults}
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        sys.stdout.write("\n".join([*_table(compiled, cuda), "", *(faults or ["no faults"])]) + "\n")
    return 1 if faults else 0


def cuda_kernels() -> list[Usage]:
    """The kernels in ``fastreg._cuda`` as it was built; none without it."""
    spec = importlib.util.find_spec("fastreg._cuda")
    return [] if spec is None or spec.origin is None else usage(Path(spec.origin))


def _table(compiled: list[Compiled], cuda: list[Usage]) -> Iterator[str]:
    yield HEADER
    for row in compiled:
        products = f"by {row.tensor_cores or 'FMA'}" if row.dots else ""
        yield (
            f"{row.op:<28}{row.kernel:<34}{row.dtype:<10}{row.capability:>4}{row.warps:>6}{row.registers:>10}"
            f"{row.local:>7}{row.shared:>8}  {products}"
        ).rstrip()
    for used in cuda:
        launch = f"{used.capability:>4}{used.registers:>16}{used.local:>7}{used.shared:>8}"
        yield f"{'fastreg._cuda':<28}{used.kernel:<44}{launch}"
