"""Sinks and the ``fastreg monitor`` command that reads what they write."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from fastreg.cli import main
from fastreg.errors import FastregError
from fastreg.monitor_cli import sparkline
from fastreg.sinks import CSVSink, JSONLSink, MemorySink, Sink, TensorBoardSink, TerminalSink

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


def test_a_pipe_gets_plain_lines_of_every_nth_step() -> None:
    stream = io.StringIO()
    with TerminalSink(stream, every=5) as sink:
        for step in range(1, 11):
            sink.write(step, {A: step / 3})
    assert stream.getvalue() == "step 5  a 1.667\nstep 10  a 3.333\n"


def test_a_terminal_gets_one_line_no_longer_than_it_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    with TerminalSink(stream) as sink:
        sink.write(1, {A: 1.0})
        sink.write(2, {"x" * 50: 1.0})
    assert stream.getvalue() == "\rstep 1  a 1\x1b[K\rstep 2  xxxxxxxxxxx\x1b[K\n"


def test_the_terminal_is_stderr_and_every_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    TerminalSink().write(1, {A: math.nan})
    assert capsys.readouterr().err == "step 1  a nan\n"
    for every in (0, 1.5, True):
        with pytest.raises(FastregError, match="every"):
            TerminalSink(every=every)


@pytest.mark.parametrize("kind", [CSVSink, JSONLSink])
def test_the_command_summarises_what_a_sink_wrote(
    kind: type[Sink], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "run.log")
    for steps in ((0, 1, 2, 3), (2, 3, 4)):
        with kind(path) as sink:
            for step in steps:
                sink.write(step, {A: float(step * len(steps)), "b": math.nan if step == 4 else 2.0})
    # Steps 2 and 3 were written again by the resumed run: a is 0, 4, then 6, 9, 12.
    assert main(["monitor", path]) == 0
    header, a, b = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["metric", "rows", "last", "mean", "min", "max", "trend"]
    assert a == [A, "5", "12", "6.2", "0", "12", "▁▃▅▆█"]
    assert b == ["b", "5", "nan", "2", "2", "2", "▁▁▁▁"]
    assert main(["monitor", path, "--metric", A, "--last", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [header, [A, "2", "12", "10.5", "9", "12", "▁█"]]


def test_statistics_are_over_finite_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.csv").write_text("step,a,b\n1,inf,nan\n2,1,nan\n3,-inf,nan\n4,4,nan\n")
    assert main(["monitor", str(tmp_path / "run.csv")]) == 0
    a, b = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert a == ["a", "4", "4", "2.5", "1", "4", "▁", "█"]
    assert b == ["b", "4", "nan", "nan", "nan", "nan"]


def test_a_sparkline_fits_and_keeps_the_shape() -> None:
    assert sparkline([float(i) for i in range(8)]) == "▁▂▃▄▅▆▇█"
    long = sparkline([float(i) for i in range(1001)])
    assert len(long) == 40
    assert list(long) == sorted(long) and set(long) == set("▁▂▃▄▅▆▇█")
    assert sparkline([1.0, math.nan, math.inf, 2.0]) == "▁  █"
    assert sparkline([math.nan]) == " "


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "at least one row"),
        ("step,a\n", "at least one row"),
        ("step,a\n1,2\n3\n", "line 3 of"),
        ("step,a\n1,high\n", "line 2 of"),
        ("name,a\n1,2\n", "line 2 of"),
        ("step,a\ninf,2\n", "line 2 of"),
        ('{"step": 1, "a": 2}\n{"step": 2, "a"', "line 2 of"),
        ('{"a": 2}\n', "line 1 of"),
        ('{"step": 1, "a": []}\n', "line 1 of"),
        ('{"step": 1, "a": 2}\n[1]\n', "line 2 of"),
    ],
)
def test_a_malformed_file_is_refused_by_line(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text(text)
    assert main(["monitor", str(tmp_path / "run")]) == 1
    assert complaint in capsys.readouterr().err


def test_requests_that_cannot_be_served_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").write_text("step,a\n1,2\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for arguments, complaint in (
        (["missing"], "missing"),
        (["run", "--metric", "b"], "['a'], got ['b']"),
        (["run", "--last", "0"], "--last must be at least 1, got 0"),
        (["run", "--plot", "run.png"], "pip install 'fastreg[demo]'"),
    ):
        assert main(["monitor", str(tmp_path / arguments[0]), *arguments[1:]]) == 1
        assert complaint in capsys.readouterr().err


def test_the_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image")
    path, plot = tmp_path / "run.csv", tmp_path / "plots" / "run.png"
    path.write_text("step,a,b\n1,2,3\n2,nan,4\n")
    assert main(["monitor", str(path), "--plot", str(plot)]) == 0
    one = tmp_path / "one.png"
    assert main(["monitor", str(path), "--plot", str(one), "--metric", "a"]) == 0
    assert image.imread(plot).std() > 0
    assert image.imread(plot).shape[0] > image.imread(one).shape[0]
    assert main(["monitor", str(path), "--plot", str(tmp_path / "run.txt")]) == 1
    assert "--plot must end in one of" in capsys.readouterr().err
