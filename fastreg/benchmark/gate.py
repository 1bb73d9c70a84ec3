"""Correctness before speed: a method is timed only if its float64 gradient or product is right."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast, get_args

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastreg.benchmark import curvature
from fastreg.benchmark.method import Method, Penalized, Product, Quantity
from fastreg.benchmark.peers import Step, plain, shown
from fastreg.benchmark.penalty_gradients import GRADIENTS
from fastreg.benchmark.presets import Problem, mean_cross_entropy
from fastreg.benchmark.sam import RHO

# Relative error in float64 of a product, or of what a method adds to the gradient of the loss. Exact
# methods differ from the reference by rounding only, about 1e-13 here after a second derivative; a
# method that drops a term, or that replaces one by a difference quotient, is off by 1e-6 or more.
TOLERANCE = 1e-9


def gradient(problem: Problem) -> torch.Tensor:
    """All gradients of the problem's model as one float64 vector ``[P]``."""
    return torch.cat([g.detach().double().flatten() for p in problem.model.parameters() if (g := p.grad) is not None])


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """||value - reference|| / ||reference||; a value that is not finite has an infinite error."""
    error = float((value - reference).norm() / reference.norm())
    return error if error == error else float("inf")


class Parts(NamedTuple):
    """Gradients of equal parts of a batch: their squared norms ``[parts]`` and their mean ``[P]``."""

    sq_norms: torch.Tensor
    mean: torch.Tensor


