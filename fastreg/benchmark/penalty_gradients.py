"""The right gradients of penalties, by plain autograd, one micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastreg.benchmark.curvature import Chunk, symbolic_gradient
from fastreg.benchmark.penalties import LR
from fastreg.benchmark.presets import Problem, mean_cross_entropy
from fastreg.errors import FastregError


def _squares(problem: Problem, given: Tensor, target: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Gradient ``[P]`` of ``mean_k ||grad target(outputs_k, given_k)||^2``, ``given`` cut as the batch is."""
    parameters = list(problem.model.parameters())
    total = torch.zeros(())
    for (x, _), own in zip(problem.chunks(), given.chunk(problem.micro_batches), strict=True):
        with sdpa_kernel(SDPBackend.MATH):
            grads = torch.autograd.grad(target(problem.model(x), own), parameters, create_graph=True)
            squared = reduce(torch.add, (g.square().sum() for g in grads))
            # Of the last bias: its gradient is no function of the weights where a target is linear in the outputs.
            found = torch.autograd.grad(squared, parameters, materialize_grads=True)
        total = total + _flat(found) / problem.micro_batches
    return total


def _frozen(outputs: Tensor, labels: Tensor) -> Tensor:
    residual = outputs.detach().softmax(-1) - F.one_hot(labels, outputs.shape[-1])
    return (residual * outputs).sum(-1).mean()


def _fisher_true(problem: Problem, labels: Tensor) -> Tensor:
    """That of "fixed-label", and ``mean_k (s_k - mean of the other s) grad log p(yh_k)`` with ``s_k = ||gh_k||^2``."""
    m, rest = problem.micro_batches, max(problem.micro_batches - 1, 1)
    squares, total, weighted = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for (x, _), own in zip(problem.chunks(), labels.chunk(m), strict=True):
        g = _gradient(problem, (x, own))
        squares, total, weighted = squares + g @ g, total + g, weighted + (g @ g) * g
    score = (1 + 1 / rest) * weighted - squares / rest * total
    # gh_k is minus a mean over the predictions of a micro-batch, log p(yh_k) a sum over them.
    return _squares(problem, labels, mean_cross_entropy) - score * (labels.numel() / m**2)


def _variance(problem: Problem, weigh: Callable[[Tensor], Tensor] = lambda v: v) -> Tensor:
    """``2 mean_k H_k S (g_k - g)``, S a constant; that H_k and not ``H_k - H`` stands there cancels in the mean."""
    if problem.micro_batches < 2:
        raise FastregError("bench: m must be at least 2 for a variance, got 1 (a single micro-batch has none)")
    # Not the gradient of the whole batch, which is another one where samples interact.
    mean = sum(_gradient(problem, chunk) for chunk in problem.chunks()) / problem.micro_batches
    total = torch.zeros(())
    for chunk in problem.chunks():
        gradient = symbolic_gradient(problem, chunk)
        total = total + _along(problem, gradient, weigh(_flat(gradient).detach() - mean))
    return 2 / problem.micro_batches * total


def _without_replacement(problem: Problem, ritz_vectors: Tensor) -> Tensor:
    """The weight's eigenvectors are the penalty's own Ritz vectors; eigenvalues are ``<u, H u>``, from here."""
    u = ritz_vectors.double()
    gradient = symbolic_gradient(problem, (problem.inputs, problem.targets))
    values = torch.stack([row @ _along(problem, gradient, row) for row in u])
    excess = 2 * _phi_2(-LR * problem.micro_batches * values) - 1
    return _variance(problem, lambda v: v + (excess * (u @ v)) @ u)


def _phi_2(z: Tensor) -> Tensor:
    """``(e^z - 1 - z) / z^2`` as a corner of ``exp [[z, 1, 0], [0, 0, 1], [0, 0, 0]]``, without a cancellation at 0."""
    matrix = z.new_zeros(len(z), 3, 3)
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 2] = z, 1, 1
    return torch.linalg.matrix_exp(matrix)[:, 0, 2]


def _gradient(problem: Problem, chunk: Chunk) -> Tensor:
    return _flat(symbolic_gradient(problem, chunk)).detach()


def _along(problem: Problem, gradient: tuple[Tensor, ...], v: Tensor) -> Tensor:
    """``H v`` from a gradient with a graph, which stays."""
    parameters = list(problem.model.parameters())
    parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
    return _flat(torch.autograd.grad(gradient, parameters, parts, retain_graph=True))


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


# Gradient [P] of R at weight one, of a float64 problem and of what a step drew (:attr:`peers.Step.drawn`).
GRADIENTS: dict[str, Callable[[Problem, Any], Tensor]] = {
    "grad_norm": lambda problem, _: _squares(problem, problem.targets, mean_cross_entropy),
    "fisher": lambda problem, labels: _squares(problem, labels, mean_cross_entropy),
    "fisher_frozen": lambda problem, labels: _squares(problem, labels, _frozen),
    "fisher_true": _fisher_true,
    "average_jacobian": lambda problem, _: _squares(problem, problem.targets, lambda z, _: z.sum(-1).mean()),
    "unit_jacobian": lambda problem, u: _squares(problem, u.double(), lambda z, u: (z * u).sum(-1).mean()),
    "variance": lambda problem, _: _variance(problem),
    "noise_trace": lambda problem, _: _variance(problem) * (len(problem.inputs) / (problem.micro_batches - 1)),
    "without_replacement": _without_replacement,
}
