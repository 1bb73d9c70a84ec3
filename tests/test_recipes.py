"""Runs and experiments of ``fastreg train``: steps, resumption, checkpoints."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreg.errors import FastregError
from fastreg.recipes.checkpoint import Checkpoint, load_checkpoint
from fastreg.recipes.data import Dataset
from fastreg.recipes.experiment import run_experiment, schedule
from fastreg.recipes.methods import GRAD_NORM, SMALL_BATCH, Method
from fastreg.recipes.progress import Progress
from fastreg.recipes.report import Results, summarise, table
from fastreg.recipes.settings import MODELS, Settings
from fastreg.recipes.training import Run, Score, evaluate
from recipe_cases import METHODS, NOVACK_METHODS, small_digits, tiny


@pytest.fixture(scope="module")
def data() -> Dataset:
    return small_digits()


def without_seconds(results: Results) -> Results:
    """Results less the wall-clock times, the one part that no run repeats."""
    return [
        {
            **result,
            "history": [
                {key: value for key, value in entry.items() if key != "seconds"}
                for entry in result["history"]
            ],
        }
        for result in results
    ]


@pytest.mark.parametrize("method", (*METHODS, *NOVACK_METHODS), ids=lambda method: method.name)
def test_run_resumes_bit_identically_after_any_epoch(
    method: Method, data: Dataset, tmp_path: Path
) -> None:
    settings = tiny()
    whole = Run(settings, method, 7, data)
    states = []
    while not whole.finished:
        whole.train_epoch()
        torch.save(whole.state_dict(), tmp_path / f"{len(whole.history)}.pt")
        states.append(tmp_path / f"{len(whole.history)}.pt")
    for path in states[:-1]:
        resumed = Run(settings, method, 7, data)
        resumed.load_state_dict(torch.load(path, weights_only=True))
        while not resumed.finished:
            resumed.train_epoch()
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert without_seconds([whole.result()]) == without_seconds([resumed.result()])


class Stop(Exception):
    """Stands for a killed process."""


class StoppingProgress(Progress):
    """Raises after a given number of epochs, as the process might end at any of them."""

    def __init__(self, epochs: int) -> None:
        super().__init__(epochs)
        self.left = epochs

    def advance(self, run: str, epochs: int = 1) -> None:
        super().advance(run, epochs)
        self.left -= epochs
        if self.left < 0:
            raise Stop


def test_experiment_resumes_bit_identically_across_methods_and_seeds(
    data: Dataset, tmp_path: Path
) -> None:
    settings = tiny(epochs=2)
    total = settings.epochs * len(schedule(settings))
    with Progress(total) as progress:
        whole = run_experiment(Checkpoint(settings), data, tmp_path / "whole.pt", progress)
    path = tmp_path / "parts.pt"
    Checkpoint(settings).save(path)
    # One epoch more each time: interruptions fall inside runs and between them.
    for epochs in range(total):
        with pytest.raises(Stop):
            run_experiment(load_checkpoint(path), data, path, StoppingProgress(epochs))
    last = run_experiment(load_checkpoint(path), data, path, StoppingProgress(total))
    assert without_seconds(last) == without_seconds(whole)
    assert [(r["seed"], r["method"]) for r in last] == [
        (seed, method.name) for seed, method in schedule(settings)
    ]


def test_seeds_differ_and_repeat(data: Dataset) -> None:
    def losses(seed: int) -> list[float]:
        run = Run(tiny(epochs=1), METHODS[0], seed, data)
        run.train_epoch()
        return [entry["train_loss"] for entry in run.history]

    assert losses(0) == losses(0) != losses(1)


def gradient_of_one_step(settings: Settings, method: Method, data: Dataset) -> torch.Tensor:
    run = Run(settings, method, 0, data)
    before = nn.utils.parameters_to_vector(run.model.parameters()).detach().clone()
    run.train_epoch()
    after = nn.utils.parameters_to_vector(run.model.parameters()).detach()
    return (before - after) / method.lr


def test_penalised_step_is_the_gradient_of_loss_plus_weight_times_penalty(data: Dataset) -> None:
    method = Method(GRAD_NORM, lr=0.5, weight=0.3)
    settings = tiny(epochs=1, batch_size=128, chunk_size=128, micro_batch_size=32)
    step = gradient_of_one_step(settings, method, data)

    torch.manual_seed(0)
    model = MODELS["mlp"].build().double()
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    x, y = data.train.inputs[order].double(), data.train.targets[order]
    squares = []
    for inputs, targets in zip(x.split(32), y.split(32)):
        loss = F.cross_entropy(model(inputs), targets)
        grads = torch.autograd.grad(loss, tuple(model.parameters()), create_graph=True)
        squares.append(sum(grad.square().sum() for grad in grads))
    total = F.cross_entropy(model(x), y) + method.weight * torch.stack(squares).mean()
    grads = torch.autograd.grad(total, tuple(model.parameters()), materialize_grads=True)
    expected = torch.cat([grad.flatten() for grad in grads])
    assert (step - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("method", METHODS[1:3], ids=lambda method: method.name)
def test_accumulated_step_equals_the_unsplit_one(method: Method, data: Dataset) -> None:
    settings = tiny(epochs=1, batch_size=128, chunk_size=128)
    whole = gradient_of_one_step(settings, method, data)
    split = gradient_of_one_step(replace(settings, chunk_size=32), method, data)
    assert (whole - split).norm() < 1e-4 * whole.norm()


@pytest.mark.parametrize("method", (METHODS[1], *NOVACK_METHODS[-2:]), ids=lambda method: method.name)
def test_plain_large_batch_step_normalises_micro_batches_as_the_penalised_one(
    method: Method, monkeypatch: pytest.MonkeyPatch, data: Dataset
) -> None:
    sizes: list[int] = []

    class Recorder(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                sizes.append(len(x))
            return super().forward(x)

    recipe = replace(
        MODELS["mlp"],
        build=lambda: nn.Sequential(Recorder(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    monkeypatch.setitem(MODELS, "mlp", recipe)
    run = Run(tiny(), method, 0, data)
    sizes.clear()
    run._pass()
    assert sizes == [16] * 8


def test_best_epoch_is_chosen_by_validation_and_ties_by_loss() -> None:
    assert Score(0.9, 0.5).better_than(Score(0.8, 0.1))
    assert Score(0.9, 0.4).better_than(Score(0.9, 0.5))
    assert not Score(0.9, 0.5).better_than(Score(0.9, 0.5))


def test_history_and_result_of_a_run(data: Dataset) -> None:
    run = Run(tiny(), METHODS[2], 0, data)
    while not run.finished:
        run.train_epoch()
    history, result = run.history, run.result()
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert ["micro_batch_grad_norm" in entry for entry in history] == [False, True, True]
    accuracies = [entry["validation_accuracy"] for entry in history]
    assert result["best"]["accuracy"] == max(accuracies)
    assert result["final"]["test_accuracy"] == evaluate(run.model, data, data.test).accuracy
    assert run.model.training


def test_measured_norm_equals_a_loop_over_micro_batches(data: Dataset) -> None:
    run = Run(tiny(), METHODS[2], 0, data)
    run.train_epoch()
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    measured = run.micro_batch_grad_norm()
    norms = []
    for x, y in zip(data.train.inputs[:64].split(16), data.train.targets[:64].split(16)):
        run.model.zero_grad()
        F.cross_entropy(run.model(x), y).backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in run.model.parameters()]))
    assert measured == pytest.approx(float(torch.stack(norms).mean()), rel=1e-4)
    assert all(torch.equal(before[name], v) for name, v in run.model.state_dict().items())


def test_diverged_run_ends_and_is_reported(data: Dataset, tmp_path: Path) -> None:
    settings = tiny(methods=(METHODS[1], Method(SMALL_BATCH, lr=1e20)), seeds=(0,))
    with Progress(6) as progress:
        results = run_experiment(Checkpoint(settings), data, tmp_path / "c.pt", progress)
    assert [result["diverged"] for result in results] == [False, True]
    summary = summarise(settings, results)[1]
    assert (summary.diverged, summary.test.count) == (1, 0)
    assert "(1 diverged)" in table(summarise(settings, results))


def test_checkpoint_round_trip_keeps_settings(tmp_path: Path) -> None:
    settings = tiny()
    Checkpoint(settings, [{"seed": 1}]).save(tmp_path / "c.pt")
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert loaded == Checkpoint(settings, [{"seed": 1}])
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_interrupted_save_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.pt"
    Checkpoint(tiny(epochs=1)).save(path)

    def fail(contents: object, stream: object) -> None:
        stream.write(b"half")
        raise Stop

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(Stop):
        Checkpoint(tiny(epochs=2)).save(path)
    assert load_checkpoint(path).settings.epochs == 1


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.target), "w")


def test_hostile_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path, sign = tmp_path / "c.pt", tmp_path / "ran"
    for write in (torch.save, lambda value, where: where.write_bytes(pickle.dumps(value, protocol=2))):
        write({"format": Hostile(sign)}, path)
        with pytest.raises(FastregError, match="resume: checkpoint must be"):
            load_checkpoint(path)
        assert not sign.exists()


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    Checkpoint(tiny()).save(path)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(FastregError, match="resume: checkpoint must be"):
            load_checkpoint(path)
    for other in ([1], {"format": 0}, {"format": 1}, {"format": 1, "settings": {"device": "cpu"}}):
        torch.save(other, path)
        with pytest.raises(FastregError, match="file that fastreg train wrote"):
            load_checkpoint(path)
    with pytest.raises(FastregError, match="existing file"):
        load_checkpoint(tmp_path / "absent.pt")
