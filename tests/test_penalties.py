"""Every penalty equals its formula in plain float64 autograd, value and gradient."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
import oracle
from cases import BY_NAME, CASES, Case
from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.noise.covariance import NoiseCovariance
from fastreg.penalties.flat_weight import flat_drift_weight
from penalty_oracle import MicroBatches, flat, gradient_with, jacobians, label_gradients, phi_2, regularized

EXACT = 1e-10
WEIGHT = 0.7
SAMPLES = 7
MLP = BY_NAME["mlp_gelu"]
NAMES = ("mlp_gelu", "residual_conv", "batch_norm_train", "gpt_tied", "transformer_encoder")
VARIED = [BY_NAME[name] for name in NAMES]


def unbiased_norm(cut: MicroBatches) -> Tensor:
    return cut.mean.square().sum() - cut.variance() / (len(cut.losses) - 1)


# Options of GradNorm (or a penalty like it) -> R.
FORMULAS = {
    "centered": (lambda: fastreg.GradNorm(WEIGHT, centered=True), MicroBatches.variance),
    "centered, unbiased": (
        lambda: fastreg.GradNorm(WEIGHT, centered=True, unbiased=True),
        lambda cut: cut.variance() * len(cut.losses) / (len(cut.losses) - 1),
    ),
    "unbiased": (lambda: fastreg.GradNorm(WEIGHT, unbiased=True), unbiased_norm),
    "unsquared": (
        lambda: fastreg.GradNorm(WEIGHT, unsquared=True), lambda cut: cut.gradients.square().sum(1).sqrt().mean()
    ),
    "noise trace": (
        lambda: fastreg.NoiseTrace(WEIGHT), lambda cut: cut.variance() * SAMPLES / (len(cut.losses) - 1)
    ),
}


@pytest.mark.parametrize("size", [3, 2])
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("case", VARIED, ids=lambda case: case.name)
def test_forms_of_the_gradient_norm_equal_the_oracle(case: Case, formula: str, size: int) -> None:
    make, value = FORMULAS[formula]
    batch = case.batch(SAMPLES)
    want, number = gradient_with(case, batch, size, value, WEIGHT)
    got, reg = regularized(case, batch, size, make())
    oracle.assert_same_gradient(got, want)
    torch.testing.assert_close(reg.metrics[f"fastreg/{reg.penalties[0].name}"], number, rtol=EXACT, atol=0.0)


@pytest.mark.parametrize("case", [c for c in CASES if c.min_group <= 3], ids=lambda case: case.name)
def test_the_variance_equals_the_oracle_on_every_case(case: Case) -> None:
    batch = case.batch(6)
    try:
        got, _ = regularized(case, batch, 3, fastreg.GradNorm(WEIGHT, centered=True))
    except UnsupportedOperation:
        assert case.may_refuse
        return
    want, _ = gradient_with(case, batch, 3, MicroBatches.variance, WEIGHT)
    oracle.assert_same_gradient(got, want)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_variance_knows_how_the_loss_was_reduced(reduction: str) -> None:
    batch = MLP.batch(SAMPLES)
    want, _ = gradient_with(MLP, batch, 3, MicroBatches.variance, 1.0)
    plain, _ = gradient_with(MLP, batch, 3, MicroBatches.variance, 0.0)
    model = MLP.model()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(1.0, centered=True), micro_batch_size=3)
    losses = MLP.sample_losses(model(batch[0]), batch[1])
    loss, factor = (losses.sum(), SAMPLES) if reduction == "sum" else (losses.mean() / 4, 0.25)
    reg(loss, reduction=reduction, scale=1.0 if reduction == "sum" else 0.25).backward()
    # The penalty itself is not multiplied by the number of samples.
    own = 1.0 if reduction == "sum" else factor
    expected = {name: factor * plain[name] + own * (want[name] - plain[name]) for name in want}
    oracle.assert_same_gradient(oracle.collected_gradient(model), expected)


def test_losses_per_sample_and_tokens_have_their_own_shares() -> None:
    case, batch = MLP, MLP.batch(6)
    want, _ = gradient_with(case, batch, 4, MicroBatches.variance, WEIGHT)
    model = case.model()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(WEIGHT, centered=True), micro_batch_size=4)
    losses = case.sample_losses(model(batch[0]), batch[1])
    reg(losses, counts=None).mean().backward()
    got = oracle.collected_gradient(model)
    del reg
    # An averaged per-sample loss halves nothing: the penalty is spread over the entries that are averaged.
    oracle.assert_same_gradient(got, want)


def test_a_part_of_the_micro_batches_estimates_the_variance_without_bias() -> None:
    """Over all choices of two of three micro-batches the mean is the whole variance."""
    batch = MLP.batch(6)
    _, number = gradient_with(MLP, batch, 2, MicroBatches.variance, WEIGHT)
    penalty, found, seen = fastreg.GradNorm(WEIGHT, centered=True), [], set()
    for seed in range(40):
        _, reg = regularized(MLP, batch, 2, penalty, fraction=0.5, seed=seed)
        key = round(float(reg.metrics["fastreg/grad_variance"]), 9)
        if key not in seen:
            seen.add(key)
            found.append(reg.metrics["fastreg/grad_variance"])
    assert len(found) == 3
    torch.testing.assert_close(torch.stack(found).mean(), number, rtol=EXACT, atol=0.0)


def test_a_gradient_of_zero_has_no_root_to_differentiate() -> None:
    model = nn.Linear(3, 1, dtype=torch.float64)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(1.0, unsquared=True), micro_batch_size=2, check=False)
    reg(model(torch.ones(4, 3, dtype=torch.float64)).square().mean()).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


# Without replacement


def weighted_variance(lr: float, steps: int | None = None):
    """R with S from the spectrum of the dense Hessian, as a constant."""

    def value(cut: MicroBatches) -> Tensor:
        curvatures, vectors = torch.linalg.eigh(cut.hessian().detach())
        count = len(cut.losses) if steps is None else steps
        weights = 2 * phi_2(-lr * count * curvatures)
        parts = (cut.gradients - cut.mean) @ vectors
        return cut.shares @ (parts.square() @ weights)

    return value


@pytest.mark.parametrize("name", ["mlp_gelu", "tied_padding", "conv1d_same"])
@pytest.mark.parametrize("lr", [0.5, 5.0])
def test_without_replacement_equals_the_dense_formula_at_full_rank(name: str, lr: float) -> None:
    case = BY_NAME[name]
    batch = case.batch(SAMPLES)
    want, number = gradient_with(case, batch, 3, weighted_variance(lr), WEIGHT)
    rank = sum(p.numel() for p in case.model().parameters())
    got, reg = regularized(case, batch, 3, fastreg.WithoutReplacement(WEIGHT, lr=lr, rank=rank, seed=0))
    oracle.assert_same_gradient(got, want, 1e-8)
    torch.testing.assert_close(reg.metrics["fastreg/without_replacement"], number, rtol=1e-9, atol=0.0)


def test_without_replacement_tends_to_the_variance_for_small_steps() -> None:
    batch = MLP.batch(SAMPLES)
    want, _ = gradient_with(MLP, batch, 3, MicroBatches.variance, WEIGHT)
    errors = []
    for lr in (1e-2, 1e-3):
        got, _ = regularized(MLP, batch, 3, fastreg.WithoutReplacement(WEIGHT, lr=lr, rank=79, seed=0))
        errors.append(oracle.relative_error(got, want))
    assert errors[0] < 1e-2 and 8 < errors[0] / errors[1] < 12


def test_without_replacement_stands_beside_other_penalties_and_resumes() -> None:
    batch = MLP.batch(6)

    def both(cut: MicroBatches) -> Tensor:
        return weighted_variance(2.0, 9)(cut) + cut.gradients.square().sum(1).mean()

    want, _ = gradient_with(MLP, batch, 2, both, WEIGHT)
    penalty = fastreg.WithoutReplacement(WEIGHT, lr=2.0, steps=9, rank=79, seed=0, refresh=3)
    got, reg = regularized(MLP, batch, 2, [fastreg.GradNorm(WEIGHT), penalty])
    oracle.assert_same_gradient(got, want, 1e-8)
    again = fastreg.WithoutReplacement(WEIGHT, lr=2.0, steps=9, rank=79, seed=5, refresh=3)
    again.load_state_dict(penalty.state_dict())
    other = MLP.batch(12)[0][6:], batch[1]
    later, _ = regularized(MLP, other, 2, again)
    reg.remove()
    kept, _ = regularized(MLP, other, 2, penalty)
    assert all(torch.equal(later[name], kept[name]) for name in kept)


def test_fewer_ritz_pairs_than_parameters_come_close_when_few_curvatures_count() -> None:
    batch = MLP.batch(SAMPLES)
    want, _ = gradient_with(MLP, batch, 3, weighted_variance(5.0), WEIGHT)
    errors = [
        oracle.relative_error(
            regularized(MLP, batch, 3, fastreg.WithoutReplacement(WEIGHT, lr=5.0, rank=rank, seed=0))[0], want
        )
        for rank in (1, 12, 50)
    ]
    assert errors[2] < 1e-3 < errors[1] < errors[0] < 0.1


# Jacobians


@pytest.mark.parametrize("size", [3, 1])
def test_average_jacobian_equals_the_oracle(size: int) -> None:
    case, batch = MLP, MLP.batch(SAMPLES)

    def value(cut: MicroBatches) -> Tensor:
        ones = [cut.gradient(cut.model(x).sum(-1).mean()) for x in cut.inputs.split(cut.size)]
        return torch.stack(ones).square().sum(1).mean()

    want, number = gradient_with(case, batch, size, value, WEIGHT)
    got, reg = regularized(case, batch, size, fastreg.AverageJacobian(WEIGHT))
    oracle.assert_same_gradient(got, want)
    torch.testing.assert_close(reg.metrics["fastreg/average_jacobian"], number, rtol=EXACT, atol=0.0)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_unit_jacobian_equals_the_oracle_at_its_directions(orthogonal: bool) -> None:
    batch = MLP.batch(SAMPLES)
    penalty = fastreg.UnitJacobian(WEIGHT, directions=2, orthogonal=orthogonal, seed=3)
    got, reg = regularized(MLP, batch, 3, penalty)
    u = penalty.last_directions
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(3, 2, dtype=u.dtype))
    assert orthogonal == bool(torch.linalg.vecdot(u[:, 0], u[:, 1]).abs().max() < 1e-12)

    def value(cut: MicroBatches) -> Tensor:
        outputs = [cut.model(x).mean(0) for x in cut.inputs.split(cut.size)]
        squares = [cut.gradient(u[k, j] @ out).square().sum() for k, out in enumerate(outputs) for j in range(2)]
        return torch.stack(squares).mean()

    want, number = gradient_with(MLP, batch, 3, value, WEIGHT)
    oracle.assert_same_gradient(got, want)
    torch.testing.assert_close(reg.metrics["fastreg/unit_jacobian"], number, rtol=EXACT, atol=0.0)


def test_as_many_orthogonal_directions_as_classes_leave_nothing_to_chance() -> None:
    """R = (1/m) sum_k ||J_k||_F^2 / C; a single direction has that expectation."""
    batch, model = MLP.batch(6), MLP.model()
    mean = torch.stack([j.mean(0) for j in jacobians(model, batch[0]).split(3)]).detach()
    want = mean.square().sum((1, 2)).mean() / 3
    whole = fastreg.UnitJacobian(WEIGHT, directions=3, orthogonal=True, seed=1)
    _, reg = regularized(MLP, batch, 3, whole)
    torch.testing.assert_close(reg.metrics["fastreg/unit_jacobian"], want, rtol=EXACT, atol=0.0)
    reg.remove()
    model, penalty = MLP.model(), fastreg.UnitJacobian(WEIGHT, directions=1, seed=1)
    reg = fastreg.Regularizer(model, penalty, micro_batch_size=3, check=False)
    draws = []
    for _ in range(400):
        outputs = model(batch[0])
        reg(MLP.loss_fn(outputs, batch[1]), outputs)
        draws.append(reg.metrics["fastreg/unit_jacobian"])
    draws = torch.stack(draws)
    assert abs(draws.mean() - want) < 4 * draws.std() / 20


@pytest.mark.parametrize("penalty", [fastreg.AverageJacobian(0.1), fastreg.UnitJacobian(0.1, seed=0)])
def test_jacobian_penalties_of_a_linear_model_are_constants(penalty: fastreg.Penalty) -> None:
    model = nn.Linear(4, 3, dtype=torch.float64)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    reg = fastreg.Regularizer(model, penalty, micro_batch_size=2)
    outputs = model(x)
    loss = F.cross_entropy(outputs, y)
    plain = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    reg(loss, outputs).backward()
    for p, g in zip(model.parameters(), plain):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "penalty",
    [
        lambda: fastreg.AverageJacobian(0.1),
        lambda: fastreg.UnitJacobian(0.1, seed=4),
        lambda: fastreg.FisherTrace(0.1, seed=4, gradient="frozen"),
    ],
    ids=["average", "unit", "frozen"],
)
def test_output_penalties_by_perturbation_come_near_the_exact_ones(penalty) -> None:
    batch = MLP.batch(6)
    exact, _ = regularized(MLP, batch, 3, penalty())
    model = MLP.model()
    reg = fastreg.Regularizer(model, penalty(), micro_batch_size=3, method="perturb", difference="central")
    reg(lambda: MLP.loss_fn(model(batch[0]), batch[1])).backward()
    assert oracle.relative_error(oracle.collected_gradient(model), exact) < 1e-6


def test_outputs_of_several_predictions_average_over_them() -> None:
    case = BY_NAME["gpt_tied"]
    batch = case.batch(4)

    def value(cut: MicroBatches) -> Tensor:
        ones = [cut.gradient(cut.model(x).sum(-1).mean()) for x in cut.inputs.split(cut.size)]
        return torch.stack(ones).square().sum(1).mean()

    want, _ = gradient_with(case, batch, 2, value, WEIGHT)
    got, _ = regularized(case, batch, 2, fastreg.AverageJacobian(WEIGHT))
    oracle.assert_same_gradient(got, want)


# The Fisher trace and its gradients


def fisher_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of tr F ``[P]``: of the whole, and with the softmax covariance frozen."""
    parameters = oracle.trainable(model)
    p, g = label_gradients(model, x)
    true = flat(oracle.gradient_of((p * g.square().sum(-1)).sum(1).mean(), parameters, False))
    jacobian, q = jacobians(model, x), p.detach()
    covariance = torch.diag_embed(q) - q.unsqueeze(2) * q.unsqueeze(1)
    value = torch.einsum("icp,icd,idp->i", jacobian, covariance, jacobian).mean()
    # Jacobians of a linear model are constants, without a graph.
    frozen = flat(oracle.gradient_of(value, parameters, False)) if value.requires_grad else torch.zeros_like(true)
    return {"true": true, "frozen": frozen}


