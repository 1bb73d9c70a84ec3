"""Policies give the weights they say, follow the optimizer, and match the trajectories they are meant to match."""

from __future__ import annotations

import copy
import math
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastreg
import oracle
from cases import BY_NAME
from fastreg import weights
from fastreg.errors import FastregError
from penalty_oracle import MicroBatches, gradient_with, regularized

CASE = BY_NAME["mlp_gelu"]


def squares(cut: MicroBatches) -> Tensor:
    return cut.gradients.square().sum(1).mean()


def test_a_policy_acts_as_the_number_it_gives_and_is_reported() -> None:
    batch = CASE.batch(6)
    want, value = gradient_with(CASE, batch, 2, squares, 0.05)
    got, reg = regularized(CASE, batch, 2, fastreg.GradNorm(weights.fixed(0.05, lr=0.1)))
    oracle.assert_same_gradient(got, want)
    assert float(reg.metrics["fastreg/grad_norm_weight"]) == pytest.approx(0.05)
    assert float(reg.metrics["fastreg/grad_norm_rule_ratio"]) == pytest.approx(2.0)
    torch.testing.assert_close(reg.metrics["fastreg/penalty"], 0.05 * value, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("method", ["exact", "perturb"])
def test_schedules_go_by_calls_and_survive_a_checkpoint(method: str) -> None:
    def build() -> tuple[nn.Module, fastreg.Regularizer]:
        model = CASE.model()
        policy = weights.warm_up(0.4, 4)
        return model, fastreg.Regularizer(model, fastreg.GradNorm(policy), micro_batch_size=2, every=2, method=method)

    def call(model: nn.Module, reg: fastreg.Regularizer) -> None:
        x, y = CASE.batch(6)
        reg(lambda: CASE.loss_fn(model(x), y)).backward()

    model, reg = build()
    seen = []
    for _ in range(3):
        call(model, reg)
        seen.append(float(reg.metrics["fastreg/grad_norm_weight"]))
    assert seen == pytest.approx([0.1, 0.1, 0.3])  # calls 0 and 2 are regularized
    later, resumed = build()
    resumed.load_state_dict(reg.state_dict())
    call(later, resumed)
    call(later, resumed)
    assert float(resumed.metrics["fastreg/grad_norm_weight"]) == pytest.approx(0.4)


def test_the_learning_rate_is_read_from_the_optimizer_at_every_step() -> None:
    model, (x, y) = CASE.model(), CASE.batch(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    policy = weights.match_sgd(0.1, batch_target=2, lr=optimizer)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(policy), micro_batch_size=2)
    for lr in (0.02, 0.06):
        optimizer.param_groups[0]["lr"] = lr
        reg(CASE.loss_fn(model(x), y))
        assert float(reg.metrics["fastreg/grad_norm_weight"]) == pytest.approx((0.1 - lr) / 4)
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(FastregError, match="lr must be at most lr_target"):
        reg(CASE.loss_fn(model(x), y))


# Matching: trajectories


class Descent:
    """SGD in plain torch from the same weights every time, over given orders of three batches of two samples."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.start = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        self.x, self.y = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0])

    def run(self, steps: list[list[int]], lr: float, penalty: object, micro_batch_size: int = 2) -> Tensor:
        model = copy.deepcopy(self.start)
        reg = None
        if penalty is not None:
            reg = fastreg.Regularizer(model, penalty, micro_batch_size=micro_batch_size, check=False)
        for batch in steps:
            loss = F.cross_entropy(model(self.x[batch]), self.y[batch])
            loss = loss if reg is None else reg(loss)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients):
                    p -= lr * g
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def shuffled(self, lr: float, epochs: int, penalty: object = None) -> Tensor:
        """The mean over all orders of one epoch, run ``epochs`` times in a row forwards and backwards in turn."""
        found = []
        for order in permutations(([0, 1], [2, 3], [4, 5])):
            turns = [list(order) if epoch % 2 == 0 else list(order)[::-1] for epoch in range(epochs)]
            found.append(self.run([batch for turn in turns for batch in turn], lr, penalty))
        return torch.stack(found).mean(0)


def slope(rates: list[float], errors: list[float]) -> float:
    return math.log(errors[0] / errors[-1]) / math.log(rates[0] / rates[-1])


RATES = [0.2, 0.1, 0.05]


def test_small_batches_at_half_the_rate_follow_the_larger_rate() -> None:
    descent = Descent()
    matched, plain = [], []
    for rate in RATES:
        want, half = descent.shuffled(rate, 2), rate / 2
        policy = weights.match_sgd(rate, batch_target=2, lr=half)
        matched.append(float((descent.shuffled(half, 4, fastreg.GradNorm(policy)) - want).norm()))
        plain.append(float((descent.shuffled(half, 4) - want).norm()))
    assert abs(slope(RATES, matched) - 3) < 0.2 and abs(slope(RATES, plain) - 2) < 0.2


@pytest.mark.parametrize("divisor", [1, 2])
def test_large_batches_follow_small_ones(divisor: int) -> None:
    """At the same rate the variance alone is missing; at a lower one the difference of rates too."""
    descent = Descent()
    matched, plain = [], []
    for rate in RATES:
        want, own = descent.shuffled(rate, 2), rate / divisor
        penalty = [fastreg.GradNorm(weights.fixed(own / 4), centered=True)]
        if divisor > 1:
            penalty.append(fastreg.GradNorm(weights.match_sgd(rate, 2, lr=own)))
        else:
            penalty = [fastreg.GradNorm(weights.match_sgd(rate, 2, lr=own), centered=True)]
        steps = [list(range(6))] * (6 * divisor)
        matched.append(float((descent.run(steps, own, penalty) - want).norm()))
        plain.append(float((descent.run(steps, own, None) - want).norm()))
    assert abs(slope(RATES, matched) - 3) < 0.2 and abs(slope(RATES, plain) - 2) < 0.2


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_momentum_factor_is_that_of_heavy_ball_on_a_parabola(momentum: float) -> None:
    """On a w^2 / 2 the decay per unit of time lr / (1 - mu) is a + 2 c a^2 + ..., c the coefficient of the square."""
    curvature, estimates = 1.3, []
    for lr in (1e-3 * (1 - momentum) ** 2, 5e-4 * (1 - momentum) ** 2):
        trace = 1 + momentum - lr * curvature
        root = (trace + math.sqrt(trace**2 - 4 * momentum)) / 2
        decay = -math.log(root) / (lr / (1 - momentum))
        estimates.append((decay - curvature) / (2 * curvature**2) / lr)
    limit = 2 * estimates[1] - estimates[0]
    weight = weights.match_sgd(1.0, lr=0.0, momentum=momentum).at(0)
    assert weight == pytest.approx(limit, rel=2e-3)


def test_the_minimum_of_two_parabolas_moves_as_shuffled_sgd_has_it() -> None:
    """Stationary mean of shuffled SGD by iterating its maps; the minimum of C + (lr / 4) R by the gradient's root."""
    a, b, lr = 1.0, 3.0, 1e-3

    def stationary(first: float, second: float, signs: tuple[int, int]) -> float:
        w = 0.0
        for _ in range(40000):
            w -= lr * first * (w - signs[0])
            w -= lr * second * (w - signs[1])
        return w

    sgd = (stationary(a, b, (1, -1)) + stationary(b, a, (-1, 1))) / 2
    model = Shift()
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weights.match_sgd(lr)), micro_batch_size=1, check=False)
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    stiffness = torch.tensor([a, b], dtype=torch.float64)

    def gradient(w: float) -> float:
        nn.init.constant_(model.weight, w)
        loss = reg((stiffness * (model(x) - x).square().flatten() / 2).mean())
        return float(torch.autograd.grad(loss, model.weight)[0])

    # The gradient is linear in w.
    at_0, at_1 = gradient(0.0), gradient(1.0)
    found, minimum = at_0 / (at_0 - at_1), (a - b) / (a + b)
    assert abs(sgd - minimum) > 1e-4 > 20 * abs(found - sgd)


