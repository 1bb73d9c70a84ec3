"""What every subcommand does to standard output and standard error, to pipes, interrupts and other encodings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastreg import cli
from fastreg.cli_output import deliver
from fastreg.errors import FastregError

ROOT = Path(__file__).resolve().parents[1]


def only_document(text: str) -> object:
    """The one JSON document that the text is, by the standard's grammar: without NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(text, parse_constant=refuse)


def python(*arguments: str, stdout: int = subprocess.PIPE, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, encoding="utf-8", cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A subcommand ``boom`` with ``--json`` whose ``run`` the test sets."""
    module = SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--json", action="store_true"))
    monkeypatch.setitem(sys.modules, "boom_command", module)
    monkeypatch.setitem(cli.COMMANDS, "boom", cli.Command("boom_command", "fails", ("fastreg boom",), ("bang",)))
    return module


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["env"], "versions"),
        (["check", "examples.tiny_gpt:problem"], "parameters"),
        (["monitor", "run.csv"], "metrics"),
        (["recipe"], "recipes"),
        (["recipes"], "recipes"),
        (["recipe", "plateau", "--quick", "--runs", "20", "--output", "out"], "result"),
    ],
    ids=lambda value: "_".join(value[:3]) if isinstance(value, list) else "",
)
def test_with_json_the_output_is_one_document(
    arguments: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    Path("run.csv").write_text("step,a\n1,nan\n2,3\n")
    assert cli.main([*arguments, "--json"]) == 0
    assert key in only_document(capsys.readouterr().out)


def test_json_before_the_name_of_a_recipe_counts_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = ["plateau", "--quick", "--runs", "20", "--no-plot", "--output", str(tmp_path)]
    assert cli.main(["recipe", "--json", *after]) == 0
    printed = capsys.readouterr()
    assert only_document(printed.out)["recipe"] == "plateau"
    assert only_document((tmp_path / "result.json").read_text()) == only_document(printed.out)
    assert f"wrote {tmp_path / 'result.json'}" in printed.err


def test_a_refusal_is_a_document_with_json_and_its_reason_on_stderr(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_args: object) -> int:
        raise FastregError("boom: no")

    command.run = refuse
    assert cli.main(["boom", "--json"]) == 1
    printed = capsys.readouterr()
    assert (only_document(printed.out), printed.err) == ({"error": "boom: no"}, "error: boom: no\n")
    assert cli.main(["boom"]) == 1
    assert capsys.readouterr().out == ""


def test_a_file_that_cannot_be_opened_is_named_without_a_traceback(
    command: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = lambda _args: len((tmp_path / "missing").read_text())
    assert cli.main(["boom"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'missing'}: No such file or directory\n"


def test_an_error_of_the_system_that_is_no_file_is_a_traceback(command: SimpleNamespace) -> None:
    def fail(_args: object) -> int:
        raise OSError("weather")

    command.run = fail
    with pytest.raises(OSError, match="weather"):
        cli.main(["boom"])


def test_an_alias_is_the_command(command: SimpleNamespace) -> None:
    command.run = lambda _args: 7
    assert cli.main(["bang"]) == 7


def test_an_interrupt_ends_with_130_and_no_traceback() -> None:
    script = (
        "import os, signal, sys\n"
        "from fastreg import cli, environment\n"
        "environment.collect = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(cli.main(['env']))"
    )
    process = python("-c", script)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    read, write = os.pipe()
    process = python("-m", "fastreg", "env", stdout=write)
    os.close(write)
    os.close(read)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


def test_output_fits_any_encoding_and_has_no_escapes(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text("step,a\n1,2\n2,3\n")
    arguments = ["-m", "fastreg", "monitor", str(tmp_path / "run.csv")]
    process = python(*arguments, PYTHONIOENCODING="ascii", TERM="dumb", NO_COLOR="1")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[1].split()[:3] == ["a", "2", "3"]
    assert out.isascii() and "\x1b" not in out


def test_a_document_goes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "a.json"
    for target in (None, False, file, True):
        deliver({"a": [1.0, float("-inf")]}, target)
    out = capsys.readouterr().out
    assert out.startswith(f"wrote {file}\n{{")
    assert only_document(out.partition("\n")[2]) == only_document(file.read_text()) == {"a": [1.0, None]}
