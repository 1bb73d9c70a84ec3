"""Drift of SGD without replacement, against all orders of fixed batches, dense recursions and closed forms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import permutations, product

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.functional import mse_loss

from fastreg.curvature.vectors import unflatten
from fastreg.errors import FastregError
from fastreg.noise.displacement import measured_vs_predicted
from fastreg.noise.drift import drift_weight, eigenbasis_drift, flat_drift_weight, without_replacement_drift
from fastreg.noise.modified_loss import modified_loss_gradient

DOUBLE = torch.float64
SAMPLES, BATCHES = 6, 4


def weighted_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared errors with weights, which targets carry in their second column."""
    return (targets[:, 1:] * (outputs - targets[:, :1]).square()).mean()


class Case:
    """Batches of the same samples with weights ``1 + eps z_i``, the z_i of mean 0: fluctuations are linear in eps."""

    def __init__(self, eps: float, *, linear: bool = True) -> None:
        generator = torch.Generator().manual_seed(3)
        draw = partial(torch.randn, generator=generator, dtype=DOUBLE)
        layers = [nn.Linear(3, 1)] if linear else [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)]
        self.model = nn.Sequential(*layers).double()
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(draw(p.shape))
        self.inputs, targets, spread = draw(SAMPLES, 3), draw(SAMPLES, 1), draw(BATCHES, SAMPLES, 1)
        weights = 1 + eps * (spread - spread.mean(0))
        self.targets = torch.cat([targets.expand_as(weights), weights], 2)  # [k, n, 2]
        self.batch = self.inputs.repeat(BATCHES, 1), self.targets.flatten(0, 1)
        self.parameters = dict(self.model.named_parameters())
        self.start = torch.cat([p.detach().flatten() for p in self.parameters.values()])

    def loss(self, w: Tensor, k: int | None = None) -> Tensor:
        """Of batch k, or their mean, at flat parameters; by torch alone."""
        return self.loss_of(w, self.targets.mean(0) if k is None else self.targets[k])

    def loss_of(self, w: Tensor, targets: Tensor) -> Tensor:
        outputs = functional_call(self.model, unflatten(w, self.parameters), (self.inputs,))
        return weighted_error(outputs, targets)

    def epoch(self, targets: Tensor, lr: float) -> Tensor:
        """The end of steps on these targets ``[steps, n, 2]``."""
        w = self.start
        for of_step in targets:
            w = w - lr * grad(self.loss_of)(w, of_step)
        return w

    def descent(self, steps: int, lr: float) -> Tensor:
        return self.epoch(self.targets.mean(0).expand(steps, -1, -1), lr)

    def mean_shift(self, lr: float, orders: list[tuple[int, ...]]) -> Tensor:
        """From the end of gradient descent to the mean end over orders."""
        ends = vmap(partial(self.epoch, lr=lr))(self.targets[torch.tensor(orders)])
        return ends.mean(0) - self.descent(BATCHES, lr)

    def predicted(self, lr: float, function: Callable[..., Tensor] = without_replacement_drift) -> Tensor:
        return function(self.model, weighted_error, self.batch, SAMPLES, lr)

    def lr(self, scaled: float) -> float:
        """At which the largest curvature times lr is ``scaled``."""
        return scaled / float(torch.linalg.eigvalsh(hessian(self.loss)(self.start))[-1])


SHUFFLED = list(permutations(range(BATCHES)))
EPSILONS = [0.005 * 2**j for j in range(4)]


def slope(x: list[float], y: list[float]) -> float:
    return float(numpy.polyfit(numpy.log(x), numpy.log(y), 1)[0])


@pytest.mark.parametrize("scaled", [0.1, 1.5, 2.5])
def test_drift_is_that_over_all_orders_to_third_order_in_the_fluctuations(scaled: float) -> None:
    without, left = [], []
    for eps in EPSILONS:
        case = Case(eps)
        lr = case.lr(scaled)
        shift = case.mean_shift(lr, SHUFFLED)
        without.append(float(shift.norm()))
        left.append(float((shift - case.predicted(lr)).norm()))
    assert slope(EPSILONS, without) == pytest.approx(2, abs=0.15)
    assert slope(EPSILONS, left) == pytest.approx(3, abs=0.15)
    assert left[0] < 0.05 * without[0]


def test_with_replacement_a_quadratic_has_no_drift() -> None:
    case = Case(0.3)
    shift = case.mean_shift(case.lr(1.0), list(product(range(BATCHES), repeat=BATCHES)))
    assert float(shift.norm()) < 1e-13 < 1e-3 < float(case.predicted(case.lr(1.0)).norm())


