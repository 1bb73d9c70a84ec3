"""``fastreg bench``: arguments, and what they ask to be measured."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from fastreg.benchmark import machine, report, suite
from fastreg.benchmark.method import Suite
from fastreg.benchmark.methods import METHODS, default_methods
from fastreg.benchmark.plan import CURVE_METHODS, CURVES
from fastreg.benchmark.presets import PRESETS, Preset
from fastreg.benchmark.report import Row
from fastreg.benchmark.run import Cell, Settings
from fastreg.cli_output import add_json, aside, at_least_one, deliver, plot_file
from fastreg.errors import FastregError
from fastreg.optional import require
from fastreg.sinks.terminal import rewritable

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}

EPILOG = "\n".join(
    [
        "methods:",
        *(f"  {m.name:<22}{m.about}{'' if m.by_default else ' (only if named)'}"
          for m in METHODS.values()),
        "models:",
        *(f"  {p.name:<22}{p.about}{'' if p.by_default else ' (only if named)'}"
          for p in PRESETS.values()),
    ]
)


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
    add("--m", type=at_least_one, nargs="+", default=[8, 32], metavar="M",
        help="micro-batches of a batch, at most one per sample (default: 8 32)")
    add("--suite", choices=[*get_args(Suite), "scaling"], default="penalty",
        help="what to compare: norms of samples and micro-batches, the gradient-norm penalty with its peers, the "
        "Fisher trace and its penalty, every penalty of the library, monitoring, sharpness-aware minimisation, "
        "products with curvature matrices, what a large model chooses from (scale: time and memory of exact, "
        "recomputed and perturbed penalties), or curves of mlp and gpt with one size varied, m among them (default: "
        "penalty)")
    add("--methods", nargs="+", choices=[*METHODS], metavar="METHOD", help="default: those of the suite")
    add("--rounds", type=at_least_one, default=11, metavar="N", help="timed rounds (default: 11)")
    add_machine(parser)
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add("--plot", type=plot_file, metavar="FILE", help="draw the ratios, as .png, .svg or .pdf")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Declare the options that every benchmark of steps has."""
    add = parser.add_argument
    add("--threads", type=at_least_one, default=os.cpu_count(), metavar="N",
        help="CPU threads (default: all cores)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=[*AUTOCAST], default="float32",
        help="of the timed forward passes; bfloat16 runs under autocast")
    add_json(parser, file=True)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 if a method of fastreg's is wrong or failed, else 0.

    Raises:
        FastregError: no such device, nothing to draw with, or an m that does not divide a batch.
    """
    if args.plot:
        require("matplotlib")
    settings = on_machine(Settings(rounds=args.rounds, peak_memory=not args.no_memory), args)
    rows = execute(_cells(args), settings, args, {"methods": args.methods or _defaults(args)})
    if args.plot:
        title = f"{machine.device_name(args.device)}, torch {torch.__version__}, {args.dtype}"
        report.draw(args.plot, rows, title)
    return suite.exit_status(rows)


def on_machine(settings: Settings, args: argparse.Namespace) -> Settings:
    """``settings`` on the machine that ``args`` name (:func:`add_machine`), which is made ready.

    Raises:
        FastregError: no such device.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise FastregError("bench: --device must be one that torch can use, got cuda "
                           "(torch.cuda.is_available() is False)")
    torch.set_num_threads(args.threads)
    autocast = AUTOCAST[args.dtype]
    return dataclasses.replace(settings, threads=args.threads, device=args.device, autocast=autocast, note=_note)


def execute(
    cells: Sequence[Cell], settings: Settings, args: argparse.Namespace, described: dict[str, object]
) -> list[Row]:
    """Measure ``cells``; the document has ``described`` among its settings, and is written to a file after each."""
    here = machine.describe(args.device)
    asked = {"command": shlex.join(sys.argv), "rounds": settings.rounds, "dtype": args.dtype, "threads": args.threads}

    def write(rows: list[Row]) -> None:
        if isinstance(args.json, Path):
            report.write_json(args.json, report.document(rows, here, {**asked, **described}))

    with aside(args.json):
        print(f"{here['device']}, {args.threads} threads, torch {torch.__version__}, {args.dtype}")
        rows = suite.measure(cells, settings, write)
    if args.json is True:
        deliver(report.document(rows, here, {**asked, **described}), True)
    return rows


def _note(text: str) -> None:
    """Show what is being done on a line of its own, where there is a terminal to overwrite it on."""
    if rewritable(sys.stderr):
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _presets(model: str) -> list[Preset]:
    if model == "all":
        return [preset for preset in PRESETS.values() if preset.by_default]
    return [PRESETS[model]]


def _defaults(args: argparse.Namespace) -> list[str]:
    return list(CURVE_METHODS) if args.suite == "scaling" else default_methods(args.suite)


def _cells(args: argparse.Namespace) -> list[Cell]:
    """A cell for every model and wanted count, no more than one micro-batch per sample, each once."""
    methods = tuple(args.methods or _defaults(args))
    if args.suite == "scaling":
        curves = [curve for curve in CURVES[args.device] if args.model in ("all", curve.name.split()[0])]
        return [dataclasses.replace(cell, methods=methods) for curve in curves for cell in curve.cells()]
    pairs = dict.fromkeys((preset, min(m, preset.batch)) for preset in _presets(args.model) for m in args.m)
    return [Cell(preset, m, methods, args.suite) for preset, m in pairs]
