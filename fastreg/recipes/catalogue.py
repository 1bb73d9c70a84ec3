"""What a recipe is: one claim of a paper, made again at small scale by one command.

A recipe is one file of :mod:`fastreg.recipes.papers` that ends in ``RECIPE = Recipe(...)``; the catalogue finds it,
``fastreg recipe NAME`` runs it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fastreg.errors import FastregError
from fastreg.recipes import papers
from fastreg.recipes.progress import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Recipe:
    """One reproduction: a configuration, a run, and how its result is shown.

    Attributes:
        name: on the command line, in words joined by hyphens.
        paper: authors, year and arXiv number.
        claim: what the paper says, in one sentence.
        config: frozen dataclass whose fields (int, float, str, bool, tuples of them) are the options of the command
            line, with ``help`` and perhaps ``choices`` as their metadata; its defaults end within minutes on two cores.
        quick: the same experiment in seconds, coarser.
        steps: how many units of progress a configuration makes.
        run: makes the result: numbers, strings, lists and dicts, as JSON holds them.
        table: the result as aligned text, with a line that says whether the claim was seen.
        draw: the result as axes of a figure.
        presets: name -> configuration, the paper's own scale among them.
    """

    name: str
    paper: str
    claim: str
    config: type
    quick: Any
    steps: Callable[[Any], int]
    run: Callable[[Any, Progress], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    draw: Callable[[Figure, dict[str, Any]], None]
    presets: tuple[tuple[str, Any], ...] = ()


@cache
def catalogue() -> dict[str, Recipe]:
    """Every recipe by name."""
    modules = pkgutil.iter_modules(papers.__path__, f"{papers.__name__}.")
    found = (importlib.import_module(module.name) for module in modules)
    recipes = (module.RECIPE for module in found if hasattr(module, "RECIPE"))
    return {recipe.name: recipe for recipe in sorted(recipes, key=lambda recipe: recipe.name)}


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        FastregError: there is none.

    Example:
        >>> recipe("plateau").name
        'plateau'
    """
    known = catalogue()
    if name not in known:
        raise FastregError(f"recipe: name must be one of {list(known)}, got {name!r}")
    return known[name]
