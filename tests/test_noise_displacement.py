"""Modified losses and displacements of an epoch, against SGD in every order, by plain autograd in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations, product
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vmap
from torch.nn.functional import mse_loss

from fastreg.curvature.vectors import unflatten
from fastreg.errors import FastregError
from fastreg.noise.displacement import DisplacementReport, measured_vs_predicted
from fastreg.noise.expansion import cyclic_bracket, epoch_expansion
from fastreg.noise.modified_loss import modified_loss, modified_loss_gradient

DOUBLE = torch.float64
SIZE, COUNT = 3, 4
RATES = [0.002, 0.004, 0.008]


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(5)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data() -> tuple[Tensor, Tensor]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(6), dtype=DOUBLE)
    return draw(SIZE * COUNT, 3), draw(SIZE * COUNT, 2)


MODEL, BATCH = network(), data()
PARAMETERS = dict(MODEL.named_parameters())
START = torch.cat([p.detach().flatten() for p in PARAMETERS.values()])
INPUTS, TARGETS = (part.unflatten(0, (COUNT, SIZE)) for part in BATCH)
SHUFFLED = list(permutations(range(COUNT)))
REPLACED = list(product(range(COUNT), repeat=COUNT))


def loss(w: Tensor, inputs: Tensor = BATCH[0], targets: Tensor = BATCH[1]) -> Tensor:
    return mse_loss(functional_call(MODEL, unflatten(w, PARAMETERS), (inputs,)), targets)


def displacements(orders: Sequence[Sequence[int]], lr: float, steps: int = 1) -> Tensor:
    """Of epochs of SGD, ``[n, D]``."""
    places = torch.tensor(orders)
    w = START.expand(len(places), -1)
    for k in places.repeat_interleave(steps, 1).T:
        w = w - lr * vmap(grad(loss))(w, INPUTS[k], TARGETS[k])
    return w - START


def flow(gradient: Callable[[Tensor], Tensor], start: Tensor, time: float, substeps: int = 6) -> Tensor:
    """The end of ``w' = -gradient(w)``, by the classical Runge-Kutta method."""
    w, h = start, time / substeps
    for _ in range(substeps):
        one = -gradient(w)
        two = -gradient(w + h / 2 * one)
        three = -gradient(w + h / 2 * two)
        w = w + h / 6 * (one + 2 * two + 2 * three - gradient(w + h * three))
    return w


def modified(w: Tensor, **arguments: object) -> Tensor:
    """The library's gradient at w, flat."""
    model = network()
    nn.utils.vector_to_parameters(w, model.parameters())
    return torch.cat([g.flatten() for g in modified_loss_gradient(model, mse_loss, BATCH, SIZE, **arguments)])


def slope(errors: Sequence[float]) -> float:
    return float(numpy.polyfit(numpy.log(RATES), numpy.log(errors), 1)[0])


def flow_slope(orders: Sequence[Sequence[int]], sampling: str, steps: int = 1) -> float:
    """Of the distance between the mean over orders and the flow of the modified loss."""
    errors = []
    for lr in RATES:
        end = flow(partial(modified, lr=lr, sampling=sampling), START, COUNT * steps * lr)
        errors.append(float((displacements(orders, lr, steps).mean(0) + START - end).norm()))
    return slope(errors)


@pytest.mark.parametrize(
    ("orders", "sampling", "steps", "expected"),
    [
        pytest.param(SHUFFLED, "shuffled", 1, 3, id="all orders"),
        pytest.param(SHUFFLED, "gd", 1, 2, id="all orders without the variance term"),
        pytest.param([(2, 0, 3, 1), (1, 3, 0, 2)], "shuffled", 1, 3, id="an order and its reverse"),
        pytest.param([(2, 0, 3, 1)], "shuffled", 1, 2, id="an order alone"),
        pytest.param(REPLACED, "with_replacement", 1, 3, id="with replacement"),
        pytest.param(REPLACED, "shuffled", 1, 2, id="with replacement and the variance term"),
        pytest.param(SHUFFLED, "shuffled", 3, 3, id="three steps per batch"),
    ],
)
def test_mean_iterate_follows_the_flow(
    orders: Sequence[Sequence[int]], sampling: str, steps: int, expected: int
) -> None:
    assert flow_slope(orders, sampling, steps) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(("momentum", "scale", "warm_up"), [(0.0, 1, 0), (0.5, 1, 30), (0.9, 0.25, 150)])
