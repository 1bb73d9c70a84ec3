"""The types that a user of the package sees, as mypy reads them in strict mode."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import fastreg.kernels

ROOT = Path(__file__).resolve().parent.parent
USAGE = ROOT / "tests" / "typing_usage.py"

checked = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="mypy is not installed (make types installs it)"
)


def reported(tmp_path: Path) -> set[tuple[int, str]]:
    """Line and code of every error that mypy finds in the usage file."""
    # In a checkout the kernels are another folder than their place in the package: as an installed one has them.
    package = tmp_path / "fastreg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "kernels").symlink_to(Path(fastreg.kernels.__file__).parent)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--no-pretty", USAGE]
    environment = os.environ | {"MYPYPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "Success" in found.stdout or re.search(r"Found \d+ errors", found.stdout), found.stdout + found.stderr
    pattern = re.compile(rf"{re.escape(USAGE.name)}:(\d+): error: .*\[([a-z-]+)\]$")
    return {(int(hit[1]), hit[2]) for line in found.stdout.splitlines() if (hit := pattern.search(line))}


def expected() -> set[tuple[int, str]]:
    """Line and code of every wrong use."""
    lines = enumerate(USAGE.read_text(encoding="utf-8").splitlines(), 1)
    return {(number, hit[1]) for number, line in lines if (hit := re.search(r"# E: ([a-z-]+)$", line))}


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("fastreg").joinpath("py.typed").is_file()


@checked
def test_right_uses_have_their_types_and_wrong_ones_are_reported(tmp_path: Path) -> None:
    wrong = expected()
    assert len(wrong) > 10
    assert reported(tmp_path) == wrong
