"""What ``fastreg train`` chooses and says: settings, sweep, summary, verdict."""

import math
from dataclasses import replace

import pytest
import torch

from fastreg.errors import FastregError
from fastreg.recipes import sweep as sweep_module
from fastreg.recipes.data import Dataset, Split
from fastreg.recipes.methods import (
    DEFAULT_METHODS,
    GRAD_NORM,
    KINDS,
    LARGE_BATCH,
    NORMALIZED,
    SMALL_BATCH,
    UNIT_JACOBIAN,
    Method,
    matched,
)
from fastreg.recipes.report import paired_difference, summarise, verdict
from fastreg.recipes.settings import MODELS, default_settings
from fastreg.recipes.sweep import candidates, sweep, sweep_table
from recipe_cases import METHODS, small_digits, tiny


@pytest.fixture(scope="module")
def data() -> Dataset:
    return small_digits()


def test_sweep_never_reads_the_test_split(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sweep_module.LEARNING_RATES, LARGE_BATCH, (0.5, 1e20))
    # A split that cannot be scored: reading it would raise.
    unreadable = Split(torch.empty(0, 0), torch.empty(0))
    trials = sweep(
        tiny(epochs=1, methods=METHODS[1:2]), replace(data, test=unreadable)
    )
    assert [trial.method.lr for trial in trials] == [0.5, 1e20]
    assert trials[0].accuracy > 0 and math.isnan(trials[1].accuracy)
    assert max(trials, key=lambda trial: trial.rank) is trials[0]
    marked = [line for line in sweep_table(trials).splitlines() if line.endswith("*")]
    assert len(marked) == 1 and " 0.5 " in marked[0]


def test_sweep_grid_covers_the_rule_and_its_neighbours() -> None:
    ratios = {method.rule_ratio for method in candidates(GRAD_NORM)}
    assert ratios == set(sweep_module.RULE_RATIOS) and 1.0 in ratios
    assert not set(sweep_module.SWEEP_SEEDS) & set(default_settings("digits").seeds)


def result_of(method: str, seed: int, accuracy: float, seconds: float) -> dict[str, object]:
    entry = {"epoch": 1, "seconds": seconds, "micro_batch_grad_norm": 1.0}
    return {
        "method": method,
        "seed": seed,
        "diverged": False,
        "best": {"accuracy": accuracy, "test_accuracy": accuracy},
        "final": {"train_accuracy": 1.0, "test_accuracy": accuracy - 0.01},
        "history": [entry],
    }


def test_summary_by_hand() -> None:
    results = [
        result_of(LARGE_BATCH, 0, 0.90, 1.0),
        result_of(GRAD_NORM, 0, 0.92, 2.0),
        result_of(LARGE_BATCH, 1, 0.94, 2.0),
        result_of(GRAD_NORM, 1, 0.94, 5.0),
    ]
    summary = summarise(tiny(methods=METHODS[1:3]), results)[1]
    assert summary.test.mean == pytest.approx(0.93)
    assert summary.test.std == pytest.approx(0.01 * math.sqrt(2))
    assert summary.final.mean == pytest.approx(0.92)
    assert summary.overhead == pytest.approx(2.25)
    difference = paired_difference(results, GRAD_NORM, LARGE_BATCH)
    assert difference.mean == pytest.approx(0.01)
    assert difference.standard_error == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("small", "large", "penalised", "sentences"),
    [
        ((0.95, 0.96), (0.91, 0.92), (0.93, 0.94), ["+4.00 ± 0.00 points", "50% of the gap"]),
        ((0.95, 0.96), (0.91, 0.92), (0.89, 0.90), ["+4.00", "worse than without the penalty"]),
        ((0.95, 0.91), (0.91, 0.95), (0.93, 0.97), ["no clear gap", "better than without"]),
        ((0.90, 0.91), (0.91, 0.92), (0.90, 0.93), ["nothing to recover", "no clear change"]),
    ],
)
def test_verdict_says_what_came_out(
    small: tuple[float, float],
    large: tuple[float, float],
    penalised: tuple[float, float],
    sentences: list[str],
) -> None:
    results = [
        result_of(name, seed, values[seed], 1.0)
        for name, values in ((SMALL_BATCH, small), (LARGE_BATCH, large), (GRAD_NORM, penalised))
        for seed in (0, 1)
    ]
    lines = verdict(tiny(methods=METHODS[:3]), results)
    assert len(lines) == 2
    for line, sentence in zip(lines, sentences):
        assert sentence in line


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_classifies_its_data(name: str) -> None:
    recipe = MODELS[name]
    shape = (1, 8, 8) if recipe.data == "digits" else (3, 32, 32)
    classes = 100 if recipe.data == "cifar100" else 10
    with torch.no_grad():
        assert recipe.build()(torch.randn(2, *shape)).shape == (2, classes)
    names = [method.name for method in recipe.methods]
    assert names[:4] == list(DEFAULT_METHODS) and set(names) <= set(KINDS)
    assert len(names) == (5 if name == "vgg11" else len(KINDS))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seeds": ()}, "seeds must be distinct"),
        ({"seeds": (1, 1)}, "seeds must be distinct"),
        ({"batch_size": 8}, "batch_size must be at least micro_batch_size = 16"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"chunk_size": 24}, "chunk_size must be a multiple of micro_batch_size"),
        ({"model": "lenet"}, "model must be one of"),
    ],
)
def test_settings_refuse(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(FastregError, match=expected):
        tiny(**changes)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("adam", 0.1), "name must be one of"),
        ((LARGE_BATCH, 0.0), "lr of large_batch must be positive"),
        ((LARGE_BATCH, math.nan), "lr of large_batch must be positive"),
        ((LARGE_BATCH, 0.1, 0.1), "weight of large_batch must be 0"),
        ((GRAD_NORM, 0.1), "weight of grad_norm must be positive"),
        ((UNIT_JACOBIAN, 0.1), "weight of unit_jacobian must be positive"),
        ((NORMALIZED, 0.1, 0.1), "weight of normalized must be 0"),
    ],
)
def test_methods_refuse(values: tuple[object, ...], expected: str) -> None:
    with pytest.raises(FastregError, match=expected):
        Method(*values)


def test_matched_methods_share_the_small_batch_rate_and_follow_the_rule() -> None:
    methods = matched(METHODS)
    assert [method.name for method in methods] == [method.name for method in METHODS]
    assert {method.lr for method in methods} == {METHODS[0].lr}
    assert [method.rule_ratio for method in methods] == [0, 0, 1, 1]
    with pytest.raises(FastregError, match="methods must contain small_batch"):
        matched(METHODS[1:])
    for method in (Method(UNIT_JACOBIAN, 0.1, 0.1), Method(NORMALIZED, 0.1)):
        with pytest.raises(FastregError, match=rf"matched: methods must be among .*, got \['{method.name}'\]"):
            matched((*METHODS, method))
