"""What is shipped: sdist and wheel contents, and builds that lack their tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import fastreg._C
from fastreg._version import __version__

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")
BUILD_INPUTS = ("csrc", "fastreg", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
# What work in a checkout leaves behind or keeps beside the package; none of it may ship.
LEAVINGS = (
    "fastreg/__pycache__/errors.cpython-311.pyc",
    "fastreg/optim/.ruff_cache/left",
    "kernels/__pycache__/left.pyc",
    "tests/test_left.py",
    "tests/oracle.py",
    "examples/left.py",
    "runs/left.json",
)
# A name that is None in sys.modules cannot be imported: all that a build needs are its declared requirements.
BUILD_SCRIPT = """
import sys
sys.modules.update(torch=None, triton=None, numpy=None)
import setuptools.build_meta as backend
print("built:", backend.build_{kind}("dist"))
"""
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false", "FASTREG_CUDA": "0"}


def copy_sources(target: Path) -> Path:
    """A copy of what a build reads, without anything an earlier build left in the checkout."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "_build_info.json")
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            target.mkdir(exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def run(command: list[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


def build(tree: Path, kind: str, **variables: str) -> Path:
    """Build the ``kind`` ("sdist" or "wheel") of ``tree`` through its backend, as pip does, with no torch to be had."""
    result = run([sys.executable, "-c", BUILD_SCRIPT.format(kind=kind)], tree, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return tree / "dist" / result.stdout.rpartition("built: ")[2].strip()


def python_files(folder: Path, prefix: str) -> set[str]:
    return {prefix + path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources") / "tree")


@pytest.fixture(scope="module")
def sdist(sources: Path) -> Path:
    for name in LEAVINGS:
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_text("left\n", encoding="utf-8")
    return build(sources, "sdist", FASTREG_CUDA="0")


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"fastreg-{__version__}"


@pytest.fixture(scope="module")
def wheel_names(unpacked: Path) -> list[str]:
    """Names in a wheel that is built from the sdist, over the leavings of a build with CUDA."""
    # Optimising is what takes the time, and only names are read.
    compiler = unpacked / "quick-c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0\n', encoding="utf-8")
    compiler.chmod(0o755)
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = unpacked / "build" / f"lib.{tag}" / "fastreg" / f"_cuda{EXTENSION}"
    stale.parent.mkdir(parents=True)
    stale.touch()
    path = build(unpacked, "wheel", CC=str(compiler), CXX=str(compiler), FASTREG_CUDA="0")
    assert not stale.exists()
    return zipfile.ZipFile(path).namelist()


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which pip installed a wheel that was built where no compiler works."""
    folder = tmp_path_factory.mktemp("bare")
    wheel = build(copy_sources(folder / "tree"), "wheel", **NO_COMPILER)
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", "site"]
    result = run([*command, str(wheel)], folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "site"


def test_wheel_holds_every_module_under_fastreg(sources: Path, wheel_names: list[str]) -> None:
    modules = python_files(sources / "fastreg", "fastreg/") | python_files(sources / "kernels", "fastreg/kernels/")
    assert {name for name in wheel_names if name.endswith(".py")} == modules


def test_wheel_holds_the_license(wheel_names: list[str]) -> None:
    assert any(name.endswith("LICENSE") for name in wheel_names)


def test_wheel_holds_nothing_else_and_nothing_stale(wheel_names: list[str]) -> None:
    assert {name.partition("/")[0] for name in wheel_names} == {"fastreg", f"fastreg-{__version__}.dist-info"}
    others = {name for name in wheel_names if name.startswith("fastreg/") and not name.endswith(".py")}
    assert others == {f"fastreg/_C{EXTENSION}", "fastreg/py.typed", "fastreg/_build_info.json"}


def test_sdist_holds_what_a_build_reads_and_nothing_else(sources: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    modules = python_files(sources / "fastreg", "fastreg/") | python_files(sources / "kernels", "kernels/")
    assert modules | {"fastreg/py.typed", "pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"csrc", "fastreg", "fastreg.egg-info", "kernels"}
    assert not names & set(LEAVINGS)


def test_sdist_holds_every_native_source(sources: Path, unpacked: Path) -> None:
    expected = {path.name for path in (sources / "csrc").iterdir()}
    assert {path.name for path in (unpacked / "csrc").iterdir()} == expected
    assert not (unpacked / "fastreg" / "_build_info.json").exists()


def run_installed(site: Path, *arguments: str) -> str:
    """Output of Python with the package in ``site`` in front.

    ``-S`` keeps out the finder of an editable install, which would lend its own native modules.
    """
    path = os.pathsep.join([str(site), *(entry for entry in sys.path if entry)])
    result = run([sys.executable, "-S", *arguments], site, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_compiler_env_says_what_is_missing_and_why(without_compiler: Path) -> None:
    script = "import fastreg.kernels as k; from fastreg.cli import main; print(k.__file__); main(['env', '--json'])"
    origin, _, text = run_installed(without_compiler, "-c", script).partition("\n")
    assert Path(origin).is_relative_to(without_compiler)
    report = json.loads(text)
    assert not report["modules"]["_C"]["present"]
    assert "no working C++17 compiler" in report["modules"]["_C"]["detail"]
    assert "apt-get install g++" in report["modules"]["_C"]["detail"]
    assert "FASTREG_CUDA=0" in report["modules"]["_cuda"]["detail"]
    for kinds in report["ops"].values():
        assert kinds["cpu"]["reference"] is None
        assert kinds["cpu"].get("native", "absent") is not None


def fake_nvcc(folder: Path) -> str:
    """A CUDA_HOME whose nvcc rejects everything."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'unsupported host compiler' >&2\nexit 1\n", encoding="utf-8")
    nvcc.chmod(0o755)
    return str(folder)


def test_cuda_is_an_error_only_where_it_was_asked_for(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    variables = NO_COMPILER | {"CUDA_HOME": fake_nvcc(tmp_path / "cuda")}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    forced = run(command, tree, **variables | {"FASTREG_CUDA": "1"})
    assert forced.returncode != 0
    assert "FASTREG_CUDA=1 but nvcc failed: unsupported host compiler" in forced.stdout + forced.stderr
    automatic = run(command, tree, **variables | {"FASTREG_CUDA": "auto"})
    assert automatic.returncode == 0, automatic.stderr
    info = json.loads((tree / "fastreg" / "_build_info.json").read_text(encoding="utf-8"))
    assert not info["_cuda"]["built"]
    assert "unsupported host compiler" in info["_cuda"]["detail"]


def test_cuda_switch_takes_three_values(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    command = [sys.executable, "setup.py", "build_ext"]
    result = run(command, tree, **NO_COMPILER | {"FASTREG_CUDA": "yes"})
    assert result.returncode != 0
    assert "FASTREG_CUDA must be auto, 0 or 1, got 'yes'" in result.stdout + result.stderr


def test_code_the_compiler_rejects_is_an_error(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path / "tree")
    for source in (tree / "csrc").glob("*.c*"):
        source.write_text("#error rejected\n", encoding="utf-8")
    info = tree / "fastreg" / "_build_info.json"
    info.write_text('{"_C": {"built": true, "detail": "an earlier build"}}', encoding="utf-8")
    result = run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, FASTREG_CUDA="0")
    assert result.returncode != 0
    assert "rejected" in result.stdout + result.stderr
    assert not info.exists()


def test_version_comes_from_one_place(tmp_path: Path) -> None:
    assert metadata.version("fastreg") == __version__ == fastreg._C.version()
    tree = copy_sources(tmp_path / "tree")
    (tree / "fastreg" / "_version.py").write_text('__version__ = "7.8.9"\n', encoding="utf-8")
    wheel = build(tree, "wheel", **NO_COMPILER)
    assert wheel.name.startswith("fastreg-7.8.9-")
    (described,) = metadata.distributions(path=[str(wheel)])
    assert (described.version, described.metadata["License-Expression"]) == ("7.8.9", "Apache-2.0")
    assert "fastreg-7.8.9" in build(tree, "sdist", **NO_COMPILER).name


def test_native_module_shares_torch_threads() -> None:
    assert fastreg._C.max_threads() == torch.get_num_threads()
