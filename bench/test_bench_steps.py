"""Whole steps of ours and the plain one under pytest-benchmark: ``pytest bench --benchmark-only``.

To be compared between commits (``bench/compare.py``); ``fastreg bench`` interleaves the methods, has the others', and
is the one to quote ratios from.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fastreg.benchmark.methods import METHODS
from fastreg.benchmark.presets import PRESETS
from fastreg.errors import FastregError

M = 8
# A step of each kind of layer, below a second.
MODELS = ("mlp", "resnet", "gpt")
CHOSEN = [one.name for one in METHODS.values() if one.name == "plain" or (one.ours and one.by_default)]


@pytest.mark.parametrize("method", CHOSEN)
@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark: BenchmarkFixture, model: str, method: str) -> None:
    benchmark.group = f"{model}, m = {M}"
    benchmark.extra_info.update(method=method, ours=METHODS[method].ours)
    try:
        step = METHODS[method].prepare(PRESETS[model].problem(M))
        # The first step is checked against plain autograd, which is not part of what a step costs.
        step.run()
    except FastregError as error:
        pytest.skip(str(error).splitlines()[0])
    benchmark.pedantic(step.run, rounds=5, warmup_rounds=1)
