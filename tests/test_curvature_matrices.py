"""Hessian, Gauss-Newton and Fisher matrices of models on data, against dense ones of plain autograd, in float64.

Where an estimate is random its bound is four standard errors, known from the exact matrix unless stated.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import numpy
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import oracle
from cases import BY_NAME, Case, cross_entropy
from curvature_oracle import Piece
from fastreg.curvature import (
    GGN,
    CurvatureOperator,
    Fisher,
    Hessian,
    participation_ratio,
    spectral_density,
    stable_rank,
    top_eigenvalues,
    trace,
)
from fastreg.errors import FastregError

EXACT, SAME, ERRORS = 1e-10, 1e-12, 4
MATRICES = {
    "hessian": Hessian,
    "ggn": GGN,
    "exact": partial(Fisher, kind="exact"),
    "empirical": partial(Fisher, kind="empirical"),
    "sampled": partial(Fisher, kind="sampled"),
}
every_matrix = pytest.mark.parametrize("kind", MATRICES)


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose Gauss-Newton matrix is not the Fisher matrix: [B, C], [B] -> [B]."""
    return (1 + targets) * cross_entropy(outputs, targets)


def dropout_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 3))


NETWORK = Case("network", lambda: nn.Sequential(
    nn.Linear(10, 28), nn.GELU(), nn.Linear(28, 28), nn.GELU(), nn.Linear(28, 8)), (10,), classes=8)  # fmt: skip
DROPOUT = Case("dropout", dropout_net, (5,))


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(case: Case | str, samples: int = 7) -> tuple[nn.Module, tuple[Tensor, Tensor], Case]:
    case = BY_NAME[case] if isinstance(case, str) else case
    return case.model(), case.batch(samples), case


def cut(batch: tuple[Tensor, Tensor], *sizes: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.split(sizes) for tensor in batch), strict=True))


def columns(operator: CurvatureOperator, count: int = 3) -> Tensor:
    return torch.randn(operator.size, count, generator=seeded(), dtype=torch.float64)


def dense(kind: str, *piece: object) -> Tensor:
    return getattr(Piece(*piece), kind)()


