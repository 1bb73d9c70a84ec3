"""Curvature operators, Lanczos and extreme eigenvalues, against dense symmetric matrices and torch.linalg.eigvalsh."""

from __future__ import annotations

import sys

import numpy
import pytest
import torch
from torch import Tensor

from fastreg.curvature.eigenvalues import ROUNDINGS, top_eigenvalues
from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.recurrence import Recurrence, lanczos
from fastreg.errors import FastregError

SHAPES = {"weight": (3, 2), "scale": (), "bias": (4,)}
SIZE = 11
DTYPES = [torch.float32, torch.float64]
# Multiple eigenvalues are in none of them, except 0: one start vector sees an eigenvalue once.
SPECTRA = {
    "indefinite": torch.linspace(-3, 5, 40),
    "clustered": torch.cat([torch.linspace(0, 1e-3, 37), torch.tensor([2.0, 2.01, 10.0])]),
    "low_rank": torch.cat([torch.zeros(33), torch.tensor([-4.0, -3.5, -2.5, 1.0, 2.0, 3.0, 7.0])]),
    "zero": torch.zeros(13),
    "one": torch.tensor([-3.0]),
    "smaller_than_steps": torch.linspace(-1, 2, 5),
    "huge": torch.linspace(-3, 5, 17) * 1e30,
    "tiny": torch.linspace(-3, 5, 17) * 1e-30,
}
ORDER = {"LA": lambda v: -v, "SA": lambda v: v, "LM": lambda v: -v.abs()}


class Dense(CurvatureOperator):
    """A symmetric matrix on parameters of given shapes, and how many rows each product was asked for."""

    def __init__(self, matrix: Tensor, parameters: dict[str, Tensor] | None = None) -> None:
        super().__init__(parameters or {"w": torch.zeros(len(matrix), dtype=matrix.dtype)})
        self.matrix = matrix
        self.asked: list[int] = []

    def apply(self, rows: Tensor) -> Tensor:
        assert rows.shape[1] == self.size and rows.dtype == self.dtype
        self.asked.append(len(rows))
        return rows @ self.matrix


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    values = values.double()
    rotation, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=seeded(), dtype=torch.float64))
    matrix = rotation * values @ rotation.T
    return ((matrix + matrix.T) / 2).to(dtype)


def on_shapes(dtype: torch.dtype = torch.float64) -> Dense:
    matrix = with_spectrum(torch.linspace(-2, 3, SIZE), dtype)
    return Dense(matrix, {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()})


def rounding(matrix: Tensor) -> float:
    """Of a product: dot products of D terms."""
    return len(matrix) * torch.finfo(matrix.dtype).eps * float(torch.linalg.eigvalsh(matrix.double()).abs().max())


