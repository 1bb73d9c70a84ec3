"""Plateau, saddle, spectrum and sharpness: small cases against enumeration, closed forms and dense algebra."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, permutations, product

import pytest
import torch
from torch import Tensor, nn

from fastreg.errors import FastregError
from fastreg.recipes.catalogue import recipe
from fastreg.recipes.data import digits
from fastreg.recipes.papers import plateau, saddle, sharpness, spectrum
from fastreg.recipes.papers._toy import ORDERS, epoch_order, follow
from fastreg.recipes.papers._training import SAMPLERS, batches, descend
from fastreg.recipes.progress import Progress

SLOPES = (1.3, -0.4, -1.1, 0.2)


def every(sequences: list[tuple[int, ...]]) -> Tensor:
    """``[steps, runs]``, a run per sequence."""
    return torch.tensor(sequences).T


def plateau_ends(sequences: list[tuple[int, ...]], lr: float, start: tuple[float, float]) -> Tensor:
    """Points ``(x, y)`` at the end, ``[runs, 2]``."""
    slopes = torch.tensor(SLOPES, dtype=torch.float64)
    begin = slopes.new_tensor(start).expand(len(sequences), 2)
    return follow(plateau.batch_loss(slopes), begin, every(sequences), lr)[-1]


def test_the_full_loss_of_the_plateau_is_zero() -> None:
    slopes, points = torch.tensor(SLOPES, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    losses = [plateau.batch_loss(slopes)(torch.full((4,), batch), points) for batch in range(4)]
    torch.testing.assert_close(sum(losses), torch.zeros(4, dtype=torch.float64))


def test_an_epoch_contracts_the_plateau_alike_in_every_order() -> None:
    lr, (x, y) = 0.37, (0.6, -0.1)
    u = v = 1.0
    for slope in SLOPES:
        u, v = u * (1 - lr * slope), v * (1 + lr * slope)
    ends = plateau_ends(list(permutations(range(4))), lr, (x, y))
    expected = torch.tensor([u * (x + 1 + y), v * (x - 1 - y)], dtype=torch.float64).expand(24, 2)
    sums = torch.stack([ends[:, 0] + 1 + ends[:, 1], ends[:, 0] - 1 - ends[:, 1]], 1)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    assert max(u, v) < 1


def test_with_replacement_the_plateau_keeps_its_mean_and_spreads() -> None:
    lr, (x, y), steps = 0.37, (0.6, -0.1), 4
    ends = plateau_ends(list(product(range(4), repeat=steps)), lr, (x, y))
    torch.testing.assert_close(ends.mean(0), ends.new_tensor((x, y)), rtol=1e-12, atol=1e-14)
    radius = ends[:, 0] ** 2 + (1 + ends[:, 1]) ** 2
    growth = plateau.step_growth(torch.tensor(SLOPES, dtype=torch.float64), lr)
    assert float(radius.mean()) == pytest.approx((x**2 + (1 + y) ** 2) * growth**steps, rel=1e-12)


def test_the_plateau_recipe_agrees_with_its_closed_forms() -> None:
    result = plateau.run(plateau.Config(runs=2000, epochs=10), Progress(2))
    assert result["largest_deviation"] < 1e-12
    assert result["without"] == pytest.approx(result["without_predicted"], rel=1e-12)
    assert abs(result["growth"] - result["growth_predicted"]) < 4 * result["growth_error"] < 0.00625
    assert all(abs(s) < 4 * e for s, e in zip(result["mean_shift"], result["mean_shift_error"]))
    assert plateau.table(result).endswith("without replacement: seen")


def epoch_mean(lr: float, curvature: float) -> float:
    """Mean of y over all orders of one epoch from the saddle, by enumeration."""
    forces, couplings = (torch.tensor(v, dtype=torch.float64) for v in ((1.0, -1.5, 0.2, 0.3), (0.4, -0.7, 0.5, -0.2)))
    order = every(list(permutations(range(4))))
    ends = follow(saddle.batch_loss(forces, couplings, curvature), forces.new_zeros(24, 2), order, lr)[-1]
    return float(ends[:, 1].mean()) - saddle.first_drift(forces, couplings, lr)


def test_the_drift_from_the_saddle_is_right_to_its_order() -> None:
    """The drift is of second order; what enumeration leaves of it must be of third."""
    lrs = torch.tensor([0.02, 0.01, 0.005], dtype=torch.float64)
    rest = torch.tensor([abs(epoch_mean(float(lr), 0.05)) for lr in lrs], dtype=torch.float64)
    slopes = rest.log().diff() / lrs.log().diff()
    assert slopes.min() > 2.85


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_without_replacement_every_run_leaves_the_saddle_on_the_predicted_side(sign: float) -> None:
    config = replace(saddle.RECIPE.quick, couplings=tuple(sign * r for r in saddle.Config().couplings))
    result = saddle.run(config, Progress(1))
    without, with_ = (result[scheme] for scheme in ORDERS)
    assert without["escaped"] == without["predicted_side"] == 1.0
    assert with_["predicted_side"] < 0.75
    assert without["median_epochs"] < 0.7 * with_["median_epochs"]
    assert result["drift_predicted"] * sign < 0
    assert abs(with_["drift"]) < 4 * with_["drift_error"]


def test_escapes_are_told_from_first_passage() -> None:
    y = torch.tensor([[0.1, 0.2, 0.0], [1.5, -2.0, 0.0], [-3.0, -1.0, 0.5]], dtype=torch.float64)
    found = saddle._escapes(y, 1.0, drift=-1.0)
    assert (found["escaped"], found["predicted_side"], found["epochs"]) == (pytest.approx(2 / 3), 0.5, [2, 2])


def test_no_run_escapes_from_where_nothing_moves() -> None:
    table = saddle.table(saddle.run(replace(saddle.RECIPE.quick, epochs=1), Progress(1)))
    assert table.endswith("not seen")


def test_an_epoch_without_replacement_has_every_batch_once_in_all_orders() -> None:
    order = epoch_order(ORDERS[0], 600, 3, torch.Generator().manual_seed(0))
    assert order.sort(0).values.T.unique(dim=0).tolist() == [[0, 1, 2]]
    _, counts = order.T.unique(dim=0, return_counts=True)
    # 100 of each of the 6 orders are expected, with a standard deviation of 9.
    assert len(counts) == 6 and 64 <= counts.min() and counts.max() <= 136


def test_sgd_of_the_recipes_is_that_of_hand_written_steps() -> None:
    model, data = nn.Linear(3, 1).double(), (torch.randn(6, 3).double(), torch.randn(6, 1).double())
    weight, bias = (p.detach().clone() for p in model.parameters())
    order = [*islice(batches("without replacement", 6, 2, seed=3), 6), None]
    assert sorted(sum(order[:3], [])) == sorted(sum(order[3:6], [])) == list(range(6))
    assert list(descend(model, nn.functional.mse_loss, data, order, 0.1)) == list(range(8))
    for index in order:
        x, y = (part if index is None else part[index] for part in data)
        residual = 2 * (x @ weight.T + bias - y) / len(x)
        weight, bias = weight - 0.1 * residual.T @ x, bias - 0.1 * residual.sum(0)
    torch.testing.assert_close(list(model.parameters()), [weight, bias])


def test_the_spectrum_is_that_of_the_dense_hessian() -> None:
    config, split = spectrum.Config(steps=5, width=2, samples=20, batch_size=4), digits()
    found = spectrum.train(split.train, split.validation, config, "full batch", seed=1)
    data = spectrum.training_data(split.train, config, 1)
    torch.manual_seed(1)
    sizes = [(2, 64), (2,), (10, 2), (10,)]
    model = spectrum.mlp((64, 2, 10), "tanh").double()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([torch.Size(size).numel() for size in sizes])
        w1, b1, w2, b2 = (part.view(size) for part, size in zip(parts, sizes))
        logits = (data[0] @ w1.T + b1).tanh() @ w2.T + b2
        return (logits.logsumexp(1) - logits.gather(1, data[1][:, None])[:, 0]).mean()

    for _ in range(5):
        flat = flat - config.lr * torch.func.grad(loss)(flat)
    values = torch.linalg.eigvalsh(torch.func.hessian(loss)(flat))
    assert found["loss"] == pytest.approx(float(loss(flat)), rel=1e-10)
    assert found["eigenvalues"] == pytest.approx(values.flip(0).tolist(), rel=1e-8, abs=1e-10)
    assert found["participation_ratio"] == pytest.approx(float(values.sum() ** 2 / (values**2).sum()), rel=1e-8)


def test_a_share_of_the_labels_is_drawn_at_random() -> None:
    train = digits().train
    config = spectrum.Config(wrong_labels=0.5)
    changed = spectrum.training_data(train, config, 0)[1] != train.targets
    # Half are redrawn and nine tenths of these change: 461 +- 16.
    assert 397 < int(changed.sum()) < 525
    assert spectrum.training_data(train, replace(config, wrong_labels=0.0), 0)[1].equal(train.targets)


def test_the_mean_batch_top_is_that_of_dense_hessians() -> None:
    torch.manual_seed(0)
    model, batch = sharpness.mlp((3, 4, 2), "tanh"), (torch.randn(6, 3), torch.randn(6, 2))
    found = sharpness.mean_top(model, batch, 2, torch.Generator().manual_seed(0))
    sizes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        w1, b1, w2, b2 = (part.view(size) for part, size in zip(flat.split([s.numel() for s in sizes]), sizes))
        return ((x @ w1.T + b1).tanh() @ w2.T + b2 - y).pow(2).sum() / 4

    parts = zip(batch[0].split(2), batch[1].split(2))
    tops = [float(torch.linalg.eigvalsh(torch.func.hessian(loss)(flat, x, y))[-1]) for x, y in parts]
    assert found == pytest.approx(sum(tops) / 3, rel=2 * sharpness.TOLERANCE)


def test_measuring_more_often_leaves_the_run_as_it_is() -> None:
    config = replace(sharpness.RECIPE.quick, steps=6, points=1, drawn=2, tops=1)
    data = sharpness.prepare(digits().train)
    for scheme in list(SAMPLERS)[:2]:
        often = sharpness.train(data, replace(config, points=3), scheme, Progress(1))
        rare = sharpness.train(data, config, scheme, Progress(1))
        assert [point["step"] for point in often] == [0, 2, 4, 6]
        assert [point["loss"] for point in rare] == [often[0]["loss"], often[-1]["loss"]]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("plateau", {"slopes": (1.0, 0.5)}, r"plateau: slopes must be .* sum to 0, not all 0, got \(1.0, 0.5\)"),
        ("plateau", {"runs": 1}, "plateau: runs must be >= 2 .* got 1 and"),
        ("saddle", {"forces": (1.0, -1.0)}, "saddle: forces and couplings must be equally many"),
        ("saddle", {"forces": (1.0, 1.0, -1.0, -1.0) * 2}, "saddle: .* be correlated"),
        ("saddle", {"distance": 0.0}, "saddle: .*distance > 0, got"),
        ("spectrum", {"width": 100}, "spectrum: width must be from 1 to 26, got 100"),
        ("spectrum", {"seeds": 1}, "spectrum: seeds must be >= 2"),
        ("sharpness", {"points": 61}, "sharpness: points must be from 1 to the number of steps, got 61 of 200 and 60"),
        ("sharpness", {"tops": 0}, "sharpness: batch_size must be .* got 4, 0 and 8"),
    ],
)
def test_a_configuration_without_meaning_is_refused(name: str, changes: dict[str, object], message: str) -> None:
    entry = recipe(name)
    with pytest.raises(FastregError, match=message):
        entry.run(replace(entry.quick, **changes), Progress(1))