def penalty_part(case: Case, batch: tuple[Tensor, Tensor], size: int, penalty: fastreg.Penalty) -> Tensor:
    """The penalty's share of the gradient ``[P]``, for weight 1."""
    plain, _ = gradient_with(case, batch, size, lambda cut: cut.loss * 0, 0.0)
    got, reg = regularized(case, batch, size, penalty, check=False)
    reg.remove()
    return flat(got) - flat(plain)


@pytest.mark.parametrize("gradient", ["frozen", "true"])
def test_exact_labels_give_the_fisher_trace_and_its_gradients(gradient: str) -> None:
    case, batch = MLP, MLP.batch(5)
    want = fisher_gradients(case.model(), batch[0])[gradient]
    penalty = fastreg.FisherTrace(1.0, labels="exact", gradient=gradient)
    got, reg = regularized(case, batch, 1, penalty)
    plain, _ = gradient_with(case, batch, 1, lambda cut: cut.loss * 0, 0.0)
    assert (flat(got) - flat(plain) - want).norm() < EXACT * want.norm()
    value = oracle.exact_fisher_trace(case.model(), batch[0])
    torch.testing.assert_close(reg.metrics["fastreg/fisher_trace"], value, rtol=EXACT, atol=0.0)


def test_the_two_gradients_of_the_fisher_trace_differ() -> None:
    found = fisher_gradients(MLP.model(), MLP.batch(5)[0])
    assert F.cosine_similarity(found["true"], found["frozen"], dim=0) < 0.99