def expected(matrix: Tensor, which: str, k: int) -> Tensor:
    values = torch.linalg.eigvalsh(matrix.double())
    return values[torch.argsort(ORDER[which](values))[:k]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigenvalues_and_vectors(name: str, dtype: torch.dtype, which: str) -> None:
    matrix = with_spectrum(SPECTRA[name], dtype)
    k, tol = min(3, len(matrix)), 1e-4
    values, vectors = top_eigenvalues(Dense(matrix), k, which=which, tol=tol, generator=seeded(1), vectors=True)
    noise = rounding(matrix) + ROUNDINGS * torch.finfo(dtype).eps * float(SPECTRA[name].abs().max())
    want, matrix, exact = expected(matrix, which, k), matrix.double(), vectors.double()
    assert values.dtype == dtype and vectors.shape == (len(matrix), k)
    assert ((values - want).abs() <= tol * want.abs() + noise).all()
    residuals = (matrix @ exact - exact * values).norm(dim=0)
    assert (residuals <= tol * want.abs() + noise).all()
    assert (exact.T @ exact - torch.eye(k)).abs().max() < len(matrix) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_lobpcg_sees_multiple_eigenvalues_and_lanczos_each_once(dtype: torch.dtype, which: str) -> None:
    values = torch.cat([torch.tensor([-6.0, -6.0, -3.0, 6.0, 6.0, 3.0]), torch.zeros(60)])
    matrix, tol = with_spectrum(values, dtype), 1e-4
    block, vectors = top_eigenvalues(
        Dense(matrix), 3, which=which, method="lobpcg", tol=tol, generator=seeded(1), vectors=True
    )
    # As many steps as there are different eigenvalues: the space is invariant.
    single = top_eigenvalues(Dense(matrix), 2, which=which, steps=5, max_steps=5, generator=seeded(1))
    want, exact = expected(matrix, which, 3), vectors.double()
    assert ((block - want).abs() <= tol * want.abs()).all()
    assert ((single - want[[0, 2]]).abs() <= rounding(matrix)).all()
    assert ((matrix.double() @ exact - exact * block).norm(dim=0) <= tol * want.abs() + rounding(matrix)).all()


@pytest.mark.parametrize("name", ["one", "smaller_than_steps", "zero"])
def test_lobpcg_on_few_parameters(name: str) -> None:
    matrix = with_spectrum(SPECTRA[name])
    got = top_eigenvalues(Dense(matrix), len(matrix), which="SA", method="lobpcg")
    assert (got - expected(matrix, "SA", len(matrix))).abs().max() <= rounding(matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_lanczos_is_a_factorisation(name: str, dtype: torch.dtype) -> None:
    matrix = with_spectrum(SPECTRA[name], dtype)
    operator, size = Dense(matrix), len(matrix)
    starts = torch.randn(3, size, generator=seeded(1), dtype=dtype)
    run = lanczos(operator, starts, 50, seeded(2))
    assert operator.asked == [3] * size and (run.last == 0).all()
    assert run.alphas.shape == (3, size) and run.betas.shape == (3, size - 1) and run.basis.shape == (size, 3, size)
    basis, eps = run.basis.transpose(0, 1).double(), torch.finfo(dtype).eps
    assert (basis @ basis.transpose(1, 2) - torch.eye(size)).abs().max() < size * eps
    tridiagonal = torch.diag_embed(run.alphas) + torch.diag_embed(run.betas, 1) + torch.diag_embed(run.betas, -1)
    assert (basis @ matrix.double() @ basis.transpose(1, 2) - tridiagonal).abs().max() <= 2 * rounding(matrix)
    assert (run.ritz()[0] - torch.linalg.eigvalsh(matrix.double())).abs().max() <= 2 * rounding(matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [3, 20])
def test_quadrature_of_an_exhausted_space(dtype: torch.dtype, steps: int) -> None:
    """Three eigenvalues take three steps; what is added after them has no weight."""
    matrix = with_spectrum(torch.tensor([-1.0, 2.0, 3.0]).repeat_interleave(8), dtype)
    start = torch.randn(1, 24, generator=seeded(1), dtype=dtype)
    values, vectors = lanczos(Dense(matrix), start, steps, seeded(2)).ritz()
    weights = vectors[0, 0] ** 2
    unit, image = start[0].double() / start.double().norm(), start[0].double() / start.double().norm()
    for power in range(5):
        assert abs(float(weights @ values[0] ** power - unit @ image)) <= 3**power * 24 * torch.finfo(dtype).eps
        image = matrix.double() @ image


def test_an_identity_does_not_lose_orthogonality() -> None:
    """Every residual is rounding, step after step, and rounding must not be handed on enlarged."""
    run = lanczos(Dense(with_spectrum(torch.ones(60))), torch.randn(4, 60, generator=seeded(1)).double(), 60, seeded(2))
    basis = run.basis.transpose(0, 1)
    assert (basis @ basis.transpose(1, 2) - torch.eye(60)).abs().max() < 60 * torch.finfo(torch.float64).eps
    assert (run.ritz()[0] - 1).abs().max() < 60 * torch.finfo(torch.float64).eps


def test_rows_are_independent_recurrences() -> None:
    """One that is started anew between two that are not."""
    matrix = torch.diag(torch.linspace(-2, 5, 30).double())
    starts = torch.randn(3, 30, generator=seeded(1), dtype=torch.float64)
    starts[1] = torch.eye(30)[4]
    together = lanczos(Dense(matrix), starts, 6, seeded(2))
    assert float(together.betas[1, 0]) == 0 and (together.betas[[0, 2]] > 0).all() and (together.last > 0).all()
    for row in (0, 2):
        alone = lanczos(Dense(matrix), starts[row : row + 1], 6)
        assert (together.alphas[row] - alone.alphas[0]).abs().max() < rounding(matrix)
        assert (together.betas[row] - alone.betas[0]).abs().max() < rounding(matrix)


def test_going_on_repeats_nothing() -> None:
    matrix = with_spectrum(torch.linspace(-2, 5, 30))
    starts = torch.randn(2, 30, generator=seeded(1), dtype=torch.float64)
    operator = Dense(matrix)
    recurrence = Recurrence(operator, starts)
    first, whole = recurrence.advance(4), lanczos(Dense(matrix), starts, 9)
    run = recurrence.advance(9)
    assert operator.asked == [2] * 9
    for got, want in zip(vars(run).values(), vars(whole).values()):
        assert torch.equal(got, want)
    assert torch.equal(first.basis, whole.basis[:4]) and torch.equal(first.last, whole.betas[:, 3])


def test_one_product_per_step_and_no_step_too_many() -> None:
    operator = Dense(with_spectrum(torch.linspace(-3, 5, 200)))
    coarse = top_eigenvalues(operator, 2, tol=0.1, steps=5, generator=seeded(1))
    products = len(operator.asked)
    assert set(operator.asked) == {1} and 5 <= products < 40 and coarse.shape == (2,)
    operator.asked.clear()
    top_eigenvalues(operator, 2, tol=float("1e300"), steps=30, generator=seeded(1))
    assert operator.asked == [1] * 30


def test_eigenvalues_within_rounding_of_zero_take_no_more_steps() -> None:
    """Their relative residual never gets small."""
    operator = Dense(with_spectrum(SPECTRA["clustered"], torch.float32))
    values = top_eigenvalues(operator, 3, which="SA", tol=1e-4, generator=seeded(1))
    assert len(operator.asked) < operator.size and values.abs().max() < 1e-4


def test_lobpcg_stops_within_a_round() -> None:
    """In the third, of 5, 10 and 20 iterations with three products around each: 44 without a tolerance."""
    operator = Dense(with_spectrum(torch.linspace(-3, 5, 60)))
    top_eigenvalues(operator, 3, method="lobpcg", tol=1e-3, generator=seeded(1))
    assert 21 < len(operator.asked) < 40


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exhausted_recurrence_starts_anew_from_the_generator(dtype: torch.dtype) -> None:
    matrix = with_spectrum(SPECTRA["low_rank"], dtype)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(lanczos(Dense(matrix), torch.ones(2, 40, dtype=dtype), 30, seeded(3)))
    assert torch.equal(runs[0].basis, runs[1].basis)
    # Seven eigenvalues and 0 are found in eight steps, and each of the others starts anew, but for some of rounding.
    assert ((runs[0].betas == 0).sum(1) > 15).all()


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_a_seeded_generator_determines_all(method: str) -> None:
    matrix = with_spectrum(torch.linspace(-3, 5, 50), torch.float32)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))
        run = top_eigenvalues(Dense(matrix), 2, method=method, generator=seeded(seed), vectors=True)
        runs.append(run)
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
def test_an_unreached_tolerance_is_refused(method: str) -> None:
    operator = Dense(with_spectrum(torch.linspace(-3, 5, 200)))
    message = r"max_steps must be enough .* got .* for theta = .* after 7 \(raise max_steps or tol\)"
    with pytest.raises(FastregError, match=message):
        top_eigenvalues(operator, 2, method=method, tol=1e-9, max_steps=7, generator=seeded(1))


