"""The command ``fastreg train``."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fastreg.cli import main
from fastreg.errors import FastregError
from fastreg.optional import require
from fastreg.recipes.methods import GRAD_NORM, LARGE_BATCH
from fastreg.recipes.progress import Progress

SHORT = ["train", "--epochs", "1", "--seeds", "1", "--methods", LARGE_BATCH, GRAD_NORM]


def test_command_writes_table_plots_json_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, report, threads = tmp_path / "out", tmp_path / "r.json", torch.get_num_threads()
    assert main([*SHORT, "--output", str(folder), "--json", str(report)]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr()
    assert "large batch + GradNorm" in printed.out and str(folder) in printed.out
    assert "\r" not in printed.err
    for name in ("accuracy", "gradient_norm", "seconds"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
        assert (folder / f"{name}.svg").read_bytes().startswith(b"<?xml"), name
    first = json.loads(report.read_text())
    assert [run["method"] for run in first["runs"]] == [LARGE_BATCH, GRAD_NORM]
    assert first["environment"]["torch"] == torch.__version__
    assert first["environment"]["threads"] == first["settings"]["threads"] == 1
    # Resuming a finished experiment repeats nothing and reports the same.
    resume = ["train", "--resume", str(folder / "checkpoint.pt"), "--json", str(report), "--no-plot"]
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
        (["--model", "vgg11", "--methods", "unit_jacobian"], "lr and weight must be given for unit_jacobian on vgg11"),
        (["--model", "vgg11", "--methods", "normalized"], "lr and weight must be given for normalized on vgg11"),
        (["--data", "svhn"], "data-dir must be the folder"),
        (["--data", "cifar100", "--model", "resnet18"], "model must be one of ['resnet18-cifar100'] for cifar100"),
        (["--methods", "small_batch", "normalized", "--matched"], "matched: methods must be among"),
        (["--weight", "normalized=1", "--methods", "normalized"], "weight of normalized must be 0"),
        (["--data-dir", "somewhere"], "data-dir must be absent for digits"),
        (["--resume", "c.pt", "--epochs", "2"], "--epochs must be absent with --resume"),
        (["--matched", "--methods", "large_batch"], "methods must contain small_batch"),
        (["--matched", "--lr", "large_batch=1"], "--lr must name small_batch alone"),
        (["--resume", "c.pt", "--matched"], "--matched must be absent with --resume"),
        (["--sweep", "--seeds", "2"], "--seeds must be absent with --sweep"),
        (["--sweep", "--no-plot"], "--no-plot must be absent with --sweep"),
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


def test_a_document_alone_is_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert main([*SHORT, "--output", str(folder), "--no-plot", "--json"]) == 0
    printed = capsys.readouterr()
    assert [run["method"] for run in json.loads(printed.out)["runs"]] == [LARGE_BATCH, GRAD_NORM]
    assert "large batch + GradNorm" in printed.err
    assert [path.name for path in folder.iterdir()] == ["checkpoint.pt"]


def test_a_sweep_is_a_document_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "new" / "sweep.json"
    assert main(["train", "--sweep", "--epochs", "2", "--methods", LARGE_BATCH, "--json", str(report)]) == 0
    trials = json.loads(report.read_text())["trials"]
    assert [trial["method"]["lr"] for trial in trials] == [0.1, 0.3, 1.0, 3.0]
    best = max(trials, key=lambda trial: (trial["accuracy"], -trial["loss"]))
    assert [trial for trial in trials if trial["best"]] == [best]
    (starred,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("*")]
    assert f"{best['method']['lr']:g}" in starred.split()


def test_without_matplotlib_training_does_not_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SHORT, "--output", str(tmp_path / "out")]) == 1
    assert "matplotlib must be installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Progress, run: str, epochs: int = 1) -> None:
        if LARGE_BATCH.replace("_", " ") + " +" in run:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "advance", interrupt)
    assert main([*SHORT, "--output", str(tmp_path)]) == 130
    last = capsys.readouterr().err.splitlines()[-2:]
    assert last == [f"to go on: fastreg train --resume {tmp_path / 'checkpoint.pt'}", "interrupted"]
    monkeypatch.undo()
    assert main([*last[0].partition("fastreg ")[2].split(), "--no-plot", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2


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
    monkeypatch.setenv("TERM", "dumb")
    assert err() == "done\n"
    monkeypatch.setenv("TERM", "xterm")
    drawn = err()
    assert "2/2" in drawn and "large batch, seed 0" in drawn and "done\n" in drawn


def test_missing_package_is_named() -> None:
    with pytest.raises(FastregError, match=r"no_such_package must be installed.*fastreg\[demo\]"):
        require("no_such_package")
