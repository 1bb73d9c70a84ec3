"""The gradient noise scale as a guide to the batch size, held against a sweep over batch sizes.

    python examples/choose_batch_size.py [--seed 0] [--steps 1500] [--target 0.1] [--csv noise_scale.csv]
    fastreg monitor noise_scale.csv --plot noise_scale.png

McCandlish et al. 2018 (arXiv:1812.06162) predict ``S(B) = S_min (1 + B_noise / B)`` steps to a given loss at the best
learning rate, B_noise an average of ``tr S / ||G||^2`` over the run. Here: SGD on the 1,024 training digits until their
loss is 0.1, the best of six learning rates, means over three runs (seed 0)::

    batch     8     16     32     64    128    256
    steps   359    268    166    136    127    101
    fitted  382    241    170    135    117    108      S_min 99 steps, B_crit 22.8 samples

The shape holds within 11%. The noise scale measured at batch 64 is 38 samples on average (13 in the second fifth of a
run, 61 in the last), 1.7 times B_crit; seeds 10 and 20 give 0.9 and 1.2 times (25 of 27, 30 of 26), a target of 0.3
gives 1.5 times (26 of 17.5): runs of one batch size tell B_crit within a factor of two. 35 s on one CPU core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F

import fastreg
from fastreg.errors import FastregError
from fastreg.models import mlp
from fastreg.recipes.data import Split, digits
from fastreg.sinks import CSVSink, MemorySink, Sink

BATCHES = (8, 16, 32, 64, 128, 256)
RATES = tuple(0.28 * 2 ** (k / 2) for k in range(6))
RUNS = 3
MEASURED = 64
FILE = Path("noise_scale.csv")


def steps_to_target(
    data: Split, batch: int, rate: float, *, target: float, limit: int, seed: int, sinks: Sequence[Sink] = ()
) -> int | None:
    """Steps of SGD until the loss over all data is at most ``target``; None if it is not after ``limit`` steps."""
    torch.manual_seed(seed)
    model = mlp((64, 32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    monitor = fastreg.Monitor(model, ema=0.9, sinks=sinks) if sinks else None
    for step in range(1, limit + 1):
        # Drawn with replacement: the data are the population whose gradient and covariance the noise scale compares.
        index = torch.randint(len(data), (batch,))
        F.cross_entropy(model(data.inputs[index]), data.targets[index]).backward()
        if monitor is not None:
            monitor.step()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            if F.cross_entropy(model(data.inputs), data.targets) <= target:
                return step
    return None


def tuned(data: Split, batch: int, target: float, limit: int, seed: int) -> tuple[float, float]:
    """The fewest steps to the target over learning rates, a mean over ``RUNS`` runs, and that learning rate."""
    best, chosen = RUNS * limit + 1, 0.0
    for rate in RATES:
        total = 0
        for run in range(seed, seed + RUNS):
            # A learning rate is given up once its runs have taken as many steps as all those of the best one.
            taken = steps_to_target(data, batch, rate, target=target, limit=min(limit, best - 1 - total), seed=run)
            if taken is None:
                break
            total += taken
        else:
            best, chosen = total, rate
    if not chosen:
        raise FastregError(f"tuned: target must be a loss reached in {limit} steps, got {target} (raise either)")
    return best / RUNS, chosen


def fit(batches: Sequence[int], steps: Sequence[float]) -> tuple[float, float]:
    """``(S_min, B_crit)`` of ``S(B) = S_min (1 + B_crit / B)`` by least squares of relative errors."""
    s, b = torch.tensor(steps).double(), torch.tensor(batches).double()
    minimum, slope = torch.linalg.lstsq(torch.stack([1 / s, 1 / (b * s)], 1), torch.ones(len(s), 1).double()).solution
    return minimum.item(), (slope / minimum).item()


def measured(data: Split, rate: float, target: float, limit: int, seed: int, path: Path) -> list[list[float]]:
    """Noise scales of every step of ``RUNS`` runs of batch size ``MEASURED``; the first goes to ``path`` as well."""
    path.unlink(missing_ok=True)
    sinks = [MemorySink() for _ in range(RUNS)]
    with CSVSink(path) as csv:
        for run, both in enumerate([[sinks[0], csv], *([sink] for sink in sinks[1:])]):
            steps_to_target(data, MEASURED, rate, target=target, limit=limit, seed=seed + run, sinks=both)
    return [[row["fastreg/grad_noise_scale"] for row in sink.rows] for sink in sinks]


def report(results: dict[int, tuple[float, float]], runs: list[list[float]]) -> tuple[float, float]:
    """Print the sweep, its fit and the noise scale; return ``B_crit`` and the mean noise scale."""
    if min(map(len, runs)) < 5:
        raise FastregError(f"report: runs must take at least 5 steps, got {min(map(len, runs))} (lower the target)")
    minimum, critical = fit(list(results), [taken for taken, _ in results.values()])
    print("batch  rate  steps  samples  fitted steps")
    for batch, (taken, rate) in results.items():
        fitted = minimum * (1 + critical / batch)
        print(f"{batch:5d} {rate:5.2f} {taken:6.0f} {taken * batch:8.0f} {fitted:13.0f}")
    print(f"fit: S_min {minimum:.0f} steps, B_crit {critical:.1f} samples")
    for k in range(5):
        parts = [fmean(run[len(run) * k // 5 : len(run) * (k + 1) // 5]) for run in runs]
        print(f"noise scale at batch {MEASURED}, {20 * k}-{20 * k + 20}% of a run: {fmean(parts):.1f} samples")
    scale = fmean(map(fmean, runs))
    print(f"its mean: {scale:.1f} samples, {scale / critical:.2f} of B_crit; at that batch size the fit gives")
    print(f"{1 + critical / scale:.2f} times the fewest steps and {1 + scale / critical:.2f} times the fewest samples")
    return critical, scale


def main(seed: int = 0, steps: int = 1500, target: float = 0.1, csv: Path = FILE) -> tuple[float, float]:
    """Sweep over batch sizes, then measure the noise scale at one of them; see ``report``."""
    data = digits().train
    results = {batch: tuned(data, batch, target, steps, seed) for batch in BATCHES}
    return report(results, measured(data, results[MEASURED][1], target, steps, seed, csv))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the first of the runs (default: 0)")
    parser.add_argument("--steps", type=int, default=1500, help="most steps of a run (default: 1500)")
    parser.add_argument("--target", type=float, default=0.1, help="loss over the training data (default: 0.1)")
    parser.add_argument("--csv", type=Path, default=FILE, help="replaced if it exists (default: noise_scale.csv)")
    main(**vars(parser.parse_args()))
