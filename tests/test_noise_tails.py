"""Tail indices of one-dimensional SGD, and Hill's estimate of them from samples."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from numpy.polynomial import Polynomial
from scipy import special

from fastreg.errors import FastregError
from fastreg.noise.hill import HillEstimate, hill_estimator, hill_plot
from fastreg.noise.tails import TailIndex, continuous_index, kesten_index, tail_index, ziyin_index

pytestmark = pytest.mark.filterwarnings("error")


def moment(beta: float, lr_times_a: float, batch_size: int) -> float:
    """``E|1 - c chi2_S|^beta`` by Kummer's functions: 1F1 below the zero of the factor, U above it."""
    c, half = lr_times_a / batch_size, batch_size / 2
    below = special.beta(half, beta + 1) * special.hyp1f1(half, half + beta + 1, -1 / (2 * c))
    tricomi = special.hyperu(beta + 1, beta + 1 + half, 1 / (2 * c))
    above = special.gamma(beta + 1) * tricomi * math.exp(-1 / (2 * c))
    return (below + above) / (math.gamma(half) * (2 * c) ** half)


def learning_rate(index: int, batch_size: int) -> float:
    """The one ``lr a`` of an even index: there the expectation is a polynomial in the moments of chi2_S."""
    moments = [2.0**j * special.poch(batch_size / 2, j) for j in range(index + 1)]
    terms = [special.binom(index, j) * (-1 / batch_size) ** j * moments[j] for j in range(index + 1)]
    roots = Polynomial([0.0, *terms[1:]]).roots()
    (root,) = roots[(abs(roots.imag) < 1e-9) & (roots.real > 1e-9)].real
    return float(root)


def stationary_weights(lr_times_a: float, batch_size: int, count: int, steps: int) -> torch.Tensor:
    """Weights of independent runs of SGD on ``y = noise``, a = 1, from 0: what the index is the index of."""
    source = numpy.random.default_rng(0)
    weights = numpy.zeros(count)
    for _ in range(steps):
        squares = source.chisquare(batch_size, count)
        # Given the inputs, the sum of input times label is normal of that variance.
        products = numpy.sqrt(squares) * source.standard_normal(count)
        weights -= lr_times_a / batch_size * (squares * weights - products)
    return torch.from_numpy(weights)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16, 33])
@pytest.mark.parametrize("index", [2, 4, 6, 8, 10])
def test_even_indices_are_the_roots_of_polynomials(index: int, batch_size: int) -> None:
    assert kesten_index(learning_rate(index, batch_size), batch_size) == pytest.approx(index, rel=1e-10)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 100, 1000])
def test_index_is_two_at_the_bound_of_stability(batch_size: int) -> None:
    bound = 2 * batch_size / (batch_size + 2)
    assert kesten_index(bound, batch_size) == pytest.approx(2, rel=1e-10)
    assert ziyin_index(bound, batch_size) == pytest.approx(2, rel=1e-14)


@pytest.mark.parametrize(("batch_size", "index"), [(2, 2.0), (4, 3.50468), (8, 6.20230), (16, 11.41944)])
def test_known_indices_at_unit_learning_rate(batch_size: int, index: float) -> None:
    found = kesten_index(1.0, batch_size)
    assert found == pytest.approx(index, abs=1e-5)
    assert moment(found, 1.0, batch_size) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(("batch_size", "index"), [(2, 2.0), (4, 3.505), (8, 6.202)])
def test_index_solves_the_equation_in_simulation(batch_size: int, index: float) -> None:
    draws = numpy.random.default_rng(1).chisquare(batch_size, 4_000_000)
    powers = abs(1 - draws / batch_size) ** index
    assert kesten_index(1.0, batch_size) == pytest.approx(index, abs=1e-3)
    assert powers.mean() == pytest.approx(1, abs=4 * powers.std() / len(powers) ** 0.5)


@pytest.mark.parametrize(("lr_times_a", "batch_size"), [(1.3, 1), (2.4, 1), (2.42, 1), (2.2, 8), (1.5, 5)])
def test_index_below_two_solves_the_equation(lr_times_a: float, batch_size: int) -> None:
    index = kesten_index(lr_times_a, batch_size)
    assert 0 < index < 2
    assert moment(index, lr_times_a, batch_size) == pytest.approx(1, rel=1e-10)
    # E|M|^beta is convex with value 1 at 0: below 1 in between, above 1 beyond.
    assert moment(index / 2, lr_times_a, batch_size) < 1 < moment(1.5 * index, lr_times_a, batch_size)


@pytest.mark.parametrize("batch_size", [1, 16, 256])
def test_small_learning_rates_approach_the_limit_linearly_up_to_a_logarithm(batch_size: int) -> None:
    limit = math.exp(1 + special.lambertw(1 / math.e).real) / 2
    gaps = [limit - kesten_index(lr, batch_size) * lr / batch_size for lr in (1e-4, 1e-6)]
    assert limit == pytest.approx(1.7955607, abs=1e-6)
    assert math.log10(gaps[0] / gaps[1]) / 2 == pytest.approx(1, abs=0.1)


