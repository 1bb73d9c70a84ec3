"""pytorch_optimizer 4.1 (Kim 2021, github.com/kozistr/pytorch_optimizer): its sharpness-aware minimisation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastreg.benchmark.method import Method
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem
from fastreg.benchmark.sam import RHO, closure_of


def methods() -> Iterator[Method]:
    """SAM with one perturbation."""
    about, package = "pytorch_optimizer.SAM, one perturbation", "pytorch_optimizer"
    # It takes the norm of the gradient in float32.
    yield Method("package_sam", "sam", about, sam, suites=("sam",), package=package, rounding=1e-6)


def sam(problem: Problem) -> Step:
    """``pytorch_optimizer.SAM`` on the whole batch, its fastest settings."""
    import pytorch_optimizer

    parameters = list(problem.model.parameters())
    # No guard against a zero norm, so that the formula is the same.
    optimizer = pytorch_optimizer.SAM(parameters, _NoStep, rho=RHO, perturb_eps=0.0, foreach=True)
    closure = closure_of(problem)

    def run() -> None:
        closure()
        optimizer.step(closure)

    return Step(problem.model, run)


class _NoStep(torch.optim.Optimizer):
    """Leaves weights and gradients as they are."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, defaults)

    def step(self, closure: Any = None) -> Any:
        pass
