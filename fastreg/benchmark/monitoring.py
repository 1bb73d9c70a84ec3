"""Plain steps with something beside them that measures their gradients."""

from __future__ import annotations

from torch import Tensor

import fastreg
from fastreg.benchmark.peers import Step, plain
from fastreg.benchmark.presets import Problem
from fastreg.stats import RidingNorms


def plain_norms(problem: Problem) -> Step:
    """The plain step with per-sample squared gradient norms riding on its backward."""
    model = problem.model
    norms = RidingNorms(model, micro_batch_size=1)
    step = plain(problem)
    found: list[Tensor] = []

    def run() -> None:
        step.run()
        found[:] = [norms.read()]

    return Step(model, run, sq_norms=lambda: found[0])


def monitored(problem: Problem, **options: object) -> Step:
    """The plain step with :class:`fastreg.Monitor` beside it."""
    model = problem.model
    monitor = fastreg.Monitor(model, **options)
    step = plain(problem)

    def run() -> None:
        step.run()
        monitor.step()

    return Step(model, run, sq_norms=lambda: monitor.metrics["fastreg/sample_norms"].square())
