"""Traces, spectral densities and their summaries, on dense symmetric matrices with known eigenvalues.

Expectations over random signs are taken exactly, over all 2^D sign vectors. Where seeds are fixed instead, the
bound is four standard errors, which a mean of many terms passes with probability 0.9999.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastreg.curvature import density as density_module, traces as trace_module
from fastreg.curvature.density import Density, spectral_density
from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.summaries import participation_ratio, stable_rank
from fastreg.curvature.traces import trace
from fastreg.errors import FastregError

EXACT = 1e-10
# Float32 roundings of a few chained sums of 40 terms.
FLOAT32 = 1e-4
SMALL = 5
METHODS = ("hutchinson", "hutch++", "xtrace")


class Dense(CurvatureOperator):
    """A matrix ``[D, D]`` whose coordinates are two parameters; counts the rows of every call."""

    def __init__(self, matrix: Tensor, first: int | None = None) -> None:
        first = len(matrix) // 2 if first is None else first
        super().__init__({"first": matrix.new_zeros(first), "second": matrix.new_zeros(len(matrix) - first)})
        self.matrix, self.calls = matrix, []

    def apply(self, rows: Tensor) -> Tensor:
        self.calls.append(len(rows))
        return rows @ self.matrix


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)).Q
    matrix = ((basis * eigenvalues.double()) @ basis.T).to(eigenvalues.dtype)
    return (matrix + matrix.T) / 2


def symmetric(size: int, seed: int = 0) -> Tensor:
    matrix = torch.randn(size, size, generator=seeded(seed), dtype=torch.float64)
    return matrix + matrix.T


def decaying(size: int, rate: float = 0.8) -> Tensor:
    return rotated(rate ** torch.arange(size, dtype=torch.float64))


def all_signs(size: int) -> Tensor:
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=size)), dtype=torch.float64)


@pytest.fixture
def enumerated(monkeypatch: pytest.MonkeyPatch) -> int:
    """Replaces random signs of ``SMALL`` coordinates by all of them; how many they are."""
    every = all_signs(SMALL)
    drawn = itertools.cycle(every)

    def signs(operator: CurvatureOperator, count: int, generator: torch.Generator | None) -> Tensor:
        return torch.stack(list(itertools.islice(drawn, count)))

    monkeypatch.setattr(trace_module, "signs", signs)
    monkeypatch.setattr(density_module, "signs", signs)
    return len(every)


@pytest.mark.parametrize("block", [1, 7, 32])
def test_hutchinson_over_all_signs(enumerated: int, block: int) -> None:
    """The mean is the trace, in each diagonal block too, and the variance is ``2 (||A||_F^2 - ||diag A||^2)``."""
    matrix = symmetric(SMALL)
    got = trace(Dense(matrix, first=2), samples=enumerated, per_layer=True, block=block)
    torch.testing.assert_close(got.value, matrix.trace(), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(got.layers["first"], matrix[:2, :2].trace(), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(got.layers["second"], matrix[2:, 2:].trace(), rtol=EXACT, atol=EXACT)
    variance = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    torch.testing.assert_close(got.error, (variance / (enumerated - 1)).sqrt(), rtol=EXACT, atol=EXACT)


def test_hutchinson_of_a_diagonal_is_exact() -> None:
    eigenvalues = torch.arange(-3.0, 10.0, dtype=torch.float64)
    got = trace(Dense(eigenvalues.diag()), samples=2)
    torch.testing.assert_close(got.value, eigenvalues.sum(), rtol=EXACT, atol=EXACT)
    assert got.error == 0
    assert got.layers is None


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_hutch_plus_plus_over_all_signs(columns: int) -> None:
    """For any sketch: what it captures, and the mean of the rest over all signs, against dense projectors."""
    matrix = symmetric(SMALL)
    sketch = torch.randn(columns, SMALL, generator=seeded(1), dtype=torch.float64)
    probes = all_signs(SMALL)
    captured, rest = trace_module._split_by_sketch(Dense(matrix), sketch, probes, 3)
    basis = torch.linalg.svd(matrix @ sketch.T, full_matrices=False).U
    complement = torch.eye(SMALL, dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(captured, (basis.T @ matrix @ basis).trace(), rtol=EXACT, atol=EXACT)
    want = torch.einsum("na,ab,nb->n", probes, complement @ matrix @ complement, probes)
    torch.testing.assert_close(rest, want, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(captured + rest.mean(), matrix.trace(), rtol=EXACT, atol=EXACT)


def left_out(matrix: Tensor, probes: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """The basis of the range of A on all probes but i, and that of its complement."""
    others = torch.cat([probes[:i], probes[i + 1 :]])
    full = torch.linalg.qr(matrix @ others.T, mode="complete").Q
    return full[:, : len(others)], full[:, len(others) :]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_xtrace_terms(count: int) -> None:
    """The downdated QR gives what one QR per left-out probe gives."""
    matrix = symmetric(17)
    probes = torch.randn(count, 17, generator=seeded(1), dtype=torch.float64)
    want = []
    for i, probe in enumerate(probes):
        basis, complement = left_out(matrix, probes, i)
        rest = complement @ complement.T @ probe
        rest = rest * ((17 - count + 1) / rest.square().sum()).sqrt()
        want.append((basis.T @ matrix @ basis).trace() + rest @ matrix @ rest)
    got = trace_module._leave_one_out(Dense(matrix), probes, 4)
    torch.testing.assert_close(got, torch.stack(want), rtol=EXACT, atol=EXACT)


def test_xtrace_terms_are_unbiased() -> None:
    """Given the others, w_i is uniform in direction: for a quadratic form, an orthonormal basis averages the same."""
    matrix = symmetric(9)
    probes = torch.randn(4, 9, generator=seeded(1), dtype=torch.float64)
    for i in range(4):
        terms = []
        for direction in left_out(matrix, probes, i)[1].T:
            replaced = probes.clone()
            replaced[i] = direction
            terms.append(trace_module._leave_one_out(Dense(matrix), replaced, 4)[i])
        assert len(terms) == 6
        torch.testing.assert_close(torch.stack(terms).mean(), matrix.trace(), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_low_rank_is_exact(method: str, rank: int, dtype: torch.dtype) -> None:
    """Rank 4 is below 15 // 3 and 15 // 2: the sketch holds the range and nothing is left to chance."""
    eigenvalues = torch.zeros(40, dtype=dtype)
    eigenvalues[:rank] = torch.tensor([5.0, -2.0, 1.0, 0.5], dtype=dtype)[:rank]
    matrix = rotated(eigenvalues)
    bound = EXACT if dtype == torch.float64 else FLOAT32
    for seed in range(5):
        got = trace(Dense(matrix), method=method, samples=15, generator=seeded(seed))
        assert got.value.dtype == got.error.dtype == dtype
        torch.testing.assert_close(got.value, eigenvalues.sum(), rtol=bound, atol=bound)
        assert got.error < bound


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("matrix", [symmetric(60), decaying(60)], ids=["indefinite", "decaying"])
def test_standard_error(method: str, matrix: Tensor) -> None:
    """Of 40 seeds none misses by six standard errors, and the errors made are of the size that is told.

    A standard error from 10 terms has Student's tails, hence six. Squared errors made, averaged over 40 seeds, scatter
    by sqrt(2 / 40) = 0.22 about their mean, which is what is told, or 1.7 times that for XTrace, whose terms depend on
    each other. The bounds are an error told twice too large, and 1.7 too small.
    """
    runs = [trace(Dense(matrix), method=method, samples=30, generator=seeded(seed)) for seed in range(40)]
    made = torch.stack([run.value for run in runs]) - matrix.trace()
    told = torch.stack([run.error for run in runs])
    assert (made.abs() < 6 * told).all()
    assert 0.25 < made.square().mean() / told.square().mean() < 3