def test_the_residual_named_is_the_true_one() -> None:
    matrix = with_spectrum(torch.linspace(-3, 5, 200))
    with pytest.raises(FastregError) as error:
        top_eigenvalues(Dense(matrix), tol=1e-9, max_steps=6, generator=seeded(1))
    value, vector = top_eigenvalues(Dense(matrix), tol=1e300, steps=6, max_steps=6, generator=seeded(1), vectors=True)
    true = float((matrix @ vector - vector * value).norm())
    assert f"got {true:.2g} for theta = {float(value):.4g} after 6" in str(error.value)


def test_long_float32_vectors_stay_orthogonal() -> None:
    """A float32 sum of a million products, term by term, would not do."""

    class Diagonal(CurvatureOperator):
        def apply(self, rows: Tensor) -> Tensor:
            return rows * self.parameters["w"]

    diagonal = torch.linspace(0, 1, 2**20)
    diagonal[:3] = torch.tensor([9.0, 7.0, 5.0])
    start = torch.randn(1, 2**20, generator=seeded(1))
    basis = lanczos(Diagonal({"w": diagonal}), start, 8).basis[:, 0].double()
    assert (basis @ basis.T - torch.eye(8)).abs().max() < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scipy_and_dense_views(dtype: torch.dtype) -> None:
    operator = on_shapes(dtype)
    view, matrix = operator.to_scipy(), operator.matrix.numpy()
    columns = numpy.random.default_rng(0).standard_normal((SIZE, 3)).astype(matrix.dtype)
    assert view.shape == (SIZE, SIZE) and view.dtype == matrix.dtype and (view @ columns).dtype == matrix.dtype
    bound = 10 * rounding(operator.matrix)
    for product, given in ((view.matmat, columns), (view.rmatmat, columns), (view.matvec, columns[:, 0]),
                           (view.rmatvec, columns[:, 0]), (view.matvec, columns[:, :1])):  # fmt: skip
        assert product(given).shape == given.shape
        assert numpy.abs(product(given) - matrix @ given).max() < bound
    operator.asked.clear()
    assert torch.equal(operator.dense(block=4), operator.matrix) and operator.asked == [4, 4, 3]