def assert_near(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape and (got - want).abs().max() <= bound * want.abs().max()


@dataclass(frozen=True)
class Known:
    """An operator on 1,352 parameters, its matrix and its eigenvalues, ascending."""

    operator: CurvatureOperator
    matrix: Tensor
    eigenvalues: Tensor


@pytest.fixture(scope="module", params=["hessian", "ggn", "exact"])
def known(request: pytest.FixtureRequest) -> Known:
    """Of a network trained until outliers stand out of the bulk."""
    model, batch, case = *small(NETWORK, 24)[:2], replace(NETWORK, sample_losses=weighted)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        case.loss_fn(model(batch[0]), batch[1]).backward()
        optimizer.step()
    matrix = dense(request.param, model, case, *batch)
    return Known(MATRICES[request.param](model, case.loss_fn, batch), matrix, torch.linalg.eigvalsh(matrix))


def test_the_dense_matrix(known: Known) -> None:
    assert_near(known.operator.dense(), known.matrix, EXACT)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_top_eigenvalues(known: Known, which: str, k: int) -> None:
    tol, exact = 1e-6, known.eigenvalues
    want = exact[{"LA": -exact, "SA": exact, "LM": -exact.abs()}[which].argsort()[:k]]
    values = top_eigenvalues(known.operator, k, which=which, tol=tol, generator=seeded())
    # Where eigenvalues are zero there is rounding only.
    assert ((values - want).abs() <= tol * want.abs() + EXACT * exact.abs().max()).all()


def test_scipy_finds_the_same(known: Known) -> None:
    start = numpy.random.default_rng(0).standard_normal(known.operator.size)
    found = torch.tensor(eigsh(known.operator.to_scipy(), 3, which="LA", v0=start, return_eigenvectors=False))
    assert_near(found.sort().values, known.eigenvalues[-3:], EXACT)
    assert_near(top_eigenvalues(known.operator, 3, tol=1e-6, generator=seeded()), found.sort().values.flip(0), EXACT)


def sign_variance(matrix: Tensor) -> Tensor:
    """Of ``z . A z`` over random signs."""
    return 2 * (matrix.square().sum() - matrix.diagonal().square().sum())


def test_trace_in_all_and_by_layer(known: Known) -> None:
    samples, matrix, start = 40, known.matrix, 0
    got = trace(known.operator, samples=samples, per_layer=True, generator=seeded())
    error = (sign_variance(matrix) / samples).sqrt()
    assert (got.value - matrix.trace()).abs() <= ERRORS * error
    # A standard deviation estimated from 40 numbers.
    assert 0.5 < got.error / error < 2
    for name, p in known.operator.parameters.items():
        rows = matrix[start : start + p.numel()]
        block = rows[:, start : start + p.numel()]
        # The signs of other layers come in by the product: each entry beside the block counts once.
        variance = sign_variance(block) + rows.square().sum() - block.square().sum()
        assert (got.layers[name] - block.trace()).abs() <= ERRORS * (variance / samples).sqrt()
        start += p.numel()


@pytest.mark.parametrize(("method", "told"), [("hutch++", 1.0), ("xtrace", 0.75)])
def test_traces_with_a_sketch(known: Known, method: str, told: float) -> None:
    """Their own error is what there is to compare with; that of XTrace is some 25 % too small."""
    got = trace(known.operator, method=method, samples=60, generator=seeded())
    assert (got.value - known.matrix.trace()).abs() <= ERRORS * got.error / told
    assert 0 < got.error < (sign_variance(known.matrix) / 60).sqrt()


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_as_many_samples_as_parameters_are_exact(method: str) -> None:
    model, batch, case = small("mlp_gelu")
    operator = Hessian(model, case.loss_fn, batch)
    got, want = trace(operator, method=method, samples=operator.size), dense("hessian", model, case, *batch).trace()
    assert (got.value - want).abs() <= EXACT * want.abs() and got.error == 0 and got.products == operator.size


@pytest.mark.parametrize(("method", "samples"), [("hutch++", 21), ("xtrace", 14)])
def test_traces_are_exact_where_the_sketch_holds_the_range(method: str, samples: int) -> None:
    """Three samples of three classes have a Fisher matrix of rank 6."""
    model, batch, case = small("mlp_gelu", samples=3)
    got = trace(MATRICES["exact"](model, None, batch), method=method, samples=samples, generator=seeded())
    assert_near(got.value, dense("exact", model, case, *batch).trace(), EXACT)


def test_spectral_density(known: Known) -> None:
    """Moments, and the distribution function against that of the exact eigenvalues under the same kernel.

    At t, a probe gives ``z . f(A) z / D`` with 0 <= f <= 1; as ``z . z`` is D, f - 1/2 has the same variance,
    ``<= 2 ||f - 1/2||_F^2 / D^2 <= 1 / (2 D)``. Quadrature is exact to degree 2 s, and Chebyshev coefficients of f
    fall like ``exp(-(k sigma / R)^2 / 2) / k`` on a spectrum of half width R.
    """
    exact, steps, probes, width = known.eigenvalues, 64, 4, 0.03
    size, sigma = len(exact), width * float(exact[-1] - exact[0]) / 2
    density = spectral_density(known.operator, steps=steps, probes=probes, sigma=sigma, generator=seeded())
    power = torch.eye(size, dtype=torch.float64)
    for exponent in (1, 2, 3):
        power = power @ known.matrix
        error = (sign_variance(power) / probes).sqrt() / size
        assert (density.moment(exponent) - power.trace() / size).abs() <= ERRORS * error
    # Every probe has found what stands out most.
    assert_near(density.nodes.amax(1), exact[-1].expand(probes), 1e-6)
    function = torch.cumulative_trapezoid(density.on(), density.grid)
    want = torch.special.ndtr((density.grid[1:, None] - exact) / sigma).mean(1)
    bound = ERRORS / math.sqrt(2 * size * probes) + math.exp(-((2 * steps * width) ** 2) / 2)
    assert (function - want).abs().max() <= bound and abs(float(function[-1]) - 1) < 1e-5


def test_stable_rank_and_participation_ratio(known: Known) -> None:
    squares, matrix, probes, samples = known.eigenvalues.square(), known.matrix, 4, 100
    variance, want = sign_variance(matrix @ matrix), squares.sum() / squares.max()
    got = stable_rank(known.operator, probes=probes, generator=seeded())
    assert (got - want).abs() <= ERRORS * (variance / probes).sqrt() / squares.max()
    # To first order, the relative errors of the trace, twice, and of the squares add up at most.
    relative = 2 * sign_variance(matrix).sqrt() / matrix.trace() + variance.sqrt() / squares.sum()
    got, want = participation_ratio(known.operator, samples=samples, generator=seeded()), matrix.trace() ** 2
    assert (got * squares.sum() / want - 1).abs() <= ERRORS * relative / samples**0.5


# What does not depend on the place of a sample in the data.
@pytest.mark.parametrize("kind", ["hessian", "ggn", "exact", "empirical"])
@pytest.mark.parametrize("name", ["mlp_silu_square", "gpt_tied", "vit"])
def test_any_cut_of_the_data_is_the_whole(name: str, kind: str) -> None:
    model, batch, case = small(name)
    dataset = TensorDataset(*batch)
    data = (batch, cut(batch, 2, 1, 4), DataLoader(dataset, 3), DataLoader(dataset, 3, shuffle=True))
    operators = [MATRICES[kind](model, case.loss_fn, one) for one in data]
    whole, *parts = [operator @ columns(operator) for operator in operators]
    assert_near(whole, dense(kind, model, case, *batch) @ columns(operators[0]), EXACT)
    for part in parts:
        assert_near(part, whole, SAME)


@pytest.mark.parametrize("name", ["mlp_gelu", "gpt_tied"])
def test_a_layer_has_its_diagonal_block(name: str) -> None:
    model, batch, case = small(name)
    whole, sizes = dense("hessian", model, case, *batch), [p.numel() for p in model.parameters()]
    ends = dict(zip(oracle.trainable(model), itertools.accumulate(sizes), strict=True))
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.LayerNorm))]
    for layer in layers:
        own = [name for name, p in model.named_parameters() if any(p is q for q in layer.parameters())]
        rows = slice(ends[own[0]] - dict(model.named_parameters())[own[0]].numel(), ends[own[-1]])
        block = Hessian(model, case.loss_fn, batch, parameters=layer.parameters()).dense()
        assert_near(block, whole[rows, rows], EXACT)


