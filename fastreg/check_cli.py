"""``fastreg check MODULE:FACTORY``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable

from fastreg.check import check
from fastreg.errors import FastregError

EPILOG = """\
FACTORY takes no arguments and returns (model, loss_fn, (inputs, targets)), where loss_fn(outputs, targets) is the
mean loss over samples.

example:
  fastreg check examples.tiny_gpt:problem
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="where the model, the loss and a batch come from")
    parser.add_argument("--micro-batch-size", type=int, default=None, metavar="B", help="default: half the batch")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; FastregError if the model is refused."""
    model, loss_fn, batch = _factory(args.factory)()
    report = check(model, loss_fn, batch, micro_batch_size=args.micro_batch_size)
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 0


def _factory(path: str) -> Callable[[], tuple]:
    module, _, name = path.partition(":")
    if not module or not name:
        raise FastregError(f"check: factory must be MODULE:FACTORY, got {path!r} (for example mypackage.models:tiny)")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as missing:
        raise FastregError(f"check: module {module!r} must be importable, got: {missing}") from missing
    if not callable(found):
        raise FastregError(f"check: {module!r} must have a callable {name!r}, got {found!r}")
    return found