def test_decaying_spectra_favour_the_sketches() -> None:
    """Half the gains in variance that 400 other seeds show: 9 for Hutch++, another 4.5 for XTrace."""
    matrix = decaying(60)
    squares = {}
    for method in METHODS:
        runs = [trace(Dense(matrix), method=method, samples=30, generator=seeded(seed)).value for seed in range(40)]
        squares[method] = (torch.stack(runs) - matrix.trace()).square().mean()
    assert squares["hutch++"] < squares["hutchinson"] / 4.5
    assert squares["xtrace"] < squares["hutch++"] / 2.2


@pytest.mark.parametrize("samples", [4, 5, 6, 13, 30])
@pytest.mark.parametrize("method", METHODS)
def test_products_and_blocks(method: str, samples: int) -> None:
    """``products`` is the number of rows asked for, and the block changes the calls, not the estimate."""
    one, five = Dense(symmetric(40)), Dense(symmetric(40))
    first = trace(one, method=method, samples=samples, block=1, generator=seeded())
    second = trace(five, method=method, samples=samples, block=5, generator=seeded())
    torch.testing.assert_close(first.value, second.value, rtol=EXACT, atol=EXACT)
    assert first.products == second.products == len(one.calls) == sum(five.calls)
    assert samples - first.products == (samples % 2 if method == "xtrace" else 0)
    assert set(one.calls) == {1}
    assert max(five.calls) <= 5
    # At most one incomplete block in each of two phases.
    assert len(five.calls) <= samples / 5 + 2


