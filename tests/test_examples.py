"""Short runs of the examples of monitoring, and the arithmetic they rest on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import choose_batch_size, find_wrong_labels
from fastreg.cli import main as fastreg_command
from fastreg.errors import FastregError
from fastreg.recipes.data import Split, digits


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
