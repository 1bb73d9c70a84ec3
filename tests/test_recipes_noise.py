"""Recipes about gradient noise: stationary covariance, tail index, learning-rate sweep, order of an epoch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.models import mlp
from fastreg.recipes.catalogue import Recipe
from fastreg.recipes.data import Dataset, Split, digits
from fastreg.recipes.papers import _sweep_report, covariance, lr_sweep, order_of_epoch, tail_index
from fastreg.recipes.papers._regression_chains import growth, simulate
from fastreg.recipes.papers._tables import aligned
from fastreg.recipes.progress import Progress

# Standard errors that a simulation may be off by; seeds are fixed, so a test passes always or never.
SIGMAS = 4.0
SPECTRUM = (1.0, 0.4, 0.1)


def next_moment(moment: Tensor, A: Tensor, lr: float, batch_size: int, noise_variance: float) -> Tensor:
    """``E w w'`` after a step: fourth moments of a Gaussian by Isserlis, ``E x x' M x x' = 2 A M A + tr(A M) A``."""
    fourth = 2 * A @ moment @ A + (A @ moment).trace() * A
    squares = (1 - 1 / batch_size) * A @ moment @ A + (fourth + noise_variance * A) / batch_size
    return moment - lr * (A @ moment + moment @ A) + lr**2 * squares


def perform(recipe: Recipe, config: Any) -> dict[str, Any]:
    with Progress(recipe.steps(config)) as progress:
        return recipe.run(config, progress)


@pytest.mark.parametrize("batch_size, lr", [(1, 0.2), (4, 0.5)])
def test_simulated_covariance_obeys_the_moment_recursion(batch_size: int, lr: float) -> None:
    spectrum = torch.tensor(SPECTRUM, dtype=torch.float64)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(1000):
        expected = next_moment(expected, spectrum.diag(), lr, batch_size, 2.0)
    generator = torch.Generator().manual_seed(0)
    # 8 relaxation times of the slowest direction leave a bias far below the error.
    steps = round(8 / (lr * 0.1))
    moments = simulate(spectrum, lr, batch_size, math.sqrt(2), 1000, steps, generator)
    moment, error = moments.mean(0), moments.std(0) / math.sqrt(1000)
    assert ((moment - expected).abs() < SIGMAS * error).all()
    assert (error.diagonal() < 0.02 * expected.diagonal()).all()


@pytest.mark.parametrize("lr, batch_size", [(0.3, 1), (0.9, 2)])
def test_growth_is_the_spectral_radius_of_the_moment_recursion(lr: float, batch_size: int) -> None:
    spectrum = torch.tensor(SPECTRUM, dtype=torch.float64)
    units = torch.eye(9, dtype=torch.float64).view(9, 3, 3)
    matrix = torch.stack([next_moment(unit, spectrum.diag(), lr, batch_size, 0.0).flatten() for unit in units], 1)
    expected = float(torch.linalg.eigvals(matrix).abs().max())
    value, error = growth(spectrum, lr, batch_size, 1000, 300, torch.Generator().manual_seed(0))
    assert abs(value - expected) < SIGMAS * error
    assert error < 0.01


def test_covariance_recipe_tells_theorem_and_small_lr_value_apart() -> None:
    config = covariance.Config(batch_sizes=(2,), fractions=(0.5,), around=(0.7, 1.3), chains=1000)
    result = perform(covariance.RECIPE, config)
    (row,) = result["variances"]
    assert abs(row["measured"] - row["exact"]) < SIGMAS * row["error"]
    assert row["measured"] - row["naive"] > 10 * row["error"]
    below, above = result["growths"]
    assert below["growth"] + SIGMAS * below["error"] < 1 < above["growth"] - SIGMAS * above["error"]


def test_tail_index_chains_have_the_variance_of_the_recursion() -> None:
    rate, batch_size, chains = 0.5, 4, 200_000
    ends = tail_index.simulate(rate, batch_size, chains, 30, np.random.default_rng(0))
    # E M^2 and the variance of the noise, from E chi2_S = S and E chi2_S^2 = S (S + 2).
    expected = rate**2 / batch_size / (2 * rate - rate**2 * (1 + 2 / batch_size))
    error = np.square(ends).std() / math.sqrt(chains)
    assert abs(np.square(ends).mean() - expected) < SIGMAS * error
    assert error < 0.01 * expected


