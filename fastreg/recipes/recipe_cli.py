"""The subcommand ``fastreg recipe``: a claim of a paper made again, as a table, a figure and a JSON file."""

from __future__ import annotations

import argparse
import time
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from textwrap import wrap
from typing import Any, get_args, get_origin, get_type_hints

from fastreg.cli_output import EXIT_STATUS, add_json, aside, deliver, finite
from fastreg.optional import require
from fastreg.recipes.catalogue import Recipe, catalogue, recipe
from fastreg.recipes.plots import save
from fastreg.recipes.progress import Progress
from fastreg.recipes.report import environment

# In inches; a recipe may change it.
SIZE = (9, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one sub-command per recipe, with an option per field of its configuration; without one all are listed."""
    add_json(parser)
    names = parser.add_subparsers(dest="recipe", metavar="NAME")
    for entry in catalogue().values():
        about = f"{entry.claim} {entry.paper}".replace("%", "%%")
        command = f"  fastreg recipe {entry.name}"
        examples = ("examples:", f"{command} --quick", f"{command} --output out", f"{command} --no-plot --json", "")
        epilog = "\n".join((*examples, EXIT_STATUS))
        child = names.add_parser(entry.name, help=about, description="\n".join(wrap(about, 100)), epilog=epilog)
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
    # Where it is not given, that of ``fastreg recipe --json NAME`` counts.
    add_json(parser, file=True, default=argparse.SUPPRESS)
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


def _kind(field: Field[Any], annotation: Any) -> dict[str, Any]:
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
    named: dict[str | None, Any] = {None: entry.quick if args.quick else entry.config(), **dict(entry.presets)}
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
    if args.recipe is None:
        _show_list(args.json)
        return 0
    entry = recipe(args.recipe)
    if not args.no_plot:
        require("matplotlib")
    with aside(args.json):
        contents = perform(entry, configuration(entry, args))
        print(entry.table(contents["result"]))
        deliver(contents, args.output / "result.json")
        for path in [] if args.no_plot else _plot(entry, contents["result"], args.output):
            print(f"wrote {path}")
    deliver(contents, args.json)
    return 0


def _show_list(as_json: bool) -> None:
    if not as_json:
        print(listing())
    entries = catalogue().values()
    names = [{"name": e.name, "paper": e.paper, "claim": e.claim, "presets": list(dict(e.presets))} for e in entries]
    deliver({"recipes": names}, as_json)


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
    return finite(contents)


def _plot(entry: Recipe, result: dict[str, Any], folder: Path) -> list[Path]:
    # Figure without pyplot: no display is looked for and no global state is left behind.
    figure = require("matplotlib.figure").Figure(figsize=SIZE, layout="constrained")
    figure.suptitle(f"{entry.name} ({entry.paper})", fontsize=9)
    entry.draw(figure, result)
    return save(figure, folder, entry.name)
