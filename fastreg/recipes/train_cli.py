"""The subcommand ``fastreg train``."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from fastreg.cli_output import add_json, aside, at_least_one, deliver
from fastreg.errors import FastregError
from fastreg.optional import require
from fastreg.recipes.checkpoint import Checkpoint, load_checkpoint
from fastreg.recipes.data import Dataset
from fastreg.recipes.datasets import check_directory, load_dataset
from fastreg.recipes.experiment import run_experiment, schedule
from fastreg.recipes.methods import DEFAULT_METHODS, KINDS, SMALL_BATCH, Method, matched
from fastreg.recipes.plots import write_plots
from fastreg.recipes.presets import MODELS
from fastreg.recipes.progress import Progress
from fastreg.recipes.report import LEGEND, document, summarise, table, verdict
from fastreg.recipes.settings import DEFAULTS, Settings, default_settings, preset
from fastreg.recipes.sweep import sweep, sweep_document, sweep_table

Result = TypeVar("Result")

SIZES = ("epochs", "batch_size", "micro_batch_size", "chunk_size", "threads")
# Options that are not given are None or False.
CHOSEN_BY_SWEEP = ("seeds", "lr", "weight", "matched")
FIXED_BY_CHECKPOINT = ("data", "model", "methods", "sweep", *CHOSEN_BY_SWEEP, *SIZES)
WRITTEN_BY_RUNS = ("output", "no_plot")


def _method_value(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if name not in KINDS or not value > 0 or value == float("inf"):
        raise argparse.ArgumentTypeError(
            f"must be METHOD=VALUE with METHOD one of {', '.join(KINDS)} and VALUE positive, "
            f"got {text!r}"
        )
    return name, value


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"must be cpu or cuda[:N], got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda[:N], got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"must be a device that torch sees, got {text!r} ({torch.cuda.device_count()} GPUs)"
        )
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastreg train``."""
    parser.set_defaults(parser=parser)
    add = parser.add_argument
    add("--data", choices=list(DEFAULTS), help="data set (default: digits)")
    add("--data-dir", type=Path, metavar="DIR", help="the folder of its files; none for digits")
    add("--model", choices=list(MODELS), help="default: mlp for digits, otherwise resnet18")
    add("--methods", nargs="+", choices=list(KINDS), metavar="METHOD",
        help=f"of {'; '.join(f'{name}: {kind.does}' for name, kind in KINDS.items())} "
        f"(default: {', '.join(DEFAULT_METHODS)})")  # fmt: skip
    add("--seeds", type=at_least_one, metavar="N", help="number of seeds, counted from 0")
    add("--lr", type=_method_value, action="append", metavar="METHOD=VALUE",
        help="learning rate of one method; repeatable")  # fmt: skip
    add("--weight", type=_method_value, action="append", metavar="METHOD=VALUE",
        help="penalty weight of one method; repeatable")  # fmt: skip
    add("--matched", action="store_true",
        help="all methods at the small-batch lr, penalties at weight lr / 4: nothing else tuned")  # fmt: skip
    add("--epochs", type=at_least_one, metavar="N", help="passes over the training split")
    add("--batch-size", type=at_least_one, metavar="B", help="samples of a large-batch step")
    add("--micro-batch-size", type=at_least_one, metavar="b",
        help="samples of a micro-batch and of a small-batch step")  # fmt: skip
    add("--chunk-size", type=at_least_one, metavar="N",
        help="most samples of one forward pass; larger batches accumulate")  # fmt: skip
    add("--threads", type=at_least_one, metavar="N",
        help="of torch on the CPU (default: 1 for digits, otherwise torch's own)")  # fmt: skip
    add("--device", type=_device, help="cpu or cuda[:N] (default: cpu)")
    add("--output", type=Path, metavar="DIR", help="folder of plots and checkpoint "
        "(default: runs/train, or the folder of the checkpoint resumed)")  # fmt: skip
    add("--resume", type=Path, metavar="CHECKPOINT", help="continue from DIR/checkpoint.pt")
    add_json(parser, file=True)
    add("--no-plot", action="store_true", help="do not draw (needs no matplotlib)")
    add("--sweep", action="store_true",
        help="choose learning rates and weights on the validation split instead")  # fmt: skip


