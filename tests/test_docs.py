"""The documentation: its code runs, its links lead somewhere, its errors are raised as told, and Sphinx builds it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastreg
from fastreg.recipes.catalogue import catalogue
from test_theory_docs import anchors, resolved

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
BUILT = DOCS / "_build"
PAGES = {
    str(page.relative_to(DOCS)): page.read_text(encoding="utf-8")
    for page in sorted(DOCS.rglob("*.md"))
    if BUILT not in page.parents
}
# Pages that were there before the site: test_theory_docs.py and the tests they name hold those.
OLDER = {"architecture.md", "decisions.md", "edge_of_stability.md", "experiment.md", "kernels.md", "memory.md",
         "mixed_precision.md", *(name for name in PAGES if name.startswith("theory/"))}  # fmt: skip
WRITTEN = sorted(set(PAGES) - OLDER)
ERRORS = re.findall(r"^## (.+?)$(.*?)(?=^## |\Z)", PAGES["faq.md"], re.S | re.M)
BLOCK = re.compile(r"^```python( raises)?\n(.*?)^```", re.S | re.M)
FORMULA = re.compile(r'<div class="highlight-text.*?<pre>(.*?)</pre>', re.S)
LARGEST = 300_000
NEEDED = ("sphinx", "furo", "myst_parser", "latex2mathml")
OPTIONAL = ("accelerate", "lightning", "transformers")
MISSING = [name for name in NEEDED if find_spec(name) is None]


def prose(name: str) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", PAGES[name], flags=re.S | re.M)


def blocks_of(name: str, *packages: str) -> list[tuple[str, str]]:
    """The code of a page, without blocks that import other optional packages than these."""
    others = re.compile(rf"^(?:from|import) ({'|'.join(set(OPTIONAL) - set(packages))})", re.M)
    return [block for block in BLOCK.findall(PAGES[name]) if not others.search(block[1])]


def run(blocks: list[tuple[str, str]], name: str, namespace: dict[str, object]) -> list[str]:
    """Run a page's blocks in order; the messages of those that must raise."""
    messages = []
    for raises, block in blocks:
        code = compile(block, name, "exec", dont_inherit=True)
        if not raises:
            exec(code, namespace)
            continue
        with pytest.raises(fastreg.FastregError) as caught:
            exec(code, namespace)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("name", [name for name in WRITTEN if BLOCK.search(PAGES[name]) and name != "faq.md"])
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(blocks_of(name), name, {"__name__": "page"}) == []


@pytest.mark.parametrize("package", OPTIONAL)
def test_code_of_integrations_runs(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of("guide/integrations.md", package)
    assert len(blocks) > len(blocks_of("guide/integrations.md"))
    run(blocks, "guide/integrations.md", {"__name__": "page"})


@pytest.mark.parametrize("title, text", ERRORS, ids=[title for title, _ in ERRORS])
def test_errors_are_raised_with_the_words_of_their_heading(title: str, text: str) -> None:
    namespace: dict[str, object] = {"__name__": "page"}
    run(BLOCK.findall(PAGES["faq.md"].partition("\n## ")[0]), "faq.md", namespace)
    messages = run(BLOCK.findall(text), "faq.md", namespace)
    assert all(title in message for message in messages), messages


def test_fifteen_errors_are_explained() -> None:
    assert sum("```python raises" in text for _, text in ERRORS) >= 15


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        path, _, anchor = target.partition("#")
        page = DOCS / Path(name).parent / path if path else DOCS / name
        if "://" in target:
            continue
        assert page.exists(), target
        assert not anchor or anchor in anchors(whole(page)), target


def whole(page: Path) -> str:
    """A page with what it includes."""
    text = page.read_text(encoding="utf-8")
    included = re.findall(r"```\{include\} (\S+)", text)
    return "\n".join([text, *((page.parent / path).read_text(encoding="utf-8") for path in included)])


@pytest.mark.parametrize("name", [name for name in PAGES if "{toctree}" in PAGES[name]])
def test_contents_name_pages(name: str) -> None:
    entries = re.findall(r"^```\{toctree\}\n(.*?)^```", PAGES[name], re.S | re.M)
    pages = [line for entry in entries for line in entry.split("\n") if line and not line.startswith(":")]
    assert pages and all((DOCS / Path(name).parent / f"{page}.md").exists() for page in pages)


@pytest.mark.parametrize("name", [name for name in WRITTEN if "](" in PAGES[name] and ".png)" in PAGES[name]])
def test_pictures_are_small(name: str) -> None:
    for path in re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGES[name]):
        picture = DOCS / Path(name).parent / path
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size < LARGEST


def test_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    drawn = subprocess.run([sys.executable, FIGURES / "draw.py", tmp_path], capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    names = {path.name for path in FIGURES.glob("*.png")}
    assert {path.name for path in tmp_path.iterdir()} == names
    shown = re.findall(r"\]\((?:\.\./)?figures/(\S+\.png)\)", "\n".join(PAGES.values()))
    assert names <= set(shown)


def test_every_recipe_is_in_the_gallery() -> None:
    sections = dict(re.findall(r"^## (\S+)$(.*?)(?=^## |\Z)", PAGES["recipes.md"], re.S | re.M))
    assert sections.keys() == catalogue().keys()
    for name, recipe in catalogue().items():
        assert f"theory/figures/{name}.png" in sections[name]
        assert " ".join(sections[name].split()).startswith(f"{recipe.claim} From {recipe.paper}. [What came out](")


def documented() -> set[str]:
    """Names that the reference asks autodoc for, directly or by module."""
    text = "\n".join(page for name, page in PAGES.items() if name.startswith("api/"))
    single = re.findall(r"^\.\. auto(?:class|function|exception):: (?:fastreg\.)?([\w.]+)", text, re.M)
    modules = [importlib.import_module(name) for name in re.findall(r"^\.\. automodule:: (\S+)", text, re.M)]
    of_modules = {f"{module.__name__}.{name}" for module in modules for name in getattr(module, "__all__", ())}
    return {*single, *(name.removeprefix("fastreg.") for name in of_modules)}


def public() -> list[str]:
    """Everything in ``fastreg.__all__``, and in that of the modules it names."""
    names = []
    for name in fastreg.__all__:
        below = getattr(getattr(fastreg, name), "__all__", None)
        names += [name] if below is None else [f"{name}.{one}" for one in below]
    return [name for name in names if not name.startswith("__")]


@pytest.mark.parametrize("name", public())
def test_every_public_name_is_in_the_reference(name: str) -> None:
    assert name in documented()
    assert resolved(f"fastreg.{name}") is not None


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (pip install 'fastreg[docs]')")
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "doctrees", DOCS, tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    formulas = "".join(text for page in tmp_path.glob("api/*.html") for text in FORMULA.findall(page.read_text()))
    assert "g_k" in formulas and "``" not in formulas
