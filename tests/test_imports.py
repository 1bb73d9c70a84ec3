"""Who may import whom, in Python and in C++."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import those of its own line and of the lines above it. A module that is not listed
# is held only to the rule that imports have no cycle.
LAYERS = (
    ("fastreg._C", "fastreg._cuda", "fastreg.errors", "fastreg._version", "fastreg.optional"),
    ("fastreg.delivered", "fastreg.hosted", "fastreg.peek"),
    ("fastreg.kernels",),
    ("fastreg.micro_batches", "fastreg.loss", "fastreg.weights"),
    ("fastreg.normalize", "fastreg.cross_entropy", "fastreg.attention", "fastreg.fused_attention"),
    ("fastreg.session", "fastreg.rules", "fastreg.sharding", "fastreg.recording"),
    ("fastreg.attach", "fastreg.chain", "fastreg.graph_walk", "fastreg.ranks"),
    ("fastreg.repeatable", "fastreg.rerun", "fastreg.recompute"),
    ("fastreg.curvature",),
    ("fastreg.penalties",),
    ("fastreg.perturbed_passes", "fastreg.perturbed_penalty", "fastreg.perturbed_step"),
    ("fastreg.self_check", "fastreg.sinks", "fastreg.stats", "fastreg.regularizer"),
    ("fastreg.monitor", "fastreg.sampling", "fastreg.tracing"),
    ("fastreg.noise",),
    ("fastreg.check",),
    ("fastreg", "fastreg.models"),
    ("fastreg.kernel_report",),
    (
        "fastreg.recipes",
        "fastreg.benchmark",
        "fastreg.environment",
        "fastreg.integrations",
        "fastreg.check_cli",
        "fastreg.monitor_cli",
        "fastreg.cli",
    ),
)


def module_names() -> dict[str, Path]:
    """Every module of the package by its import name."""
    found = {}
    for folder, prefix in (("fastreg", "fastreg"), ("kernels", "fastreg.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([prefix, *(part for part in parts if part != "__init__")])] = path
    return found


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def imported(path: Path, known: set[str]) -> set[str]:
    """Modules of fastreg that a file imports; relative imports are a failure."""
    targets: set[str] = set()
    for node in runtime_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            targets |= {name if name in known else str(node.module) for name in full}
    return {name for name in targets if name == "fastreg" or name.startswith("fastreg.")}


@pytest.fixture(scope="module")
def import_graph() -> dict[str, set[str]]:
    modules = module_names()
    known = {*modules, "fastreg._C", "fastreg._cuda"}
    return {name: imported(path, known) - {name} for name, path in modules.items()}


def layer(name: str) -> int | None:
    """Line of LAYERS that a module belongs to, by its longest listed prefix."""
    while name not in {member for line in LAYERS for member in line}:
        name, dot, _ = name.rpartition(".")
        if name == "fastreg" or not dot:
            return None
    return next(rank for rank, line in enumerate(LAYERS) if name in line)


def test_imports_point_one_way(import_graph: dict[str, set[str]]) -> None:
    upward = [
        f"{source} -> {target}"
        for source, targets in import_graph.items()
        for target in targets
        if None not in (low := layer(target), high := layer(source)) and low > high
    ]
    assert not upward


def test_imports_have_no_cycle(import_graph: dict[str, set[str]]) -> None:
    # A package's __init__ re-exports its members, so a member that imports it closes a cycle.
    assert len(list(TopologicalSorter(import_graph).static_order())) >= len(import_graph)


def test_kernels_import_only_native_modules_and_errors(import_graph: dict[str, set[str]]) -> None:
    outside = {
        f"{source} -> {target}"
        for source, targets in import_graph.items()
        for target in targets
        if source.startswith("fastreg.kernels") and not target.startswith("fastreg.kernels")
    }
    allowed = ("fastreg._C", "fastreg._cuda", "fastreg.errors")
    assert not {edge for edge in outside if not edge.endswith(allowed)}


def test_native_code_knows_no_torch_and_python_only_in_the_bindings() -> None:
    for path in sorted((ROOT / "csrc").iterdir()):
        includes = re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"))
        roots = {name.partition("/")[0] for name in includes}
        assert not roots & {"torch", "ATen", "c10", "caffe2"}, path.name
        if not path.name.startswith("bind_"):
            assert not roots & {"pybind11", "Python.h"}, path.name


@pytest.mark.parametrize("use", ["from kernels import outer_sum", "import kernels; kernels.outer_sum"])
def test_what_is_in_bare_kernels_is_refused(use: str) -> None:
    command = [sys.executable, "-c", use]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "ImportError: this folder is imported as fastreg.kernels" in result.stderr


def test_bare_kernels_has_no_modules_and_answers_those_who_ask_for_a_version() -> None:
    # Hugging Face's transformers and diffusers look so for a package of this name, without catching errors.
    probe = "import kernels, importlib; print(getattr(kernels, '__version__', 'none'), kernels.__file__)"
    command = [sys.executable, "-c", f"{probe}; importlib.import_module('kernels.outer_sum')"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("none ")
    assert "ModuleNotFoundError: No module named 'kernels.outer_sum'" in result.stderr
