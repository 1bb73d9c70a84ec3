"""Does the implicit penalty of a large learning rate explain its benefit?  (Smith, Dherin, Barrett, De 2021)

SGD at learning rate eta on shuffled batches follows the gradient flow of ``C + (eta/4) mean_k ||g_k||^2`` on average
(arXiv:2101.12176, eq. 1). So two families of runs are compared, from the same initial weights, on the same data:

    implicit   SGD at a sweep of learning rates eta
    explicit   SGD at one small learning rate on ``C_k + (lambda/4) ||g_k||^2``, at a sweep of lambda

No momentum, no weight decay, constant learning rates, equal numbers of epochs. If the implicit penalty is what helps,
both held-out accuracies peak at similar values of eta and lambda, and the second recovers part of what the first gains
over SGD at the small learning rate. Gains are means over seeds of differences between runs of the same seed.

The defaults for digits (256 samples, the grids, the small rate, the epochs) were chosen after looking at runs of seeds
0 to 3, on the digits that are reported; so these seeds are not among the defaults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fastreg
from fastreg.errors import FastregError
from fastreg.models import mlp, wide_resnet
from fastreg.recipes.catalogue import Recipe
from fastreg.recipes.data import Dataset, Split
from fastreg.recipes.datasets import FROM_FILES, SHIPPED, load_dataset
from fastreg.recipes.papers._sweep_report import draw, table
from fastreg.recipes.progress import Progress
from fastreg.recipes.scoring import Score, evaluate


def _powers_of_two(first: int, last: int) -> tuple[float, ...]:
    return tuple(2.0**power for power in range(first, last + 1))


@dataclass(frozen=True)
class Config:
    """Options of the recipe."""

    data: str = field(default="digits", metadata={"help": "data set", "choices": (*SHIPPED, *FROM_FILES)})
    data_dir: str = field(default="", metadata={"help": "its folder; none for digits"})
    model: str = field(default="mlp", metadata={"help": "mlp or 10-1 Wide-ResNet", "choices": ("mlp", "wide-resnet")})
    hidden: tuple[int, ...] = field(default=(64, 64), metadata={"help": "widths of the mlp"})
    train_size: int = field(default=256, metadata={"help": "training samples, chosen by the seed; 0 for all"})
    batch_size: int = field(default=16, metadata={"help": "b, samples of a step"})
    lrs: tuple[float, ...] = field(default=_powers_of_two(-4, 0), metadata={"help": "eta"})
    penalties: tuple[float, ...] = field(default=_powers_of_two(-4, 2), metadata={"help": "lambda"})
    small_lr: float = field(default=2.0**-5, metadata={"help": "of the explicit runs and of the baseline"})
    epochs: int = field(default=150, metadata={"help": "passes over the training samples"})
    measure_every: int = field(default=10, metadata={"help": "epochs between two evaluations"})
    seeds: int = field(default=4, metadata={"help": "runs of every setting"})
    first_seed: int = field(default=10, metadata={"help": "of the first of them"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda[:N]"})


def paper_scale() -> Config:
    """A 10-1 Wide-ResNet on CIFAR-10, powers of two from 2^-9 to 2^-3; values to be checked against the paper."""
    sweep = _powers_of_two(-9, -3)
    config = Config(data="cifar10", data_dir="cifar-10-batches-py", model="wide-resnet", train_size=0, batch_size=32)
    return replace(config, lrs=sweep, penalties=sweep, small_lr=2.0**-9, epochs=1600, seeds=3, device="cuda")


def settings(config: Config) -> list[tuple[float, float]]:
    """Pairs ``(lr, lambda)``: the baseline, the implicit runs, the explicit runs, without repetition.

    Example:
        >>> settings(Config(lrs=(0.5, 1.0), penalties=(0.25,), small_lr=0.5))
        [(0.5, 0.0), (1.0, 0.0), (0.5, 0.25)]
    """
    implicit = [(lr, 0.0) for lr in config.lrs]
    explicit = [(config.small_lr, penalty) for penalty in config.penalties]
    return list(dict.fromkeys([(config.small_lr, 0.0), *implicit, *explicit]))


def build(config: Config, data: Dataset, seed: int) -> nn.Module:
    """The model of a seed, on the configuration's device."""
    torch.manual_seed(seed)
    if config.model == "wide-resnet":
        return wide_resnet(10, 1, data.num_classes).to(config.device)
    features = data.train.inputs[0].numel()
    return mlp((features, *config.hidden, data.num_classes)).to(config.device)


