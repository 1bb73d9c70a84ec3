"""Every op and implementation at model sizes: ``pytest bench/test_bench_ops.py --benchmark-only``.

The reference is the composition of torch calls that an implementation has to beat.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastreg.kernels import backend, registry
from op_cases import CPU_CASES, OpCase

CALLS = [
    pytest.param(case, implementation.name, id=f"{case.op}-{case.label}-{implementation.name}")
    for case in CPU_CASES
    for implementation in registry()[case.op].implementations
    if implementation.why_not(*case.draw(torch.float32, "cpu")) is None
]


@pytest.mark.parametrize(("case", "implementation"), CALLS)
def test_op(benchmark: BenchmarkFixture, case: OpCase, implementation: str) -> None:
    benchmark.group = f"{case.op} {case.label}"
    torch.manual_seed(0)
    arguments = case.draw(torch.float32, "cpu")
    with backend(implementation):
        benchmark(registry()[case.op], *arguments)
