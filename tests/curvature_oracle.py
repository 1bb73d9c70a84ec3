"""Curvature matrices of the zoo in plain PyTorch: one micro-batch after another, dense, nothing of fastreg in it.

Vectors are flat, ``[D]``, in the order of the parameters that require a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import oracle
from cases import Case


def flat(parts: Sequence[Tensor | None], like: Sequence[Tensor], lead: tuple[int, ...] = ()) -> Tensor:
    """``[*lead, *shape]`` of every parameter, in one ``[*lead, D]``; zeros for None."""
    parts = [p.new_zeros(*lead, *p.shape) if part is None else part for part, p in zip(parts, like, strict=True)]
    return torch.cat([part.reshape(*lead, -1) for part in parts], -1)


def cut(rows: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``[..., D]`` as name -> ``[..., *shape]``."""
    parts = rows.split([p.numel() for p in parameters.values()], -1)
    return {name: part.reshape((*rows.shape[:-1], *p.shape)) for part, (name, p) in zip(parts, parameters.items())}


def hessian_product(loss: Tensor, parameters: Sequence[Tensor], vector: Tensor) -> Tensor:
    """``H v`` as the gradient of ``<gradient, v>``, ``[D]``."""
    gradient = flat(
        torch.autograd.grad(loss, parameters, create_graph=True, retain_graph=True, allow_unused=True), parameters
    )
    if not gradient.requires_grad:
        return torch.zeros_like(vector)
    found = torch.autograd.grad(gradient @ vector, parameters, retain_graph=True, allow_unused=True)
    return flat(found, parameters)


class Piece:
    """The plain model on one micro-batch.

    Attributes:
        labels: of every prediction, for the sampled Fisher matrix; to be set.
    """

    def __init__(self, model: nn.Module, case: Case, inputs: Tensor, targets: Tensor) -> None:
        self.case, self.targets = case, targets
        self.labels: Tensor | None = None
        self.parameters = list(oracle.trainable(model).values())
        with sdpa_kernel(SDPBackend.MATH):
            # Under autocast, what follows the outputs is not in their precision.
            self.outputs = model(inputs).to(self.parameters[0].dtype)
        self.loss = case.loss_fn(self.outputs, targets)

    def gradient(self) -> Tensor:
        """``[D]``."""
        return self._rows(self.loss[None])[0]

    def hessian_product(self, vector: Tensor) -> Tensor:
        """``[D] -> [D]``."""
        return hessian_product(self.loss, self.parameters, vector)

    def hessian_by_rows(self) -> Tensor:
        """``[D, D]``, one call of autograd for each."""
        return self._rows(self._differentiable_gradient())

    def hessian(self) -> Tensor:
        """``[D, D]``, all rows in one call."""
        gradient = self._differentiable_gradient()
        identity = torch.eye(len(gradient), dtype=gradient.dtype)
        rows = torch.autograd.grad(
            gradient, self.parameters, identity, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        return flat(rows, self.parameters, (len(gradient),))

    def ggn(self) -> Tensor:
        """``J^T H_out J``, ``[D, D]``."""
        loss = lambda outputs: self.case.loss_fn(outputs.view_as(self.outputs), self.targets)  # noqa: E731
        curvature = torch.autograd.functional.hessian(loss, self.outputs.detach().flatten())
        return self._jacobian.T @ curvature @ self._jacobian

    def exact(self) -> Tensor:
        """``(1/N) sum_r sum_c p(c) s s^T`` with scores ``s = grad log p(c)``, c every label of prediction r."""
        log_p = lambda outputs: outputs.view_as(self.outputs).log_softmax(-1).flatten()  # noqa: E731
        outputs = self.outputs.detach().flatten()
        scores = torch.autograd.functional.jacobian(log_p, outputs) @ self._jacobian
        count = len(outputs) // self.outputs.shape[-1]
        return scores.T @ (scores * log_p(outputs).exp()[:, None]) / count

    def sampled(self) -> Tensor:
        """``(1/N) sum_r s_r s_r^T`` at the labels drawn."""
        losses = F.cross_entropy(self.outputs.flatten(0, -2), self.labels, reduction="none")
        return self._mean_outer(losses)

    def empirical(self) -> Tensor:
        """``(1/B) sum_i g_i g_i^T``."""
        return self._mean_outer(self.case.sample_losses(self.outputs, self.targets))

    @cached_property
    def _jacobian(self) -> Tensor:
        return self._rows(self.outputs.flatten())

    def _differentiable_gradient(self) -> Tensor:
        return flat(
            torch.autograd.grad(self.loss, self.parameters, create_graph=True, allow_unused=True), self.parameters
        )

    def _mean_outer(self, losses: Tensor) -> Tensor:
        scores = self._rows(losses)
        return scores.T @ scores / len(losses)

    def _rows(self, values: Tensor) -> Tensor:
        """The Jacobian ``[R, D]`` of ``[R]``, row by row."""
        found = (
            torch.autograd.grad(value, self.parameters, retain_graph=True, allow_unused=True)
            if value.requires_grad
            else [None] * len(self.parameters)
            for value in values
        )
        return torch.stack([flat(parts, self.parameters) for parts in found])


def pieces(case: Case, samples: int, size: int) -> list[Piece]:
    """Every micro-batch of the first ``samples`` samples of a case."""
    model, (inputs, targets) = case.model(), case.batch(samples)
    return [Piece(model, case, inputs[rows], targets[rows]) for rows in oracle.cut(samples, size)]
