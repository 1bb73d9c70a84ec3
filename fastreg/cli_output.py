"""What subcommands share: ``--json``, types of arguments, and what goes to which stream.

With ``--json`` standard output holds exactly one JSON document; tables, remarks and progress go to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

PLOT_FORMATS = (".png", ".svg", ".pdf")
EXIT_STATUS = """\
exit status:
  0    done
  1    refused or failed; the reason is on standard error
  2    wrong command line
  130  interrupted"""


def add_json(parser: argparse.ArgumentParser, *, file: bool = False, default: object = None) -> None:
    """Declare ``--json``: True asks for the document on standard output, a path for a file.

    Args:
        parser: of a subcommand.
        file: whether a file may be named; not for a command with positional arguments, which would be taken for it.
        default: ``argparse.SUPPRESS`` where a parser further up has the option too.
    """
    about = "print one JSON document, and everything else on standard error"
    if file:
        about += "; with FILE write it there"
        parser.add_argument("--json", nargs="?", const=True, default=default, type=Path, metavar="FILE", help=about)
    else:
        parser.add_argument("--json", action="store_true", help=about)


def aside(as_json: object) -> AbstractContextManager[object]:
    """Where people read what is printed inside: standard error if ``--json`` claims standard output.

    Example:
        >>> from fastreg.cli_output import aside
        >>> with aside(None):
        ...     print("for people")
        for people
    """
    return redirect_stdout(sys.stderr) if as_json is True else nullcontext()


def finite(document: object) -> Any:
    """The document as JSON holds it: numbers that are not finite become None, tuples lists.

    Example:
        >>> from fastreg.cli_output import finite
        >>> finite({"a": (1.0, float("nan"))})
        {'a': [1.0, None]}
    """
    return json.loads(json.dumps(document), parse_constant=lambda name: None)


def deliver(document: object, target: bool | Path | None) -> None:
    """Print the document (True), write it to a file (a path; missing folders are created), or neither (None, False).

    Example:
        >>> from fastreg.cli_output import deliver
        >>> deliver({"loss": float("inf")}, True)
        {
         "loss": null
        }
    """
    text = json.dumps(finite(document), indent=1) + "\n"
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(f"wrote {target}")
    elif target:
        sys.stdout.write(text)


def at_least_one(text: str) -> int:
    """Type of the argument of an option that counts.

    Example:
        >>> from fastreg.cli_output import at_least_one
        >>> at_least_one("3")
        3
    """
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def plot_file(text: str) -> Path:
    """Type of the argument of ``--plot``: a file of a format that matplotlib writes wherever it is installed.

    Example:
        >>> from fastreg.cli_output import plot_file
        >>> plot_file("run.svg").suffix
        '.svg'
    """
    path = Path(text)
    if path.suffix.lower() not in PLOT_FORMATS:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(PLOT_FORMATS)}, got {text!r}")
    return path
