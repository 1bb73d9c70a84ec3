"""Products of the Hessian, the generalised Gauss-Newton and the Fisher matrix with vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastreg.cross_entropy import drawn_cross_entropy
from fastreg.curvature.linearization import Linearization, LossFunction
from fastreg.errors import FastregError
from fastreg.kernels._checks import accumulator

# Takes one tensor per parameter, and gives as many.
Product = Callable[[list[Tensor]], list[Tensor]]
FISHER_KINDS = ("sampled", "empirical", "exact")


def hessian_product(linear: Linearization, loss_fn: LossFunction, targets: Tensor) -> Product:
    """``v -> H v`` for the Hessian of the loss."""
    return linear.hessian(linear.loss(loss_fn, targets))


def ggn_product(linear: Linearization, loss_fn: LossFunction, targets: Tensor) -> Product:
    """``v -> J^T (H_out (J v))`` with the Jacobian of the outputs and the loss's Hessian by the outputs."""
    logits = linear.logits().detach().requires_grad_()
    (slope,) = torch.autograd.grad(linear.loss(loss_fn, targets, logits), logits, create_graph=True)
    jacobian = linear.jacobian()

    def product(vectors: list[Tensor]) -> list[Tensor]:
        pushed = jacobian(vectors)
        curved = None
        if slope.requires_grad:
            (curved,) = torch.autograd.grad(slope, logits, pushed, retain_graph=True, allow_unused=True)
        return linear.pull_back(torch.zeros_like(pushed) if curved is None else curved)

    return product


def fisher_product(
    linear: Linearization,
    kind: str,
    loss_fn: LossFunction | None = None,
    targets: Tensor | None = None,
    seed: int | None = None,
    draw: int = 0,
) -> Product:
    """``v -> F v``.

    Args:
        kind: ``"exact"``, the expectation over labels of the softmax; ``"sampled"``, one label drawn per prediction;
            ``"empirical"``, the gradients of the samples' own losses.
        draw: number of the draw with this seed.

    Raises:
        FastregError: unknown kind; outputs that are not logits ``[B, ..., C]``.
    """
    if kind not in FISHER_KINDS:
        raise FastregError(f"fisher_vp: kind must be one of {FISHER_KINDS}, got {kind!r}")
    if linear.logits().dim() < 2:
        raise FastregError(f"fisher_vp: outputs must be logits [B, ..., C], got {tuple(linear.logits().shape)}")
    if kind == "exact":
        return _exact(linear)
    if kind == "sampled":
        return _sampled(linear, (torch.initial_seed() if seed is None else seed) % 2**63, draw)
    return _empirical(linear, loss_fn, targets)


def _exact(linear: Linearization) -> Product:
    logits = linear.logits().detach()
    p = torch.softmax(logits.to(accumulator(logits.dtype)), -1)
    count, jacobian = p.numel() // p.shape[-1], linear.jacobian()

    def product(vectors: list[Tensor]) -> list[Tensor]:
        weighted = p * jacobian(vectors)
        return linear.pull_back(((weighted - p * weighted.sum(-1, keepdim=True)) / count).to(logits.dtype))

    return product


def _sampled(linear: Linearization, seed: int, draw: int) -> Product:
    logits = linear.logits().detach().requires_grad_()
    with torch.enable_grad():
        losses, _ = drawn_cross_entropy(logits.flatten(0, -2), seed, draw)
        (scores,) = torch.autograd.grad(losses.sum(), logits)
    return _outer_products(linear, scores / losses.numel() ** 0.5, (-1,))


def _empirical(linear: Linearization, loss_fn: LossFunction | None, targets: Tensor | None) -> Product:
    if loss_fn is None or targets is None:
        raise FastregError("fisher_vp: loss_fn must be given for kind='empirical', got None")
    logits = linear.logits().detach().requires_grad_()
    (slope,) = torch.autograd.grad(linear.loss_once(loss_fn, targets, logits), logits)
    samples = linear.micro_batches.samples
    rows = slope.unflatten(0, (samples, -1))
    # The loss is a mean over samples: rows are those of each sample's own loss over B.
    return _outer_products(linear, rows * samples**0.5, tuple(range(1, rows.dim())))


def _outer_products(linear: Linearization, scores: Tensor, dims: tuple[int, ...]) -> Product:
    """``v -> J^T sum_i s_i (s_i . J v)``, the inner products over ``dims`` of the scores."""
    jacobian = linear.jacobian()

    def product(vectors: list[Tensor]) -> list[Tensor]:
        pushed = jacobian(vectors)
        along = (scores * pushed.reshape(scores.shape)).sum(dims, keepdim=True)
        return linear.pull_back((scores * along).reshape(pushed.shape))

    return product