@pytest.mark.parametrize(("gradient", "expected"), [("fixed-label", "frozen"), ("frozen", "frozen"), ("true", "true")])
@pytest.mark.parametrize("size", [1, 2])
def test_sampled_labels_expect_the_gradient_that_is_named(gradient: str, expected: str, size: int) -> None:
    """All draws of four labels of three classes, each with its probability: E R = tr F / b."""
    case, batch = MLP, MLP.batch(4)
    model = case.model()
    want = fisher_gradients(model, batch[0])[expected] / size
    p = model(batch[0]).softmax(-1).detach()
    total, value = torch.zeros_like(want), 0.0
    for number in range(3**4):
        labels = torch.tensor([number // 3**i % 3 for i in range(4)])
        chance = p.gather(1, labels[:, None]).prod()
        penalty = Dealt(labels, gradient)
        total += chance * penalty_part(case, batch, size, penalty)
        value += chance * penalty.value_seen
    assert (total - want).norm() < 1e-9 * want.norm()
    trace = oracle.exact_fisher_trace(model, batch[0]) / size
    torch.testing.assert_close(value, trace, rtol=1e-9, atol=0.0)


class Dealt(fastreg.FisherTrace):
    """Labels that are dealt, not drawn."""

    def __init__(self, labels: Tensor, gradient: str) -> None:
        super().__init__(1.0, seed=0, gradient=gradient)
        self.dealt = labels

    def _drawn(self, logits: Tensor) -> Tensor:
        self.last_labels = self.dealt
        return F.cross_entropy(logits, self.dealt, reduction="none")

    def value(self, step: object) -> Tensor:
        found = super().value(step)
        self.value_seen = found.detach()
        return found


def test_in_a_linear_softmax_the_frozen_gradient_is_zero_and_the_true_one_is_not() -> None:
    model = nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = fisher_gradients(model, x)
    assert found["frozen"].norm() == 0 and found["true"].norm() > 1e-3
    y = torch.zeros(5, dtype=torch.long)
    reg = fastreg.Regularizer(model, fastreg.FisherTrace(1.0, seed=0, gradient="frozen"), micro_batch_size=2)
    outputs = model(x)
    plain = torch.autograd.grad(F.cross_entropy(outputs, y), list(model.parameters()), retain_graph=True)
    reg(F.cross_entropy(outputs, y), outputs).backward()
    for p, g in zip(model.parameters(), plain):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-15)


def test_per_sample_norms_estimate_the_trace_with_less_variance() -> None:
    """b ||gh_k||^2 and mean_i ||gh^(i)||^2 are both without bias; the second varies less."""
    case, batch = MLP, MLP.batch(8)
    model = case.model()
    spreads, means = {}, {}
    for size in (1, 8):
        reg = fastreg.Regularizer(model, fastreg.FisherTrace(1.0, seed=9), micro_batch_size=size, check=False)
        draws = []
        for _ in range(300):
            outputs = model(batch[0])
            reg(case.loss_fn(outputs, batch[1]), outputs)
            draws.append(reg.metrics["fastreg/fisher_trace"] * size)
        reg.remove()
        spreads[size], means[size] = torch.stack(draws).std(), torch.stack(draws).mean()
    want = oracle.exact_fisher_trace(model, batch[0])
    assert all(abs(means[size] - want) < 4 * spreads[size] / 300**0.5 for size in means)
    assert spreads[1] < spreads[8]


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastreg.GradNorm(0.1, unsquared=True, centered=True), "unsquared must go with neither"),
        (lambda: fastreg.FisherTrace(0.1, gradient="score"), "gradient must be one of"),
        (lambda: fastreg.FisherTrace(0.1, labels="drawn"), "labels must be one of"),
        (lambda: fastreg.FisherTrace(0.1, labels="exact"), "gradient must be 'frozen' or 'true'"),
        (lambda: fastreg.UnitJacobian(0.1, directions=0), "directions must be an integer"),
        (lambda: fastreg.WithoutReplacement(0.1, lr=-1.0), "must be a number >= 0"),
        (lambda: fastreg.WithoutReplacement(0.1, lr=0.1, rank=0), "rank must be an integer"),
        (lambda: fastreg.NoiseTrace(-0.1), "weight must be"),
    ],
)
def test_wrong_options_are_refused(make, message: str) -> None:
    with pytest.raises(FastregError, match=message):
        make()