def test_heavy_ball_follows_the_flow(momentum: float, scale: float, warm_up: int) -> None:
    right, naive = [], []
    for lr in (scale * rate * (1 - momentum) for rate in RATES):
        # Transients die out on the way to where the flow is compared, which must be about the same for every lr.
        w = flow(grad(loss), START, -warm_up * lr / (1 - momentum), 20)
        velocity, path = grad(loss)(w) / (1 - momentum) * (warm_up > 0), []
        for _ in range(warm_up + 5):
            path.append(w)
            velocity = momentum * velocity + grad(loss)(w)
            w = w - lr * velocity
        time = 5 * lr / (1 - momentum)
        with_term = partial(modified, lr=lr, sampling="gd", momentum=momentum)
        right.append(float((flow(with_term, path[warm_up], time) - w).norm()))
        # What the coefficient of gradient descent with lr / (1 - mu) would give.
        without = partial(modified, lr=lr / (1 - momentum), sampling="gd")
        naive.append(float((flow(without, path[warm_up], time) - w).norm()))
    assert slope(right) == pytest.approx(3, abs=0.15)
    assert slope(naive) == pytest.approx(2 if momentum else 3, abs=0.15)


@pytest.mark.parametrize(
    ("sampling", "momentum", "coefficient"),
    [("gd", 0.0, 0.075), ("with_replacement", 0.0, 0.075), ("shuffled", 0.0, 0.075), ("gd", 0.9, 14.25)],
)
def test_value_and_gradient_are_those_of_autograd(sampling: str, momentum: float, coefficient: float) -> None:
    def expected(w: Tensor) -> Tensor:
        parts = zip(INPUTS, TARGETS) if sampling == "shuffled" else [BATCH]
        squared = [grad(loss)(w, *part).square().sum() for part in parts]
        return loss(w) + coefficient * sum(squared) / len(squared)

    arguments = {"lr": 0.3, "sampling": sampling, "momentum": momentum}
    value = modified_loss(MODEL, mse_loss, BATCH, SIZE, **arguments)
    assert value.dim() == 0 and not value.requires_grad
    torch.testing.assert_close(value, expected(START), rtol=1e-10, atol=0)
    torch.testing.assert_close(modified(START, **arguments), grad(expected)(START), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("sampling", "orders"),
    [("shuffled", SHUFFLED), ("with_replacement", REPLACED), ("cyclic", [range(COUNT)])],
)
def test_expansion_is_right_to_second_order(sampling: str, orders: Sequence[Sequence[int]], steps: int) -> None:
    expansion = epoch_expansion(MODEL, mse_loss, BATCH, SIZE, sampling=sampling, steps=steps)
    means = [displacements(orders, lr, steps).mean(0) for lr in RATES]
    pairs = list(zip(RATES, means, strict=True))
    assert slope([float((mean - lr * expansion.first).norm()) for lr, mean in pairs]) == pytest.approx(2, abs=0.15)
    assert slope([float((mean - expansion.displacement(lr)).norm()) for lr, mean in pairs]) == pytest.approx(
        3, abs=0.15
    )


def test_cyclic_order_needs_the_bracket() -> None:
    shuffled = epoch_expansion(MODEL, mse_loss, BATCH, SIZE)
    bracket = cyclic_bracket(MODEL, mse_loss, BATCH, SIZE)
    without, left = [], []
    for lr in RATES:
        missing = displacements([range(COUNT)], lr)[0] - shuffled.displacement(lr)
        without.append(float(missing.norm()))
        left.append(float((missing - lr**2 * bracket).norm()))
    assert slope(without) == pytest.approx(2, abs=0.15)
    assert slope(left) == pytest.approx(3, abs=0.15)


def test_bracket_is_the_dense_one_and_changes_sign_with_the_order_reversed() -> None:
    gradients = [grad(loss)(START, *part) for part in zip(INPUTS, TARGETS)]
    hessians = [hessian(loss)(START, *part) for part in zip(INPUTS, TARGETS)]
    pairs = [(j, k) for k in range(COUNT) for j in range(k)]
    expected = sum(hessians[k] @ gradients[j] - hessians[j] @ gradients[k] for j, k in pairs) / 2
    torch.testing.assert_close(cyclic_bracket(MODEL, mse_loss, BATCH, SIZE), expected, rtol=1e-10, atol=1e-14)
    reverse = tuple(part.flip(0).flatten(0, 1) for part in (INPUTS, TARGETS))
    torch.testing.assert_close(cyclic_bracket(MODEL, mse_loss, reverse, SIZE), -expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("sampling", "orders"), [("shuffled", SHUFFLED), ("with_replacement", REPLACED)])
def test_report_measures_the_mean_over_all_orders(sampling: str, orders: Sequence[Sequence[int]]) -> None:
    report = measured_vs_predicted(MODEL, mse_loss, BATCH, SIZE, RATES[::-1], sampling=sampling, steps=2)
    expected = torch.stack([displacements(orders, lr, 2).mean(0) for lr in RATES])
    torch.testing.assert_close(report.measured, expected, rtol=1e-10, atol=1e-14)
    assert report.lr.tolist() == RATES and report.epochs == len(orders)
    assert report.standard_error.tolist() == [0.0] * len(RATES)


