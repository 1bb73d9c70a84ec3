"""Whole steps under pytest-benchmark: ``pytest bench --benchmark-only``.

For statistics over one step at a time, histograms and ``--benchmark-compare`` between commits;
``fastreg bench`` interleaves the methods and is the one to quote ratios from.
"""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastreg.benchmark.methods import METHODS
from fastreg.benchmark.presets import PRESETS


@pytest.mark.parametrize("method", [m.name for m in METHODS.values() if m.by_default])
@pytest.mark.parametrize("model", [p.name for p in PRESETS.values() if p.by_default])
def test_step(benchmark: BenchmarkFixture, model: str, method: str) -> None:
    benchmark.group = f"{model}, m = 8"
    step = METHODS[method].prepare(PRESETS[model].problem(8))
    # The first step is checked against plain autograd, which is not part of what a step costs.
    step.run()
    benchmark.pedantic(step.run, rounds=5, warmup_rounds=1)