@pytest.mark.parametrize(
    ("penalty", "size", "message"),
    [
        (lambda: fastreg.GradNorm(0.1, unbiased=True), 6, "at least 2 micro-batches"),
        (lambda: fastreg.NoiseTrace(0.1), 6, "at least 2 micro-batches"),
        (lambda: fastreg.FisherTrace(0.1, labels="exact", gradient="true"), 2, "micro_batch_size=1"),
        (lambda: fastreg.UnitJacobian(0.1, directions=4, orthogonal=True), 2, "at most the number of classes, 3"),
    ],
)
def test_what_a_batch_cannot_give_is_refused(penalty, size: int, message: str) -> None:
    with pytest.raises(FastregError, match=message):
        regularized(MLP, MLP.batch(6), size, penalty())


def test_jacobian_penalties_need_outputs() -> None:
    model, (x, y) = MLP.model(), MLP.batch(6)
    reg = fastreg.Regularizer(model, fastreg.AverageJacobian(0.1), micro_batch_size=2)
    with pytest.raises(FastregError, match="AverageJacobian: outputs must be the model's logits, got none"):
        reg(MLP.loss_fn(model(x), y))


def test_without_replacement_wants_all_micro_batches_and_to_be_alone() -> None:
    make = lambda: fastreg.WithoutReplacement(0.1, lr=0.1)  # noqa: E731
    with pytest.raises(FastregError, match="fraction must be 1"):
        regularized(MLP, MLP.batch(6), 2, make(), fraction=0.5)
    with pytest.raises(FastregError, match="the only one"):
        regularized(MLP, MLP.batch(6), 2, [make(), make()])


