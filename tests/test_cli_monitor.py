"""``fastreg monitor``, which reads what sinks have written."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from fastreg.cli import main
from fastreg.monitor_cli import sparkline
from fastreg.sinks import CSVSink, JSONLSink, Sink

A = "fastreg/a"


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


@pytest.mark.parametrize(("suffix", "start"), [(".PNG", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_plot_is_of_the_format_that_its_name_says(suffix: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, plot = tmp_path / "run.csv", tmp_path / f"run{suffix}"
    path.write_text("step,a\n1,2\n2,3\n")
    assert main(["monitor", str(path), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("option", "word", "complaint"),
    [
        *(("--plot", name, "must end in .png, .svg, .pdf") for name in ("run.gif", "run.txt", "run")),
        *(("--last", number, "must be an integer of at least 1") for number in ("0", "-1", "1.5", "many")),
    ],
)
def test_a_wrong_command_line_ends_before_the_file_is_read(
    option: str, word: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["monitor", "no such file", option, word])
    assert exit_info.value.code == 2
    assert f"argument {option}: {complaint}, got '{word}'" in capsys.readouterr().err


def test_the_document_has_the_figures_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.csv").write_text("step,a,b\n2,inf,nan\n4,1,nan\n9,4,nan\n")
    assert main(["monitor", str(tmp_path / "run.csv"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    steps = {"rows": 3, "first_step": 2, "last_step": 9}
    assert metrics["a"] == {**steps, "last": 4.0, "mean": 2.5, "min": 1.0, "max": 4.0}
    assert metrics["b"] == {**steps, "last": None, "mean": None, "min": None, "max": None}