def test_the_published_value_is_right_only_at_index_two() -> None:
    batch_size, bound = 8, 1.6
    gaps = [ziyin_index(lr, batch_size) - kesten_index(lr, batch_size) for lr in (0.1, 1.0, bound, 1.9)]
    assert gaps[0] > gaps[1] > 1.7 and abs(gaps[2]) < 1e-10 and gaps[3] < -0.3


def test_table_holds_the_three_values() -> None:
    assert tail_index(0.5, 4) == TailIndex(kesten_index(0.5, 4), 12.0, 17.0)


@pytest.mark.parametrize("function", [kesten_index, ziyin_index, continuous_index])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 4), "lr_times_a must be positive and finite, got 0.0"),
        ((-1.0, 4), "lr_times_a must be positive"),
        ((math.inf, 4), "lr_times_a must be positive and finite, got inf"),
        ((math.nan, 4), "lr_times_a must be positive and finite, got nan"),
        ((1.0, 0), "batch_size must be an integer >= 1, got 0"),
        ((1.0, 2.0), "batch_size must be an integer"),
        ((1.0, True), "batch_size must be an integer"),
    ],
)
def test_wrong_settings_are_named(function: object, arguments: tuple[float, int], message: str) -> None:
    with pytest.raises(FastregError, match=f"{function.__name__}: {message}"):
        function(*arguments)


def test_no_stationary_distribution_is_named() -> None:
    # E log|1 - lr chi2_1| changes sign between: simulated, 4e6 draws, standard error 6e-4.
    draws = numpy.random.default_rng(2).chisquare(1, 4_000_000)
    drifts = [numpy.log(abs(1 - lr * draws)).mean() for lr in (2.38, 2.48)]
    assert drifts[0] < -0.01 and drifts[1] > 0.01
    assert kesten_index(2.38, 1) > 0
    with pytest.raises(FastregError, match="lr_times_a must be so small .* got 2.48, where it is 0.01"):
        kesten_index(2.48, 1)


def pareto(index: float, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) ** (-1 / index)


def test_hill_on_pareto_samples_errs_as_it_says() -> None:
    estimates = [hill_estimator(row, k=100) for row in pareto(1.7, (600, 2000))]
    indices = torch.stack([estimate.index for estimate in estimates])
    errors = torch.stack([estimate.error for estimate in estimates])
    # Exactly k/(k - 1) times the index in expectation: 1 / a mean of k exponentials.
    assert indices.mean().item() == pytest.approx(1.7 * 100 / 99, abs=4 * 0.17 / 600**0.5)
    assert ((indices - 1.7) / errors).std().item() == pytest.approx(1, abs=0.12)


def test_hill_plot_by_hand() -> None:
    plot = hill_plot(torch.tensor([[-8.0, 0.0], [1.0, 2.0]]), largest=2)
    log2 = math.log(2)
    expected = torch.tensor([1 / (2 * log2), 1 / ((3 * log2 + log2) / 2)], dtype=torch.float64)
    assert torch.allclose(plot.index, expected, rtol=1e-14)
    assert torch.allclose(plot.error, expected / torch.tensor([1.0, 2.0]).double().sqrt(), rtol=1e-14)
    assert plot.k.tolist() == [1, 2]


def test_hill_is_the_last_of_the_plot_and_free_of_scale() -> None:
    samples = pareto(2.5, (1000,))
    one, plot, scaled = hill_estimator(samples, 50), hill_plot(samples, 50), hill_estimator(-3 * samples, 50)
    assert isinstance(one, HillEstimate) and (one.index, one.error, one.k) == (plot.index[-1], plot.error[-1], 50)
    assert scaled.index.item() == pytest.approx(one.index.item(), rel=1e-12)


@pytest.mark.parametrize(("lr_times_a", "batch_size", "k"), [(1.0, 2, 1500), (1.0, 4, 1500), (1.8, 8, 1500)])
def test_simulated_sgd_has_the_exact_index(lr_times_a: float, batch_size: int, k: int) -> None:
    estimate = hill_estimator(stationary_weights(lr_times_a, batch_size, 500_000, 30), k)
    index = tail_index(lr_times_a, batch_size)
    assert abs(estimate.index - index.exact) < 3 * estimate.error
    assert abs(estimate.index - index.continuous) > 20 * estimate.error
    # At the bound of stability, S = 2, the paper's value is the exact one.
    assert batch_size == 2 or abs(estimate.index - index.paper) > 5 * estimate.error


@pytest.mark.parametrize(
    ("samples", "k", "message"),
    [
        (torch.ones(3), 0, "must be in 1 .. 2, got 0"),
        (torch.ones(3), 3, "must be in 1 .. 2, got 3"),
        (torch.ones(3), 1.0, "must be in 1 .. 2, got 1.0"),
        (torch.tensor([2.0, 0.0, 0.0]), 1, r"2 largest \|samples\| must be positive and finite"),
        (torch.tensor([2.0, math.nan, 1.0]), 1, "must be positive and finite"),
        (torch.tensor([2.0, math.inf, 1.0]), 1, "must be positive and finite"),
    ],
)
def test_wrong_samples_are_named(samples: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(FastregError, match=f"hill_estimator: .*{message}"):
        hill_estimator(samples, k)
    with pytest.raises(FastregError, match=f"hill_plot: .*{message}"):
        hill_plot(samples, k)
