"""Modified losses: plain gradients, their flows integrated to rounding, and SGD in every order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations, product

import numpy
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

import fastreg
from fastreg.curvature.vectors import unflatten
from fastreg.errors import FastregError
from fastreg.noise.displacement import measured_vs_predicted
from fastreg.noise.expansion import cyclic_bracket, epoch_expansion
from fastreg.noise.modified_loss import modified_loss, modified_loss_gradient

DOUBLE = torch.float64
SIZE, COUNT = 2, 3
RATES = [0.004 * 2**j for j in range(3)]
EVERY_ORDER = list(permutations(range(COUNT)))
EVERY_SEQUENCE = list(product(range(COUNT), repeat=COUNT))


class Problem:
    """Three batches of two samples for 2 -> 3 -> 2, tanh, cross entropy; everything by torch alone."""

    def __init__(self) -> None:
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(5), dtype=DOUBLE)
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(draw(p.shape))
        self.batch = draw(SIZE * COUNT, 2), torch.tensor([0, 1, 1, 0, 1, 1])
        self.parameters = dict(self.model.named_parameters())
        self.start = torch.cat([p.detach().flatten() for p in self.parameters.values()])

    def loss(self, w: Tensor, k: int | None = None) -> Tensor:
        part = slice(None) if k is None else slice(k * SIZE, (k + 1) * SIZE)
        outputs = functional_call(self.model, unflatten(w, self.parameters), (self.batch[0][part],))
        return F.cross_entropy(outputs, self.batch[1][part])

    def ends(self, orders: Sequence[Sequence[int | None]], lr: float, steps: int = 1) -> Tensor:
        """The mean end of epochs."""
        found = []
        for order in orders:
            w = self.start
            for k in (k for k in order for _ in range(steps)):
                w = w - lr * grad(self.loss)(w, k)
            found.append(w)
        return torch.stack(found).mean(0)

    def modified(self, w: Tensor, each: float, whole: float) -> Tensor:
        """``C + each mean_k ||g_k||^2 + whole ||g||^2``."""
        squares = torch.stack([grad(self.loss)(w, k).square().sum() for k in range(COUNT)])
        return self.loss(w) + each * squares.mean() + whole * grad(self.loss)(w).square().sum()

    def flow(self, each: float, whole: float, time: float, start: Tensor | None = None) -> Tensor:
        """The gradient flow of :meth:`modified`, to twelve digits."""
        field = grad(lambda w: self.modified(w, each, whole))
        right = lambda _, w: -field(torch.from_numpy(w)).numpy()  # noqa: E731
        start = self.start if start is None else start
        found = solve_ivp(right, (0.0, time), start.numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
        return torch.from_numpy(found.y[:, -1].copy())


def slope(errors: list[float], rates: Sequence[float] = RATES) -> float:
    return float(numpy.polyfit(numpy.log(rates), numpy.log(errors), 1)[0])


def distances(measured: Callable[[float], Tensor], predicted: Callable[[float], Tensor]) -> list[float]:
    return [float((measured(lr) - predicted(lr)).norm()) for lr in RATES]


ARGUMENTS = {
    "shuffled": (0.25, 0.0, {"sampling": "shuffled"}),
    "gd": (0.0, 0.25, {"sampling": "gd"}),
    "with_replacement": (0.0, 0.25, {"sampling": "with_replacement"}),
    "momentum": (0.0, 0.25 * 1.5 / 0.25, {"sampling": "gd", "momentum": 0.5}),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_values_and_gradients_are_those_of_autograd(name: str) -> None:
    problem, lr = Problem(), 0.3
    each, whole, options = ARGUMENTS[name]
    value = modified_loss(problem.model, F.cross_entropy, problem.batch, SIZE, lr, **options)
    torch.testing.assert_close(value, problem.modified(problem.start, lr * each, lr * whole), rtol=1e-12, atol=0.0)
    found = modified_loss_gradient(problem.model, F.cross_entropy, problem.batch, SIZE, lr, **options)
    want = grad(lambda w: problem.modified(w, lr * each, lr * whole))(problem.start)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found]), want, rtol=1e-10, atol=1e-14)
    assert all(p.grad is None for p in problem.model.parameters())


def test_the_mean_over_orders_follows_the_flow_with_the_variance_and_not_without() -> None:
    """Smith, Dherin, Barrett, De 2021, eq. 1: local error O(lr^3) of an epoch."""
    problem = Problem()
    ends = partial(problem.ends, EVERY_ORDER)
    assert slope(distances(ends, lambda lr: problem.flow(lr / 4, 0.0, COUNT * lr))) == pytest.approx(3, abs=0.15)
    assert slope(distances(ends, lambda lr: problem.flow(0.0, lr / 4, COUNT * lr))) == pytest.approx(2, abs=0.15)


def test_one_order_and_its_reverse_are_enough() -> None:
    problem = Problem()
    ends = partial(problem.ends, [(2, 0, 1), (1, 0, 2)])
    assert slope(distances(ends, lambda lr: problem.flow(lr / 4, 0.0, COUNT * lr))) == pytest.approx(3, abs=0.15)
    alone = partial(problem.ends, [(2, 0, 1)])
    assert slope(distances(alone, lambda lr: problem.flow(lr / 4, 0.0, COUNT * lr))) == pytest.approx(2, abs=0.15)


def test_with_replacement_the_variance_is_absent() -> None:
    problem = Problem()
    ends = partial(problem.ends, EVERY_SEQUENCE)
    assert slope(distances(ends, lambda lr: problem.flow(0.0, lr / 4, COUNT * lr))) == pytest.approx(3, abs=0.15)
    assert slope(distances(ends, lambda lr: problem.flow(lr / 4, 0.0, COUNT * lr))) == pytest.approx(2, abs=0.15)


def test_gradient_descent_follows_the_flow_of_barrett_and_dherin() -> None:
    problem = Problem()
    ends = partial(problem.ends, [(None,) * COUNT])
    assert slope(distances(ends, lambda lr: problem.flow(0.0, lr / 4, COUNT * lr))) == pytest.approx(3, abs=0.15)
    assert slope(distances(ends, lambda lr: problem.flow(0.0, 0.0, COUNT * lr))) == pytest.approx(2, abs=0.15)


def test_several_steps_on_a_batch_count_with_the_rate_of_one() -> None:
    """The larger the bare rate at equal lr n, the stronger the term: it is discretisation, not noise."""
    problem, steps = Problem(), 3
    ends = partial(problem.ends, EVERY_ORDER, steps=steps)
    time = steps * COUNT
    assert slope(distances(ends, lambda lr: problem.flow(lr / 4, 0.0, time * lr))) == pytest.approx(3, abs=0.2)
    assert slope(distances(ends, lambda lr: problem.flow(steps * lr / 4, 0.0, time * lr))) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("momentum", [0.5, 0.8])
def test_heavy_ball_follows_its_flow_once_its_transient_has_passed(momentum: float) -> None:
    problem, settled, steps = Problem(), 120, 6

    def ends(lr: float) -> tuple[Tensor, Tensor]:
        w, velocity = problem.start, torch.zeros_like(problem.start)
        for step in range(settled + steps):
            if step == settled:
                start = w
            velocity = momentum * velocity + grad(problem.loss)(w)
            w = w - lr * velocity
        return start, w

    rates, errors = [lr * (1 - momentum) ** 2 for lr in (0.0005, 0.001, 0.002)], {True: [], False: []}
    for lr in rates:
        start, end = ends(lr)
        factor = (1 + momentum) / (1 - momentum) ** 2
        for whole in (True, False):
            flow = problem.flow(0.0, lr / 4 * factor if whole else lr / 4, steps * lr / (1 - momentum), start)
            errors[whole].append(float((end - flow).norm()))
    assert slope(errors[True], rates) == pytest.approx(3, abs=0.2)
    assert slope(errors[False], rates) == pytest.approx(2, abs=0.2)


def test_a_fixed_order_needs_the_bracket() -> None:
    problem = Problem()
    bracket = cyclic_bracket(problem.model, F.cross_entropy, problem.batch, SIZE)
    ends = partial(problem.ends, [range(COUNT)])
    flow = lambda lr: problem.flow(lr / 4, 0.0, COUNT * lr)  # noqa: E731
    assert slope(distances(ends, flow)) == pytest.approx(2, abs=0.15)
    assert slope(distances(ends, lambda lr: flow(lr) + lr**2 * bracket)) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("sampling", "orders"),
    [
        ("shuffled", EVERY_ORDER),
        ("with_replacement", EVERY_SEQUENCE),
        ("cyclic", [range(COUNT)]),
        ("gd", [(None,) * COUNT]),
    ],
)
def test_expansions_miss_an_epoch_by_the_third_power(sampling: str, orders: list, steps: int) -> None:
    problem = Problem()
    found = epoch_expansion(problem.model, F.cross_entropy, problem.batch, SIZE, sampling=sampling, steps=steps)
    moved = lambda lr: problem.ends(orders, lr, steps) - problem.start  # noqa: E731
    assert slope(distances(moved, found.displacement)) == pytest.approx(3, abs=0.2)
    assert slope(distances(moved, lambda lr: lr * found.first)) == pytest.approx(2, abs=0.2)


def test_the_report_is_of_the_epochs_that_were_run(tmp_path) -> None:
    problem = Problem()
    before = {name: p.clone() for name, p in problem.model.state_dict().items()}
    state = torch.get_rng_state()
    report = measured_vs_predicted(problem.model, F.cross_entropy, problem.batch, SIZE, RATES)
    for lr, measured in zip(RATES, report.measured):
        want = problem.ends(EVERY_ORDER, lr) - problem.start
        torch.testing.assert_close(measured, want, rtol=1e-10, atol=1e-14)
    assert report.epochs == 6 and report.slopes == pytest.approx((2, 3), abs=0.2)
    assert float(report.cosine.min()) > 0.99 and "slopes of errors" in report.table()
    assert report.plot(tmp_path / "report.png").stat().st_size > 1000
    assert all(torch.equal(p, before[name]) for name, p in problem.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_come_near_the_mean_over_all_orders_within_their_error() -> None:
    problem = Problem()
    report = measured_vs_predicted(problem.model, F.cross_entropy, problem.batch, SIZE, 0.1, orders=40)
    want = problem.ends(EVERY_ORDER, 0.1) - problem.start
    assert report.epochs == 80 and 0 < report.standard_error[0]
    assert float((report.measured[0] - want).norm()) < 4 * float(report.standard_error[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, f: modified_loss(p.model, f, p.batch, 4, 0.1), "batch_size must be a divisor of the 6 samples"),
        (lambda p, f: modified_loss(p.model, f, p.batch, 2, 0.0), "lr must be a number > 0"),
        (lambda p, f: modified_loss(p.model, f, p.batch, 2, 0.1, sampling="cyclic"), "sampling must be one of"),
        (lambda p, f: modified_loss(p.model, f, p.batch, 2, 0.1, momentum=0.5), "momentum must be 0 unless"),
        (lambda p, f: epoch_expansion(p.model, f, p.batch, 2, steps=0), "steps"),
        (lambda p, f: measured_vs_predicted(p.model, f, p.batch, 2, []), "got none"),
        (lambda p, f: measured_vs_predicted(p.model, f, p.batch, 2, 0.1, sampling="gd", orders=3), "orders must be None"),
    ],
)
def test_refused(call: Callable, message: str) -> None:
    with pytest.raises(FastregError, match=message):
        call(Problem(), F.cross_entropy)


# Two parabolas a (w - 1)^2 / 2 and b (w + 1)^2 / 2


@pytest.mark.parametrize("lr", [0.1, 0.4])
def test_minima_move_as_the_maps_of_two_parabolas_say(lr: float) -> None:
    a, b = 1.0, 3.0
    first, second = lambda w: w - lr * a * (w - 1), lambda w: w - lr * b * (w + 1)  # noqa: E731
    cyclic = shuffled = replaced = 0.0
    for _ in range(3000):
        cyclic = second(first(cyclic))
        # Affine maps: the mean of the image is the image of the mean.
        shuffled = (second(first(shuffled)) + first(second(shuffled))) / 2
        replaced = (first(replaced) + second(replaced)) / 2
    assert shuffled == pytest.approx((a - b) / (a + b - lr * a * b), rel=1e-12)
    assert cyclic == pytest.approx((a * (1 - lr * b) - b) / (a + b - lr * a * b), rel=1e-12)
    assert replaced == pytest.approx((a - b) / (a + b), rel=1e-12)
    weight = lr / 4
    gradient = lambda w: penalised_gradient(w, a, b, weight)  # noqa: E731
    root = gradient(0.0) / (gradient(0.0) - gradient(1.0))
    want = (a - b) * (1 + 2 * weight * (a + b)) / (a + b + 2 * weight * (a**2 + b**2))
    assert root == pytest.approx(want, rel=1e-12)
    # To first order in lr the penalised minimum is where shuffled SGD settles.
    assert abs(root - shuffled) < lr * abs(replaced - shuffled) * 3


def penalised_gradient(w: float, a: float, b: float, weight: float) -> float:
    """Of the mean of the parabolas with ``GradNorm(weight)``, by the library."""
    model = nn.Linear(1, 1, bias=False, dtype=DOUBLE)
    nn.init.constant_(model.weight, w)
    reg = fastreg.Regularizer(model, fastreg.GradNorm(weight), micro_batch_size=1, check=False)
    stiffness, places = torch.tensor([a, b], dtype=DOUBLE), torch.tensor([1.0, -1.0], dtype=DOUBLE)
    outputs = model(torch.ones(2, 1, dtype=DOUBLE))
    loss = reg((stiffness * (outputs.flatten() - places).square() / 2).mean())
    return float(torch.autograd.grad(loss, model.weight)[0])