def test_dense_columns_are_products() -> None:
    """Of an operator that is not symmetric, so that a transpose shows."""
    matrix = torch.randn(5, 5, generator=seeded(), dtype=torch.float64)
    assert torch.equal(Dense(matrix.T).dense(), matrix)


@pytest.mark.parametrize("n", [None, 1, 5])
def test_vectors_return_in_the_form_they_came_in(n: int | None) -> None:
    operator, lead = on_shapes(), () if n is None else (n,)
    named = {name: torch.randn((*lead, *shape), generator=seeded(i), dtype=torch.float64)
             for i, (name, shape) in enumerate(SHAPES.items())}  # fmt: skip
    columns = torch.cat([v.reshape(n or 1, -1).T for v in named.values()])
    want = operator.matrix @ columns
    flat = columns[:, 0] if n is None else columns
    got = operator @ flat
    assert got.shape == flat.shape and torch.allclose(got.reshape(SIZE, -1), want)
    shuffled = {name: named[name] for name in reversed(named)}
    by_name, listed, paired = operator @ shuffled, operator @ list(named.values()), operator @ tuple(named.values())
    assert isinstance(by_name, dict) and isinstance(listed, list) and isinstance(paired, tuple)
    start = 0
    for position, (name, shape) in enumerate(SHAPES.items()):
        part = want[start : start + named[name][(0,) * len(lead)].numel()]
        start += len(part)
        for value in (by_name[name], listed[position], paired[position]):
            assert value.shape == (*lead, *shape) and torch.allclose(value.reshape(n or 1, -1).T, part)


def test_no_vectors() -> None:
    operator = on_shapes()
    assert (operator @ torch.zeros(SIZE, 0).double()).shape == (SIZE, 0)
    empty = {name: torch.zeros(0, *shape).double() for name, shape in SHAPES.items()}
    assert (operator @ empty)["weight"].shape == (0, 3, 2)


def test_attributes_and_half_precision() -> None:
    half = {"a": torch.zeros(2, 2, dtype=torch.bfloat16), "b": torch.zeros(3)}
    operator = Dense(torch.eye(7), half)
    assert (operator.size, operator.shape, operator.dtype) == (7, (7, 7), torch.float32)
    assert list(operator.parameters) == ["a", "b"] and operator.device == torch.device("cpu")
    assert (operator @ torch.ones(7)).dtype == torch.float32
    assert Dense(torch.eye(7), half | {"b": torch.zeros(3).double()}).dtype == torch.float64


