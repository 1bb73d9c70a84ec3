"""Every recipe of the catalogue in its quick form, and the command that runs them."""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fastreg.cli import main
from fastreg.errors import FastregError
from fastreg.recipes import recipe_cli
from fastreg.recipes.catalogue import Recipe, catalogue, recipe
from fastreg.recipes.recipe_cli import perform

NAMES = sorted(catalogue())


@cache
def quick(name: str) -> dict[str, Any]:
    return perform(recipe(name), recipe(name).quick)


@pytest.mark.parametrize("name", NAMES)
def test_quick_ends_in_seconds(name: str) -> None:
    start = time.process_time()
    quick(name)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_json_with_its_provenance(name: str) -> None:
    contents = quick(name)
    assert json.loads(json.dumps(contents, allow_nan=False)) == contents
    assert contents["config"] == json.loads(json.dumps(asdict(recipe(name).quick)))
    assert contents["result"] and contents["seconds"] > 0
    assert {"fastreg", "torch"} <= set(contents["environment"])


@pytest.mark.parametrize("name", NAMES)
def test_the_table_has_rows_and_a_verdict(name: str) -> None:
    lines = recipe(name).table(quick(name)["result"]).splitlines()
    assert len(lines) >= 3
    assert any(re.search(r"\d", line) for line in lines)
    # The verdict is a sentence, unlike the rows above it.
    assert len(re.findall(r"[a-z]{3,}", lines[-1])) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_the_figure_shows_something(name: str) -> None:
    figure = Figure()
    recipe(name).draw(figure, quick(name)["result"])
    panels = figure.get_axes()
    assert panels
    for panel in panels:
        assert panel.has_data() and panel.get_xlabel() + panel.get_ylabel()


@pytest.mark.parametrize("name", NAMES)
def test_the_module_cites_the_paper_and_the_fields_have_help(name: str) -> None:
    entry = recipe(name)
    number = re.search(r"\d{4}\.\d{5}", entry.paper)
    assert number and number.group() in (sys.modules[entry.run.__module__].__doc__ or "")
    assert entry.claim.endswith(".")
    assert all(f.metadata.get("help") for f in entry.config.__dataclass_fields__.values())
    assert isinstance(entry.quick, entry.config)
    assert all(isinstance(config, entry.config) for _, config in entry.presets)
    assert entry.steps(entry.quick) >= 1


@pytest.mark.parametrize("name", ["plateau", "spectrum", "sharpness"])
def test_the_same_configuration_gives_the_same_result(name: str) -> None:
    assert perform(recipe(name), recipe(name).quick)["result"] == quick(name)["result"]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(FastregError, match=r"recipe: name must be one of \[.*'plateau'.*\], got 'plato'"):
        recipe("plato")


@dataclass(frozen=True)
class Config:
    """One field of every type."""

    count: int = field(default=3, metadata={"help": "100% of them"})
    rate: float = field(default=0.5, metadata={"help": "rate"})
    word: str = field(default="a", metadata={"help": "word", "choices": ("a", "b")})
    flag: bool = field(default=True, metadata={"help": "flag"})
    many: tuple[int, ...] = field(default=(1, 2), metadata={"help": "many"})


def echo(config: Config, progress: object) -> dict[str, Any]:
    if config.count < 0:
        raise FastregError(f"echo: count must be >= 0, got {config.count}")
    return {**asdict(config), "ratio": float("nan")}


@pytest.fixture
def echoed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A catalogue of one recipe whose result is its configuration."""
    entry = Recipe(
        name="echo", paper="Nobody 2020, arXiv:2001.00001", claim="Echoes.", config=Config, quick=Config(count=1),
        steps=lambda config: 1, run=echo, table=lambda result: f"count {result['count']}",
        draw=lambda figure, result: figure.add_subplot().plot([1, 2]), presets=(("large", Config(count=9, rate=2.0)),),
    )  # fmt: skip
    monkeypatch.setattr(recipe_cli, "catalogue", lambda: {"echo": entry})
    monkeypatch.setattr(recipe_cli, "recipe", lambda name: entry)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], Config()),
        (["--quick"], Config(count=1)),
        (["--preset", "large"], Config(count=9, rate=2.0)),
        (["--preset", "large", "--rate", "4"], Config(count=9, rate=4.0)),
        (["--quick", "--count", "0"], Config(count=0)),
        (["--no-flag", "--word", "b", "--many", "5", "6", "7"], Config(flag=False, word="b", many=(5, 6, 7))),
    ],
)
def test_options_make_the_configuration(echoed: Path, options: list[str], expected: Config) -> None:
    assert main(["recipe", "echo", "--no-plot", "--output", str(echoed), *options]) == 0
    contents = json.loads((echoed / "result.json").read_text())
    assert contents["config"] == json.loads(json.dumps(asdict(expected)))
    assert contents["result"]["ratio"] is None
    assert [path.name for path in echoed.iterdir()] == ["result.json"]


def test_a_run_writes_its_figure_and_prints_its_table(echoed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = echoed.with_name("copy.json")
    assert main(["recipe", "echo", "--output", str(echoed), "--json", str(copy)]) == 0
    assert {path.name for path in echoed.iterdir()} == {"result.json", "echo.png", "echo.svg"}
    assert copy.read_text() == (echoed / "result.json").read_text()
    assert capsys.readouterr().out.startswith("count 3\nwrote ")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["echo", "--counts", "3"], r"arguments must be among .*--output.*--count.*--no-flag.*, got --counts 3"),
        (["echo", "--cou", "3"], "got --cou 3"),
        (["echo", "--count", "x"], "invalid int value: 'x'"),
        (["echo", "--word", "c"], "invalid choice: 'c'"),
        (["echo", "--preset", "tiny"], "invalid choice: 'tiny'"),
        (["echo", "--preset", "large", "--quick"], "not allowed with"),
        (["ecco"], "invalid choice: 'ecco'"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(
    echoed: Path, options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["recipe", *options])
    assert exit_info.value.code == 2
    assert re.search(complaint, capsys.readouterr().err)


def test_what_the_recipe_refuses_ends_with_status_1(echoed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "echo", "--count", "-1", "--no-plot", "--output", str(echoed)]) == 1
    assert capsys.readouterr().err == "error: echo: count must be >= 0, got -1\n"
    assert not echoed.exists()


def test_help_tells_options_and_defaults(echoed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipe", "echo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "100% of them (default: 3)" in text and "(default: 1 2)" in text and "--flag, --no-flag" in text


def test_the_list_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe"]) == 0
    text = capsys.readouterr().out
    assert all(f"{entry.name}\n    {entry.claim}\n    {entry.paper}" in text for entry in catalogue().values())
