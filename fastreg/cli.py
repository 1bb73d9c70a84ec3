"""The ``fastreg`` command: a table of subcommands, each in a module of its own.

A subcommand's module offers ``add_arguments(parser)`` and ``run(args) -> int`` and is imported only
when its name is on the command line, so ``fastreg env`` works where matplotlib is not installed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fastreg._version import __version__
from fastreg.errors import FastregError


@dataclass(frozen=True)
class Command:
    """One subcommand: the module that implements it, a summary, and an example."""

    module: str
    summary: str
    example: str


COMMANDS = {
    "env": Command("fastreg.environment", "what is installed, what is missing and why", "fastreg env --json"),
    "train": Command(
        "fastreg.recipes.train_cli",
        "small-batch, large-batch and regularized large-batch SGD compared on real data",
        "fastreg train --help",
    ),
    "recipe": Command(
        "fastreg.recipes.recipe_cli", "make a paper's claim again at small scale", "fastreg recipe plateau --quick"
    ),
    "bench": Command(
        "fastreg.benchmark.cli", "time a training step against its peers", "fastreg bench --model mlp"
    ),
    "check": Command(
        "fastreg.check_cli", "which rule serves each parameter, and a self-test", "fastreg check --help"
    ),
    "monitor": Command(
        "fastreg.monitor_cli", "what was measured during training, as a table and as curves", "fastreg monitor run.csv"
    ),
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Parser that knows every subcommand by name and the arguments of ``chosen``."""
    parser = argparse.ArgumentParser(
        prog="fastreg",
        description="Explicit forms of SGD's implicit regularizers, computed in one batched pass.",
        epilog="examples:\n" + "\n".join(f"  {command.example}" for command in COMMANDS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastreg {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            importlib.import_module(command.module).add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: ``sys.argv[1:]``) and return its exit status.

    0 is success, 1 a request that fastreg refuses (the reason is on stderr), 2 a wrong command line.

    Example:
        >>> from fastreg.cli import main
        >>> main(["env", "--json"])  # doctest: +SKIP
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    try:
        args = build_parser(chosen).parse_args(arguments)
        return importlib.import_module(COMMANDS[args.command].module).run(args)
    except FastregError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
