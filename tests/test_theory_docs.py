"""The pages on theory: their code runs, their links lead somewhere, and every recipe is shown with its figure once."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from fastreg.recipes.catalogue import catalogue

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "theory"
PAGES = sorted(FOLDER.glob("*.md"))
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = {name: re.findall(r"^```python\n(.*?)^```", text, re.S | re.M) for name, text in TEXT.items()}
LARGEST_FIGURE = 150_000


def prose(name: str) -> str:
    """A page without its code, in which brackets are no links."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", TEXT[name], flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """Of headings of words, as GitHub makes them."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)}


def public_names() -> list[str]:
    table = [line for line in TEXT["README.md"].splitlines() if line.startswith("|")]
    return sorted(set(re.findall(r"`(fastreg(?:\.\w+)+)`", "\n".join(table))))


def resolved(name: str) -> object:
    """What a dotted path leads to; modules on the way need not be imported yet."""
    parts, found = name.split("."), importlib.import_module("fastreg")
    for place, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:place]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_recipe_is_shown_with_its_command_on_one_page(name: str) -> None:
    figure = FOLDER / "figures" / f"{name}.png"
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and figure.stat().st_size < LARGEST_FIGURE
    shown = [page for page, text in TEXT.items() if re.search(rf"!\[[^]]+\]\(figures/{name}\.png\)", text)]
    run = [page for page, text in TEXT.items() if f"`fastreg recipe {name}`" in text]
    assert shown == run and len(shown) == 1


def test_figures_are_those_of_recipes() -> None:
    assert {path.stem for path in (FOLDER / "figures").iterdir()} == set(catalogue())


@pytest.mark.parametrize("name", TEXT)
def test_relative_links_lead_to_files_and_headings(name: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(name))
    assert targets
    for target in (target for target in targets if "://" not in target):
        path, _, anchor = target.partition("#")
        page = FOLDER / path if path else FOLDER / name
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", [name for name in TEXT if BLOCKS[name]])
def test_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in BLOCKS[name]:
        exec(compile(block, name, "exec"), namespace)


def test_every_page_of_a_paper_has_code() -> None:
    assert {name for name in TEXT if not BLOCKS[name]} == {"README.md"}


def test_files_of_tests_exist() -> None:
    named = {file for text in TEXT.values() for file in re.findall(r"`(?:tests/)?(test_\w+\.py)`", text)}
    assert len(named) >= 8
    assert all((Path(__file__).parent / file).exists() for file in named)


@pytest.mark.parametrize("name", public_names())
def test_public_names_resolve(name: str) -> None:
    assert resolved(name) is not None


def test_the_map_names_something_in_every_row() -> None:
    rows = TEXT["README.md"].partition("## Map")[2].partition("## ")[0].splitlines()
    rows = [row for row in rows if row.startswith("| ") and not row.startswith(("| ---", "| quantity"))]
    assert len(rows) >= 22
    assert all("`fastreg." in row and len(re.findall(r"(?<!\\)\|", row)) == 6 for row in rows)