def attach(config: Config, model: nn.Module, penalty: float) -> fastreg.Regularizer:
    """Adds ``(lambda/4) ||g_k||^2`` to a loss of batch k; the identity for lambda = 0.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> attach(Config(), model, 0.0)(torch.tensor(1.0))
        tensor(1.)
    """
    regularizer = fastreg.Regularizer(model, fastreg.GradNorm(weight=penalty / 4), micro_batch_size=config.batch_size)
    regularizer.enabled = penalty > 0
    return regularizer


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: fastreg.Regularizer,
    data: Dataset,
    batch_size: int,
    order: torch.Generator,
) -> bool:
    """One pass over ``data.train`` in a fresh order; whether the loss stayed finite."""
    for index in torch.randperm(len(data.train), generator=order).split(batch_size):
        index = index.to(data.train.targets.device)
        x, y = data.transform(data.train.inputs[index], order), data.train.targets[index]
        optimizer.zero_grad(set_to_none=True)
        loss = regularizer(F.cross_entropy(model(x), y))
        if not loss < float("inf"):
            return False
        loss.backward()
        optimizer.step()
    return True


def train(config: Config, data: Dataset, lr: float, penalty: float, seed: int, progress: Progress) -> dict[str, float]:
    """One run.

    Args:
        config: of the sweep.
        data: on the configuration's device.
        lr: constant.
        penalty: lambda, in units of a learning rate.
        seed: of weights, of which training samples are kept, of order and augmentation.
        progress: counts epochs.

    Returns:
        Held-out accuracy and loss at the evaluation with the best validation score, and the final train loss,
        nan when the run diverged.

    Example:
        >>> config = Config(epochs=1, measure_every=1)
        >>> sorted(train(config, load_dataset("digits", None), 0.1, 0.0, 0, Progress(1)))
        ['accuracy', 'loss', 'train_loss']
    """
    model, order = build(config, data, seed), torch.Generator().manual_seed(seed)
    data = _subset(data, config.train_size, order)
    optimizer, regularizer = torch.optim.SGD(model.parameters(), lr=lr), attach(config, model, penalty)
    best, held_out, train_loss = Score(-1.0, math.inf), Score(math.nan, math.nan), math.nan
    for epoch in range(1, config.epochs + 1):
        if not train_epoch(model, optimizer, regularizer, data, config.batch_size, order):
            progress.advance("diverged", config.epochs - epoch + 1)
            return {"accuracy": held_out.accuracy, "loss": held_out.loss, "train_loss": math.nan}
        if epoch % config.measure_every == 0 or epoch == config.epochs:
            score = evaluate(model, data, data.validation)
            if score.better_than(best):
                best, held_out = score, evaluate(model, data, data.test)
            train_loss = evaluate(model, data, data.train).loss
        progress.advance(f"lr {lr:.3g}, lambda {penalty:.3g}, seed {seed}")
    return {"accuracy": held_out.accuracy, "loss": held_out.loss, "train_loss": train_loss}


def _subset(data: Dataset, size: int, order: torch.Generator) -> Dataset:
    if not size:
        return data
    kept = torch.randperm(len(data.train), generator=order)[:size].to(data.train.targets.device)
    return replace(data, train=Split(data.train.inputs[kept], data.train.targets[kept]))


def run(config: Config, progress: Progress) -> dict[str, Any]:
    """All settings with all seeds: lists over seeds, one row per setting, the baseline first."""
    for name in ("batch_size", "epochs", "measure_every", "seeds"):
        if getattr(config, name) < 1:
            raise FastregError(f"lr-sweep: {name} must be at least 1, got {getattr(config, name)}")
    data = load_dataset(config.data, Path(config.data_dir) if config.data_dir else None).to(config.device)
    measured = "accuracy", "loss", "train_loss"
    rows: list[dict[str, Any]] = [
        {"lr": lr, "penalty": penalty, **{name: [] for name in measured}} for lr, penalty in settings(config)
    ]
    for row, seed in product(rows, range(config.first_seed, config.first_seed + config.seeds)):
        for name, value in train(config, data, row["lr"], row["penalty"], seed, progress).items():
            row[name].append(value)
    return {"small_lr": config.small_lr, "rows": rows}


RECIPE = Recipe(
    name="lr-sweep",
    paper="Smith, Dherin, Barrett, De 2021, arXiv:2101.12176",
    claim="An explicit penalty (lambda/4) mean ||g_k||^2 at a small learning rate recovers much of the benefit of a "
    "large one, and is best at lambda near the best eta.",
    config=Config,
    quick=Config(lrs=(0.5,), penalties=(0.5,), small_lr=0.125, epochs=10, measure_every=5, seeds=2),
    steps=lambda config: len(settings(config)) * config.seeds * config.epochs,
    run=run,
    table=table,
    draw=draw,
    presets=(("paper", paper_scale()),),
)
