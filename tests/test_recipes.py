"""The experiment of ``fastreg train``: steps, resumption, checkpoints, report, command line."""

import json
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreg.cli import main
from fastreg.errors import FastregError
from fastreg.recipes import sweep as sweep_module
from fastreg.recipes.checkpoint import Checkpoint, load_checkpoint
from fastreg.recipes.data import Dataset, Split
from fastreg.recipes.experiment import run_experiment, schedule
from fastreg.recipes.methods import (
    FISHER_TRACE,
    GRAD_NORM,
    LARGE_BATCH,
    SMALL_BATCH,
    TITLES,
    Method,
    matched,
)
from fastreg.recipes.optional import require
from fastreg.recipes.progress import Progress
from fastreg.recipes.report import Results, paired_difference, summarise, table, verdict
from fastreg.recipes.settings import MODELS, Settings, default_settings, load_dataset
from fastreg.recipes.sweep import Trial, candidates, sweep, sweep_table
from fastreg.recipes.training import Run, Score, evaluate

METHODS = (
    Method(SMALL_BATCH, lr=0.1),
    Method(LARGE_BATCH, lr=0.5),
    Method(GRAD_NORM, lr=0.5, weight=0.1),
    Method(FISHER_TRACE, lr=0.5, weight=0.1),
)


@pytest.fixture(scope="module")
def data() -> Dataset:
    """The digits with 128 training samples."""
    whole = load_dataset("digits", None)
    return replace(whole, train=Split(whole.train.inputs[:128], whole.train.targets[:128]))


def tiny(**changes: object) -> Settings:
    settings = replace(
        default_settings("digits"),
        methods=METHODS,
        seeds=(0, 1),
        epochs=3,
        batch_size=64,
        micro_batch_size=16,
        chunk_size=64,
        measure_every=2,
        checkpoint_every=1,
    )
    return replace(settings, **changes)


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


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
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


def test_plain_large_batch_step_normalises_micro_batches_as_the_penalised_one(
    monkeypatch: pytest.MonkeyPatch, data: Dataset
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
    run = Run(tiny(), METHODS[1], 0, data)
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


def test_sweep_never_reads_the_test_split(
    data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sweep_module.LEARNING_RATES, LARGE_BATCH, (0.5, 1e20))
    # A split that cannot be scored: reading it would raise.
    unreadable = Split(torch.empty(0, 0), torch.empty(0))
    trials = sweep(
        tiny(epochs=1, methods=METHODS[1:2]), replace(data, test=unreadable)
    )
    assert [trial.method.lr for trial in trials] == [0.5, 1e20]
    assert trials[0].accuracy > 0 and math.isnan(trials[1].accuracy)
    assert max(trials, key=lambda trial: trial.rank) is trials[0]
    marked = [line for line in sweep_table(trials).splitlines() if line.endswith("*")]
    assert len(marked) == 1 and " 0.5 " in marked[0]


def test_sweep_grid_covers_the_rule_and_its_neighbours() -> None:
    ratios = {method.rule_ratio for method in candidates(GRAD_NORM)}
    assert ratios == set(sweep_module.RULE_RATIOS) and 1.0 in ratios
    assert not set(sweep_module.SWEEP_SEEDS) & set(default_settings("digits").seeds)


def result_of(method: str, seed: int, accuracy: float, seconds: float) -> dict[str, object]:
    entry = {"epoch": 1, "seconds": seconds, "micro_batch_grad_norm": 1.0}
    return {
        "method": method,
        "seed": seed,
        "diverged": False,
        "best": {"accuracy": accuracy, "test_accuracy": accuracy},
        "final": {"train_accuracy": 1.0, "test_accuracy": accuracy - 0.01},
        "history": [entry],
    }


def test_summary_by_hand() -> None:
    results = [
        result_of(LARGE_BATCH, 0, 0.90, 1.0),
        result_of(GRAD_NORM, 0, 0.92, 2.0),
        result_of(LARGE_BATCH, 1, 0.94, 2.0),
        result_of(GRAD_NORM, 1, 0.94, 5.0),
    ]
    summary = summarise(tiny(methods=METHODS[1:3]), results)[1]
    assert summary.test.mean == pytest.approx(0.93)
    assert summary.test.std == pytest.approx(0.01 * math.sqrt(2))
    assert summary.final.mean == pytest.approx(0.92)
    assert summary.overhead == pytest.approx(2.25)
    difference = paired_difference(results, GRAD_NORM, LARGE_BATCH)
    assert difference.mean == pytest.approx(0.01)
    assert difference.standard_error == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("small", "large", "penalised", "sentences"),
    [
        ((0.95, 0.96), (0.91, 0.92), (0.93, 0.94), ["+4.00 ± 0.00 points", "50% of the gap"]),
        ((0.95, 0.96), (0.91, 0.92), (0.89, 0.90), ["+4.00", "worse than without the penalty"]),
        ((0.95, 0.91), (0.91, 0.95), (0.93, 0.97), ["no clear gap", "better than without"]),
        ((0.90, 0.91), (0.91, 0.92), (0.90, 0.93), ["nothing to recover", "no clear change"]),
    ],
)
def test_verdict_says_what_came_out(
    small: tuple[float, float],
    large: tuple[float, float],
    penalised: tuple[float, float],
    sentences: list[str],
) -> None:
    results = [
        result_of(name, seed, values[seed], 1.0)
        for name, values in ((SMALL_BATCH, small), (LARGE_BATCH, large), (GRAD_NORM, penalised))
        for seed in (0, 1)
    ]
    lines = verdict(tiny(methods=METHODS[:3]), results)
    assert len(lines) == 2
    for line, sentence in zip(lines, sentences):
        assert sentence in line


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