def test_tail_index_recipe_rules_out_the_papers_index() -> None:
    # So heavy a tail that the power law begins early and the two indices, 0.477 and 0.333, lie far apart.
    config = tail_index.Config(lr_times_a=1.5, batch_sizes=(1,), chains=100_000, steps=100, tails=(0.01,))
    (row,) = perform(tail_index.RECIPE, config)["rows"]
    assert abs(row["hill"][0] - row["exact"]) < SIGMAS * row["error"][0]
    assert row["hill"][0] - row["paper"] > SIGMAS * row["error"][0]


@pytest.mark.parametrize(
    "index, words",
    [(2.78, "in 1 of 1 cases and the exact one in 0"), (3, "in 0 of 1 cases and the exact one in 1")],
)
def test_verdict_on_the_tail_index(index: float, words: str) -> None:
    row = {"batch_size": 3, "exact": 2.8, "paper": 3.0, "hill": [0.0, index], "error": [0.01, 0.05]}
    assert words in tail_index.table({"lr_times_a": 1.0, "tails": [0.1, 0.01], "rows": [row]})


SWEEP = lr_sweep.Config(train_size=64, hidden=(8,), lrs=(0.25,), penalties=(0.5,), epochs=4, measure_every=2, seeds=2)


def few_digits() -> Dataset:
    data = digits()
    return replace(data, train=Split(data.train.inputs[:100], data.train.targets[:100]))


def trained(penalty: float, lr: float = 0.125) -> list[Tensor]:
    """Weights after two epochs of the recipe's training loop."""
    data, order = few_digits(), torch.Generator().manual_seed(3)
    model = lr_sweep.build(SWEEP, data, seed=3)
    optimizer, regularizer = torch.optim.SGD(model.parameters(), lr=lr), lr_sweep.attach(SWEEP, model, penalty)
    for _ in range(2):
        assert lr_sweep.train_epoch(model, optimizer, regularizer, data, SWEEP.batch_size, order)
    return [p.detach() for p in model.parameters()]


def plain_sgd(lr: float) -> list[Tensor]:
    """The same without the library."""
    data, order = few_digits(), torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    model = mlp((64, 8, 10))
    for _ in range(2):
        for index in torch.randperm(len(data.train), generator=order).split(16):
            loss = F.cross_entropy(model(data.train.inputs[index]), data.train.targets[index])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, gradient in zip(model.parameters(), gradients):
                    p.add_(gradient, alpha=-lr)
    return [p.detach() for p in model.parameters()]


def test_lambda_zero_is_plain_sgd_bit_for_bit() -> None:
    plain = plain_sgd(0.125)
    assert all(map(torch.equal, trained(0.0), plain))
    assert not any(map(torch.equal, trained(0.5), plain))


def test_gradient_of_the_penalty_is_the_explicit_sum() -> None:
    torch.manual_seed(0)
    model = mlp((5, 7, 3), "tanh").double()
    x, y, penalty = torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,)), 0.7
    parameters = list(model.parameters())
    loss = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    explicit = torch.autograd.grad(loss + penalty / 4 * sum(g.square().sum() for g in gradients), parameters)
    lr_sweep.attach(SWEEP, model, penalty)(F.cross_entropy(model(x), y)).backward()
    for p, expected in zip(parameters, explicit):
        torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=1e-12)


def test_settings_start_with_the_baseline_and_do_not_repeat() -> None:
    config = replace(SWEEP, small_lr=0.25, lrs=(0.5, 0.25), penalties=(1.0, 2.0))
    assert lr_sweep.settings(config) == [(0.25, 0.0), (0.5, 0.0), (0.25, 1.0), (0.25, 2.0)]


def test_a_diverging_run_is_reported_as_such() -> None:
    result = perform(lr_sweep.RECIPE, replace(SWEEP, lrs=(1e30,), penalties=(), seeds=1))
    row = result["rows"][1]
    assert math.isnan(row["train_loss"][0]) and math.isnan(row["accuracy"][0])
    assert "nan" in lr_sweep.table(result)


