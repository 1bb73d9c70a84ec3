"""Steps of sharpness-aware minimisation: ours, the plain loop over micro-batches, and a package's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem, mean_cross_entropy
from fastreg.optim import SAM

# Length of the perturbation: the usual choice of Foret et al. 2021 (arXiv:2010.01412, section 3).
RHO = 0.05


def m_sam(problem: Problem) -> Step:
    """``fastreg.optim.SAM``, all micro-batches at once."""
    return _fastreg(problem, problem.micro_batch_size)


def sam(problem: Problem) -> Step:
    """``fastreg.optim.SAM`` with the batch as its only micro-batch."""
    return _fastreg(problem, None)


def _fastreg(problem: Problem, micro_batch_size: int | None) -> Step:
    # The base only names the parameters: a step of the benchmark ends with the gradient.
    base = torch.optim.SGD(problem.model.parameters())
    optimizer = SAM(base, problem.model, RHO, micro_batch_size)
    closure = _closure(problem)
    return Step(problem.model, lambda: optimizer.backward(closure))


def sequential_m_sam(problem: Problem) -> Step:
    """One micro-batch after another: gradient, perturb, accumulate the gradient there, restore."""
    model, parameters = problem.model, list(problem.model.parameters())

    def run() -> None:
        model.zero_grad(set_to_none=True)
        saved = [p.detach().clone() for p in parameters]
        for chunk in problem.chunks():
            grads = torch.autograd.grad(_loss(problem, *chunk), parameters)
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            with torch.no_grad():
                torch._foreach_add_(parameters, grads, alpha=RHO / norm.item())
            (_loss(problem, *chunk) / problem.micro_batches).backward()
            with torch.no_grad():
                torch._foreach_copy_(parameters, saved)

    return Step(model, run)


def package_sam(problem: Problem) -> Step:
    """``pytorch_optimizer.SAM`` on the whole batch, its fastest settings."""
    import pytorch_optimizer

    parameters = list(problem.model.parameters())
    # No guard against a zero norm, so that the formula is the same.
    optimizer = pytorch_optimizer.SAM(parameters, _NoStep, rho=RHO, perturb_eps=0.0, foreach=True)
    closure = _closure(problem)

    def run() -> None:
        closure()
        optimizer.step(closure)

    return Step(problem.model, run)


class _NoStep(torch.optim.Optimizer):
    """Leaves weights and gradients as they are."""

    def __init__(self, params: object, **defaults: object) -> None:
        super().__init__(params, defaults)

    def step(self, closure: None = None) -> None:
        pass


def _loss(problem: Problem, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with problem.precision():
        return mean_cross_entropy(problem.model(inputs), targets)


def _closure(problem: Problem) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        problem.model.zero_grad(set_to_none=True)
        loss = _loss(problem, problem.inputs, problem.targets)
        loss.backward()
        return loss

    return closure
