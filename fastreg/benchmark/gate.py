"""Correctness before speed: a method is timed only if its float64 gradient is right."""

import dataclasses
import functools
from collections.abc import Callable

import torch

from fastreg.benchmark.methods import Method
from fastreg.benchmark.peers import Step, double_backward, plain
from fastreg.benchmark.presets import Problem, mean_cross_entropy
from fastreg.benchmark.sam import RHO

# Relative error in float64 of what a method adds to the gradient of the loss. Exact methods differ
# from the reference by rounding only, about 1e-13 here after a second derivative; a method that
# drops a term, or that replaces one by a difference quotient, is off by 1e-6 or more.
TOLERANCE = 1e-9


def gradient(problem: Problem) -> torch.Tensor:
    """All gradients of the problem's model as one float64 vector ``[P]``."""
    return torch.cat([p.grad.detach().double().flatten() for p in problem.model.parameters()])


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||; a value that is not finite has an infinite error."""
    error = float((value - reference).norm() / reference.norm())
    return error if error == error else float("inf")


class Reference:
    """The right answers of one float64 problem, by plain autograd, one micro-batch at a time.

    Args:
        problem: float64, not shared with any method.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = dataclasses.replace(problem, weight=1.0)

    @functools.cached_property
    def loss_gradient(self) -> torch.Tensor:
        """Gradient of the loss alone, ``[P]``."""
        plain(self.problem).run()
        return gradient(self.problem)

    @functools.cached_property
    def grad_norm_gradient(self) -> torch.Tensor:
        """Gradient of the gradient-norm penalty R at weight one, ``[P]``."""
        return self._penalty_gradient(None)

    def fisher_gradient(self, labels: torch.Tensor) -> torch.Tensor:
        """Gradient of the Fisher-trace penalty at weight one for these labels, ``[P]``."""
        chunks = iter(labels.chunk(self.problem.micro_batches))
        return self._penalty_gradient(lambda outputs: next(chunks))

    def _penalty_gradient(
        self, labels_of: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> torch.Tensor:
        double_backward(self.problem, labels_of)
        return gradient(self.problem) - self.loss_gradient

    @functools.cached_property
    def sam_gradient(self) -> torch.Tensor:
        """Gradient at weights perturbed along that of the batch, ``[P]``."""
        return self._perturbed_gradient(1)

    @functools.cached_property
    def m_sam_gradient(self) -> torch.Tensor:
        """Mean over micro-batches of their gradients, each at weights perturbed along itself, ``[P]``."""
        return self._perturbed_gradient(self.problem.micro_batches)

    def _perturbed_gradient(self, micro_batches: int) -> torch.Tensor:
        weights = dict(self.problem.model.named_parameters())
        found = []
        for x, y in dataclasses.replace(self.problem, micro_batches=micro_batches).chunks():
            direction = self._gradient_at(weights, x, y)
            length = sum(g.square().sum() for g in direction.values()).sqrt()
            moved = {n: (w + RHO / length * direction[n]).detach().requires_grad_() for n, w in weights.items()}
            found.append(torch.cat([g.flatten() for g in self._gradient_at(moved, x, y).values()]))
        return torch.stack(found).mean(0)

    def _gradient_at(
        self, weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        outputs = torch.func.functional_call(self.problem.model, weights, (x,))
        grads = torch.autograd.grad(mean_cross_entropy(outputs, y), list(weights.values()))
        return dict(zip(weights, grads, strict=True))

    @functools.cached_property
    def sample_norms(self) -> torch.Tensor:
        """Squared norms ``[B]`` of the gradients of the samples' own losses."""
        parameters = list(self.problem.model.parameters())
        pairs = zip(self.problem.inputs.split(1), self.problem.targets.split(1))
        losses = (mean_cross_entropy(self.problem.model(x), y) for x, y in pairs)
        grads = (torch.autograd.grad(loss, parameters) for loss in losses)
        return torch.stack([sum(g.square().sum() for g in sample) for sample in grads])

    @functools.cached_property
    def balanced_weight(self) -> float:
        """The weight at which the penalty's gradient is as long as the loss's.

        A smaller one would hide the penalty's error in the rounding of the loss's gradient.
        """
        return float(self.loss_gradient.norm() / self.grad_norm_gradient.norm())

    def error(self, method: Method, problem: Problem, step: Step) -> float:
        """Relative error of what the last run of ``step`` left behind.

        The gradient of the loss is subtracted first, so the error is that of what the method adds.
        """
        found = gradient(problem)
        if method.computes in ("loss", "sample_norms"):
            error = relative_error(found, self.loss_gradient)
            if method.computes == "loss":
                return error
            return max(error, relative_error(step.sq_norms().double(), self.sample_norms))
        if method.computes in ("sam", "m_sam"):
            expected = self.sam_gradient if method.computes == "sam" else self.m_sam_gradient
            return relative_error(found - self.loss_gradient, expected - self.loss_gradient)
        if method.computes == "grad_norm":
            expected = self.grad_norm_gradient
        else:
            expected = self.fisher_gradient(step.labels())
        return relative_error((found - self.loss_gradient) / problem.weight, expected)


def run_and_compare(
    method: Method, problem: Problem, reference: Reference
) -> tuple[Step, float]:
    """Prepare a step of ``method`` on ``problem``, run it once, and give it with its error."""
    problem = dataclasses.replace(problem.copy(), weight=reference.balanced_weight)
    step = method.prepare(problem)
    step.run()
    return step, reference.error(method, problem, step)