def entries(**changed: object) -> dict[str, object]:
    return {name: torch.zeros(2, *shape).double() for name, shape in SHAPES.items()} | changed


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.zeros(8).double(), r"must be \[11\] .* got \[8\]"),
        (torch.zeros(3, 11).double(), r"must be \[11, 11\] .* got \[3, 11\]"),
        (torch.zeros(11, 2, 2).double(), r"must be \[11\] .* got \[11, 2, 2\]"),
        (torch.zeros(11), "torch.float64 on cpu, got .* torch.float32"),
        (torch.zeros(11, device="meta").double(), "on cpu, got .* on meta"),
        (numpy.zeros(11), "must be a tensor, a dict .* got ndarray"),
        ({name: v for name, v in entries().items() if name != "bias"}, r"missing \['bias'\], unknown \[\]"),
        (entries(gain=torch.zeros(2)), r"missing \[\], unknown \['gain'\]"),
        (entries(bias=torch.zeros(3, 4).double()), r"vectors\['bias'\] must be \[2, 4\] .* got \[3, 4\]"),
        (entries(bias=torch.zeros(4).double()), r"vectors\['bias'\] must be \[2, 4\] .* got \[4\]"),
        (entries(weight=torch.zeros(2, 2, 3).double()), r"vectors\['weight'\] must be \[2, 3, 2\] .* got \[2, 2, 3\]"),
        (entries(weight=torch.zeros(2, 3).double()), r"vectors\['weight'\] must be \[3, 2\] .* got \[2, 3\]"),
        (entries(scale=torch.zeros(2)), r"vectors\['scale'\] must be .* torch.float64 .* got .* torch.float32"),
        (entries(weight=1.0), r"vectors\['weight'\] must be a tensor, got float"),
        (list(entries().values())[:2], "one tensor per parameter, 3, got 2"),
    ],
)
def test_refused_vectors(vectors: object, message: str) -> None:
    with pytest.raises(FastregError, match=message):
        on_shapes() @ vectors


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "at least one element, got none"),
        ({"w": torch.zeros(0)}, "at least one element, got none"),
        ({"w": torch.zeros(2, dtype=torch.int64)}, r"parameters\['w'\] must be floating point, got torch.int64"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, "must be floating point, got torch.complex64"),
        ({"w": torch.zeros(2), "v": torch.zeros(2, device="meta")}, r"one device, got \['cpu', 'meta'\]"),
    ],
)
def test_refused_parameters(parameters: dict[str, Tensor], message: str) -> None:
    with pytest.raises(FastregError, match=message):
        CurvatureOperator.__init__(on_shapes(), parameters)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be an integer from 1 to 11, got 0"),
        ({"k": 12}, "k must be an integer from 1 to 11, got 12"),
        ({"k": True}, "k must be an integer .* got True"),
        ({"which": "BE"}, "which must be one of .* got 'BE'"),
        ({"method": "arpack"}, "method must be one of .* got 'arpack'"),
        ({"tol": 0}, "tol must be a number > 0, got 0"),
        ({"tol": float("nan")}, "tol must be a number > 0, got nan"),
        ({"steps": 0}, "steps must be an integer from 1 to 200 or None, got 0"),
        ({"steps": 9, "max_steps": 8}, "steps must be an integer from 1 to 8 or None, got 9"),
        ({"k": 3, "max_steps": 2}, "max_steps must be an integer >= k = 3, got 2"),
        ({"method": "lobpcg", "which": "LM"}, "lobpcg must be asked for LA or SA"),
        ({"method": "lobpcg", "steps": 5}, "lobpcg must be asked for LA or SA, without steps"),
    ],
)
def test_refused_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FastregError, match=message):
        top_eigenvalues(on_shapes(), **arguments)


@pytest.mark.parametrize(
    ("starts", "steps", "message"),
    [
        (torch.ones(11).double(), 3, r"starts must be \[1, 11\] .* got \[11\]"),
        (torch.ones(2, 10).double(), 3, r"starts must be \[2, 11\] .* got \[2, 10\]"),
        (torch.ones(2, 11), 3, "torch.float64 on cpu, got .* torch.float32"),
        (torch.eye(2, 11).double() * torch.tensor([[2.0], [0.0]]), 3, r"not zero, got norms \[2.0, 0.0\]"),
        (torch.full((1, 11), float("nan")).double(), 3, r"finite rows .* got norms \[nan\]"),
        (torch.ones(1, 11).double(), 0, "steps must be an integer >= 1, got 0"),
        (torch.ones(1, 11).double(), 2.0, "steps must be an integer >= 1, got 2.0"),
    ],
)
def test_refused_starts(starts: Tensor, steps: int, message: str) -> None:
    with pytest.raises(FastregError, match=message):
        lanczos(on_shapes(), starts, steps)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_products_that_are_not_finite(value: float) -> None:
    matrix = torch.eye(5, dtype=torch.float64)
    matrix[2, 2] = value
    with pytest.raises(FastregError, match="finite products, got nan or inf at step 1"):
        top_eigenvalues(Dense(matrix), generator=seeded(1))


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="scipy"):
        on_shapes().to_scipy()
    with pytest.raises(ImportError, match="scipy"):
        top_eigenvalues(on_shapes(), method="lobpcg")
    assert top_eigenvalues(on_shapes()).shape == (1,)


def test_block_of_dense() -> None:
    with pytest.raises(FastregError, match="block must be an integer >= 1, got 0"):
        on_shapes().dense(block=0)