def third_derivative_drift(case: Case, lr: float) -> Tensor:
    """``-(lr/2) D^3 L : Cov`` at every step, propagated; Cov of the linearised path, over all orders."""
    y, orders = case.start, torch.tensor(SHUFFLED)
    paths, total = torch.zeros(len(orders), len(y), dtype=DOUBLE), torch.zeros_like(y)
    for place in orders.T:
        step = torch.eye(len(y), dtype=DOUBLE) - lr * hessian(case.loss)(y)
        bent = vmap(lambda d: jvp(hessian(case.loss), (y,), (d,))[1] @ d)(paths)
        total = step @ total - lr / 2 * bent.mean(0)
        gradient = grad(case.loss)(y)
        kicks = torch.stack([grad(case.loss)(y, k) - gradient for k in range(BATCHES)])
        paths = paths @ step - lr * kicks[place]
        y = y - lr * gradient
    return total


def test_other_losses_add_the_third_derivative_and_nothing_else() -> None:
    alone, both = [], []
    for eps in EPSILONS:
        case = Case(eps, linear=False)
        lr = case.lr(0.7)
        left = case.mean_shift(lr, SHUFFLED) - case.predicted(lr)
        alone.append(float(left.norm()))
        both.append(float((left - third_derivative_drift(case, lr)).norm()))
    assert slope(EPSILONS, alone) == pytest.approx(2, abs=0.15)
    assert slope(EPSILONS, both) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("linear", [True, False])
def test_the_recursion_is_the_double_sum(linear: bool) -> None:
    case = Case(0.5, linear=linear)
    lr, size = case.lr(0.9), len(case.start)
    path = [case.descent(t, lr) for t in range(BATCHES)]
    steps = [torch.eye(size, dtype=DOUBLE) - lr * hessian(case.loss)(y) for y in path]
    total = torch.zeros(size, dtype=DOUBLE)
    for s in range(BATCHES):
        for t in range(s + 1, BATCHES):
            for k in range(BATCHES):
                v = grad(case.loss)(path[s], k) - grad(case.loss)(path[s])
                for r in range(s + 1, t):
                    v = steps[r] @ v
                v = (hessian(case.loss)(path[t], k) - hessian(case.loss)(path[t])) @ v
                for r in range(t + 1, BATCHES):
                    v = steps[r] @ v
                total += v
    expected = -(lr**2) / (BATCHES - 1) / BATCHES * total
    torch.testing.assert_close(case.predicted(lr), expected, rtol=1e-10, atol=1e-14)


