"""The edge of stability: sharpness against ``2 / lr`` while gradient descent and SGD train at one learning rate.

    python examples/edge_of_stability.py [--lr 0.4] [--batch 4] [--seed 0] [--out docs/edge_of_stability.png]

A tanh network learns the 1,024 training digits with the squared loss. Measured are the sharpness, the largest
eigenvalue of the Hessian over all data, and the batch sharpness, ``mean_B g_B^T H_B g_B / ||g_B||^2`` over batches of
the size that a step takes. At learning rate 0.4, ``2 / lr`` is 5; seeds 0, 1, 2, means over the second half of a run::

    gradient descent   sharpness 1.03, 1.03, 1.04 of 2 / lr     batch sharpness 1.00, 1.00, 1.00
    SGD, batch size 4  sharpness 0.46, 0.41, 0.38 of 2 / lr     batch sharpness 0.78, 0.78, 0.77

Gradient descent does what Cohen et al. 2021 (arXiv:2103.00065) describe: the sharpness rises from 2.2 to 2 / lr and
stays. SGD does in part what Andreyev and Beneventano 2024 (arXiv:2412.20553) describe: the sharpness is held far below
2 / lr and the batch sharpness rises to a level, but to one below 2 / lr, and for batches of 16 and more below the
sharpness (docs/edge_of_stability.md). 47 s on one CPU core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from fastreg.curvature import Hessian
from fastreg.errors import FastregError
from fastreg.models import mlp
from fastreg.optional import require
from fastreg.recipes.data import digits
from fastreg.recipes.papers.sharpness import Point, drawn, half_squared, measure, prepare

WIDTH = 64
FILE = Path("docs/edge_of_stability.png")


def train(
    data: tuple[Tensor, Tensor], batch: int | None, *, rate: float, steps: int, points: int, seed: int
) -> list[Point]:
    """Gradient descent, or SGD on ``batch`` samples a step; measured at the start and ``points`` times."""
    if not 1 <= points <= steps or not (batch is None or 1 <= batch <= len(data[0])):
        got = f"{points}, {steps} and {batch}"
        raise FastregError(f"train: points must be in [1, steps] and batch in [1, {len(data[0])}], got {got}")
    torch.manual_seed(seed)
    model = mlp((data[0].shape[1], WIDTH, WIDTH, data[1].shape[1]), "tanh")
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    # Not the random numbers of training: measured more or less often, a run stays the same.
    generator = torch.Generator().manual_seed(seed)
    hessian, found, every = Hessian(model, half_squared, data), [], steps // points
    for step in range(steps + 1):
        if step % every == 0:
            found.append(measure(hessian, data, batch, rate, step, generator))
        inputs, targets = data if batch is None else drawn(data, batch, None)
        half_squared(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def settled(found: Sequence[Point], rate: float) -> tuple[float, float]:
    """Sharpness and batch sharpness over ``2 / rate``, means over the second half of a run."""
    late = found[len(found) // 2 :]
    return fmean(p.sharpness for p in late) * rate / 2, fmean(p.batch_sharpness for p in late) * rate / 2


def report(title: str, found: Sequence[Point], rate: float) -> None:
    """Print about ten of the points, and where the run has settled."""
    print(f"{title}: 2 / lr = {2 / rate:.2f}\n step     loss  sharpness  batch sharpness")
    for point in found[:: max(1, len(found) // 10)]:
        print(f"{point.step:5d} {point.loss:8.5f} {point.sharpness:10.2f} {point.batch_sharpness:16.2f}")
    top, batch = settled(found, rate)
    print(f"second half, over 2 / lr: sharpness {top:.2f}, batch sharpness {batch:.2f}\n")


def draw(path: Path, runs: dict[str, list[Point]], rate: float) -> None:
    """One panel per run: both sharpnesses over steps, and ``2 / rate``."""
    # Figure without pyplot: no display is looked for and no global state is left behind.
    figure = require("matplotlib.figure").Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (title, found) in zip(panels, runs.items(), strict=True):
        steps = [point.step for point in found]
        axes.plot(steps, [point.batch_sharpness for point in found], color="C1", lw=1, label="batch sharpness")
        axes.plot(steps, [point.sharpness for point in found], color="C0", label="sharpness (largest eigenvalue)")
        axes.axhline(2 / rate, color="black", linestyle="--", lw=1, label="2 / learning rate")
        axes.locator_params(axis="x", nbins=5)
        axes.set(title=title, xlabel="step")
    panels[0].set_ylabel("curvature of the loss")
    panels[-1].legend(loc="lower right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(
    lr: float = 0.4,
    batch: int = 4,
    gd_steps: int = 3000,
    sgd_steps: int = 20000,
    points: int = 100,
    seed: int = 0,
    out: Path = FILE,
) -> dict[str, list[Point]]:
    """Train both ways, print and draw; return what was measured."""
    require("matplotlib")
    data, runs = prepare(digits().train), {}
    sizes = {"gradient descent": (None, gd_steps), f"SGD, batch size {batch}": (batch, sgd_steps)}
    for title, (size, steps) in sizes.items():
        runs[title] = train(data, size, rate=lr, steps=steps, points=points, seed=seed)
        report(title, runs[title], lr)
    draw(out, runs, lr)
    return runs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lr", type=float, default=0.4, help="of both runs (default: 0.4)")
    parser.add_argument("--batch", type=int, default=4, help="of SGD (default: 4)")
    parser.add_argument("--gd-steps", type=int, default=3000, help="of gradient descent (default: 3000)")
    parser.add_argument("--sgd-steps", type=int, default=20000, help="of SGD (default: 20000)")
    parser.add_argument("--points", type=int, default=100, help="measured in each run (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--out", type=Path, default=FILE, help=f"the plot (default: {FILE})")
    main(**vars(parser.parse_args()))
