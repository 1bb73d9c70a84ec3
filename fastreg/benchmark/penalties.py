"""Steps with a penalty of the library, and what one writes in torch for the variance of micro-batch gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastreg
from fastreg.benchmark.peers import Step, double_backward, plain
from fastreg.benchmark.presets import Problem, mean_cross_entropy

# Of WithoutReplacement: Lanczos steps, calls that keep what they find, and the learning rate it stands for.
RANK, REFRESH, LR = 8, 1000, 0.1
Drawn = Callable[[], Tensor | None]


def exact(problem: Problem, compiled: bool = False) -> Step:
    """The gradient-norm penalty."""
    return _regularized(problem, fastreg.GradNorm(problem.weight), compiled=compiled)


def variance(problem: Problem) -> Step:
    """The variance of micro-batch gradients."""
    return _regularized(problem, fastreg.GradNorm(problem.weight, centered=True))


def noise_trace(problem: Problem) -> Step:
    """The trace of the covariance of per-sample gradients."""
    return _regularized(problem, fastreg.NoiseTrace(problem.weight))


def fisher(problem: Problem, gradient: str = "fixed-label", compiled: bool = False) -> Step:
    """The Fisher-trace penalty for sampled labels, with one of its gradients."""
    penalty = fastreg.FisherTrace(problem.weight, gradient=gradient)
    return _regularized(problem, penalty, lambda: penalty.last_labels, compiled=compiled)


def average_jacobian(problem: Problem) -> Step:
    """The average-Jacobian penalty."""
    return _regularized(problem, fastreg.AverageJacobian(problem.weight))


def unit_jacobian(problem: Problem) -> Step:
    """The unit-Jacobian penalty, one direction per micro-batch."""
    penalty = fastreg.UnitJacobian(problem.weight)

    def drawn() -> Tensor | None:
        return None if penalty.last_directions is None else penalty.last_directions.squeeze(1)

    return _regularized(problem, penalty, drawn)


def without_replacement(problem: Problem) -> Step:
    """The eigenvalue-weighted variance; its Ritz vectors come from the first run and stay for ``REFRESH`` runs."""
    penalty = fastreg.WithoutReplacement(problem.weight, LR, rank=RANK, refresh=REFRESH)
    return _regularized(problem, penalty, lambda: penalty.state_dict()["ritz"][1])


def _regularized(
    problem: Problem, penalty: fastreg.Penalty, drawn: Drawn | None = None, compiled: bool = False
) -> Step:
    model = problem.model
    reg = fastreg.Regularizer(model, penalty, micro_batch_size=problem.micro_batch_size)

    def differentiate(inputs: Tensor, targets: Tensor) -> None:
        with problem.precision():
            outputs = model(inputs)
            loss = mean_cross_entropy(outputs, targets)
        reg(loss, outputs).backward()

    taken = fastreg.compile(differentiate, model) if compiled else differentiate

    def run() -> None:
        model.zero_grad(set_to_none=True)
        taken(problem.inputs, problem.targets)

    # The first step checks itself, the second is traced.
    for _ in range(2 if compiled else 0):
        run()
    return Step(model, run, drawn=drawn)


def sequential_variance(problem: Problem) -> Step:
    """Mean squared norm by one double backward per micro-batch, less that of the batch by one more."""

    def run() -> None:
        double_backward(problem, None)
        _add_square(problem, (problem.inputs, problem.targets), -problem.weight)

    return Step(problem.model, run)


def sequential_centred(problem: Problem) -> Step:
    """Distances to the batch's gradient, which is taken first and is a constant: what it moves cancels in the mean."""
    step, parameters = plain(problem), list(problem.model.parameters())

    def run() -> None:
        step.run()
        mean = [p.grad.clone() for p in parameters if p.grad is not None]
        for chunk in problem.chunks():
            _add_square(problem, chunk, problem.weight / problem.micro_batches, mean)

    return Step(problem.model, run)


def _add_square(
    problem: Problem, chunk: tuple[Tensor, Tensor], weight: float, center: list[Tensor] | None = None
) -> None:
    """Add the gradient of ``weight ||g - center||^2`` to ``.grad``, g that of the chunk's mean loss."""
    with sdpa_kernel(SDPBackend.MATH):
        with problem.precision():
            loss = mean_cross_entropy(problem.model(chunk[0]), chunk[1])
        grads = torch.autograd.grad(loss, list(problem.model.parameters()), create_graph=True)
        apart = grads if center is None else [g - c for g, c in zip(grads, center, strict=True)]
        (weight * torch.stack([g.square().sum() for g in apart]).sum()).backward()