@pytest.mark.parametrize("size", [1, 2, 5, 30])
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_no_chance_where_products_suffice(method: str, size: int) -> None:
    operator = Dense(symmetric(size))
    got = trace(operator, method=method, samples=30)
    torch.testing.assert_close(got.value, operator.matrix.trace(), rtol=EXACT, atol=EXACT)
    assert (got.error, got.products, sum(operator.calls)) == (0, size, size)


@pytest.mark.parametrize("size", [5, 7, 8])
def test_sketches_of_nearly_all_of_the_space(size: int) -> None:
    """Just below the number of products that would make it exact."""
    matrix = symmetric(size)
    for method, seed in itertools.product(["hutch++", "xtrace"], range(5)):
        got = trace(Dense(matrix), method=method, samples=size - 1, generator=seeded(seed))
        # An error from two terms has Cauchy's tails; the estimate itself never leaves twice the range of x . A x.
        assert (got.value - matrix.trace()).abs() < 2 * size * torch.linalg.eigvalsh(matrix).abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_the_generator_decides(method: str) -> None:
    matrix, state = symmetric(40), torch.get_rng_state()
    values = [trace(Dense(matrix), method=method, generator=seeded(seed)).value for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lanczos"}, "trace: method must be one of .*'xtrace'.*, got 'lanczos'"),
        ({"samples": 1}, "trace: samples must be an integer >= 2, got 1"),
        ({"samples": True}, "trace: samples must be an integer >= 2, got True"),
        ({"samples": 8.0}, "trace: samples must be an integer >= 2, got 8.0"),
        ({"samples": 3, "method": "hutch++"}, "trace: samples must be an integer >= 4, got 3"),
        ({"samples": 3, "method": "xtrace"}, "trace: samples must be an integer >= 4, got 3"),
        ({"block": 0}, "trace: block must be an integer >= 1, got 0"),
        ({"per_layer": True, "method": "xtrace"}, "trace: method must be 'hutchinson' for per_layer=True"),
    ],
)
def test_trace_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(FastregError, match=message):
        trace(Dense(symmetric(8)), **options)


