"""``fastreg check MODULE:FACTORY``: how each parameter is served, or why it is refused, and a self-test."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastreg.check import Report, check
from fastreg.cli_output import add_json, aside, at_least_one, deliver
from fastreg.errors import FastregError, UnsupportedOperation
from fastreg.kernels import explain
from fastreg.recording import Recorder

# How micro-batch gradients G_k are represented, by the first word of a form.
FORMS = {
    "quadratic": "products of pairs of rows (Gram matrices): cheap for short micro-batches, no G_k is stored",
    "pixel": "the same for a convolution: products of pairs of pixels",
    "index": "the same for a table: products of rows of equal index",
    "dense": "every G_k is stored for the second backward: m times the parameter",
    "joined": "used several times: pairs of rows of all uses, or one G_k over them, whichever is cheaper",
}
EPILOG = """\
FACTORY takes no arguments and returns (model, loss_fn, (inputs, targets)), where loss_fn(outputs, targets) is the
mean loss over samples.

forms:
""" + "\n".join(f"  {name:<11}{about}" for name, about in FORMS.items())

Problem = tuple[nn.Module, Callable[..., Any], tuple[Any, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = EPILOG
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="where the model, the loss and a batch come from")
    parser.add_argument("--micro-batch-size", type=at_least_one, metavar="B", help="default: half the batch")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if parameters are refused.

    Raises:
        FastregError: the factory is none, or the self-test fails.
    """
    with aside(args.json):
        problem = _problem(args.factory)
        with Backends() as ops:
            report, refused = examine(problem, args.micro_batch_size)
    if args.json:
        found = {"passed": not refused, "refused": refused, "backends": ops.found}
        deliver({**found, **({} if report is None else report.as_dict())}, True)
    else:
        print(_text(report, ops.found, refused))
    return 1 if refused else 0


class Backends(TorchDispatchMode):
    """Notes which backends ran each op of fastreg inside: ``found`` is op -> backends, in order of first use."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch left it untyped
        self.found: dict[str, list[str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "fastreg":
            name = func.name().removeprefix("fastreg::_")
            ran = next(candidate.name for candidate in explain(name, *args) if candidate.chosen)
            self.found[name] = list(dict.fromkeys([*self.found.get(name, ()), ran]))
        return func(*args, **(kwargs or {}))


def examine(problem: Problem, micro_batch_size: int | None) -> tuple[Report | None, dict[str, str]]:
    """The report on the parameters that are served, if any is, and the reason for each that is not.

    Raises:
        FastregError: as :func:`fastreg.check`, but for parameters that reach an operation without a rule.
    """
    try:
        return _check(problem, micro_batch_size), {}
    except UnsupportedOperation:
        # The first refusal hides all others.
        model, _, batch = problem
        served = {name: p for name, p in model.named_parameters() if p.requires_grad}
        reasons = {name: _refusal(model, batch[0], p) for name, p in served.items()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    with _frozen([served[name] for name in refused]):
        return None if len(refused) == len(served) else _check(problem, micro_batch_size), refused


def _check(problem: Problem, micro_batch_size: int | None) -> Report:
    try:
        return check(*problem, micro_batch_size=micro_batch_size)
    except NotImplementedError as missing:
        raise FastregError(
            f"check: every operation must have a double backward, got: {missing} (compute it from other operations)"
        ) from missing


def _refusal(model: nn.Module, inputs: Tensor, parameter: nn.Parameter) -> str | None:
    """Why the parameter is refused: recorded by itself."""
    recorder = Recorder(model, 1, [parameter], lambda: True)
    try:
        with torch.enable_grad():
            model(inputs)
    except UnsupportedOperation as refusal:
        return str(refusal)
    finally:
        recorder.remove()
    return None


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _text(report: Report | None, backends: dict[str, list[str]], refused: dict[str, str]) -> str:
    lines = [] if report is None else [str(report)]
    for name in dict.fromkeys(name for names in backends.values() for name in names):
        lines.append(f"backend {name}: {', '.join(op for op, names in backends.items() if name in names)}")
    lines += [f"refused: {reason}" for reason in refused.values()]
    if refused:
        lines.append(f"{len(refused)} parameters refused" + (", self-test without them" if report else ""))
    return "\n".join(lines)


def _problem(path: str) -> Problem:
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
    made = found()
    if not (isinstance(made, tuple) and list(map(type, made[2:])) in ([tuple], [list]) and len(made[2]) == 2):
        raise FastregError(f"check: {path} must return (model, loss_fn, (inputs, targets)), got {type(made).__name__}")
    return made
