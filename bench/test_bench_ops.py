"""Every op and implementation at model sizes: ``pytest bench/test_bench_ops.py --benchmark-only``.

The reference is the composition of torch calls that an implementation has to beat.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastreg.benchmark.measure import synchronize
from fastreg.kernels import backend, registry
from op_cases import CPU_CASES, OpCase, gpu_cases
from roofline import DTYPES
from verdicts import OURS

CASES = {"cpu": CPU_CASES, "cuda": gpu_cases() if torch.cuda.is_available() else []}


def calls() -> Iterator[object]:
    """Every case on every device that is here, by every implementation that can run it."""
    for device, cases in CASES.items():
        for case in cases:
            arguments = case.draw(DTYPES[device], device)
            for one in registry()[case.op].implementations:
                if one.why_not(*arguments) is None:
                    yield pytest.param(case, device, one.name, id=f"{case.op}-{case.label}-{device}-{one.name}")


@pytest.mark.parametrize(("case", "device", "implementation"), calls())
def test_op(benchmark: BenchmarkFixture, case: OpCase, device: str, implementation: str) -> None:
    benchmark.group = f"{case.op} {case.label} {device}"
    benchmark.extra_info.update(method=implementation, ours=implementation in OURS)
    torch.manual_seed(0)
    op, arguments = registry()[case.op], case.draw(DTYPES[device], device)

    def call() -> None:
        op(*arguments)
        synchronize(device)

    with backend(implementation), torch.no_grad():
        benchmark.pedantic(call, rounds=15, iterations=3, warmup_rounds=2)
