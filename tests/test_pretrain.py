"""``examples/pretrain.py``: it learns, refuses by name, and continues bit by bit, after the death of a rank too."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples import _options, _text, pretrain
from fastreg.errors import FastregError
from fastreg.models import GPTConfig
from sharded import on_processes

KINDS = {
    "none": (),
    "grad_norm": ("--regularizer", "grad_norm"),
    "fisher by perturbation": ("--regularizer", "fisher", "--method", "perturb"),
    "sam": ("--regularizer", "sam"),
    "monitor": ("--regularizer", "monitor", "--bf16"),
}
WAYS = {
    "replicated": ("ddp", "--regularizer", "grad_norm"),
    "sharded": ("fsdp2", "--regularizer", "grad_norm"),
    "sharded, perturbed": ("fsdp2", "--regularizer", "grad_norm", "--method", "perturb"),
    "sharded, monitored": ("fsdp2", "--regularizer", "monitor"),
}
OPTIONS = ("--steps", "6", "--batch-size", "8", "--micro-batch-size", "2")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller model, and every step logged."""
    monkeypatch.setitem(_options.MODELS, "tiny", GPTConfig(vocab=256, context=8, width=8, layers=1, heads=2))
    monkeypatch.setattr(pretrain, "LOGGED", 1)


def weights(trainer: pretrain.Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def rows(path: Path) -> list[dict[str, float]]:
    """What was logged, without the speed."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in found]


def dying(step: int, death: BaseException | None) -> object:
    """``one_step`` that raises, or kills the process, at a step."""
    one_step = pretrain.one_step

    def fatal(trainer: pretrain.Trainer, number: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if number == step:
            if death is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise death
        return one_step(trainer, number, x, y)

    return fatal


def test_the_tiny_preset_learns(tmp_path: Path) -> None:
    pretrain.main(["--steps", "40", "--jsonl", str(tmp_path / "log.jsonl")])
    losses = [row["loss"] for row in rows(tmp_path / "log.jsonl")]
    # Bytes that are all as likely have log 256 = 5.5; bytes drawn one by one with their frequencies 3.3.
    assert len(losses) == 4 and losses[0] < 5 and losses[-1] < 3.6


def test_the_penalty_that_is_logged_is_lower_when_it_is_applied(small: None, tmp_path: Path) -> None:
    found = []
    for weight in ("0", "0.1"):
        path = tmp_path / f"{weight}.jsonl"
        options = [*OPTIONS, "--steps", "30", "--regularizer", "grad_norm", "--jsonl", str(path)]
        pretrain.main([*options, "--weight", weight])
        found.append(rows(path)[-1]["fastreg/grad_norm"])
    assert found[1] < 0.9 * found[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    options, log = [*OPTIONS, *KINDS[kind]], tmp_path / "log.jsonl"
    wanted = pretrain.main([*options, "--jsonl", str(tmp_path / "whole.jsonl")])
    options += ["--checkpoint", str(tmp_path / "run"), "--every", "2", "--jsonl", str(log)]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="interrupted"):
        patch.setattr(pretrain, "one_step", dying(6, RuntimeError("interrupted")))
        pretrain.main(options)
    log.write_text(log.read_text() + '{"step": 6, "lo')
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000004"]
    got = pretrain.main([*options, "--resume"])
    assert all(one.equal(other) for one, other in zip(weights(got), weights(wanted), strict=True))
    assert rows(log) == rows(tmp_path / "whole.jsonl")
    assert [row["step"] for row in rows(log)] == [1, 2, 3, 4, 5, 6]


def work(rank: int, count: int, folder: Path, *extra: str, dies: bool = False) -> None:
    _options.MODELS["tiny"] = GPTConfig(vocab=256, context=8, width=8, layers=1, heads=2)
    pretrain.LOGGED = 1
    if dies and rank == 1:
        pretrain.one_step = dying(4, None)
    parallel, *options = WAYS[folder.name.removesuffix(" killed")]
    options += ["--parallel", parallel, "--jsonl", str(folder / "log.jsonl"), *extra]
    pretrain.main([*OPTIONS, *options, "--checkpoint", str(folder / "run"), "--every", "2"])
    (folder / f"ended {rank}").touch()


def work_until_killed(rank: int, count: int, folder: Path) -> None:
    work(rank, count, folder, dies=True)


def work_on(rank: int, count: int, folder: Path) -> None:
    work(rank, count, folder, "--resume")


def content(folder: Path) -> dict[str, Tensor]:
    """The tensors of the last checkpoint, read in one process."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / "run" / "step-00000006", folder / "whole.pt")
    found = torch.load(folder / "whole.pt", weights_only=False)
    moments = {f"{name} {key}": t for name, s in found["optimizer"]["state"].items() for key, t in s.items()}
    return {**found["model"], **moments}


@pytest.mark.parametrize("way", ["replicated", "sharded"])
def test_a_run_survives_the_death_of_a_rank(small: None, tmp_path: Path, way: str) -> None:
    whole, killed = tmp_path / way, tmp_path / f"{way} killed"
    for folder in (whole, killed):
        folder.mkdir()
    on_processes(2, work, whole)
    codes = on_processes(2, work_until_killed, killed, fail=True)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    assert not any(killed.glob("ended *")) and [row["step"] for row in rows(killed / "log.jsonl")] == [1, 2, 3]
    on_processes(2, work_on, killed)
    wanted, got = content(whole), content(killed)
    assert wanted.keys() == got.keys() and len(got) > 50
    assert all(got[name].equal(wanted[name]) for name in wanted)
    assert rows(killed / "log.jsonl") == rows(whole / "log.jsonl")
    assert_as_alone(whole, way)


def assert_as_alone(folder: Path, way: str) -> None:
    """What two ranks have logged in ``folder`` is what one process logs."""
    alone = folder / "alone.jsonl"
    pretrain.main([*OPTIONS, *WAYS[way][1:], "--jsonl", str(alone)])
    for both in zip(rows(alone), rows(folder / "log.jsonl"), strict=True):
        # A monitor takes its micro-batches in turn, on every rank its own.
        one, other = ({name: value for name, value in row.items() if "noise" not in name} for row in both)
        # Differences of single precision have three digits.
        assert one == pytest.approx(other, rel=1e-2 if "perturbed" in way else 1e-4)


@pytest.mark.parametrize("way", ["sharded, perturbed", "sharded, monitored"])
def test_sharded_runs_are_those_of_one_process(small: None, tmp_path: Path, way: str) -> None:
    (folder := tmp_path / way).mkdir()
    on_processes(2, work, folder)
    assert_as_alone(folder, way)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--parallel", "ddp"], "--parallel must go with torchrun"),
        (["--method", "exact", "--regularizer", "sam"], "--method must go with one of .* got sam"),
        (["--weight", "1"], "--weight must go with one of .* got none"),
        (["--compile", "--regularizer", "monitor"], "--compile must go with --regularizer none, got monitor"),
        (["--resume"], "--every and --resume must go with --checkpoint"),
        (["--checkpoint", "nowhere", "--resume"], "--resume must be given if and only if there is a checkpoint"),
        (["--steps", "0"], "--steps and --every must be >= 1, got 0"),
        (["--data", "tokens.bin"], "--data must be a text file, whose bytes are the tokens, .* got tokens.bin"),
        (["--preset", "124m"], "--data must be a .bin file of uint16 tokens, .* of 50304, got None"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: list[str], said: str) -> None:
    with pytest.raises(FastregError, match=f"pretrain: {said}"):
        pretrain.main(options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--parallel must go with torchrun"),
        (["--parallel", "ddp", "--batch-size", "7"], "--batch-size must be a multiple of the 2 ranks, got 7"),
    ],
)
def test_options_that_do_not_go_with_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FastregError, match=f"pretrain: .*{said}"):
        pretrain.main(options)


