"""Penalties written out in plain autograd: m gradients with a graph, dense Hessians, every label enumerated."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastreg
import oracle
from cases import Case


def flat(gradient: oracle.Gradient) -> Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


class MicroBatches:
    """Losses ``C_k``, weights ``w_k``, gradients ``g_k`` ``[m, P]`` and their mean, all differentiable."""

    def __init__(self, case: Case, model: nn.Module, inputs: Tensor, targets: Tensor, size: int) -> None:
        self.model, self.inputs, self.targets, self.size = model, inputs, targets, size
        self.parameters = oracle.trainable(model)
        self.losses, counts = oracle.micro_batch_losses(model, case.loss_fn, inputs, targets, size)
        self.shares = counts / counts.sum()
        self.loss = torch.stack(self.losses) @ self.shares
        self.gradients = torch.stack([self.gradient(loss) for loss in self.losses])
        self.mean = self.shares @ self.gradients

    def gradient(self, value: Tensor) -> Tensor:
        return flat(oracle.gradient_of(value, self.parameters, True))

    def variance(self) -> Tensor:
        return self.shares @ (self.gradients - self.mean).square().sum(1)

    def hessian(self) -> Tensor:
        """``[P, P]`` of the mean loss."""
        rows = [flat(oracle.gradient_of(entry, self.parameters, False)) for entry in self.mean]
        return torch.stack(rows)


def gradient_with(
    case: Case, batch: tuple[Tensor, Tensor], size: int, value: Callable[[MicroBatches], Tensor], weight: float
) -> tuple[oracle.Gradient, Tensor]:
    """Gradient of loss + weight * value, and the value, on a fresh model of the case."""
    with sdpa_kernel(SDPBackend.MATH):
        cut = MicroBatches(case, case.model(), *batch, size)
        found = value(cut)
        whole = cut.loss + weight * found
        gradient = oracle.gradient_of(whole, cut.parameters, False)
    return {name: g.detach() for name, g in gradient.items()}, found.detach()


def regularized(
    case: Case, batch: tuple[Tensor, Tensor], size: int, penalty: fastreg.Penalty, **options: object
) -> tuple[oracle.Gradient, fastreg.Regularizer]:
    """What one step with the penalty leaves in ``.grad``."""
    model = case.model()
    reg = fastreg.Regularizer(model, penalty, micro_batch_size=size, **options)
    outputs = model(batch[0])
    reg(case.loss_fn(outputs, batch[1]), outputs).backward()
    return oracle.collected_gradient(model), reg


def phi_2(z: Tensor) -> Tensor:
    """``(e^z - 1 - z) / z^2`` by quadrature of its integral ``int_0^1 (1 - t) e^(t z) dt``."""
    nodes, weights = (torch.from_numpy(array) for array in numpy.polynomial.legendre.leggauss(40))
    t = (nodes + 1) / 2
    return ((1 - t) * torch.exp(t * z.unsqueeze(-1))) @ weights / 2


def label_gradients(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """``p_iy`` ``[B, C]`` and ``grad -log p_iy`` ``[B, C, P]``, differentiable."""
    parameters, log_p = oracle.trainable(model), F.log_softmax(model(inputs), -1)
    rows = [[flat(oracle.gradient_of(-entry, parameters, True)) for entry in row] for row in log_p]
    return log_p.exp(), torch.stack([torch.stack(row) for row in rows])


def jacobians(model: nn.Module, inputs: Tensor) -> Tensor:
    """``d outputs_ic / dw`` ``[B, C, P]``, differentiable."""
    parameters, outputs = oracle.trainable(model), model(inputs)
    rows = [[flat(oracle.gradient_of(entry, parameters, True)) for entry in row] for row in outputs]
    return torch.stack([torch.stack(row) for row in rows])
