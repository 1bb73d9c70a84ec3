"""The command line's dispatcher and ``fastreg env``."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

import fastreg._C
from fastreg import cli, environment
from fastreg.errors import FastregError
from fastreg.kernels import backend, registry


def raise_refusal(_args: object) -> int:
    raise FastregError("boom: size must be positive, got 0 (pass --size)")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A subcommand ``boom`` whose ``run`` the test may replace."""
    module = SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--size", type=int, default=0),
        run=lambda args: args.size,
    )
    monkeypatch.setitem(sys.modules, "boom_command", module)
    monkeypatch.setitem(cli.COMMANDS, "boom", cli.Command("boom_command", "fails", ("fastreg boom",)))
    return module


def env_report(capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    assert cli.main(["env", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_status_is_that_of_the_subcommand(command: SimpleNamespace) -> None:
    assert cli.main(["boom", "--size", "3"]) == 3


def test_refusal_is_one_line_on_stderr(command: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = raise_refusal
    assert cli.main(["boom"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: boom: size must be positive, got 0 (pass --size)\n"
    assert captured.out == ""


def test_refusal_while_arguments_are_declared_is_one_line_too(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    command.add_arguments = raise_refusal
    assert cli.main(["boom"]) == 1
    assert capsys.readouterr().err.startswith("error: boom: ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance' (choose from env, check,"),
        (["chekc"], "invalid choice: 'chekc', did you mean check? (choose from"),
        (["env", "--yaml"], "arguments must be among --help, --json, --kernels, got --yaml"),
        (["env", "--jason"], "got --jason, did you mean --json?"),
        (["env", "--js"], "got --js"),
        (["boom", "--size", "big"], "invalid int value: 'big'"),
    ],
)
def test_wrong_use_exits_2_and_says_why(
    command: SimpleNamespace, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert complaint in capsys.readouterr().err


def test_help_names_every_command_and_gives_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for name, entry in cli.COMMANDS.items():
        assert f"    {name} " in text
        assert entry.examples[0] in text


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help_with_examples_and_exit_statuses(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([name, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: fastreg {name}" in text
    assert all(f"\n  {example}\n" in text for example in cli.COMMANDS[name].examples)
    assert "exit status:\n  0    done\n" in text


def parsed(*path: str) -> set[str]:
    """The options of the subcommand at ``path``."""
    parser = cli.build_parser(path[0])
    for name in path:
        parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[name]
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("command", [example for entry in cli.COMMANDS.values() for example in entry.examples])
def test_examples_of_the_help_are_of_options_that_exist(command: str) -> None:
    program, name, *words = command.partition(" >")[0].split()
    assert program == "fastreg"
    path = [name, *words[:1]] if name == "recipe" and words else [name]
    assert {word for word in words if word.startswith("-")} <= parsed(*path)


def test_a_command_imports_only_its_own_module() -> None:
    script = (
        "import sys; from fastreg.cli import COMMANDS, main; main(['env']); "
        "assert {c.module for c in COMMANDS.values()} & set(sys.modules) == {'fastreg.environment'}"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_installed_as_a_command() -> None:
    (entry,) = metadata.entry_points(group="console_scripts", name="fastreg")
    assert entry.load() is cli.main


def test_env_reports_versions_system_and_modules(capsys: pytest.CaptureFixture[str]) -> None:
    report = env_report(capsys)
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["system"]["isa"] == fastreg._C.isa()
    assert report["system"]["openmp_threads"] == torch.get_num_threads()
    assert report["modules"]["_C"]["present"]
    assert len(report["devices"]) == 1 + torch.cuda.device_count()


def test_env_lists_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    report = env_report(capsys)
    assert set(report["ops"]) == set(registry())
    assert all(kinds["cpu"]["reference"] is None for kinds in report["ops"].values())


def test_env_shows_a_forced_backend(capsys: pytest.CaptureFixture[str]) -> None:
    with backend("reference"):
        report = env_report(capsys)
    for kinds in report["ops"].values():
        passed_over = {name: reason for name, reason in kinds["cpu"].items() if name != "reference"}
        assert all(reason == "backend 'reference' is forced" for reason in passed_over.values())


def test_env_text_has_every_fact_of_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = env_report(capsys)
    cli.main(["env"])
    text = capsys.readouterr().out
    facts = [*report["versions"], *report["system"], *report["modules"], *report["ops"]]
    facts += [module["detail"] for module in report["modules"].values()]
    assert not [fact for fact in facts if fact not in text]


def test_missing_package_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", {"no-such-distribution": ("dreams", "go to sleep")})
    assert environment.package_versions()["no-such-distribution"] is None
    text = environment.format_report(environment.collect())
    assert "no-such-distribution  not installed: dreams (go to sleep)" in text


def test_module_of_another_version_is_called_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__version__", "999.0")
    module = environment.native_module("_C")
    assert module.detail == f"stale: built from fastreg {fastreg._C.version()} (reinstall fastreg)"


def test_module_without_a_build_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    monkeypatch.setattr(environment, "build_info", dict)
    module = environment.native_module("_C")
    assert not module.present
    assert "pip install" in module.detail


def test_cuda_module_agrees_with_torch_or_reports_the_driver() -> None:
    if not environment.build_info()["_cuda"]["built"]:
        assert not environment.native_module("_cuda").present
        return
    import fastreg._cuda

    if torch.cuda.is_available():
        assert fastreg._cuda.device_count() == torch.cuda.device_count()
        return
    with pytest.raises(RuntimeError, match="device_count: CUDA error"):
        fastreg._cuda.device_count()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loaded_code_fits_the_device() -> None:
    expected = 900 if torch.cuda.get_device_capability(0) == (9, 0) else 800
    assert environment.code_arch(0) == expected
