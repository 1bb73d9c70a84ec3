"""``fastreg bench``: arguments and the loop over models and micro-batch counts."""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import get_args

import torch

from fastreg.benchmark import machine, report
from fastreg.benchmark.methods import METHODS, Suite, default_methods
from fastreg.benchmark.presets import PRESETS, Preset
from fastreg.benchmark.report import Row
from fastreg.benchmark.run import Settings, measure_cell
from fastreg.errors import FastregError

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}

EPILOG = "\n".join(
    [
        "methods:",
        *(f"  {m.name:<22}{m.about}{'' if m.by_default else ' (only if named)'}"
          for m in METHODS.values()),
        "models:",
        *(f"  {p.name:<22}{p.about}{'' if p.by_default else ' (only if named)'}"
          for p in PRESETS.values()),
        "example:",
        "  fastreg bench --model gpt --m 8 --methods exact sequential --json gpt.json",
        "  fastreg bench --model mlp2048 --m 16 --suite sam",
        "  fastreg bench --model gpt --m 8 --suite curvature",
        "  fastreg bench --model mlp --m 8 --suite regularizers",
        "  fastreg bench --model gpt --m 8 --suite scale",
    ]
)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``fastreg bench``."""
    parser.description = (
        "Time whole training steps, or products with curvature matrices. Every method first shows its float64 "
        "result to be right; "
        "then rounds interleave all methods. ratio: to the plain step of the same round; flops: those "
        "of products and convolutions, to the plain step's."
    )
    parser.epilog = EPILOG
    add = parser.add_argument
    add("--model", choices=[*PRESETS, "all"], default="all")
    add("--m", type=_positive, nargs="+", default=[8, 32], metavar="M",
        help="micro-batches of a batch, at most one per sample (default: 8 32)")
    add("--suite", choices=get_args(Suite), default="penalty",
        help="what to compare: the gradient-norm penalty with its peers, every penalty of the library, monitoring, "
        "sharpness-aware minimisation, products with curvature matrices, or what a large model chooses from: time and "
        "memory of exact, recomputed and perturbed penalties (default: penalty)")
    add("--methods", nargs="+", choices=[*METHODS], metavar="METHOD", help="default: those of the suite")
    add("--rounds", type=_positive, default=11, metavar="N", help="timed rounds (default: 11)")
    add("--threads", type=_positive, default=os.cpu_count(), metavar="N",
        help="CPU threads (default: all cores)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=[*AUTOCAST], default="float32",
        help="of the timed forward passes; bfloat16 runs under autocast")
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add("--json", type=Path, metavar="FILE", help="write rows, machine and settings")
    add("--plot", type=Path, metavar="FILE", help="draw the ratios")


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if a method is wrong or failed, else 0.

    Raises:
        FastregError: no such device, nothing to draw with, or an m that does not divide a batch.
    """
    _check(args)
    torch.set_num_threads(args.threads)
    settings = Settings(
        rounds=args.rounds,
        threads=args.threads,
        device=args.device,
        autocast=AUTOCAST[args.dtype],
        peak_memory=not args.no_memory,
        note=_note,
    )
    here = machine.describe(args.device)
    print(f"{here['device']}, {args.threads} threads, torch {torch.__version__}, {args.dtype}")
    rows: list[Row] = []
    for preset in _presets(args.model):
        print(f"\n{preset.name}: {preset.about}\n{report.HEADER}", flush=True)
        for m in _micro_batches(preset, args.m):
            cell = measure_cell(preset, m, _methods(args), settings)
            _note("")
            print("\n".join(report.line(row) for row in cell), flush=True)
            rows += cell
            if args.json:
                report.write_json(args.json, rows, here, _settings(args))
    if args.plot:
        report.draw(args.plot, rows, f"{here['device']}, torch {torch.__version__}, {args.dtype}")
    return int(any(row.status in ("wrong", "failed") for row in rows))


def _check(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise FastregError("bench: --device must be one that torch can use, got cuda "
                           "(torch.cuda.is_available() is False)")
    if args.plot:
        report.check_plot_available()


def _note(text: str) -> None:
    """Show what is being done on a line of its own, where there is a terminal to overwrite it on."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _presets(model: str) -> list[Preset]:
    if model == "all":
        return [preset for preset in PRESETS.values() if preset.by_default]
    return [PRESETS[model]]


def _methods(args: argparse.Namespace) -> list[str]:
    return args.methods or default_methods(args.suite)


def _micro_batches(preset: Preset, wanted: list[int]) -> list[int]:
    """The wanted counts, no more than one micro-batch per sample, each once."""
    return list(dict.fromkeys(min(m, preset.batch) for m in wanted))


def _settings(args: argparse.Namespace) -> dict[str, object]:
    return {
        "command": shlex.join(["fastreg", *sys.argv[1:]]),
        "rounds": args.rounds,
        "dtype": args.dtype,
        "methods": _methods(args),
    }