def made_up(best_penalty: float, explicit: float) -> dict[str, Any]:
    """A sweep with a gain of 3 %-points at eta = 0.5, and of ``explicit`` at ``best_penalty``."""
    def row(lr: float, penalty: float, more: float) -> dict[str, Any]:
        return {"lr": lr, "penalty": penalty, "loss": [1.0, 1.0], "train_loss": [0.0, 0.0],
                "accuracy": [0.9 + more, 0.92 + more + 1e-4]}  # fmt: skip
    rows = [row(0.1, 0.0, 0.0), row(0.5, 0.0, 0.03), row(0.1, best_penalty, explicit), row(0.1, 9.0, -0.5)]
    return {"small_lr": 0.1, "rows": rows}


@pytest.mark.parametrize(
    "best_penalty, explicit, gained, similar",
    [(1.0, 0.02, "seen", "seen"), (2.0, 0.02, "seen", "not seen"), (0.25, -0.01, "not seen", "seen")],
)
def test_verdict_of_the_sweep(best_penalty: float, explicit: float, gained: str, similar: str) -> None:
    text = lr_sweep.table(made_up(best_penalty, explicit))
    assert f"(beyond two standard errors) was {gained};" in text
    assert f"were {similar}: lambda / eta = {best_penalty / 0.5:g}" in text


def test_gains_are_paired_by_seed() -> None:
    baseline, row = {"accuracy": [0.1, 0.9]}, {"accuracy": [0.2, 1.0 + 0.02]}
    value, error = _sweep_report.gain(row, baseline, "accuracy")
    assert value == pytest.approx(0.11)
    assert error == pytest.approx(0.01)
    assert math.isnan(_sweep_report.gain({"accuracy": [None, 1.0]}, baseline, "accuracy")[0])


@pytest.mark.parametrize("sampling", order_of_epoch.SAMPLINGS)
def test_errors_of_an_epoch_have_slopes_two_and_three(sampling: str) -> None:
    config = replace(order_of_epoch.RECIPE.quick, samplings=(sampling,))
    first, second = perform(order_of_epoch.RECIPE, config)["samplings"][sampling]["slopes"]
    assert abs(first - 2) < 0.15
    assert abs(second - 3) < 0.15


SMALL = [
    (covariance.RECIPE, covariance.Config(batch_sizes=(2,), fractions=(0.3,), around=(1.1,), chains=50)),
    (tail_index.RECIPE, tail_index.Config(batch_sizes=(2,), chains=2000, steps=20, tails=(0.01,))),
    (lr_sweep.RECIPE, SWEEP),
    (order_of_epoch.RECIPE, replace(order_of_epoch.RECIPE.quick, lrs=(0.01, 0.02), samplings=("cyclic",))),
]


@pytest.mark.parametrize("recipe, config", SMALL, ids=[recipe.name for recipe, _ in SMALL])
def test_results_repeat_and_follow_the_seed(recipe: Recipe, config: Any) -> None:
    first = perform(recipe, config)
    torch.rand(3)
    assert perform(recipe, config) == first
    if hasattr(config, "seed"):
        assert perform(recipe, replace(config, seed=1)) != first
    else:
        losses = first["rows"][0]["loss"]
        assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "recipe, config, words",
    [
        (covariance.RECIPE, covariance.Config(fractions=(0.5, 1.0)), "fractions must be above 0 and below 1, got"),
        (covariance.RECIPE, covariance.Config(growth_steps=1), "growth_steps must be at least 2, got 1"),
        (tail_index.RECIPE, tail_index.Config(chains=1000, tails=(0.001,)), "tails must each leave 2 or more of 1000"),
        (lr_sweep.RECIPE, replace(SWEEP, epochs=0), "epochs must be at least 1, got 0"),
        (lr_sweep.RECIPE, replace(SWEEP, data_dir="x"), "data-dir must be absent"),
    ],
)
def test_errors(recipe: Recipe, config: Any, words: str) -> None:
    with pytest.raises(FastregError, match=words):
        perform(recipe, config)


def test_aligned_columns() -> None:
    assert aligned(("n", "value"), [(10, 1 / 3), (2, None)]).splitlines() == [" n   value", "10  0.3333", " 2    None"]
