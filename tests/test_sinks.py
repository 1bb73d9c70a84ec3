"""Sinks: what reaches files, trackers and terminals."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastreg.errors import FastregError
from fastreg.sinks import CSVSink, JSONLSink, MemorySink, Sink, TensorBoardSink, TerminalSink, WandbSink

A, B = "fastreg/a", 'odd, "b"'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_memory_keeps_copies_of_the_rows() -> None:
    values = {A: 1.0}
    with MemorySink() as sink:
        sink.write(3, values)
        values[A] = 2.0
        sink.write(4, values)
    assert sink.rows == [{"step": 3, A: 1.0}, {"step": 4, A: 2.0}]


def test_csv_round_trips_exactly_and_a_resumed_run_appends(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "run.csv"
    with CSVSink(path) as sink:
        sink.write(1, {A: 0.1, B: math.nan})
    with CSVSink(str(path)) as sink:
        sink.write(2, {B: math.inf, A: torch.tensor(1 / 3, dtype=torch.float64)})
    header, *rows = csv.reader(path.read_text().splitlines())
    assert header == ["step", A, B]
    assert rows == [["1", "0.1", "nan"], ["2", repr(1 / 3), "inf"]]


@pytest.mark.parametrize("kind", [CSVSink, JSONLSink])
def test_every_row_is_on_disk_when_write_returns(kind: type[Sink], tmp_path: Path) -> None:
    sink = kind(tmp_path / "run")
    for rows in range(1, 4):
        sink.write(rows, {A: 1.0})
        assert len((tmp_path / "run").read_text().splitlines()) == rows + (kind is CSVSink)
    sink.close()
    sink.close()


def test_csv_refuses_other_keys_and_says_what_to_use(tmp_path: Path) -> None:
    with CSVSink(tmp_path / "run.csv") as sink:
        sink.write(1, {A: 1.0})
    for values in ({A: 1.0, B: 2.0}, {B: 1.0}, {}):
        with CSVSink(tmp_path / "run.csv") as sink, pytest.raises(FastregError, match="JSONLSink"):
            sink.write(2, values)
    assert (tmp_path / "run.csv").read_text() == f"step,{A}\n1,1.0\n"


def test_files_that_a_sink_did_not_write_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("name,age\n")
    with pytest.raises(FastregError, match="'name,age'"):
        CSVSink(path)
    for kind, text in ((CSVSink, "step,a\n1,0."), (JSONLSink, '{"step": 1}\n{"st')):
        path.write_text(text)
        with pytest.raises(FastregError, match="cut-off"):
            kind(path)
        assert path.read_text() == text


def test_jsonl_is_standard_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    path = tmp_path / "run.jsonl"
    for step, values in ((1, {A: 0.1, B: math.nan}), (2, {B: -math.inf}), (3, {"new": torch.tensor(2.0)})):
        with JSONLSink(path) as sink:
            sink.write(step, values)
    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, A: 0.1, B: None}, {"step": 2, B: None}, {"step": 3, "new": 2.0}]


def test_a_metric_called_step_is_refused(tmp_path: Path) -> None:
    for sink in (MemorySink(), CSVSink(tmp_path / "c"), JSONLSink(tmp_path / "j")):
        with sink, pytest.raises(FastregError, match="rename"):
            sink.write(1, {"step": 2.0})


def test_tensorboard_gets_every_value_and_stays_open() -> None:
    calls: list[tuple] = []

    class Writer:
        def add_scalar(self, tag: str, value: float, global_step: int) -> None:
            calls.append((tag, value, global_step))

    with TensorBoardSink(Writer()) as sink:
        sink.write(7, {A: 1.0, B: 2.0})
    assert calls == [(A, 1.0, 7), (B, 2.0, 7)]


def test_tensorboard_itself_reads_the_rows_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer, TensorBoardSink(writer) as sink:
        sink.write(3, {A: 0.5})
        sink.write(7, {A: 0.25, "b": math.inf})
    events = EventAccumulator(str(tmp_path)).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {A: [(3, 0.5), (7, 0.25)], "b": [(7, math.inf)]}


class WandbRun:
    """Records what a sink does to it."""

    def __init__(self) -> None:
        self.calls: list[object] = []

    def log(self, data: dict[str, float], step: int) -> None:
        self.calls.append((step, data))

    def finish(self) -> None:
        self.calls.append("finish")


def test_wandb_begins_a_run_with_the_settings_and_finishes_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, begun = WandbRun(), []

    def init(**settings: object) -> WandbRun:
        begun.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with WandbSink(project="p", mode="offline") as sink:
        sink.write(3, {A: torch.tensor(0.5)})
        sink.write(7, {A: 1.0, "b": 2.0})
    sink.close()
    assert begun == [{"project": "p", "mode": "offline"}]
    assert run.calls == [(3, {A: 0.5}), (7, {A: 1.0, "b": 2.0}), "finish"]
    assert type(run.calls[0][1][A]) is float


def test_a_run_of_the_caller_stays_open_and_wandb_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = WandbRun()
    with WandbSink(run) as sink:
        sink.write(1, {"a": 1.0})
    assert run.calls == [(1, {"a": 1.0})]
    with pytest.raises(FastregError, match=r"WandbSink: settings must be absent with a run, got \['project'\]"):
        WandbSink(run, project="p")
    with pytest.raises(FastregError, match="wandb must be installed"):
        WandbSink(project="p")


def test_wandb_itself_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with WandbSink(project="p", mode="offline", dir=str(tmp_path)) as sink:
        sink.write(3, {A: 0.8125})
        sink.write(7, {A: 0.40625, "b": 2.0})
        # A step is complete, and summarised, once a later one has begun.
        sink.write(9, {A: 1.0})
        summary = wandb.run.summary
        assert (wandb.run.step, summary["_step"], summary[A], summary["b"]) == (9, 7, 0.40625, 2.0)
    assert wandb.run is None
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_pipe_gets_plain_lines_of_every_nth_step() -> None:
    stream = io.StringIO()
    with TerminalSink(stream, every=5) as sink:
        for step in range(1, 11):
            sink.write(step, {A: step / 3})
    assert stream.getvalue() == "step 5  a 1.667\nstep 10  a 3.333\n"


def test_a_terminal_gets_one_line_no_longer_than_it_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with TerminalSink(stream) as sink:
        sink.write(1, {A: 1.0})
        sink.write(2, {"x" * 50: 1.0})
    assert stream.getvalue() == "\rstep 1  a 1\x1b[K\rstep 2  xxxxxxxxxxx\x1b[K\n"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with TerminalSink(stream) as sink:
        sink.write(1, {A: 1.0})
    assert stream.getvalue() == "step 1  a 1\n"


def test_the_terminal_is_stderr_and_every_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    TerminalSink().write(1, {A: math.nan})
    assert capsys.readouterr().err == "step 1  a nan\n"
    for every in (0, 1.5, True):
        with pytest.raises(FastregError, match="every"):
            TerminalSink(every=every)
