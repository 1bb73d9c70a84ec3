"""The subcommand ``fastreg recipe``: a claim of a paper made again, as a table, a figure and a JSON file."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from fastreg.optional import require
from fastreg.recipes.catalogue import Recipe, catalogue, recipe
from fastreg.recipes.progress import Progress
from fastreg.recipes.report import environment

DPI = 150
FORMATS = ("png", "svg")
# In inches; a recipe may change it.
SIZE = (9, 4)


class _RecipeParser(argparse.ArgumentParser):
    """Of one recipe: a misspelt option is refused here, where the known ones are at hand."""

    def parse_known_args(self, *given: Any) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = super().parse_known_args(*given)
        if unknown:
            self._refuse(unknown)
        return found, unknown

    def _refuse(self, unknown: list[str]) -> NoReturn:
        known = ", ".join(option for option in self._option_string_actions if option.startswith("--"))
        self.error(f"arguments must be among {known}, got {' '.join(unknown)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--list`` and one sub-command per recipe, with an option per field of its configuration."""
    parser.set_defaults(parser=parser)
    parser.add_argument("--list", action="store_true", help="names, papers and claims of all recipes")
    names = parser.add_subparsers(dest="recipe", metavar="NAME", parser_class=_RecipeParser)
    for entry in catalogue().values():
        about = f"{entry.claim} {entry.paper}".replace("%", "%%")
        child = names.add_parser(entry.name, help=about, description=about, allow_abbrev=False)
        _add_common(child, entry)
        _add_fields(child, entry)


def _add_common(parser: argparse.ArgumentParser, entry: Recipe) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="in seconds, coarser")
    parser.set_defaults(preset=None)
    if entry.presets:
        size.add_argument("--preset", choices=list(dict(entry.presets)), help="a configuration by name")
    folder = Path("runs/recipe") / entry.name
    parser.add_argument("--output", type=Path, default=folder, metavar="DIR", help=f"folder (default: {folder})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the contents of DIR/result.json here")
    parser.add_argument("--no-plot", action="store_true", help="do not draw (needs no matplotlib)")


def _add_fields(parser: argparse.ArgumentParser, entry: Recipe) -> None:
    group = parser.add_argument_group("options of this recipe")
    types, defaults = get_type_hints(entry.config), entry.config()
    for field in fields(entry.config):
        text = f"{field.metadata.get('help', '')} (default: {_words(getattr(defaults, field.name))})"
        kind = _kind(field, types[field.name])
        group.add_argument("--" + field.name.replace("_", "-"), help=text.strip().replace("%", "%%"), **kind)


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _kind(field: Field, annotation: Any) -> dict[str, Any]:
    """Keywords of ``add_argument`` for a field of that type."""
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    plural = get_origin(annotation) is tuple
    kind = {"type": get_args(annotation)[0] if plural else annotation, "choices": field.metadata.get("choices")}
    if kind["choices"] is None:
        kind["metavar"] = kind["type"].__name__.upper()
    return {**kind, "nargs": "+"} if plural else kind


def configuration(entry: Recipe, args: argparse.Namespace) -> Any:
    """The default, quick or preset configuration, with the fields that were given on the command line."""
    named = {None: entry.quick if args.quick else entry.config(), **dict(entry.presets)}
    given = {field.name: getattr(args, field.name) for field in fields(entry.config)}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    return replace(named[args.preset], **given)


def listing() -> str:
    """Every recipe: its name, what it claims and whose claim it is."""
    return "\n".join(f"{entry.name}\n    {entry.claim}\n    {entry.paper}" for entry in catalogue().values())


def run(args: argparse.Namespace) -> int:
    """Run one recipe, or list all, and return the exit status.

    Raises:
        FastregError: the recipe refuses its configuration, or matplotlib is missing and plots are wanted.
    """
    if args.list == (args.recipe is not None):
        args.parser.error("one of NAME and --list must be given")
    if args.list:
        print(listing())
        return 0
    entry = recipe(args.recipe)
    if not args.no_plot:
        require("matplotlib")
    contents = perform(entry, configuration(entry, args))
    print(entry.table(contents["result"]))
    for path in _write(entry, contents, args):
        print(f"wrote {path}")
    return 0


def perform(entry: Recipe, config: Any) -> dict[str, Any]:
    """Run a recipe.

    Returns:
        What ``result.json`` holds: name, paper, claim, config, result (the figures), environment (versions), seconds.
        Numbers that are not finite are None.

    Raises:
        FastregError: the recipe refuses its configuration.

    Example:
        >>> from fastreg.recipes.catalogue import recipe
        >>> entry = recipe("plateau")
        >>> perform(entry, entry.quick)["paper"]
        'Beneventano 2023, arXiv:2312.16143'
    """
    start = time.perf_counter()
    with Progress(entry.steps(config)) as progress:
        result = entry.run(config, progress)
    contents = {
        "recipe": entry.name,
        "paper": entry.paper,
        "claim": entry.claim,
        "config": asdict(config),
        "result": result,
        "environment": environment(getattr(config, "device", "cpu")),
        "seconds": time.perf_counter() - start,
    }
    # What is shown is what the file holds, and JSON knows no nan.
    return json.loads(json.dumps(contents), parse_constant=lambda name: None)


def _write(entry: Recipe, contents: dict[str, Any], args: argparse.Namespace) -> list[Path]:
    args.output.mkdir(parents=True, exist_ok=True)
    written = [args.output / "result.json", *([args.json] if args.json else [])]
    for path in written:
        path.write_text(json.dumps(contents, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return written if args.no_plot else written + _plot(entry, contents["result"], args.output)


def _plot(entry: Recipe, result: dict[str, Any], folder: Path) -> list[Path]:
    # Figure without pyplot: no display is looked for and no global state is left behind.
    figure = require("matplotlib.figure").Figure(figsize=SIZE, layout="constrained")
    figure.suptitle(f"{entry.name} ({entry.paper})", fontsize=9)
    entry.draw(figure, result)
    paths = [folder / f"{entry.name}.{extension}" for extension in FORMATS]
    for path in paths:
        figure.savefig(path, dpi=DPI)
    return paths
