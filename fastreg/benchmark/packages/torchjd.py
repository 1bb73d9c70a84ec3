"""TorchJD 0.18 (Quinton and Rey 2024, arXiv:2406.16232): norms from the Gramian of the samples' gradients.

Its engine adds up the Gramians of modules, so a weight that two modules share loses the products of its two uses. A GPT
of ours has a parameter of its own, which makes it one module to the engine, and the Gramian right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.benchmark.method import Method, no_samples
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem


def methods() -> Iterator[Method]:
    """Norms of samples and of micro-batches."""
    one = partial(Method, suites=("norms",), package="torchjd", unable=no_samples)
    about = "torchjd.autogram.Engine, the diagonal of the Gramian, then the backward of the mean"
    yield one("torchjd", "sample_norms", about, sample_norms)
    about = "the same, means of its diagonal blocks"
    yield one("torchjd_micro_norms", "micro_norms", about, micro_norms)
    about = "torchjd.autogram.Engine without batch_dim, one loss per micro-batch"
    yield one("torchjd_unbatched_micro_norms", "micro_norms", about, unbatched_micro_norms)


def sample_norms(problem: Problem) -> Step:
    """``||g_i||^2``, the diagonal."""
    return _step(problem, _per_sample, torch.diagonal, batch_dim=0)


def micro_norms(problem: Problem) -> Step:
    """``||g_k||^2``, means over blocks of ``<g_i, g_j>``."""
    m = problem.micro_batches

    def read(gramian: Tensor) -> Tensor:
        return gramian.unflatten(1, (m, -1)).unflatten(0, (m, -1)).mean((1, 3)).diagonal()

    return _step(problem, _per_sample, read, batch_dim=0)


def unbatched_micro_norms(problem: Problem) -> Step:
    """``||g_k||^2``, the diagonal of an ``[m, m]`` Gramian: fewer rows, each through the whole batch."""

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return _per_sample(outputs, targets).unflatten(0, (problem.micro_batches, -1)).mean(1)

    return _step(problem, losses, torch.diagonal, batch_dim=None)


def _step(
    problem: Problem,
    losses_of: Callable[[Tensor, Tensor], Tensor],
    read: Callable[[Tensor], Tensor],
    batch_dim: int | None,
) -> Step:
    from torchjd.autogram import Engine

    model, engine = problem.model, Engine(problem.model, batch_dim=batch_dim)
    found: list[Tensor] = []

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with problem.precision():
            losses = losses_of(model(problem.inputs), problem.targets)
            # It runs layers again.
            found[:] = [read(engine.compute_gramian(losses))]
        losses.backward(torch.full_like(losses, 1 / len(losses)))

    return Step(model, run, sq_norms=lambda: found[0], forget=found.clear)


def _per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    """Every sample's own mean cross entropy, ``[B]``."""
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(outputs), -1).mean(1)
