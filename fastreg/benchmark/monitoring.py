"""Plain steps with something beside them that measures their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastreg
from fastreg.benchmark.peers import Step, plain, shown
from fastreg.benchmark.presets import Problem, mean_cross_entropy
from fastreg.stats import RidingNorms


def plain_norms(problem: Problem, micro_batch_size: int = 1) -> Step:
    """The plain step with squared gradient norms riding on its backward, per sample as it comes."""
    model = problem.model
    norms = RidingNorms(model, micro_batch_size)
    step = plain(problem)
    found: list[Tensor] = []

    def run() -> None:
        step.run()
        found[:] = [norms.read()]

    return Step(model, run, sq_norms=lambda: found[0])


def micro_norms(problem: Problem) -> Step:
    """The same of the micro-batches."""
    return plain_norms(problem, problem.micro_batch_size)


def noise_scale(problem: Problem) -> Step:
    """The plain step, per-sample norms riding on it, and the squared norm of the gradient it leaves."""
    step = plain_norms(problem)
    found: list[Tensor] = []

    def run() -> None:
        step.run()
        squared = _squared([p.grad for p in problem.model.parameters() if p.grad is not None])
        found[:] = [_noise_statistics(shown(step.sq_norms), squared)]

    return Step(problem.model, run, statistics=lambda: found[0])


def sequential_noise_scale(problem: Problem) -> Step:
    """One backward per sample: a running sum of the gradients, and their squared norms."""
    parameters, count = list(problem.model.parameters()), len(problem.inputs)
    found: list[Tensor] = []

    def run() -> None:
        problem.model.zero_grad(set_to_none=True)
        total, squares = [torch.zeros_like(p) for p in parameters], []
        for sample in zip(problem.inputs.split(1), problem.targets.split(1), strict=True):
            grads = torch.autograd.grad(_loss(problem, *sample), parameters)
            squares.append(_squared(grads))
            torch._foreach_add_(total, grads, alpha=1 / count)
        for p, mean in zip(parameters, total, strict=True):
            p.grad = mean
        found[:] = [_noise_statistics(torch.stack(squares), _squared(total))]

    return Step(problem.model, run, statistics=lambda: found[0])


def _noise_statistics(sq_norms: Tensor, squared_mean: Tensor) -> Tensor:
    """``[2]``: the trace of the covariance, divisor B - 1, from ``||g_i||^2`` and ``||g||^2``, and the latter."""
    count = len(sq_norms)
    return torch.stack([(sq_norms.mean() - squared_mean) * (count / (count - 1)), squared_mean])


def fisher_trace(problem: Problem) -> Step:
    """Per-sample norms on labels drawn from the model: one forward, and a backward without weight gradients."""
    drawn: list[Tensor] = []
    found: list[Tensor] = []

    def on_drawn_labels(outputs: Tensor, targets: Tensor) -> Tensor:
        drawn[:] = [draw_labels(outputs)]
        return mean_cross_entropy(outputs, drawn[0])

    def run() -> None:
        with problem.precision():
            batch = (problem.inputs, problem.targets)
            found[:] = [fastreg.per_sample_grad_norms(problem.model, on_drawn_labels, batch).mean().reshape(1)]

    return Step(problem.model, run, statistics=lambda: found[0], drawn=lambda: drawn[0])


def sequential_fisher_trace(problem: Problem) -> Step:
    """One forward and backward per sample, on a label drawn from the model."""
    parameters = list(problem.model.parameters())
    drawn: list[Tensor] = []
    found: list[Tensor] = []

    def run() -> None:
        drawn.clear()
        squares = []
        for x in problem.inputs.split(1):
            with problem.precision():
                outputs = problem.model(x)
                drawn.append(draw_labels(outputs))
                loss = mean_cross_entropy(outputs, drawn[-1])
            squares.append(_squared(torch.autograd.grad(loss, parameters)))
        found[:] = [torch.stack(squares).mean().reshape(1)]

    return Step(problem.model, run, statistics=lambda: found[0], drawn=lambda: torch.cat(drawn))


def draw_labels(outputs: Tensor) -> Tensor:
    """One draw from the model's softmax for each of its predictions."""
    return torch.distributions.Categorical(logits=outputs.detach()).sample()


def _loss(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    with problem.precision():
        return mean_cross_entropy(problem.model(x), y)


def _squared(grads: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(grads))).square().sum()


def monitored(problem: Problem, **options: Any) -> Step:
    """The plain step with :class:`fastreg.Monitor` beside it."""
    model = problem.model
    monitor = fastreg.Monitor(model, **options)
    step = plain(problem)

    def run() -> None:
        step.run()
        monitor.step()

    return Step(model, run, sq_norms=lambda: monitor.metrics["fastreg/sample_norms"].square())