class Reference:
    """The right answers of one float64 problem, by plain autograd, one micro-batch at a time.

    Args:
        problem: float64, not shared with any method.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = dataclasses.replace(problem, weight=1.0)
        self._products: dict[Product, torch.Tensor] = {}
        self._penalties: dict[Penalized, torch.Tensor] = {}

    @functools.cached_property
    def loss_gradient(self) -> torch.Tensor:
        """Gradient of the loss of the whole batch alone, ``[P]``."""
        plain(self.problem).run()
        return gradient(self.problem)

    @functools.cached_property
    def micro_batches(self) -> Parts:
        """Of the micro-batches' own mean losses."""
        return self._parts(self.problem.micro_batches)

    @functools.cached_property
    def samples(self) -> Parts:
        """Of the samples' own losses."""
        return self._parts(len(self.problem.inputs))

    @functools.cached_property
    def noise_statistics(self) -> torch.Tensor:
        """``[2]``: trace of the covariance of per-sample gradients, divisor B - 1, and squared norm of their mean."""
        mean, count = self.samples.mean, len(self.samples.sq_norms)
        apart = functools.reduce(torch.add, ((g - mean).square().sum() for g in self._gradients_of(count)))
        return torch.stack([apart / (count - 1), mean @ mean])

    def fisher_trace(self, labels: torch.Tensor) -> torch.Tensor:
        """``[1]``: mean over samples of the squared gradient norm of their mean losses on ``labels``."""
        pairs = zip(self.problem.inputs.split(1), labels.split(1), strict=True)
        return torch.stack([self._gradient_of(*pair).square().sum() for pair in pairs]).mean(0, keepdim=True)

    def _parts(self, count: int) -> Parts:
        sq_norms, mean = [], torch.zeros(())
        for g in self._gradients_of(count):
            sq_norms.append(g @ g)
            mean = mean + g / count
        return Parts(torch.stack(sq_norms), mean)

    def _gradients_of(self, parts: int) -> Iterator[torch.Tensor]:
        """Gradients ``[P]`` of the mean losses of equal parts of the batch, one after another."""
        return (self._gradient_of(*chunk) for chunk in dataclasses.replace(self.problem, micro_batches=parts).chunks())

    def _gradient_of(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(mean_cross_entropy(self.problem.model(x), y), list(self.problem.model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    def penalty_gradient(self, kind: Penalized, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Gradient of the penalty R at weight one, ``[P]``, for what a step drew if R depends on it."""
        if drawn is not None:
            return GRADIENTS[kind](self.problem, drawn)
        if kind not in self._penalties:
            self._penalties[kind] = GRADIENTS[kind](self.problem, None)
        return self._penalties[kind]

    @functools.cached_property
    def sam_gradient(self) -> torch.Tensor:
        """Gradient at weights perturbed along that of the batch, ``[P]``."""
        return self._perturbed_gradient(1)

    @functools.cached_property
    def m_sam_gradient(self) -> torch.Tensor:
        """Mean over micro-batches of their gradients, each at weights perturbed along itself, ``[P]``."""
        return self._perturbed_gradient(self.problem.micro_batches)

    def _perturbed_gradient(self, micro_batches: int) -> torch.Tensor:
        weights: dict[str, torch.Tensor] = dict(self.problem.model.named_parameters())
        found = []
        for x, y in dataclasses.replace(self.problem, micro_batches=micro_batches).chunks():
            direction = self._gradient_at(weights, x, y)
            length = functools.reduce(torch.add, (g.square().sum() for g in direction.values())).sqrt()
            moved = {n: (w + RHO / length * direction[n]).detach().requires_grad_() for n, w in weights.items()}
            found.append(torch.cat([g.flatten() for g in self._gradient_at(moved, x, y).values()]))
        return torch.stack(found).mean(0)

    def _gradient_at(
        self, weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        outputs = torch.func.functional_call(self.problem.model, weights, (x,))
        grads = torch.autograd.grad(mean_cross_entropy(outputs, y), list(weights.values()))
        return dict(zip(weights, grads, strict=True))

    def product(self, kind: Product) -> torch.Tensor:
        """What methods that compute this product form, flat, one parameter after another."""
        if kind not in self._products:
            self._products[kind] = torch.cat([part.flatten() for part in self._product(kind)])
        return self._products[kind]

    def _product(self, kind: Product) -> Sequence[torch.Tensor]:
        problem, batch = self.problem, (self.problem.inputs, self.problem.targets)
        if kind == "hvp_micro":
            many = curvature.vectors(problem, problem.micro_batches)
            return curvature.micro_batch_products(problem, list(many.values()))
        if kind == "hvp_micro_grad":
            # The gradient of mean_k ||g_k||^2 is 2 mean_k H_k g_k.
            return [self.penalty_gradient("grad_norm") / 2]
        if kind == "hvp_several":
            several = zip(*curvature.vectors(problem, curvature.SEVERAL).values(), strict=True)
            found = [curvature.hessian_product(problem, batch, v) for v in several]
            return [torch.stack(parts) for parts in zip(*found, strict=True)]
        v = list(curvature.vector(problem).values())
        return self._gauss_newton(v) if kind == "ggn" else curvature.hessian_product(problem, batch, v)

    def _gauss_newton(self, vector: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """``J^T (diag p - p p^T) J v``, averaged over predictions; J v as the derivative of ``<J^T u, v>`` by u."""
        parameters = list(self.problem.model.parameters())
        with sdpa_kernel(SDPBackend.MATH):
            logits = self.problem.model(self.problem.inputs).flatten(0, -2)
            u = torch.zeros_like(logits, requires_grad=True)
            pulled = torch.autograd.grad(logits, parameters, u, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, u, vector, retain_graph=True)
        p = logits.detach().softmax(-1)
        curved = p * (pushed - (p * pushed).sum(-1, keepdim=True)) / len(logits)
        return torch.autograd.grad(logits, parameters, curved)

    @functools.cached_property
    def balanced_weight(self) -> float:
        """The weight at which the penalty's gradient is as long as the loss's.

        A smaller one would hide the penalty's error in the rounding of the loss's gradient.
        """
        return float(self.loss_gradient.norm() / self.penalty_gradient("grad_norm").norm())

    def error(self, method: Method, problem: Problem, step: Step) -> float:
        """Relative error of what the last run of ``step`` left behind.

        The gradient of the loss is subtracted first, so the error is that of what the method adds.
        """
        if method.computes in get_args(Product):
            return relative_error(shown(step.product).double(), self.product(cast(Product, method.computes)))
        if method.computes == "fisher_trace":
            return relative_error(shown(step.statistics).double(), self.fisher_trace(shown(step.drawn)))
        found, alone = gradient(problem), self._alone(method.computes)
        if method.computes in ("sam", "m_sam"):
            expected = self.sam_gradient if method.computes == "sam" else self.m_sam_gradient
            return relative_error(found - alone, expected - alone)
        if method.computes in get_args(Penalized):
            drawn = step.drawn() if step.drawn else None
            expected = self.penalty_gradient(cast(Penalized, method.computes), drawn)
            return relative_error((found - alone) / problem.weight, expected)
        return max(relative_error(found, alone), self._error_beside(method.computes, step))

    def _alone(self, computes: Quantity) -> torch.Tensor:
        """The gradient of the loss that a method differentiates beside what it adds, ``[P]``.

        Where samples interact, the micro-batches' own losses are another function than the batch's.
        """
        whole = computes in ("loss", "sam") or not self.problem.coupled
        return self.loss_gradient if whole else self.micro_batches.mean

    def _error_beside(self, computes: Quantity, step: Step) -> float:
        """Largest relative error of what is measured beside the gradient of the loss."""
        if computes == "loss":
            return 0.0
        if computes == "noise_scale":
            return float((shown(step.statistics).double() / self.noise_statistics - 1).abs().max())
        parts = self.samples if computes == "sample_norms" else self.micro_batches
        return relative_error(shown(step.sq_norms).double(), parts.sq_norms)


def run_and_compare(
    method: Method, problem: Problem, reference: Reference
) -> tuple[Step, float]:
    """Prepare a step of ``method`` on ``problem``, run it once, and give it with its error."""
    problem = problem.copy()
    if method.computes in get_args(Penalized):
        problem = dataclasses.replace(problem, weight=reference.balanced_weight)
    step = method.prepare(problem)
    step.run()
    return step, reference.error(method, problem, step)
