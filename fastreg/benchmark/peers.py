"""What one writes without this library: the steps that ours are compared with."""

import dataclasses
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastreg.benchmark.presets import Problem, mean_cross_entropy


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step, and what it can show beside the gradient it leaves in ``.grad``.

    Attributes:
        model: where the gradient is left.
        run: clears the gradients, then forward, loss and backward; or what gives the product.
        sq_norms: squared norms of the gradients of the last run: per-sample ones ``[B]`` or those of
            micro-batches ``[m]``.
        statistics: what the last run measured of the batch: ``[1]`` the Fisher trace, or ``[2]`` the trace of the
            covariance of per-sample gradients and the squared norm of their mean.
        drawn: what the last run's penalty depends on besides weights and batch: labels ``[B, ...]``, unit vectors
            ``[m, C]``, or Ritz vectors ``[r, P]``.
        product: the product of a matrix with vectors that the last run formed, flat, one parameter after another.
        forget: drops what runs leave for the next one beside the gradients.
    """

    model: nn.Module
    run: Callable[[], None]
    sq_norms: Callable[[], torch.Tensor] | None = None
    statistics: Callable[[], torch.Tensor] | None = None
    drawn: Callable[[], torch.Tensor | None] | None = None
    product: Callable[[], torch.Tensor] | None = None
    forget: Callable[[], None] | None = None

    def clear(self) -> None:
        """Free everything that runs have left."""
        self.model.zero_grad(set_to_none=True)
        if self.forget is not None:
            self.forget()


def shown(by: Callable[[], torch.Tensor | None] | None) -> torch.Tensor:
    """What the last run of a step has left, where the step shows it."""
    found = None if by is None else by()
    assert found is not None
    return found


def plain(problem: Problem) -> Step:
    """Forward, loss, backward: the yardstick."""
    model = problem.model

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with problem.precision():
            loss = mean_cross_entropy(model(problem.inputs), problem.targets)
        loss.backward()

    return Step(model, run)


def plain_compiled(problem: Problem) -> Step:
    """The plain step of ``torch.compile(model)``."""
    return plain(dataclasses.replace(problem, model=cast(nn.Module, torch.compile(problem.model))))


def sequential(problem: Problem) -> Step:
    """Gradient-norm penalty by one double backward per micro-batch."""
    return Step(problem.model, lambda: double_backward(problem, None))


def sequential_fisher(problem: Problem) -> Step:
    """Fisher-trace penalty by one double backward per micro-batch, labels drawn from the model."""
    drawn: list[torch.Tensor] = []

    def draw(outputs: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.distributions.Categorical(logits=outputs.detach()).sample())
        return drawn[-1]

    def run() -> None:
        drawn.clear()
        double_backward(problem, draw)

    return Step(problem.model, run, drawn=lambda: torch.cat(drawn))


def double_backward(
    problem: Problem, labels_of: Callable[[torch.Tensor], torch.Tensor] | None
) -> None:
    """Leave the gradient of loss + weight * mean_k ||g_k||^2 in ``.grad``, micro-batch by micro-batch.

    g_k is the gradient of micro-batch k's own mean loss or, with ``labels_of``, of its mean loss
    on the labels that this function returns for its outputs. Attention runs on the MATH backend:
    the fused ones have no second derivative.
    """
    model = problem.model
    parameters = list(model.parameters())
    model.zero_grad(set_to_none=True)
    with sdpa_kernel(SDPBackend.MATH):
        for inputs, targets in problem.chunks():
            with problem.precision():
                outputs = model(inputs)
                loss = penalised = mean_cross_entropy(outputs, targets)
                if labels_of is not None:
                    penalised = mean_cross_entropy(outputs, labels_of(outputs))
            grads = torch.autograd.grad(penalised, parameters, create_graph=True)
            sq_norm = torch.stack([g.square().sum() for g in grads]).sum()
            ((loss + problem.weight * sq_norm) / problem.micro_batches).backward()


def sequential_norms(problem: Problem) -> Step:
    """The squared gradient norm of every sample, by one backward each."""
    return _sequential_norms(problem, len(problem.inputs))


def sequential_micro_norms(problem: Problem) -> Step:
    """The squared gradient norm of every micro-batch, by one backward each."""
    return _sequential_norms(problem, problem.micro_batches)


def _sequential_norms(problem: Problem, count: int) -> Step:
    """Of ``count`` parts of the batch, whose mean gradient is the plain step's."""
    parts = dataclasses.replace(problem, micro_batches=count)
    found: list[torch.Tensor] = []

    def run() -> None:
        found.clear()
        problem.model.zero_grad(set_to_none=True)
        for chunk in parts.chunks():
            grads = _gradient(problem, chunk)
            found.append(torch.stack(torch._foreach_norm(grads)).square().sum())
            _accumulate(problem, grads, 1 / count)

    return Step(problem.model, run, sq_norms=lambda: torch.stack(found), forget=found.clear)


# Length of the step along a gradient in a difference quotient. The code of Geiping et al. 2021 (arXiv:2109.14119) takes
# 1e-2 and says that 1e-2 to 1e-4 are stable; in the middle, rounding is small in float32 and truncation bearable.
DIFFERENCE = 1e-3
# Relative error that this justifies where the loss is smooth: of first order in the length, up to 30 times it on the
# models here. Kinks cost more than all of it.
TRUNCATION = 50 * DIFFERENCE


def sequential_fd(problem: Problem) -> Step:
    """Gradient-norm penalty by a forward difference of gradients per micro-batch: two backwards each, both first order.

    ``H g`` is ``(grad(w + e g) - g) / e`` with ``e = DIFFERENCE / ||g||``, which is off by the curvature's change over
    that step: by O(DIFFERENCE) where the loss is smooth, by as much as ``H g`` where the step crosses kinks of a ReLU.
    """
    weights = [p.detach() for p in problem.model.parameters()]

    def run() -> None:
        problem.model.zero_grad(set_to_none=True)
        saved = torch._foreach_clone(weights)
        for chunk in problem.chunks():
            grads = _gradient(problem, chunk)
            e = DIFFERENCE / torch.stack(torch._foreach_norm(grads)).norm().item()
            torch._foreach_add_(weights, grads, alpha=e)
            ahead = _gradient(problem, chunk)
            torch._foreach_copy_(weights, saved)
            # mean_k (g_k + 2 weight H_k g_k)
            _accumulate(problem, grads, (1 - 2 * problem.weight / e) / problem.micro_batches)
            _accumulate(problem, ahead, 2 * problem.weight / e / problem.micro_batches)

    return Step(problem.model, run)


def _gradient(problem: Problem, chunk: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    with problem.precision():
        loss = mean_cross_entropy(problem.model(chunk[0]), chunk[1])
    return torch.autograd.grad(loss, list(problem.model.parameters()))


def _accumulate(problem: Problem, grads: tuple[torch.Tensor, ...], weight: float) -> None:
    """Add ``weight`` times the gradients to ``.grad``."""
    parameters = list(problem.model.parameters())
    if there := [p.grad for p in parameters if p.grad is not None]:
        torch._foreach_add_(there, grads, alpha=weight)
        return
    for p, g in zip(parameters, grads, strict=True):
        p.grad = weight * g
