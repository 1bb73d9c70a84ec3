"""What one writes with ``torch.func``: vmapped gradients and their norms, and penalties on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem, mean_cross_entropy

Result = TypeVar("Result")


class SplitLayerNorm(nn.Module):
    """A layer norm over the last dimension whose scale and shift are operations of their own.

    torch 2.13 takes the second derivative of a vmapped ``layer_norm`` without an error and wrongly,
    in ``grad`` of ``vmap(grad)`` and in ``jvp`` of ``jacrev``, which vmaps too: the gradient of the
    scale is then composed from a saved mean and deviation that no longer depend on the input
    (related: pytorch/functorch#534). Split like this, it is right.

    Args:
        norm: the layer norm to stand in for; its parameters are taken over.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, eps=self.eps) * self.weight + self.bias


class SplitBatchNorm(nn.Module):
    """A batch norm in training mode without running statistics, which vmap cannot update, split like a layer norm.

    ``torch.func.replace_all_batch_norm_modules_`` takes the statistics away too, and suffices for gradients; the
    second derivative is wrong then as that of a layer norm is.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = norm.eps, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        channels = (-1, *(1,) * (x.dim() - 2))
        y = F.batch_norm(x, None, None, training=True, eps=self.eps)
        return y * self.weight.view(channels) + self.bias.view(channels)


def split_norms(model: nn.Module) -> None:
    """Put a split norm in the place of every layer norm and batch norm."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, SplitLayerNorm(child))
            elif isinstance(child, _BatchNorm):
                setattr(parent, name, SplitBatchNorm(child))


def penalty(problem: Problem) -> Step:
    """Gradient-norm penalty by ``torch.func.grad`` of a penalty vmapped over micro-batches."""
    return _penalty(problem, torch.func.grad(_penalised_loss(problem)))


def penalty_compiled(problem: Problem) -> Step:
    """:func:`penalty` under ``torch.compile``."""
    return _penalty(problem, torch.compile(torch.func.grad(_penalised_loss(problem)), fullgraph=True))


def norms(problem: Problem, compiled: bool = False, micro: bool = False) -> Step:
    """Squared gradient norms of samples or micro-batches by ``vmap(grad)``; their mean gradient is the plain step's."""
    torch.func.replace_all_batch_norm_modules_(problem.model)
    gradients = vmap(torch.func.grad(functional_loss(problem)), in_dims=(None, 0, 0))

    def measure(parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        found = gradients(parameters, x, y)
        parts = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in found.values()]
        return {name: g.mean(0) for name, g in found.items()}, torch.stack(parts).square().sum(0)

    taken = torch.compile(measure, fullgraph=True) if compiled else measure
    count = problem.micro_batches if micro else len(problem.inputs)
    kept: list[Tensor] = []

    def run() -> None:
        grads, sq_norms = _differentiate(problem, taken, count)
        kept[:] = [sq_norms]
        _leave(problem, grads)

    return Step(problem.model, run, sq_norms=lambda: kept[0], forget=kept.clear)


def functional_loss(problem: Problem) -> Callable[..., Tensor]:
    """The mean loss as a function of (parameters, inputs, targets)."""

    def loss(parameters: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        with problem.precision():
            outputs = torch.func.functional_call(problem.model, parameters, (inputs,))
            return mean_cross_entropy(outputs, targets)

    return loss


def _penalised_loss(problem: Problem) -> Callable[..., Tensor]:
    """loss + weight * R as a function of (parameters, inputs [m, b, ...], targets [m, b, ...])."""
    value_and_grad = torch.func.grad_and_value(functional_loss(problem))
    per_micro_batch = vmap(value_and_grad, in_dims=(None, 0, 0))

    def penalised(parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        grads, losses = per_micro_batch(parameters, inputs, targets)
        sq_norms = sum(g.square().flatten(1).sum(dim=1) for g in grads.values())
        return losses.mean() + problem.weight * sq_norms.mean()

    return penalised


def _penalty(problem: Problem, gradient: Callable[..., Mapping[str, Tensor]]) -> Step:
    split_norms(problem.model)

    def run() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            grads = _differentiate(problem, gradient, problem.micro_batches)
        _leave(problem, grads)

    return Step(problem.model, run)


def _differentiate(problem: Problem, function: Callable[..., Result], count: int) -> Result:
    """``function`` of the parameters and of the batch in ``count`` parts, which clears the gradients first."""
    problem.model.zero_grad(set_to_none=True)
    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}
    return function(parameters, *(t.unflatten(0, (count, -1)) for t in (problem.inputs, problem.targets)))


def _leave(problem: Problem, grads: Mapping[str, Tensor]) -> None:
    for name, parameter in problem.model.named_parameters():
        parameter.grad = grads[name].detach()