class Shift(nn.Module):
    """Ones times one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.ones_like(x), self.weight)


# Other codes' penalties


@pytest.mark.parametrize(("implementation", "factor"), [("finite-differences", 1.0), ("autograd-pen", 2.0)])
def test_geiping_weights_add_what_that_code_adds(implementation: str, factor: float) -> None:
    """Finite differences there add (lr / 4) strength (g(w + eps g) - g(w)) / eps to the gradient."""
    batch, lr, strength, step = CASE.batch(4), 0.8, 0.5, 1e-6
    model = CASE.model()
    parameters = list(model.parameters())

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(CASE.loss_fn(model(batch[0]), batch[1]), parameters))

    at = gradient()
    torch._foreach_add_([p.data for p in parameters], at, alpha=step)
    added = [factor * lr / 4 * strength * (b - a) / step for a, b in zip(at, gradient())]
    policy = weights.geiping(lr, strength, implementation)
    got, _ = regularized(CASE, batch, 4, fastreg.GradNorm(policy))
    for found, plain, term in zip(got.values(), at, added):
        torch.testing.assert_close(found - plain, term, rtol=1e-4, atol=1e-8)


def test_gnp_weight_is_the_mixture_of_two_gradients_up_to_the_radius() -> None:
    batch, alpha, errors = CASE.batch(4), 0.8, []
    for radius in (1e-2, 1e-3):
        model = CASE.model()
        parameters = list(model.parameters())
        loss = CASE.loss_fn(model(batch[0]), batch[1])
        at = torch.autograd.grad(loss, parameters)
        norm = torch.stack([g.norm() for g in at]).norm()
        torch._foreach_add_([p.data for p in parameters], [radius * g / norm for g in at])
        there = torch.autograd.grad(CASE.loss_fn(model(batch[0]), batch[1]), parameters)
        mixed = [(1 - alpha) * a + alpha * b for a, b in zip(at, there)]
        got, _ = regularized(CASE, batch, 4, fastreg.GradNorm(weights.gnp(radius, alpha), unsquared=True))
        errors.append(float(torch.stack([(g - w).norm() for g, w in zip(got.values(), mixed)]).norm() / radius))
    assert 7 < errors[0] / errors[1] < 13


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: weights.fixed(-1.0), "weight must be a number >= 0"),
        (lambda: weights.match_sgd(0.0), "lr_target must be a positive number"),
        (lambda: weights.match_sgd(0.1, momentum=1.0), "momentum must be in"),
        (lambda: weights.match_sgd(0.1, lr=float("nan")), "must be a number >= 0"),
        (lambda: weights.warm_up(0.1, 0), "steps must be an integer"),
        (lambda: weights.schedule(0.1, lambda step: -1.0).at(0), "schedule: weight must be"),
        (lambda: weights.geiping(0.1, implementation="finite_diff"), "implementation must be one of"),
    ],
)
def test_wrong_arguments_are_refused(make, message: str) -> None:
    with pytest.raises(FastregError, match=message):
        make()


def test_other_micro_batches_and_several_rates_are_refused() -> None:
    model = CASE.model()
    with pytest.raises(FastregError, match="batch_target must be the regularizer's micro_batch_size, 4, got 2"):
        fastreg.Regularizer(model, fastreg.GradNorm(weights.match_sgd(0.1, batch_target=2)), micro_batch_size=4)
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]
    with pytest.raises(FastregError, match="one for all parameter groups"):
        weights.match_sgd(0.5, lr=torch.optim.SGD(groups))