def test_a_run_goes_on_only_as_it_was_started(small: None, tmp_path: Path) -> None:
    options = [*OPTIONS, "--checkpoint", str(tmp_path)]
    pretrain.main(options)
    with pytest.raises(FastregError, match="--resume must be given if and only if"):
        pretrain.main(options)
    with pytest.raises(FastregError, match=r"--resume must come with .*'steps': '6'.* got .*'steps': '7'"):
        pretrain.main([*options, "--steps", "7", "--resume"])


def test_batches_are_cut_out_of_the_tokens(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = _text.load(tmp_path / "tokens.bin", 50304, 9)
    assert isinstance(tokens, np.memmap)
    x, y = _text.batch(tokens, 500, 8, seed=3)
    assert x.equal(x[:, :1] + torch.arange(8)) and y.equal(x + 1)
    assert 0 <= x.min() < 30 and 960 < y.max() <= 999
    assert x.equal(_text.batch(tokens, 500, 8, seed=3)[0]) and not x.equal(_text.batch(tokens, 500, 8, seed=4)[0])
    (tmp_path / "short.txt").write_text("abc")
    assert _text.load(tmp_path / "short.txt", 256, 3).tolist() == [97, 98, 99]
    with pytest.raises(FastregError, match="at least 9 tokens, got 3"):
        _text.load(tmp_path / "short.txt", 256, 9)


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth() -> None:
    rates = [pretrain.rate(step, 100, 2.0) for step in range(1, 101)]
    assert rates[0] == 1 and max(rates) == rates[1] == 2 and rates[-1] == pytest.approx(0.2)
    assert rates[1:] == sorted(rates[1:], reverse=True)
