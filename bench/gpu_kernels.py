"""GPU stages of single operations: two ceilings of the card, then every op against its floor and its rivals.

``gpu_kernels.py check`` runs the kernels stage's correctness gate on a CPU at sizes divided by ``SHRINK``, so that a
wrong case is found before a GPU is at hand.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gpu_results
from fastreg.kernels import backend, registry
from gpu_timing import interleaved, spread
from op_cases import Arguments, OpCase, gpu_cases

COPY_BYTES = 4 << 30
MATMUL_SIZE = 8192
ROUNDS = 25
SHRINK = 64
# Relative root mean square error against float64 on the same inputs: rounding of the output, with
# room for the square root of the reduced length in the accumulator's rounding.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def ceilings() -> dict[str, float]:
    """Bytes per second of a large device copy and FLOP/s of a large bfloat16 matmul."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    times = interleaved({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, ROUNDS)
    copied, multiplied = (spread(times[name])["p50"] for name in ("copy", "matmul"))
    return {
        "bytes_per_s": 2 * COPY_BYTES / (1e-3 * copied),
        "flops_per_s": 2 * MATMUL_SIZE**3 / (1e-3 * multiplied),
    }


def as_tuple(result: object) -> tuple[Tensor, ...]:
    """An op's outputs as a tuple."""
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def widened(arguments: Arguments) -> Arguments:
    """The arguments with floating tensors in float64."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def error(found: object, expected: object) -> float:
    """Largest relative RMS error over the outputs that both have."""
    pairs = zip(as_tuple(found), as_tuple(expected))
    return max(float((f.double() - e).norm() / e.double().norm().clamp_min(1e-30)) for f, e in pairs)


def calls_of(case: OpCase, arguments: Arguments) -> dict[str, Callable[[], object]]:
    """The op by every implementation that can run the case, then what a user would write instead."""
    op = registry()[case.op]
    able = [i for i in op.implementations if i.why_not(*arguments) is None]
    calls = {i.name: (lambda i=i: i.fn(*arguments)) for i in able}
    return calls | {name: (lambda rival=rival: rival(*arguments)) for name, rival in case.rivals.items()}


def gate(case: OpCase, dtype: torch.dtype, device: str) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """The calls of a case on fresh inputs and the error of each against the reference in float64."""
    arguments = case.draw(dtype, device)
    with backend("reference"):
        expected = registry()[case.op](*widened(arguments))
    calls = calls_of(case, arguments)
    return calls, {name: error(call(), expected) for name, call in calls.items()}


def measure(case: OpCase, dtype: torch.dtype, top: dict[str, float]) -> list[dict[str, object]]:
    """One row per implementation and rival; a wrong one is shown and not timed."""
    calls, errors = gate(case, dtype, "cuda")
    right = {name: call for name, call in calls.items() if errors[name] <= TOLERANCE[dtype]}
    times = interleaved(right, ROUNDS)
    floor = 1e3 * case.floor_seconds(dtype, top["bytes_per_s"], top["flops_per_s"])
    rows: list[dict[str, object]] = []
    for name, found in errors.items():
        row = {"op": case.op, "case": case.label, "dtype": str(dtype).removeprefix("torch."), "implementation": name}
        row |= {"error": found, "floor_ms": floor, "bound": case.bound(dtype, **top)}
        rows.append(row | ({"ms": spread(times[name])} if name in right else {}))
    return rows


def kernels(results: Path, only: list[str]) -> None:
    """Every case in both dtypes; the file is complete up to the last one."""
    top = ceilings()
    gpu_results.add(results, "ceilings", top)
    rows: list[dict[str, object]] = []
    for case in gpu_cases():
        for dtype in TOLERANCE if not only or case.op in only else ():
            rows += measure(case, dtype, top)
            gpu_results.add(results, "kernels", rows)
            print(case.op, case.label, dtype, flush=True)


def check() -> int:
    """The gate alone, on this CPU, at small sizes; 1 if an implementation or a rival is wrong."""
    wrong = 0
    for case in gpu_cases(SHRINK):
        _, errors = gate(case, torch.float32, "cpu")
        wrong += sum(found > TOLERANCE[torch.float32] for found in errors.values())
        print(f"{case.op} {case.label}: " + ", ".join(f"{name} {found:.0e}" for name, found in errors.items()))
    return min(wrong, 1)


def once(only: list[str]) -> None:
    """Every case once in bfloat16, for a profiler to watch."""
    for case in gpu_cases():
        if not only or case.op in only:
            arguments = case.draw(torch.bfloat16, "cuda")
            registry()[case.op](*arguments)
    torch.cuda.synchronize()


def main() -> int:
    """Run one stage and add it to the results file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("stage", choices=["ceilings", "kernels", "check", "once"])
    parser.add_argument("results", type=Path, nargs="?", help="for ceilings and kernels")
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.stage == "check":
        return check()
    if args.stage == "once":
        once(args.op)
    elif args.stage == "ceilings":
        gpu_results.add(args.results, "ceilings", ceilings())
    else:
        kernels(args.results, args.op)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