def normals(eigenvalues: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """The mean of normal densities at the eigenvalues, ``[G]``."""
    return torch.distributions.Normal(eigenvalues, sigma).log_prob(grid.unsqueeze(1)).exp().mean(1)


SPECTRA = {
    "distinct": [-2.0, -0.5, 0.1, 0.7, 1.0, 1.3, 3.0, 8.0],
    "multiple": [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 5.0],
    "one": [2.0] * 8,
    "zero": [0.0] * 8,
    "single": [-4.0],
}


@pytest.mark.parametrize("steps", [8, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", SPECTRA)
def test_density_of_a_diagonal(name: str, dtype: torch.dtype, steps: int) -> None:
    """Random signs weigh the unit vectors equally: every probe gives the spectrum itself, multiplicities too."""
    eigenvalues = torch.tensor(SPECTRA[name], dtype=dtype)
    got = spectral_density(Dense(eigenvalues.diag()), steps=steps, probes=3, generator=seeded())
    assert got.nodes.shape == got.weights.shape == (3, min(steps, len(eigenvalues)))
    bound = EXACT if dtype == torch.float64 else FLOAT32
    assert got.sigma == pytest.approx(0.01 * (float(eigenvalues.abs().max()) or 1), rel=bound)
    torch.testing.assert_close(got.weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=bound, atol=0.0)
    for sigma in (got.sigma, 0.5):
        want = normals(eigenvalues.double(), got.grid, sigma)
        torch.testing.assert_close(got.on(sigma=sigma), want, rtol=bound, atol=bound * float(want.max()))
    torch.testing.assert_close(torch.trapezoid(got.on(), got.grid), torch.tensor(1.0).double(), rtol=1e-6, atol=0.0)


def test_density_over_all_signs(enumerated: int) -> None:
    """The mean of ``x . f(A) x`` over all signs is the trace of f(A): eigenvalues weigh 1/D each."""
    matrix = symmetric(SMALL)
    got = spectral_density(Dense(matrix), steps=SMALL, probes=enumerated)
    want = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(got.nodes, want.expand(enumerated, SMALL), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(got.weights.mean(0), torch.full_like(want, 1 / SMALL), rtol=EXACT, atol=EXACT)


def test_moments_over_all_signs(enumerated: int) -> None:
    """Three steps make moments below the sixth exact; the sixth is not."""
    matrix = symmetric(SMALL)
    got = spectral_density(Dense(matrix), steps=3, probes=enumerated)
    truth = [torch.linalg.matrix_power(matrix, power).trace() / SMALL for power in range(7)]
    for power in range(6):
        torch.testing.assert_close(got.moment(power), truth[power], rtol=EXACT, atol=EXACT)
    assert (got.moment(6) - truth[6]).abs() > 1e-3 * truth[6]


def test_moments_within_the_standard_error() -> None:
    """At a size that cannot be enumerated: four standard errors of a mean over 64 probes."""
    matrix = decaying(100, 0.95)
    got = spectral_density(Dense(matrix), steps=10, probes=64, generator=seeded())
    for power in range(1, 8):
        per_probe = (got.weights * got.nodes**power).sum(1)
        truth = torch.linalg.matrix_power(matrix, power).trace() / 100
        assert (got.moment(power) - truth).abs() < 4 * per_probe.std() / 8
        assert per_probe.std() > 0


def test_density_advances_probes_together() -> None:
    operator = Dense(symmetric(20))
    spectral_density(operator, steps=6, probes=5)
    assert operator.calls == [5] * 6


def test_density_grid_and_sigma() -> None:
    operator = Dense(torch.diag(torch.tensor([-1.0, 3.0], dtype=torch.float64)))
    got = spectral_density(operator, sigma=0.2, grid=101)
    assert got.sigma == 0.2
    want = torch.linspace(-2.0, 4.0, 101, dtype=torch.float64)
    torch.testing.assert_close(got.grid, want, rtol=EXACT, atol=EXACT)
    peak = got.on(torch.tensor([3.0]))
    torch.testing.assert_close(peak, normals(torch.tensor([-1.0, 3.0]).double(), torch.tensor([3.0]).double(), 0.2))


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    got = spectral_density(Dense(symmetric(8)), probes=2)
    axes = Figure().add_subplot()
    assert got.plot(axes) is axes
    assert axes.get_yscale() == "log"
    grid, drawn = torch.from_numpy(axes.lines[0].get_xydata()).unbind(1)
    assert torch.equal(grid, got.grid)
    values = got.on()
    visible = values > 1e-10 * values.max()
    assert torch.equal(drawn.isfinite(), visible)
    torch.testing.assert_close(drawn[visible], values[visible], rtol=EXACT, atol=0.0)
    assert 0 < visible.sum() < len(grid)
    for path in (tmp_path / "density.png", str(tmp_path / "density.svg")):
        assert len(got.plot(path).lines) == 1
        assert Path(path).stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "spectral_density: steps must be an integer >= 1, got 0"),
        ({"probes": 0}, "spectral_density: probes must be an integer >= 1, got 0"),
        ({"grid": 1}, "spectral_density: grid must be an integer >= 2, got 1"),
        ({"sigma": 0.0}, "spectral_density: sigma must be a number > 0, got 0.0"),
        ({"sigma": float("nan")}, "spectral_density: sigma must be a number > 0, got nan"),
    ],
)
def test_density_refusals(options: dict[str, object], message: str) -> None:
    with pytest.raises(FastregError, match=message):
        spectral_density(Dense(symmetric(8)), **options)


def test_density_method_refusals() -> None:
    ones = torch.ones(1, 1, dtype=torch.float64)
    density = Density(ones, ones, ones[0], 1.0)
    with pytest.raises(FastregError, match="Density.moment: power must be an integer >= 0, got -1"):
        density.moment(-1)
    with pytest.raises(FastregError, match="Density.on: sigma must be a number > 0, got -1.0"):
        density.on(sigma=-1.0)
    with pytest.raises(FastregError, match=r"Density.on: grid must be \[G\], got shape \(1, 1\)"):
        density.on(ones)


@pytest.mark.parametrize("block", [8, 32])
def test_summaries_over_all_signs(enumerated: int, block: int) -> None:
    matrix = symmetric(SMALL) + 4 * torch.eye(SMALL, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    squares = eigenvalues.square()
    stable = stable_rank(Dense(matrix), steps=SMALL, probes=enumerated)
    torch.testing.assert_close(stable, squares.sum() / squares.max(), rtol=EXACT, atol=EXACT)
    ratio = participation_ratio(Dense(matrix), samples=enumerated, block=block)
    torch.testing.assert_close(ratio, eigenvalues.sum().square() / squares.sum(), rtol=EXACT, atol=EXACT)


def test_summaries_of_projections() -> None:
    """k equal eigenvalues give k, whatever their scale, within the error of the norm."""
    for rank, scale in ((1, 1e-6), (5, 1.0), (60, 1e6)):
        eigenvalues = torch.zeros(60, dtype=torch.float64)
        eigenvalues[:rank] = scale
        operator = Dense(rotated(eigenvalues))
        # ||P z||^2 has the mean rank and a variance of at most 2 rank: four standard errors.
        bound = 4 * (2 / rank / 64) ** 0.5
        assert float(stable_rank(operator, probes=64, generator=seeded())) == pytest.approx(rank, rel=bound)
        ratio = participation_ratio(operator, samples=64, generator=seeded())
        assert float(ratio) == pytest.approx(rank, rel=bound)


def test_stable_rank_of_an_indefinite_matrix() -> None:
    """The largest eigenvalue in magnitude counts, and a trace of zero has no participation."""
    operator = Dense(torch.tensor([-4.0, 1.0, 1.0, 2.0], dtype=torch.float64).diag())
    assert float(stable_rank(operator, probes=1)) == pytest.approx(22 / 16)
    assert participation_ratio(operator, samples=1) == 0


def test_summaries_of_zero() -> None:
    operator = Dense(torch.zeros(6, 6))
    assert stable_rank(operator) == 0
    assert participation_ratio(operator) == 0
    for method in METHODS:
        assert trace(operator, method=method, samples=5).value == 0


def test_summary_refusals() -> None:
    operator = Dense(symmetric(8))
    for options, message in (({"steps": 1}, "steps must be an integer >= 2"), ({"probes": 0}, "probes must be")):
        with pytest.raises(FastregError, match=f"stable_rank: {message}"):
            stable_rank(operator, **options)
    for name in ("samples", "block"):
        with pytest.raises(FastregError, match=f"participation_ratio: {name} must be an integer >= 1, got 0"):
            participation_ratio(operator, **{name: 0})