@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_classifies_its_data(name: str) -> None:
    recipe = MODELS[name]
    shape = {"digits": (1, 8, 8), "cifar10": (3, 32, 32)}[recipe.data]
    with torch.no_grad():
        assert recipe.build()(torch.randn(2, *shape)).shape == (2, 10)
    assert {method.name for method in recipe.methods} == set(TITLES)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seeds": ()}, "seeds must be distinct"),
        ({"seeds": (1, 1)}, "seeds must be distinct"),
        ({"batch_size": 8}, "batch_size must be at least micro_batch_size = 16"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"chunk_size": 24}, "chunk_size must be a multiple of micro_batch_size"),
        ({"model": "lenet"}, "model must be one of"),
    ],
)
def test_settings_refuse(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(FastregError, match=expected):
        tiny(**changes)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("adam", 0.1), "name must be one of"),
        ((LARGE_BATCH, 0.0), "lr of large_batch must be positive"),
        ((LARGE_BATCH, math.nan), "lr of large_batch must be positive"),
        ((LARGE_BATCH, 0.1, 0.1), "weight of large_batch must be 0"),
        ((GRAD_NORM, 0.1), "weight of grad_norm must be positive"),
    ],
)
def test_methods_refuse(values: tuple[object, ...], expected: str) -> None:
    with pytest.raises(FastregError, match=expected):
        Method(*values)


def test_matched_methods_share_the_small_batch_rate_and_follow_the_rule() -> None:
    methods = matched(METHODS)
    assert [method.name for method in methods] == [method.name for method in METHODS]
    assert {method.lr for method in methods} == {METHODS[0].lr}
    assert [method.rule_ratio for method in methods] == [0, 0, 1, 1]
    with pytest.raises(FastregError, match="methods must contain small_batch"):
        matched(METHODS[1:])


def test_missing_package_is_named() -> None:
    with pytest.raises(FastregError, match=r"no_such_package must be installed.*fastreg\[demo\]"):
        require("no_such_package")


SHORT = ["train", "--epochs", "1", "--seeds", "1", "--methods", LARGE_BATCH, GRAD_NORM]


def test_command_writes_table_plots_json_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report = tmp_path / "out", tmp_path / "r.json"
    assert main([*SHORT, "--output", str(folder), "--json", str(report)]) == 0
    printed = capsys.readouterr()
    assert "large batch + GradNorm" in printed.out and str(folder) in printed.out
    assert "\r" not in printed.err
    for name in ("accuracy.png", "gradient_norm.png", "seconds.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name
    first = json.loads(report.read_text())
    assert [run["method"] for run in first["runs"]] == [LARGE_BATCH, GRAD_NORM]
    assert first["environment"]["torch"] == torch.__version__
    # Resuming a finished experiment repeats nothing and reports the same.
    resume = ["train", "--resume", str(folder / "checkpoint.pt"), "--json", str(report)]
    assert main(resume) == 0
    assert json.loads(report.read_text()) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be an integer of at least 1, got '0'"),
        (["--epochs", "-3"], "must be an integer of at least 1"),
        (["--seeds", "two"], "must be an integer of at least 1, got 'two'"),
        (["--data", "mnist"], "invalid choice: 'mnist'"),
        (["--model", "lenet"], "invalid choice: 'lenet'"),
        (["--methods", "adam"], "invalid choice: 'adam'"),
        (["--lr", "large_batch"], "must be METHOD=VALUE"),
        (["--lr", "large_batch=-1"], "VALUE positive"),
        (["--lr", "large_batch=nan"], "VALUE positive"),
        (["--weight", "large_batch=0.1"], "weight of large_batch must be 0"),
        (["--methods", "large_batch", "--lr", "grad_norm=1"], "must name a method that runs"),
        (["--device", "abacus"], "must be cpu or cuda"),
        (["--device", "meta"], "must be cpu or cuda"),
        (["--device", "cuda:99"], "must be a device that torch sees"),
        (["--batch-size", "8"], "batch_size must be at least micro_batch_size"),
        (["--model", "vgg11", "--data", "digits"], "model must be one of ['mlp'] for digits"),
        (["--data", "cifar10"], "data-dir must be the folder"),
        (["--data-dir", "somewhere"], "data-dir must be absent for digits"),
        (["--resume", "c.pt", "--epochs", "2"], "--epochs must be absent with --resume"),
        (["--matched", "--methods", "large_batch"], "methods must contain small_batch"),
        (["--matched", "--lr", "large_batch=1"], "--lr must name small_batch alone"),
        (["--resume", "c.pt", "--matched"], "--matched must be absent with --resume"),
        (["--sweep", "--seeds", "2"], "--seeds must be absent with --sweep"),
        (["--sweep", "--json", "r.json"], "--json must be absent with --sweep"),
        (["--resume", "c.pt", "--sweep"], "--sweep must be absent with --resume"),
    ],
)
def test_wrong_command_line_ends_with_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_unusable_files_end_with_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", "cifar10", "--data-dir", str(tmp_path)]) == 1
    assert "data_batch_1 must be" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path / "c.pt")]) == 1
    assert "existing file" in capsys.readouterr().err


def test_progress_draws_a_bar_only_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def err() -> str:
        with Progress(2) as progress:
            progress.advance("large batch, seed 0", 2)
            progress.note("done")
        return capsys.readouterr().err

    assert err() == "done\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    drawn = err()
    assert "2/2" in drawn and "large batch, seed 0" in drawn and "done\n" in drawn
