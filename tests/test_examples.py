"""Short runs of the examples of monitoring, and the arithmetic they rest on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import choose_batch_size, edge_of_stability, find_wrong_labels
from fastreg.cli import main as fastreg_command
from fastreg.errors import FastregError
from fastreg.recipes.data import Split, digits
from fastreg.recipes.papers.sharpness import TOLERANCE


def test_planted_labels_are_wrong_and_no_other_is() -> None:
    train = digits().train
    targets, wrong = find_wrong_labels.plant(train, 0.03, torch.Generator().manual_seed(1))
    assert (targets != train.targets).equal(wrong)
    assert wrong.sum() == 31 and 0 <= targets.min() and targets.max() <= 9


def test_precision_counts_wrong_labels_among_the_largest_scores() -> None:
    score, wrong = torch.tensor([0.1, 5.0, 3.0, 4.0]), torch.tensor([True, True, False, False])
    assert [find_wrong_labels.precision(score, wrong, count) for count in (1, 2, 4)] == [1.0, 0.5, 0.5]


def test_scores_of_one_step_are_norms_of_per_sample_gradients() -> None:
    """One batch a run, so that every norm is that of the initial model, which autograd can tell sample by sample."""
    inputs, targets = torch.rand(7, 1, 8, 8), torch.randint(10, (7,))
    torch.manual_seed(3)
    found = find_wrong_labels.scores(inputs, targets, 1, 0, torch.Generator())
    torch.manual_seed(3)
    model = find_wrong_labels.mlp((64, 64, 10))
    for number in range(7):
        loss = torch.nn.functional.cross_entropy(model(inputs[number : number + 1]), targets[number : number + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch.testing.assert_close(found["gradient norm"][number], norm)
        torch.testing.assert_close(found["loss"][number], loss.detach())


def test_wrong_labels_are_found_at_ten_times_the_base_rate(capsys: pytest.CaptureFixture[str]) -> None:
    found = find_wrong_labels.main(runs=1, epochs=5)
    assert min(found["gradient norm"] + found["loss"]) > 10 * 31 / 1024
    assert "31 of 1024 labels planted" in capsys.readouterr().out


def test_the_fit_recovers_the_curve_it_is_given() -> None:
    batches = (8, 16, 64, 256)
    minimum, critical = choose_batch_size.fit(batches, [90 * (1 + 24 / batch) for batch in batches])
    assert minimum == pytest.approx(90) and critical == pytest.approx(24)


def test_tuning_takes_the_learning_rate_of_the_fewest_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = dict(zip(choose_batch_size.RATES, (40, 20, 30, 25, 90, 91)))
    monkeypatch.setattr(
        choose_batch_size,
        "steps_to_target",
        lambda data, batch, rate, *, target, limit, seed: taken[rate] + seed if taken[rate] + seed <= limit else None,
    )
    steps, rate = choose_batch_size.tuned(Split(torch.empty(0), torch.empty(0)), 8, 0.1, 85, seed=0)
    assert (steps, rate) == (21, choose_batch_size.RATES[1])


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(FastregError, match="reached in 2 steps, got 0.001"):
        choose_batch_size.main(steps=2, target=0.001)
    with pytest.raises(FastregError, match="got 5 with 5 epochs"):
        find_wrong_labels.main(epochs=5, warm_up=5)
    with pytest.raises(FastregError, match=r"points must be in \[1, steps\] .*, got 3, 2 and None"):
        edge_of_stability.main(gd_steps=2, points=3)


def test_the_sweep_ends_in_a_file_that_the_monitor_command_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "noise.csv"
    path.write_text("left from an earlier run")
    critical, scale = choose_batch_size.main(steps=100, target=1.5, csv=path)
    assert critical > 0 and scale > 0
    assert fastreg_command(["monitor", str(path), "--plot", str(tmp_path / "noise.png")]) == 0
    assert "fastreg/grad_noise_scale" in capsys.readouterr().out
    assert (tmp_path / "noise.png").stat().st_size > 0


def dense_hessian(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``[D, D]`` of 1/2 ||f(x) - y||^2, a mean over samples, by plain double backward."""
    parameters = list(model.parameters())
    loss = 0.5 * (model(inputs) - targets).pow(2).sum() / len(inputs)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def test_sharpness_at_the_start_is_that_of_the_dense_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_of_stability, "WIDTH", 5)
    data = torch.randn(20, 4), torch.nn.functional.one_hot(torch.arange(20) % 3).float()
    found = edge_of_stability.train(data, None, rate=0.1, steps=1, points=1, seed=4)
    torch.manual_seed(4)
    exact = torch.linalg.eigvalsh(dense_hessian(edge_of_stability.mlp((4, 5, 5, 3), "tanh"), *data))[-1]
    assert found[0].sharpness == pytest.approx(exact.item(), rel=TOLERANCE)


def test_gradient_descent_sharpens_up_to_the_edge() -> None:
    data = edge_of_stability.prepare(digits().train)
    start, edge = edge_of_stability.train(data, None, rate=0.5, steps=240, points=1, seed=0)
    assert start.sharpness < 0.6 * 4 and edge.sharpness == pytest.approx(4, rel=0.25)
    # The gradient points along the sharpest direction once it is unstable, and not before.
    assert start.batch_sharpness < 0.6 * start.sharpness and edge.batch_sharpness == pytest.approx(4, rel=0.25)


def test_measuring_does_not_disturb_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "edge.png"
    descent, noisy = edge_of_stability.main(gd_steps=4, sgd_steps=4, points=4, out=path).values()
    data = edge_of_stability.prepare(digits().train)
    for batch, found in ((None, descent), (4, noisy)):
        rare = edge_of_stability.train(data, batch, rate=0.4, steps=4, points=1, seed=0)
        assert [point.loss for point in rare] == [found[0].loss, found[-1].loss]
    assert "2 / lr = 5.00" in capsys.readouterr().out
    assert 0 < path.stat().st_size < 150_000


def test_where_a_run_settles_is_a_share_of_the_threshold() -> None:
    found = [edge_of_stability.Point(step, 1.0, 8.0 + step, 4.0 * step) for step in range(4)]
    assert edge_of_stability.settled(found, 0.5) == (10.5 / 4, 10.0 / 4)
