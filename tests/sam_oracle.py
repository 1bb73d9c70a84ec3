"""m-SAM one micro-batch after another, in plain PyTorch on copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import oracle


def sequential_gradient(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    size: int,
    rho: float,
    adaptive: bool = False,
) -> oracle.Gradient:
    """Mean over samples of the gradient at each micro-batch's own perturbed weights."""
    total = {name: torch.zeros_like(p) for name, p in oracle.trainable(model).items()}
    for rows in oracle.cut(len(inputs), size):
        x, y = inputs[rows], targets[rows]
        moved = copy.deepcopy(model)
        parameters = oracle.trainable(moved)
        _perturb(parameters, oracle.gradient_of(loss_fn(moved(x), y), parameters, False), rho, adaptive)
        for name, gradient in oracle.gradient_of(loss_fn(moved(x), y), parameters, False).items():
            total[name] += gradient * (len(x) / len(inputs))
    return total


@torch.no_grad()
def _perturb(parameters: dict[str, Tensor], gradient: oracle.Gradient, rho: float, adaptive: bool) -> None:
    units = {name: p.abs() if adaptive else torch.ones_like(p) for name, p in parameters.items()}
    norm = torch.stack([(units[name] * g).norm() for name, g in gradient.items()]).norm()
    for name, p in parameters.items():
        p += rho * units[name].square() * gradient[name] / norm