def _methods(args: argparse.Namespace, model: str) -> tuple[Method, ...]:
    lrs, weights = dict(args.lr or ()), dict(args.weight or ())
    names = [name for name in KINDS if name in (args.methods or DEFAULT_METHODS)]
    for name in {*lrs, *weights} - set(names):
        raise FastregError(f"train: --lr and --weight must name a method that runs, got {name}")
    chosen = tuple(preset(model, name, lrs.get(name), weights.get(name)) for name in names)
    if not args.matched:
        return chosen
    if {*lrs, *weights} - {SMALL_BATCH}:
        raise FastregError("train: --lr must name small_batch alone with --matched, got more")
    return matched(chosen)


def _settings(args: argparse.Namespace) -> Settings:
    data = args.data or (MODELS[args.model].data if args.model else "digits")
    settings = default_settings(data, args.model)
    changes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    changes.setdefault("chunk_size", changes.get("batch_size", settings.batch_size))
    if args.seeds is not None:
        changes["seeds"] = tuple(range(args.seeds))
    if args.device is not None:
        changes["device"] = args.device
    return replace(settings, methods=_methods(args, settings.model), **changes)


def _refuse(args: argparse.Namespace, names: tuple[str, ...], option: str, reason: str) -> None:
    given = ["--" + name.replace("_", "-") for name in names if getattr(args, name)]
    if given:
        raise FastregError(
            f"train: {', '.join(given)} must be absent with {option}, got both ({reason})"
        )


def _or_exit(args: argparse.Namespace, make: Callable[[], Result]) -> Result:
    """What ``make`` returns; its refusal is one of the command line, which ends with status 2."""
    parser: argparse.ArgumentParser = args.parser
    try:
        return make()
    except FastregError as error:
        parser.error(str(error))


def _start(args: argparse.Namespace) -> tuple[Checkpoint, Path]:
    """A new or loaded checkpoint and the output folder; refuses options that do not go together."""
    if args.resume is not None:
        _or_exit(
            args,
            lambda: _refuse(args, FIXED_BY_CHECKPOINT, "--resume", "the checkpoint fixes it"),
        )
        return load_checkpoint(args.resume, args.device), args.output or args.resume.parent
    if args.sweep:
        names = (*CHOSEN_BY_SWEEP, *WRITTEN_BY_RUNS)
        _or_exit(args, lambda: _refuse(args, names, "--sweep", "it has its own and draws nothing"))
    return Checkpoint(_or_exit(args, lambda: _settings(args))), args.output or Path("runs/train")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _resumable(path: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if path.exists():
            print(f"to go on: fastreg train --resume {path}", file=sys.stderr)
        raise


def run(args: argparse.Namespace) -> int:
    """Run ``fastreg train`` and return its exit status.

    Raises:
        FastregError: unusable data files or checkpoint; wrong options end with status 2 instead.
    """
    checkpoint, folder = _start(args)
    settings = checkpoint.settings
    _or_exit(args, lambda: check_directory(settings.data, args.data_dir))
    data = load_dataset(settings.data, args.data_dir).to(settings.device)
    with aside(args.json), _threads(settings.threads):
        found = _sweep(settings, data) if args.sweep else _compare(checkpoint, data, folder, not args.no_plot)
    deliver(found, args.json)
    return 0


def _sweep(settings: Settings, data: Dataset) -> dict[str, object]:
    trials = sweep(settings, data)
    print(sweep_table(trials))
    return sweep_document(settings, trials)


def _compare(checkpoint: Checkpoint, data: Dataset, folder: Path, draw: bool) -> dict[str, object]:
    if draw:
        require("matplotlib")
    settings, path = checkpoint.settings, folder / "checkpoint.pt"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{settings.data}, {settings.model}: {len(schedule(settings))} runs; output in {folder}")
    with _resumable(path), Progress(len(schedule(settings)) * settings.epochs) as progress:
        results = run_experiment(checkpoint, data, path, progress)
    print("\n".join([table(summarise(settings, results)), LEGEND, *verdict(settings, results)]))
    for written in write_plots(folder, settings, results) if draw else []:
        print(f"wrote {written}")
    return document(settings, results)