@pytest.mark.parametrize("penalty", [fastreg.GradNorm(0.1, centered=True), fastreg.NoiseTrace(0.1)])
def test_variances_are_not_perturbed(penalty: fastreg.Penalty) -> None:
    model, (x, y) = MLP.model(), MLP.batch(6)
    reg = fastreg.Regularizer(model, penalty, micro_batch_size=2, method="perturb")
    with pytest.raises(FastregError, match="method='exact'"):
        reg(lambda: MLP.loss_fn(model(x), y))


# Identities between them


def partitions(indices: list[int], size: int) -> list[list[list[int]]]:
    """Every way to cut the indices into groups of a size."""
    if not indices:
        return [[]]
    first, rest = indices[0], indices[1:]
    found = []
    for others in combinations(rest, size - 1):
        left = [i for i in rest if i not in others]
        found += [[[first, *others], *tail] for tail in partitions(left, size)]
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_over_all_partitions_the_gradient_norm_holds_the_noise_trace(size: int) -> None:
    """E ||g_k||^2 = ||g||^2 + (B - b) / (B - 1) Gamma / b, Gamma from single samples by autograd."""
    inputs, targets = MLP.batch(6)
    with torch.enable_grad():
        single = MicroBatches(MLP, MLP.model(), inputs, targets, 1)
    gamma = (single.gradients - single.mean).square().sum(1).mean().detach()
    found = []
    for cut in partitions(list(range(6)), size):
        order = [i for group in cut for i in group]
        _, reg = regularized(MLP, (inputs[order], targets[order]), size, fastreg.GradNorm(1.0))
        found.append(reg.metrics["fastreg/grad_norm"])
    want = single.mean.square().sum().detach() + (6 - size) / 5 * gamma / size
    torch.testing.assert_close(torch.stack(found).mean(), want, rtol=1e-10, atol=0.0)
    noise = NoiseCovariance(MLP.model(), MLP.loss_fn, (inputs, targets)).trace()
    torch.testing.assert_close(noise, gamma, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("penalty", ["noise trace", "unbiased"])
def test_estimates_expect_what_they_say_over_draws_of_independent_samples(penalty: str) -> None:
    """Data of three samples, batches of three independent draws, all 27; ragged micro-batches of 2 and 1."""
    inputs, targets = MLP.batch(3)
    single = MicroBatches(MLP, MLP.model(), inputs, targets, 1)
    gamma = (single.gradients - single.mean).square().sum(1).mean()
    want = (gamma if penalty == "noise trace" else single.mean.square().sum()).detach()
    made = fastreg.NoiseTrace(1.0) if penalty == "noise trace" else fastreg.GradNorm(1.0, unbiased=True)
    found = []
    for drawn in product(range(3), repeat=3):
        _, reg = regularized(MLP, (inputs[list(drawn)], targets[list(drawn)]), 2, made, check=False)
        found.append(reg.metrics[f"fastreg/{made.name}"])
    torch.testing.assert_close(torch.stack(found).mean(), want, rtol=1e-9, atol=0.0)


def test_the_average_jacobian_sees_a_shift_of_all_logits_and_cross_entropy_does_not() -> None:
    """A branch that adds the same number to every logit leaves gradient and curvature of the loss as they were."""
    model, (x, y) = MLP.model(), MLP.batch(6)
    shift = nn.Linear(5, 1, dtype=torch.float64)
    outputs = model(x) + shift(x)
    assert max(g.abs().max() for g in torch.autograd.grad(F.cross_entropy(outputs, y), shift.parameters())) < 1e-15
    whole = nn.ModuleList([model, shift])
    values = {}
    for name, penalty in (("jacobian", fastreg.AverageJacobian(1.0)), ("loss", fastreg.GradNorm(1.0))):
        for scale in (0.0, 1.0):
            whole.forward = lambda x, scale=scale: model(x) + scale * shift(x)
            reg = fastreg.Regularizer(whole, penalty, micro_batch_size=2, check=False)
            out = whole(x)
            reg(F.cross_entropy(out, y), out)
            values[name, scale] = reg.metrics[f"fastreg/{penalty.name}"]
            reg.remove()
    torch.testing.assert_close(values["loss", 0.0], values["loss", 1.0], rtol=1e-12, atol=0.0)
    assert values["jacobian", 1.0] > values["jacobian", 0.0] + 1


def test_where_noise_is_like_curvature_the_weighted_trace_is_concave_in_every_eigenvalue() -> None:
    """lambda S(eta K lambda): slope 1/2 at 0, rising, concave, limit 1 / (eta K); S by quadrature."""
    rate, values = 0.3, torch.linspace(0.0, 400.0, 4001, dtype=torch.float64)
    found = values * flat_drift_weight(rate * values)
    first, second = found.diff(), found.diff().diff()
    assert bool((first > 0).all()) and bool((second < 1e-12).all())
    assert float(first[0] / 0.1) == pytest.approx(0.5, rel=0.02)
    assert float(found[-1]) == pytest.approx(1 / rate, rel=0.01)
    small = torch.linspace(-30.0, 30.0, 601, dtype=torch.float64)
    torch.testing.assert_close(flat_drift_weight(small), phi_2(-small), rtol=1e-12, atol=0.0)