@every_matrix
def test_a_shuffled_loader_draws_one_order_and_leaves_random_numbers_alone(kind: str) -> None:
    model, batch, case = small(DROPOUT)
    operator = MATRICES[kind](model, case.loss_fn, DataLoader(TensorDataset(*batch), 2, shuffle=True))
    state, first = torch.get_rng_state(), operator @ columns(operator)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(operator @ columns(operator), first)


def test_the_sampled_matrix_is_that_of_labels() -> None:
    """One of the 27 ways to label three samples gives it; other seeds give others."""
    model, batch, case = small("mlp_gelu", samples=3)
    piece, ways, found = Piece(model, case, *batch), {}, set()
    for labels in itertools.product(range(3), repeat=3):
        piece.labels = torch.tensor(labels)
        ways[labels] = piece.sampled()
    for seed in range(6):
        got = Fisher(model, None, batch, seed=seed).dense()
        errors = {labels: float((way - got).abs().max() / got.abs().max()) for labels, way in ways.items()}
        found.add(min(errors, key=errors.get))
        assert min(errors.values()) < EXACT < 0.01 < sorted(errors.values())[1]
    assert len(found) > 2


NOTHING = TensorDataset(torch.zeros(0, 5), torch.zeros(0))


@pytest.mark.parametrize("data", [[], (), DataLoader(NOTHING)], ids=["list", "tuple", "loader"])
def test_empty_data_are_refused(data: object) -> None:
    with pytest.raises(FastregError, match="data must hold at least one batch, got none"):
        Hessian(DROPOUT.model(), DROPOUT.loss_fn, data).dense()


def test_an_iterator_is_refused() -> None:
    for data, kind in ((iter([]), "list_iterator"), ((batch for batch in ()), "generator")):
        with pytest.raises(FastregError, match=rf"data must be iterable more than once, got {kind} \(pass a list"):
            Hessian(DROPOUT.model(), DROPOUT.loss_fn, data)


def test_progress_shows_batches_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model, batch, case = small("mlp_gelu")
    quiet, shown = (GGN(model, case.loss_fn, cut(batch, 3, 4), progress=progress) for progress in (False, True))
    want = quiet @ columns(quiet)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(shown @ columns(shown), want)
    bar = capsys.readouterr().err
    assert "GGN" in bar and "/2" in bar and "batch" in bar
