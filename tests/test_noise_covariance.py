"""The covariance of minibatch gradients: against autograd sample by sample, and against every minibatch there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from fastreg.curvature import GGN, CurvatureOperator, Fisher, Hessian, spectral_density, top_eigenvalues, trace
from fastreg.errors import FastregError
from fastreg.noise.alignment import CurvatureNoise, alignment
from fastreg.noise.covariance import NoiseCovariance
from fastreg.noise.scale import noise_scale

EXACT = 1e-10
Problem = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]


def classifier(samples: int) -> Problem:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, cross_entropy, (torch.randn(samples, 4).double(), torch.randint(3, (samples,)))


def convolution(samples: int) -> Problem:
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    model = nn.Sequential(*layers).double().eval()
    model[1].running_mean.normal_()
    return model, cross_entropy, (torch.randn(samples, 2, 4, 4).double(), torch.randint(2, (samples,)))


def regressor(samples: int) -> Problem:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return model, mse_loss, (torch.randn(samples, 3).double(), torch.randn(samples, 1).double())


PROBLEMS = (classifier, convolution, regressor)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def gradient(problem: Problem, chosen: Sequence[int]) -> Tensor:
    """Of the mean loss of these samples, ``[D]``, by autograd on those alone."""
    model, loss_fn, (inputs, targets) = problem
    loss = loss_fn(model(inputs[list(chosen)]), targets[list(chosen)])
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def each_gradient(problem: Problem) -> Tensor:
    """``[N, D]``."""
    return torch.stack([gradient(problem, [i]) for i in range(len(problem[2][1]))])


def over_draws(problem: Problem, draws: Sequence[Sequence[int]]) -> Tensor:
    """The covariance of the minibatch gradient over draws that are equally likely."""
    found = torch.stack([gradient(problem, draw) for draw in draws])
    return torch.cov(found.T, correction=0)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_covariance_is_that_over_all_minibatches(problem: Callable, replacement: bool, size: int) -> None:
    case = problem(5)
    draws = list(product(range(5), repeat=size) if replacement else combinations(range(5), size))
    noise = NoiseCovariance(*case, batch_size=size, replacement=replacement)
    assert relative(noise.dense(), over_draws(case, draws)) < 1e-12


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("replacement", [True, False])
def test_exact_parts_are_those_of_the_matrix_of_autograd(problem: Callable, replacement: bool) -> None:
    case = problem(9)
    factor = 1 / 4 if replacement else 5 / (4 * 8)
    dense = factor * torch.cov(each_gradient(case).T, correction=0)
    noise = NoiseCovariance(*case, batch_size=4, replacement=replacement)
    vectors = torch.randn(noise.size, 3).double()
    assert relative(noise @ vectors, dense @ vectors) < EXACT
    assert relative(noise.trace(), dense.trace()) < EXACT
    assert relative(noise.diagonal(), dense.diagonal()) < EXACT
    assert relative(noise.gram().trace(), dense.trace()) < EXACT
    values, basis = noise.top(3)
    expected, directions = torch.linalg.eigh(dense)
    assert relative(values, expected.flip(0)[:3]) < EXACT
    overlaps = (basis * directions.flip(1)[:, :3]).sum(0).abs()
    assert relative(overlaps, torch.ones(3)) < EXACT


def test_all_eigenpairs_rebuild_the_matrix_and_number_one_less_than_the_samples() -> None:
    noise = NoiseCovariance(*classifier(6), batch_size=2)
    values, basis = noise.top(20)
    assert len(values) == 5
    assert relative(basis @ torch.diag(values) @ basis.T, noise.dense()) < EXACT
    assert relative(basis.T @ basis, torch.eye(5)) < EXACT


@pytest.mark.parametrize("sizes", [[9], [4, 4, 1], [2, 3, 3, 1]])
def test_the_cut_into_batches_does_not_matter(sizes: list[int]) -> None:
    model, loss_fn, (inputs, targets) = classifier(9)
    whole = NoiseCovariance(model, loss_fn, (inputs, targets), batch_size=3, replacement=False)
    batches = list(zip(inputs.split(sizes), targets.split(sizes)))
    cut = NoiseCovariance(model, loss_fn, batches, batch_size=3, replacement=False)
    for part in (NoiseCovariance.dense, NoiseCovariance.trace, NoiseCovariance.diagonal, NoiseCovariance.gram):
        assert relative(part(cut), part(whole)) < EXACT
    assert relative(cut.top(4)[0], whole.top(4)[0]) < EXACT


def test_a_loader_that_shuffles_gives_the_same_order_in_every_pass() -> None:
    model, loss_fn, data = classifier(10)
    loader = DataLoader(TensorDataset(*data), batch_size=3, shuffle=True)
    shuffled, plain = NoiseCovariance(model, loss_fn, loader), NoiseCovariance(model, loss_fn, data)
    state = torch.get_rng_state()
    values, basis = shuffled.top(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert relative(values, plain.top(5)[0]) < EXACT
    assert relative(plain @ basis, basis * values) < EXACT


def test_dropout_draws_the_same_masks_in_every_part() -> None:
    model, loss_fn, data = classifier(7)
    model = nn.Sequential(model[0], nn.Dropout(0.5), *model[1:])
    noise = NoiseCovariance(model, loss_fn, data, seed=3)
    dense = noise.dense()
    assert relative(noise.trace(), dense.trace()) < EXACT
    assert relative(noise.diagonal(), dense.diagonal()) < EXACT
    other = NoiseCovariance(model, loss_fn, data, seed=4).dense()
    assert relative(other, dense) > 0.1


def test_estimators_of_operators_take_it() -> None:
    noise = NoiseCovariance(*classifier(6), batch_size=2)
    assert relative(top_eigenvalues(noise, 2, tol=1e-8), noise.top(2)[0]) < 1e-8
    found = trace(noise, method="xtrace", samples=20)  # exact: rank 5 is below half of the samples
    assert relative(found.value, noise.trace()) < EXACT
    density = spectral_density(noise, steps=8, probes=2)
    assert relative(density.nodes.max(), noise.top(1)[0][0]) < 1e-6
    assert noise.to_scipy().matvec(torch.ones(noise.size).numpy()).shape == (noise.size,)


def test_it_is_about_the_parameters_asked_for() -> None:
    case = classifier(6)
    noise = NoiseCovariance(*case, parameters=case[0][2].parameters())
    dense = torch.cov(each_gradient(case).T, correction=0)[25:, 25:]
    assert relative(noise.dense(), dense) < EXACT
    assert relative(noise.trace(), dense.trace()) < EXACT
    assert relative(noise.diagonal(), dense.diagonal()) < EXACT


def test_it_follows_the_model() -> None:
    case = classifier(6)
    noise = NoiseCovariance(*case)
    before = noise.trace(), noise.dense()
    with torch.no_grad():
        case[0][0].weight.add_(0.3)
    dense = torch.cov(each_gradient(case).T, correction=0)
    assert relative(noise.dense(), dense) < EXACT and relative(noise.trace(), dense.trace()) < EXACT
    assert relative(before[1], dense) > 1e-3 and relative(before[0], dense.trace()) > 1e-3


def test_there_is_no_noise_where_every_loss_is_zero() -> None:
    model, loss_fn, (inputs, _) = regressor(6)
    noise = NoiseCovariance(model, loss_fn, (inputs, model(inputs).detach()))
    assert float(noise.mean().loss) == 0
    assert float(noise.trace()) == 0 and float(noise.dense().abs().max()) == 0
    assert noise.top(2)[1].shape == (noise.size, 0)


def test_a_minibatch_of_all_samples_has_no_noise_without_replacement() -> None:
    noise = NoiseCovariance(*classifier(5), batch_size=5, replacement=False)
    assert float(noise.trace()) == 0 and float(noise.dense().abs().max()) == 0
    assert NoiseCovariance(*classifier(1), replacement=False).factor == 0


def test_mean_squared_norms_of_all_minibatches_give_the_noise_scale() -> None:
    case = classifier(5)
    found = noise_scale(NoiseCovariance(*case, batch_size=3))
    # E ||g_S||^2 = ||G||^2 + tr / S with replacement, for two sizes S.
    one, two = (
        torch.stack([gradient(case, d).square().sum() for d in product(range(5), repeat=s)]).mean() for s in (1, 2)
    )
    assert relative(found.trace, 2 * (one - two)) < EXACT
    assert relative(found.squared_gradient, 2 * two - one) < EXACT
    assert relative(found.batch_size, 2 * (one - two) / (2 * two - one)) < EXACT


def test_trace_is_that_of_the_empirical_fisher_without_the_mean() -> None:
    case = classifier(8)
    fisher = Fisher(*case, kind="empirical").dense().trace()
    expected = fisher - gradient(case, range(8)).square().sum()
    assert relative(NoiseCovariance(*case).trace(), expected) < EXACT


def test_traces_of_fisher_and_gauss_newton_agree_for_cross_entropy() -> None:
    case = classifier(8)
    fisher, ggn = Fisher(*case, kind="exact").dense(), GGN(*case).dense()
    assert relative(fisher.trace(), ggn.trace()) < EXACT
    assert relative(Hessian(*case).dense().trace(), ggn.trace()) > 1e-3


def with_residuals(residuals: Tensor) -> Problem:
    model, loss_fn, (inputs, _) = regressor(len(residuals))
    return model, loss_fn, (inputs, model(inputs).detach() - residuals[:, None])


def half_squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().mean()


@pytest.mark.parametrize("loss_fn", [mse_loss, half_squared])
@pytest.mark.parametrize("replacement", [True, False])
def test_equal_residuals_make_it_the_gauss_newton_matrix(loss_fn: Callable, replacement: bool) -> None:
    model, _, data = with_residuals(0.1 * torch.randn(12).sign().double())
    noise = NoiseCovariance(model, loss_fn, data, batch_size=4, replacement=replacement)
    weight = 2 * noise.mean().loss
    found = alignment(noise, CurvatureNoise(noise, GGN(model, loss_fn, data), weight))
    assert float(found.distance) < EXACT and abs(float(found.cosine) - 1) < EXACT
    hessian = alignment(noise, CurvatureNoise(noise, Hessian(model, loss_fn, data), weight))
    assert 1e-3 < float(hessian.distance) < 0.5


def test_unequal_residuals_do_not() -> None:
    model, loss_fn, data = with_residuals(0.1 * torch.randn(12).double())
    noise = NoiseCovariance(model, loss_fn, data, batch_size=4)
    found = alignment(noise, CurvatureNoise(noise, GGN(model, loss_fn, data), 2 * noise.mean().loss))
    assert float(found.distance) > 0.1 and 0.3 < float(found.cosine) < 0.999


def test_hessian_is_approached_as_the_residuals_vanish() -> None:
    signs = torch.randn(12).sign().double()
    sizes, distances = [1e-1, 1e-2, 1e-3], []
    for size in sizes:
        torch.manual_seed(1)
        model, loss_fn, data = with_residuals(size * signs)
        noise = NoiseCovariance(model, loss_fn, data)
        predicted = CurvatureNoise(noise, Hessian(model, loss_fn, data), 2 * noise.mean().loss)
        distances.append(float(alignment(noise, predicted).distance))
    slopes = torch.tensor(distances).log().diff() / torch.tensor(sizes).log().diff()
    assert relative(slopes, torch.ones(2)) < 0.05


def test_weight_decay_leaves_its_gradient_in_the_noise_at_a_minimum_of_the_sum() -> None:
    # In one dimension: A = x^2 = 1, residuals r +- 1 with r = x w - y, so that C = 1 whatever the decay adds.
    decay, weight = 0.5, 2.0
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, weight)
    mean = -decay * weight  # of the residuals, where the decayed loss is stationary
    data = torch.ones(2, 1).double(), weight - mean - torch.tensor([[1.0], [-1.0]]).double()
    noise = NoiseCovariance(model, half_squared, data)
    predicted = CurvatureNoise(noise, Hessian(model, half_squared, data), 2 * noise.mean().loss)
    assert relative(noise.dense(), torch.ones(1, 1)) < EXACT
    assert relative(predicted.dense(), torch.ones(1, 1)) < EXACT
    assert relative(2 * noise.mean().loss - (decay * weight) ** 2, torch.ones(())) < EXACT


def test_residuals_along_every_output_divide_the_weight_by_their_number() -> None:
    model = nn.Linear(3, 2).double()
    inputs = torch.randn(3, 3).double().repeat_interleave(4, 0)
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]).double().repeat(3, 1)
    data = inputs, model(inputs).detach() - corners
    noise = NoiseCovariance(model, mse_loss, data)
    predicted = CurvatureNoise(noise, GGN(model, mse_loss, data), 2 * noise.mean().loss / 2)
    assert float(alignment(noise, predicted).distance) < EXACT


def test_labels_of_the_model_make_it_the_fisher_matrix_in_the_mean() -> None:
    # All labels of two samples, by their probability: an expectation without sampling.
    model, loss_fn, (inputs, _) = classifier(2)
    probabilities = model(inputs).softmax(1).detach()
    found, predicted = 0, 0
    for labels in product(range(3), repeat=2):
        data = inputs, torch.tensor(labels)
        share = probabilities[[0, 1], labels].prod()
        noise = NoiseCovariance(model, loss_fn, data)
        found = found + share * noise.dense()
        predicted = predicted + share * CurvatureNoise(noise, Fisher(model, None, data, kind="exact")).dense()
    assert relative(found, predicted) < EXACT


def test_alignment_is_that_of_dense_matrices() -> None:
    case = classifier(8)
    noise, hessian = NoiseCovariance(*case, batch_size=2), Hessian(*case)
    a, b = noise.dense(), hessian.dense()
    found = alignment(noise, hessian, block=7)
    assert relative(found.cosine, (a * b).sum() / (a.norm() * b.norm())) < EXACT
    assert relative(found.distance, (a - b).norm() / b.norm()) < EXACT
    assert relative(found.multiple, (a * b).sum() / b.square().sum()) < EXACT
    assert found.products == noise.size and float(found.cosine_error) == float(found.distance_error) == 0


class Dense(CurvatureOperator):
    def __init__(self, matrix: Tensor) -> None:
        super().__init__({"weight": matrix[0]})
        self.matrix = matrix

    def apply(self, rows: Tensor) -> Tensor:
        return rows @ self.matrix


def test_probes_find_it_and_tell_their_error() -> None:
    first, second = (Dense(torch.cov(torch.randn(12, 30).double())) for _ in range(2))
    exact = alignment(first, second)
    runs = [alignment(first, second, probes=80, block=80) for _ in range(400)]
    for value, error in (("cosine", "cosine_error"), ("distance", "distance_error")):
        found = torch.stack([getattr(run, value) for run in runs])
        told = torch.stack([getattr(run, error) for run in runs]).mean()
        # The spread of 400 runs is known to 3.5 %, their mean to a 20th of it; the bias is a few of its squares.
        assert 0.85 < float(found.std() / told) < 1.15
        assert abs(float(found.mean() - getattr(exact, value))) < 4 * float(told) / 20 + 4 * float(told) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_held_in_float32(dtype: torch.dtype) -> None:
    model, loss_fn, (inputs, targets) = classifier(6)
    expected = NoiseCovariance(model, loss_fn, (inputs, targets)).top(1)[0]
    noise = NoiseCovariance(model.to(dtype), loss_fn, (inputs.to(dtype), targets))
    values, vectors = noise.top(1)
    assert values.dtype == vectors.dtype == noise.trace().dtype == noise.diagonal().dtype == torch.float32
    assert relative(values, expected) < (1e-5 if dtype == torch.float32 else 0.05)


def test_eigenvectors_of_many_parameters_are_orthonormal_in_float32() -> None:
    data = torch.randn(8, 20000), torch.randint(5, (8,))
    _, basis = NoiseCovariance(nn.Linear(20000, 5), cross_entropy, data).top(4)
    assert float((basis.T.double() @ basis.double() - torch.eye(4)).abs().max()) < 1e-6


def test_buffers_and_gradients_stay() -> None:
    model, loss_fn, data = convolution(6)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    noise = NoiseCovariance(model, loss_fn, data)
    noise.top(1), noise.trace(), noise.diagonal(), noise.dense()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("size", [0, 1.5, True])
def test_wrong_batch_sizes_are_refused(size: object) -> None:
    with pytest.raises(FastregError, match="NoiseCovariance: batch_size must be an integer >= 1"):
        NoiseCovariance(*classifier(4), batch_size=size)


def test_what_cannot_be_answered_is_refused() -> None:
    noise = NoiseCovariance(*classifier(4), batch_size=5, replacement=False)
    with pytest.raises(FastregError, match="at most the number of samples, 4, without replacement, got 5"):
        noise.trace()
    with pytest.raises(FastregError, match="top: count must be an integer >= 1, got 0"):
        noise.top(0)
    with pytest.raises(FastregError, match="at least one batch, got none"):
        NoiseCovariance(*classifier(4)[:2], []).trace()
    model, loss_fn, data = classifier(4)

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss_fn(outputs, targets) + model[0].bias.square().sum()

    with pytest.raises(FastregError, match="through the outputs only, got one that contains '0.bias'"):
        NoiseCovariance(model, penalised, data).trace()
    model, loss_fn, data = convolution(4)
    for part in (NoiseCovariance.trace, NoiseCovariance.diagonal, NoiseCovariance.dense):
        with pytest.raises(FastregError, match="couple the samples of a batch, got BatchNorm2d '1'"):
            part(NoiseCovariance(model.train(), loss_fn, data))


def test_wrong_comparisons_are_refused() -> None:
    noise, other = NoiseCovariance(*classifier(4)), NoiseCovariance(*regressor(4))
    with pytest.raises(FastregError, match="alignment: operators must be on the same parameters, got 43"):
        alignment(noise, other)
    with pytest.raises(FastregError, match="CurvatureNoise: operators must be"):
        CurvatureNoise(noise, other)
    with pytest.raises(FastregError, match="alignment: probes must be an integer >= 2, got 1"):
        alignment(noise, noise, probes=1)
    with pytest.raises(FastregError, match="alignment: block must be an integer >= 1, got 0"):
        alignment(noise, noise, block=0)
