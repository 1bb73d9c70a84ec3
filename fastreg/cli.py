"""The ``fastreg`` command: a table of subcommands, each in a module of its own.

A subcommand's module offers ``add_arguments(parser)`` and ``run(args) -> int`` and is imported only
when its name is on the command line, so ``fastreg env`` works where matplotlib is not installed.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from fastreg._version import __version__
from fastreg.cli_output import EXIT_STATUS, deliver
from fastreg.errors import FastregError

# What shells report of a command that a signal ended: SIGINT, and SIGPIPE.
INTERRUPTED, READER_LEFT = 130, 141


@dataclass(frozen=True)
class Command:
    """One subcommand: the module that implements it, a summary, examples, and other names."""

    module: str
    summary: str
    examples: tuple[str, ...]
    aliases: tuple[str, ...] = ()


COMMANDS = {
    "env": Command(
        "fastreg.environment",
        "what is installed, what is missing and why",
        ("fastreg env", "fastreg env --json", "fastreg env --kernels outer_sqnorm"),
    ),
    "check": Command(
        "fastreg.check_cli",
        "rule, form and backend of every parameter, and a self-test",
        (
            "fastreg check examples.tiny_gpt:problem",
            "fastreg check examples.tiny_gpt:problem --micro-batch-size 2 --json",
        ),
    ),
    "train": Command(
        "fastreg.recipes.train_cli",
        "small-batch, large-batch and regularized large-batch SGD compared on real data",
        (
            "fastreg train --seeds 2 --epochs 50",
            "fastreg train --resume runs/train/checkpoint.pt --json > report.json",
            "fastreg train --data cifar10 --data-dir cifar-10-batches-py --device cuda",
        ),
    ),
    "recipe": Command(
        "fastreg.recipes.recipe_cli",
        "make a paper's claim again at small scale",
        ("fastreg recipe", "fastreg recipe plateau --quick", "fastreg recipe plateau --no-plot --json"),
        ("recipes",),
    ),
    "bench": Command(
        "fastreg.benchmark.cli",
        "time a training step against its peers",
        (
            "fastreg bench --model gpt --m 8 --methods exact sequential --json gpt.json",
            "fastreg bench --model mlp --m 8 --suite regularizers --json > rows.json",
            "fastreg bench --model mlp2048 --m 16 --suite sam --plot sam.svg",
            "fastreg bench --model gpt --suite scaling",
        ),
    ),
    "monitor": Command(
        "fastreg.monitor_cli",
        "what was measured during training, as a table and as curves",
        (
            "fastreg monitor run.csv",
            "fastreg monitor run.csv --last 100 --plot run.svg",
            "fastreg monitor run.jsonl --metric loss --json",
        ),
    ),
}


class Parser(argparse.ArgumentParser):
    """Refuses what it does not know where the known words are at hand, and suggests the nearest."""

    def __init__(self, **settings: Any) -> None:
        # An abbreviation would change its meaning with the next option.
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **settings})

    def parse_known_args(  # type: ignore[override]  # of no interest here: overloads for other namespaces
        self, *given: Any, **named: Any
    ) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = super().parse_known_args(*given, **named)
        if unknown:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            self.error(f"arguments must be among {', '.join(known)}, got {' '.join(unknown)}{_near(unknown[0], known)}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            message = f"invalid choice: {value!r}{_near(str(value), known)} (choose from {', '.join(known)})"
            raise argparse.ArgumentError(action, message)


def _near(word: str, known: Sequence[str]) -> str:
    return "".join(f", did you mean {name}?" for name in get_close_matches(word, known, 1))


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Parser that knows every subcommand by name and the arguments of ``chosen``."""
    parser = Parser(
        prog="fastreg",
        description="Explicit forms of SGD's implicit regularizers, computed in one batched pass.",
        epilog=_epilog(tuple(command.examples[0] for command in COMMANDS.values())),
    )
    parser.add_argument("--version", action="version", version=f"fastreg {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        about = command.summary[0].upper() + command.summary[1:] + "."
        subparser = subparsers.add_parser(name, help=command.summary, description=about, aliases=command.aliases)
        if chosen in (name, *command.aliases):
            importlib.import_module(command.module).add_arguments(subparser)
            subparser.epilog = "\n\n".join(filter(None, (subparser.epilog, _epilog(command.examples))))
    return parser


def _epilog(examples: tuple[str, ...]) -> str:
    return "\n".join(["examples:", *(f"  {example}" for example in examples), "", EXIT_STATUS])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: ``sys.argv[1:]``) and return its exit status.

    0 is success, 1 a request that fastreg refuses or that fails (the reason is on stderr), 2 a wrong command line, 130
    an interrupt, 141 a reader of the output that left. With ``--json`` a refusal is a document as well:
    ``{"error": reason}``.

    Example:
        >>> from fastreg.cli import main
        >>> main(["env", "--json"])  # doctest: +SKIP
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal of another encoding shows a question mark for a bar of a curve.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, which must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    as_json: object = None
    try:
        args = build_parser(chosen).parse_args(arguments)
        as_json = getattr(args, "json", None)
        return importlib.import_module(_command(args.command).module).run(args)
    except FastregError as error:
        return _refuse(str(error), as_json)
    except OSError as error:
        # Of a file that was named; one without a name is no matter of the command line.
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}", as_json)


def _command(name: str) -> Command:
    return next(command for known, command in COMMANDS.items() if name in (known, *command.aliases))


def _refuse(reason: str, as_json: object) -> int:
    print(f"error: {reason}", file=sys.stderr)
    if as_json is True:
        deliver({"error": reason}, True)
    return 1
