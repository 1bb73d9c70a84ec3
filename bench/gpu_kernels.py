"""GPU stages of single operations: two ceilings of the card, then every op against its floor."""

import argparse
from pathlib import Path

import gpu_results
import torch
from op_cases import GPU_CASES, OpCase
from triton.testing import do_bench

from fastreg.kernels import backend, registry

COPY_BYTES = 4 << 30
MATMUL_SIZE = 8192
# Relative root mean square error against float64 on the same inputs: rounding of the output, with
# room for the square root of the reduced length in the accumulator's rounding.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def spread_ms(call: object) -> dict[str, float]:
    """p20, p50, p80 in milliseconds; the cache is overwritten before each call."""
    low, middle, high = do_bench(call, quantiles=[0.2, 0.5, 0.8])
    return {"p20": low, "p50": middle, "p80": high}


def ceilings() -> dict[str, float]:
    """Bytes per second of a large device copy and FLOP/s of a large bfloat16 matmul."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copied = spread_ms(lambda: target.copy_(source))
    del source, target
    a, b = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in "ab"
    )
    multiplied = spread_ms(lambda: a @ b)
    return {
        "bytes_per_s": 2 * COPY_BYTES / (1e-3 * copied["p50"]),
        "flops_per_s": 2 * MATMUL_SIZE**3 / (1e-3 * multiplied["p50"]),
    }


def error(case: OpCase, dtype: torch.dtype, implementation: str) -> float:
    """Largest relative RMS error over the outputs, against the reference in float64."""
    op, arguments = registry()[case.op], case.draw(dtype, "cuda")
    exact = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    with backend(implementation):
        found = op(*arguments)
    with backend("reference"):
        expected = op(*exact)
    pairs = zip(*(x if isinstance(x, (tuple, list)) else (x,) for x in (found, expected)))
    return max(float((f.double() - e).norm() / e.norm()) for f, e in pairs)


def measure(case: OpCase, dtype: torch.dtype, top: dict[str, float]) -> list[dict[str, object]]:
    """One row per implementation that can run the case; a wrong one is shown and not timed."""
    op, arguments = registry()[case.op], case.draw(dtype, "cuda")
    floor = 1e3 * case.floor_seconds(dtype, top["bytes_per_s"], top["flops_per_s"])
    rows: list[dict[str, object]] = []
    for candidate in op.implementations:
        if candidate.why_not(*arguments) is not None:
            continue
        row: dict[str, object] = {"op": case.op, "case": case.label, "dtype": str(dtype)}
        row |= {"implementation": candidate.name, "error": error(case, dtype, candidate.name)}
        if row["error"] <= TOLERANCE[dtype]:
            with backend(candidate.name):
                row |= {"ms": spread_ms(lambda: op(*arguments)), "floor_ms": floor}
        rows.append(row)
    return rows


def main() -> None:
    """Run one stage and add it to the results file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("stage", choices=["ceilings", "kernels"])
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    top = ceilings()
    gpu_results.add(args.results, "ceilings", top)
    print(f"copy {top['bytes_per_s'] / 1e12:.2f} TB/s, matmul {top['flops_per_s'] / 1e12:.0f} TFLOP/s")
    if args.stage == "ceilings":
        return
    rows: list[dict[str, object]] = []
    for case in GPU_CASES:
        for dtype in TOLERANCE:
            new = measure(case, dtype, top)
            rows += new
            gpu_results.add(args.results, "kernels", rows)
            for row in new:
                timed = f"{row['ms']['p50']:.3f} ms" if "ms" in row else "WRONG: not timed"
                print(f"{case.op} {case.label} {dtype} {row['implementation']}: {timed}, "
                      f"floor {1e3 * case.floor_seconds(dtype, **top):.3f} ms")


if __name__ == "__main__":
    main()
