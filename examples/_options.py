"""Options of ``pretrain.py``: presets, the command line, and what does not go together."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from fastreg.errors import FastregError
from fastreg.models import GPTConfig

PENALTIES = ("grad_norm", "fisher")
WEIGHTS = {"grad_norm": 1e-3, "fisher": 1e-3, "sam": 0.05}
WHOLE = "step-" + 8 * "[0-9]"

MODELS = {
    "tiny": GPTConfig(vocab=256, context=64, width=64, layers=2, heads=4),
    "124m": GPTConfig(vocab=50304, context=1024, width=768, layers=12, heads=12),
    "350m": GPTConfig(vocab=50304, context=1024, width=1024, layers=24, heads=16),
    "1.3b": GPTConfig(vocab=50304, context=2048, width=2048, layers=24, heads=16),
}
# Brown et al. 2020, arXiv:2005.14165, table 2.1, has the learning rates of the large ones.
DEFAULTS = {
    "tiny": {"lr": 3e-3, "steps": 250, "batch_size": 16, "micro_batch_size": 4},
    "124m": {"lr": 6e-4, "steps": 20000, "batch_size": 512, "micro_batch_size": 4},
    "350m": {"lr": 3e-4, "steps": 20000, "batch_size": 512, "micro_batch_size": 4},
    "1.3b": {"lr": 2e-4, "steps": 40000, "batch_size": 512, "micro_batch_size": 2},
}


def parser() -> argparse.ArgumentParser:
    """The command line, with the defaults of the preset ``tiny``."""
    out = argparse.ArgumentParser("pretrain.py", description="Pretraining a GPT with a penalty, SAM or a monitor.")
    add = out.add_argument
    add("--preset", choices=MODELS, default="tiny")
    add("--data", type=Path, help="text, or a .bin file of uint16 tokens (default: this repository's documentation)")
    for name, kind in (("steps", int), ("batch-size", int), ("micro-batch-size", int), ("lr", float)):
        known = ", ".join(str(preset[name.replace("-", "_")]) for preset in DEFAULTS.values())
        add(f"--{name}", type=kind, help=f"default, by preset: {known}")
    add("--regularizer", choices=("none", *PENALTIES, "sam", "monitor"), default="none")
    add("--method", choices=("exact", "perturb"), help="of a penalty (default: exact)")
    add("--weight", type=float, help=f"of a penalty, or rho of SAM (default: {WEIGHTS})")
    add("--parallel", choices=("ddp", "fsdp2"), help="under torchrun")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--compile", action="store_true", help="torch.compile")
    add("--checkpoint", type=Path, help="folder of checkpoints")
    add("--every", type=int, help="steps from one checkpoint to the next (default: only after the last step)")
    add("--resume", action="store_true", help="continue from the last checkpoint")
    add("--jsonl", type=Path, help="file of JSON lines")
    add("--seed", type=int, default=0)
    return out


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, int, int]:
    """Options, rank and number of ranks.

    Raises:
        FastregError: options that do not go together, by name.
    """
    command = parser()
    command.set_defaults(**DEFAULTS[command.parse_known_args(argv)[0].preset])
    args, launched = command.parse_args(argv), "RANK" in os.environ
    rank, ranks = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if launched else (0, 1)
    _check(args, ranks, launched)
    args.every = args.every or args.steps
    args.method = args.method or "exact"
    args.weight = WEIGHTS.get(args.regularizer) if args.weight is None else args.weight
    return args, rank, ranks


def _check(args: argparse.Namespace, ranks: int, launched: bool) -> None:
    folder, kind = args.checkpoint, args.regularizer
    there = folder is not None and any(folder.glob(WHOLE))
    why = "recorded forwards run as they were written, and compiled ones have no double backward"
    for wrong, message in (
        (bool(args.parallel) != launched, f"--parallel must go with torchrun, and it with that, got {args.parallel}"),
        (args.batch_size % ranks, f"--batch-size must be a multiple of the {ranks} ranks, got {args.batch_size}"),
        (min(args.steps, args.every or 1) < 1, f"--steps and --every must be >= 1, got {args.steps}, {args.every}"),
        (args.method and kind not in PENALTIES, f"--method must go with one of {PENALTIES}, got {kind}"),
        (args.weight is not None and kind not in WEIGHTS, f"--weight must go with one of {[*WEIGHTS]}, got {kind}"),
        (args.compile and kind != "none", f"--compile must go with --regularizer none, got {kind} ({why})"),
        (not folder and (args.resume or args.every), "--every and --resume must go with --checkpoint, got none"),
        (args.resume != there, f"--resume must be given if and only if there is a checkpoint, got {folder}"),
    ):
        if wrong:
            raise FastregError(f"pretrain: {message}")