@pytest.mark.parametrize(("sampling", "orders"), [("shuffled", 1), ("shuffled", 5), ("cyclic", None), ("gd", None)])
def test_report_slopes(sampling: str, orders: int | None) -> None:
    report = measured_vs_predicted(MODEL, mse_loss, BATCH, SIZE, RATES, sampling=sampling, orders=orders)
    assert report.slopes == pytest.approx((2, 3), abs=0.15)
    assert float(report.cosine.min()) > 0.999
    assert bool(report.standard_error.isnan().all()) == (orders == 1)


def test_random_sequences_with_replacement_miss_by_their_standard_error() -> None:
    """Over 40 seeds: squared distances from the mean over all sequences average to the squared standard error."""
    exact, distances, errors = displacements(REPLACED, RATES[0]).mean(0), [], []
    for seed in range(40):
        arguments = {"sampling": "with_replacement", "orders": 4, "seed": seed}
        report = measured_vs_predicted(MODEL, mse_loss, BATCH, SIZE, RATES[0], **arguments)
        distances.append(float((report.measured[0] - exact).square().sum()))
        errors.append(float(report.standard_error[0]) ** 2)
    assert report.epochs == 4 * COUNT
    ratio = numpy.mean(distances) / numpy.mean(errors)
    spread = numpy.std(distances) / numpy.mean(distances) + numpy.std(errors) / numpy.mean(errors)
    assert abs(ratio - 1) < 3 * spread / 40**0.5
    # Shifts take the error of first order away: it would be that of single sequences otherwise.
    single = displacements(REPLACED, RATES[0]).var(0).sum().sqrt() / 16**0.5
    assert max(errors) ** 0.5 < 0.1 * float(single)


def test_everything_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    batch = tuple(part.float() for part in BATCH)
    kept, state = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    report = measured_vs_predicted(model, mse_loss, batch, SIZE, 0.1, orders=2, dtype=DOUBLE)
    assert report.measured.dtype == DOUBLE
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, kept[name]) and p.dtype == torch.float32 for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def report() -> DisplacementReport:
    return measured_vs_predicted(MODEL, mse_loss, BATCH, SIZE, RATES)


def test_table_holds_what_the_report_does() -> None:
    one = report()
    lines = one.table().splitlines()
    assert lines[0] == "shuffled, 24 epochs; errors relative to |mean|"
    last = [float(x) for x in lines[-2].split()]
    expected = [RATES[-1], one.lengths[-1], one.first_error[-1] / one.lengths[-1]]
    expected += [one.second_error[-1] / one.lengths[-1], one.cosine[-1], 0]
    assert last == pytest.approx([float(x) for x in expected], rel=1e-3)
    assert re.findall(r"\d\.\d\d", lines[-1]) == [f"{x:.2f}" for x in one.slopes]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = report().plot(tmp_path / "displacement.png")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be a number > 0, got -1.0"),
        ({"lr": []}, "lr must be a number > 0, or several, got none"),
        ({"lr": [0.1, True]}, "lr must be a number > 0, got True"),
        ({"sampling": "sorted"}, "sampling must be one of .*'cyclic'.*, got 'sorted'"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"orders": 0}, "orders must be an integer >= 1, got 0"),
        ({"sampling": "cyclic", "orders": 3}, "orders must be None for 'cyclic', got 3"),
        ({"batch_size": 1}, "orders must be a number where there are more than 720 orders, got None for 479001600"),
        ({"batch_size": 5}, r"batch_size must be a divisor of the 12 samples, got 5 \(drop the rest\)"),
    ],
)
def test_report_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FastregError, match=f"measured_vs_predicted: {message}"):
        measured_vs_predicted(MODEL, mse_loss, BATCH, **{"batch_size": SIZE, "lr": 0.1, **arguments})


@pytest.mark.parametrize("function", [modified_loss, modified_loss_gradient])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": float("inf")}, "lr must be a number > 0, got inf"),
        ({"sampling": "cyclic"}, "sampling must be one of .*'with_replacement'.*, got 'cyclic'"),
        ({"sampling": "gd", "momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"momentum": 0.5}, "momentum must be 0 unless sampling is 'gd', got 0.5, 'shuffled'"),
        ({"batch_size": 7}, "batch_size must be a divisor of the 12 samples, got 7"),
    ],
)
def test_modified_loss_refuses(function: Callable[..., object], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FastregError, match=f"{function.__name__}: {message}"):
        function(MODEL, mse_loss, BATCH, **{"batch_size": SIZE, "lr": 0.1, **arguments})


def test_expansions_refuse_batches_of_different_sizes() -> None:
    for function in (epoch_expansion, cyclic_bracket):
        with pytest.raises(FastregError, match=f"{function.__name__}: batch_size must be a divisor of the 12 samples"):
            function(MODEL, mse_loss, BATCH, 8)
