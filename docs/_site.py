"""What the pages need beyond Sphinx: GitHub's mathematics, formulas of docstrings."""

from __future__ import annotations

import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.writers.html5 import HTML5Translator

# Pages that lie outside this folder, and the page here that includes each.
ELSEWHERE = {"bench/NOTES.md": "benchmarks.md", "README.md#": "how_it_works.md#"}
# A directive in a comment, which GitHub does not show; a name of the reference, whose page GitHub can link to.
HIDDEN = re.compile(r"^<!--\n(```\{.*?^```)\n-->$", re.S | re.M)
NAME = re.compile(r"\[`(fastreg(?:\.\w+)+)`\]\((?:\.\./)?api/\w+\.md\)")
SECTION = re.compile(r"[A-Z]\w+:$")


def read_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Translate what GitHub understands and MyST does not."""
    text = re.sub(r"\$`(.+?)`\$", r"$\1$", source[0], flags=re.S)
    text = NAME.sub(r"{py:obj}`\1`", HIDDEN.sub(r"\1", text))
    for path, page in ELSEWHERE.items():
        text = text.replace(f"](../../{path}", f"](../{page}").replace(f"](../{path}", f"]({page}")
    source[0] = text


def read_docstring(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Set indented formulas as they are written: a docstring marks them by their indentation alone."""
    kept, section, literal = [], False, False
    for before, line in zip(["", *lines], lines, strict=False):
        indented = line.startswith("    ")
        if line and not indented:
            section, literal = bool(SECTION.fullmatch(line)) and not before, False
        elif indented and not before and not section and not literal and not _goes_on(kept):
            kept += [".. code-block:: text", ""]
            literal = True
        # Napoleon would make an entry for each.
        kept.append(line.replace("*args, **kwargs:", r"\*args/\*\*kwargs:"))
    # Of a property napoleon takes what stands before a colon in the first line for its type: give it an empty comment.
    lines[:] = ["..", "", *kept] if what == "property" else kept


def _goes_on(kept: list[str]) -> bool:
    """Whether what comes is a block that the text before it has announced."""
    last = next((line for line in reversed(kept) if line), "")
    return last.endswith("::")


def find_by_last_part(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """What a docstring names as its own module does: by the last part, where only one thing ends in it."""
    target, python = node.get("reftarget", ""), env.domains.python_domain
    found = [name for name in python.objects if name.endswith(f".{target}")]
    if len(found) != 1 or node.get("refdomain") != "py":
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, content)


def _formula(node: nodes.Node, display: str) -> str:
    """MathML, whose bars have the height of text and no space around, as LaTeX's ``lvert`` and ``lVert`` have."""
    bar = r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>'
    return re.sub(r"<mo>(&#x02016;|&#x0007C;)</mo>", bar, convert(node.astext(), display=display))


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """A formula in a line."""
    self.body.append(_formula(node, "inline"))
    raise nodes.SkipNode


def visit_display(self: HTML5Translator, node: nodes.math_block) -> None:
    """A formula of its own."""
    self.body.append(f'<div class="math">{_formula(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """As Sphinx loads an extension."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_display, None))
    app.connect("source-read", read_page)
    app.connect("missing-reference", find_by_last_part)
    # Before napoleon, which turns sections into markup.
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
