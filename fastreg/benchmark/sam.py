"""Steps of sharpness-aware minimisation: ours, and the plain loop over micro-batches."""

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
    closure = closure_of(problem)

    def run() -> None:
        optimizer.backward(closure)

    return Step(problem.model, run)


def sequential_m_sam(problem: Problem) -> Step:
    """One micro-batch after another: gradient, perturb, accumulate the gradient there, restore."""
    model = problem.model
    parameters: list[torch.Tensor] = list(model.parameters())

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


def _loss(problem: Problem, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    with problem.precision():
        return mean_cross_entropy(problem.model(inputs), targets)


def closure_of(problem: Problem) -> Callable[[], torch.Tensor]:
    """Clears the gradients, then forward, loss and backward; gives the loss."""

    def closure() -> torch.Tensor:
        problem.model.zero_grad(set_to_none=True)
        loss = _loss(problem, problem.inputs, problem.targets)
        loss.backward()
        return loss

    return closure