def test_eigenbasis_form_is_the_same_at_a_stationary_point_of_a_quadratic() -> None:
    case = Case(0.5)
    curvature = hessian(case.loss)(case.start)
    case.start = case.start - torch.linalg.solve(curvature, grad(case.loss)(case.start))
    with torch.no_grad():
        for name, part in unflatten(case.start, case.parameters).items():
            case.parameters[name].copy_(part)
    lr = case.lr(1.3)
    expected = case.predicted(lr)
    assert float(expected.norm()) > 1e-3
    torch.testing.assert_close(case.predicted(lr, eigenbasis_drift), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("scaled", [0.1, 0.8, 1.7])
def test_a_plateau_contracts_as_every_order_does(scaled: float) -> None:
    """``L_i = s_i x y``, s = (s, -s): either order maps x + y and x - y to ``1 - (lr s)^2`` times themselves."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    batch = torch.ones(2, 1, dtype=DOUBLE), torch.tensor([[1.0], [-1.0]], dtype=DOUBLE)
    found = without_replacement_drift(model, lambda outputs, targets: (outputs * targets).mean(), batch, 1, scaled)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(found, -(scaled**2) * start, rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_weight_is_the_double_sum(steps: int) -> None:
    factors = torch.tensor([-1.3, -0.5, 0.0, 0.7, 1 - 1e-9, 1.0, 1.2], dtype=DOUBLE)
    found = drift_weight(factors.unsqueeze(1), factors, steps)
    for a, row in zip(factors.tolist(), found.tolist(), strict=True):
        for c, weight in zip(factors.tolist(), row, strict=True):
            expected = sum(a ** (steps - 1 - t) * c ** (t - 1 - s) for t in range(steps) for s in range(t))
            assert weight == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_weight_is_bounded_up_to_the_edge_of_stability_and_grows_geometrically_beyond() -> None:
    def weights(scaled: float) -> list[float]:
        factor = torch.tensor(1 - scaled, dtype=DOUBLE)
        return [abs(float(drift_weight(factor, factor, steps))) for steps in (100, 200, 400)]

    for scaled in (0.2, 1.0, 1.8):
        assert weights(scaled)[1:] == pytest.approx([scaled**-2] * 2, rel=1e-8)
    for scaled in (2.05, 2.5):
        # W(h, h) = d/dh of a geometric sum, so that h^k comes with a factor k.
        rates = numpy.diff(numpy.log(weights(scaled)) - numpy.log([100, 200, 400])) / [100, 200]
        assert rates == pytest.approx(numpy.log(scaled - 1), rel=0.05)


@pytest.mark.parametrize("scaled", [-8.0, -0.6, 0.0, 0.3, 1.0, 20.0])
def test_flat_weight_is_the_limit_of_many_steps(scaled: float) -> None:
    errors = []
    for steps in (500, 1000, 2000):
        noise = torch.tensor(1 - scaled / steps, dtype=DOUBLE)
        finite = drift_weight(torch.ones_like(noise), noise, steps) / steps**2
        errors.append(abs(float(finite / flat_drift_weight(torch.tensor(scaled, dtype=DOUBLE))) - 1))
    assert errors[-1] < 0.03
    assert slope([500, 1000, 2000], errors) == pytest.approx(-1, abs=0.1)


def test_flat_weight_keeps_its_digits() -> None:
    mpmath = pytest.importorskip("mpmath")
    points = [0.0, 1e-300, 1e-9, -1e-4, 0.01, -0.4999, 0.4999, 0.5, -0.5001, 3.0, -30.0, 700.0]
    found = flat_drift_weight(torch.tensor(points, dtype=DOUBLE))
    with mpmath.workdps(700):
        exact = [float((c - 1 + mpmath.exp(-c)) / c**2) if c else 0.5 for c in map(mpmath.mpf, points)]
    torch.testing.assert_close(found, torch.tensor(exact, dtype=DOUBLE), rtol=2e-15, atol=0)


A, B, LR = 1.3, 0.6, 0.7


def pair_of_quadratics(x: float) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """``A (x - 1)^2 / 2`` and ``B (x + 1)^2 / 2``, as squared errors of one sample each."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, x)
    scale = torch.tensor([[A], [B]], dtype=DOUBLE).div(2).sqrt()
    return model, (scale, scale * torch.tensor([[1.0], [-1.0]], dtype=DOUBLE))


STATIONARY = {
    "shuffled": (A - B) / (A + B - LR * A * B),
    "with_replacement": (A - B) / (A + B),
    "cyclic": (A * (1 - LR * B) - B) / (A + B - LR * A * B),
    "gd": (A - B) / (A + B),
}


@pytest.mark.parametrize("sampling", STATIONARY)
def test_the_mean_epoch_stands_still_where_minima_move_to(sampling: str) -> None:
    for x, still in ((STATIONARY[sampling], True), (STATIONARY[sampling] + 0.1, False)):
        model, batch = pair_of_quadratics(x)
        report = measured_vs_predicted(model, mse_loss, batch, 1, LR, sampling=sampling)
        assert (float(report.lengths) < 1e-15) == still


def test_the_minimum_of_the_modified_loss_is_that_of_a_penalty_on_squared_norms() -> None:
    coefficient = LR / 4
    x = (A - B) * (1 + 2 * coefficient * (A + B)) / (A + B + 2 * coefficient * (A**2 + B**2))
    model, batch = pair_of_quadratics(x)
    (found,) = modified_loss_gradient(model, mse_loss, batch, 1, LR)
    assert abs(float(found)) < 1e-15


@pytest.mark.parametrize("function", [without_replacement_drift, eigenbasis_drift])
def test_the_model_is_left_alone(function: Callable[..., Tensor]) -> None:
    case = Case(0.3, linear=False)
    state, before = torch.get_rng_state(), case.start.clone()
    case.predicted(0.1, function)
    assert torch.equal(torch.cat([p.flatten() for p in case.model.parameters()]), before)
    assert all(p.grad is None for p in case.model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("function", [without_replacement_drift, eigenbasis_drift])
@pytest.mark.parametrize(
    ("batch_size", "lr", "message"),
    [
        (5, 0.1, "batch_size must be a divisor of the 24 samples, got 5"),
        (0, 0.1, "batch_size must be an integer >= 1, got 0"),
        (24, 0.1, "batch_size must leave two batches or more, got 24"),
        (6, 0.0, "lr must be a number > 0, got 0.0"),
        (6, float("nan"), "lr must be a number > 0, got nan"),
    ],
)
def test_refused(function: Callable[..., Tensor], batch_size: int, lr: float, message: str) -> None:
    case = Case(0.3)
    with pytest.raises(FastregError, match=f"{function.__name__}: {message}"):
        function(case.model, weighted_error, case.batch, batch_size, lr)


def test_weights_refuse_what_they_cannot_weigh() -> None:
    with pytest.raises(FastregError, match="drift_weight: steps must be an integer >= 1, got 0"):
        drift_weight(torch.ones(1), torch.ones(1), 0)
    with pytest.raises(FastregError, match="flat_drift_weight: scaled must be a floating point tensor, got 1"):
        flat_drift_weight(1)
