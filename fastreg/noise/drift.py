"""The drift of SGD without replacement at learning rates that are not small against the curvature.

Notation: k steps on the k fixed batches of an epoch, in random order; losses ``L_i``, gradients ``g_i``, Hessians
``H_i``, with means L, g, H and fluctuations ``dg_i = g_i - g``, ``dH_i = H_i - H``; ``P = 1 - lr H``.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from fastreg.curvature import Hessian, batched_hvp
from fastreg.curvature.linearization import LossFunction
from fastreg.curvature.traces import check_count
from fastreg.curvature.vectors import named_parameters, unflatten
from fastreg.errors import FastregError
from fastreg.noise.expansion import BatchDerivatives
from fastreg.noise.modified_loss import Batch, check_lr, count_batches
from fastreg.penalties.flat_weight import flat_drift_weight

__all__ = ["drift_weight", "eigenbasis_drift", "flat_drift_weight", "without_replacement_drift"]


def without_replacement_drift(
    model: nn.Module, loss_fn: LossFunction, batch: Batch, batch_size: int, lr: float
) -> Tensor:
    r"""Where an epoch without replacement ends, in the mean over orders, from where gradient descent does.

        E[theta_k] - y_k = -lr^2 / (k - 1) sum_{s < t < k} P^(k-1-t) (1/k) sum_i dH_i P^(t-1-s) dg_i(y_s) + O(fluct^3)

    with ``y_s`` the path of gradient descent on L from the model's parameters, and ``dH_i`` and P of step t taken at
    ``y_t``. lr H may be of order 1. With replacement the term is 0. It is all there is to second order in the
    fluctuations for losses quadratic in the parameters; others add ``-(lr/2) D^3 L : Cov(theta_t)`` at every step, a
    drift that is there with replacement too, of another size, and is not part of the result.

    The sum is evaluated exactly, by recursion: at each of k - 1 points k + 1 Hessian-vector products over the whole
    epoch and one batched over batches. It holds a few times k vectors of length D.

    Args:
        model: at the start of the epoch; run in its current mode on a copy, and left as it is.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss over samples, scalar.
        batch: ``(inputs, targets)``, each ``[k b, ...]``: the epoch.
        batch_size: b; at least two batches of as many samples.
        lr: above 0.

    Returns:
        ``[D]``, flat, in the order of the parameters that require grad.

    Raises:
        FastregError: an argument is out of range, or as :func:`fastreg.curvature.batched_hvp`.

    Source: the question and the regime are those of Beneventano 2023, arXiv:2312.16143; the formula: derived here.

    Example:
        >>> import torch
        >>> from fastreg.noise.drift import without_replacement_drift
        >>> model, batch = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
        >>> without_replacement_drift(model, torch.nn.functional.mse_loss, batch, 2, lr=0.1).shape
        torch.Size([4])
    """
    count = _checked("without_replacement_drift", batch, batch_size, lr)
    moved = deepcopy(model)
    parameters = named_parameters(moved)
    batches = BatchDerivatives(moved, loss_fn, batch, batch_size)
    memory = _fluctuations(batches)
    drift = torch.zeros_like(memory[0])
    for _ in range(1, count):
        _move(parameters, -lr * batches.gradients.mean(0))
        batches = BatchDerivatives(moved, loss_fn, batch, batch_size)
        curved = batched_hvp(moved, loss_fn, batch, torch.cat([memory, drift.unsqueeze(0)]).T).T
        # The mean of memory is 0, so that H_i stands for dH_i.
        drift = drift - lr * curved[-1] - lr**2 / (count - 1) * batches.products(memory).mean(0)
        memory = memory - lr * curved[:-1] + _fluctuations(batches)
    return drift


def eigenbasis_drift(model: nn.Module, loss_fn: LossFunction, batch: Batch, batch_size: int, lr: float) -> Tensor:
    r""":func:`without_replacement_drift` with the path held at its start, direction by direction.

        drift_a = -lr^2 / (2 (k - 1)) sum_c W(1 - lr lambda_a, 1 - lr lambda_c) d_a Var_i(g_c)

    in the eigenbasis of H, with ``Var_i(g_c) = (1/k) sum_i dg_ic^2``, its derivative along eigenvector a, and the
    weights W of :func:`drift_weight`: descent of the variance of every ``g_c``, weighted by curvature. The same to
    rounding for quadratic losses at a stationary point of L. For small models: D batched products, and a dense
    eigendecomposition.

    Arguments, errors and source as for :func:`without_replacement_drift`.

    Example:
        >>> import torch
        >>> from fastreg.noise.drift import eigenbasis_drift
        >>> model, batch = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
        >>> eigenbasis_drift(model, torch.nn.functional.mse_loss, batch, 2, lr=0.1).shape
        torch.Size([4])
    """
    count = _checked("eigenbasis_drift", batch, batch_size, lr)
    values, vectors = torch.linalg.eigh(Hessian(model, loss_fn, batch).dense())
    batches = BatchDerivatives(model, loss_fn, batch, batch_size)
    along = _fluctuations(batches) @ vectors  # [k, c]
    slopes = [batches.products(dg.unsqueeze(1) * u).mean(0) for dg, u in zip(along.T, vectors.T)]
    halves = vectors.T @ torch.stack(slopes, 1)  # [a, c], half of d_a Var_i(g_c)
    factors = 1 - lr * values
    weighted = drift_weight(factors.unsqueeze(1), factors, count) * halves
    return -(lr**2) / (count - 1) * vectors @ weighted.sum(1)


def drift_weight(out: Tensor, noise: Tensor, steps: int) -> Tensor:
    r"""What k steps make of fluctuations along one direction that drive the iterate along another.

        W(a, c) = sum_{0 <= s < t < k} a^(k-1-t) c^(t-1-s) = sum_{t < k} a^(k-1-t) (1 - c^t) / (1 - c)

    ``k (k - 1) / 2`` at a = c = 1. Inside (-1, 1) it tends to ``1 / ((1 - a) (1 - c))``; beyond, past the edge of
    stability, it grows like ``max(|a|, |c|)^k``, with a factor k at a = c. ``W / (k (k - 1))`` is the finite-k form of
    :func:`flat_drift_weight`, its limit for a = 1.

    Args:
        out: ``a = 1 - lr lambda_a`` of the direction that is driven, of any shape.
        noise: ``c = 1 - lr lambda_c`` of the fluctuating gradient, broadcast against it.
        steps: k, at least 1.

    Returns:
        W, of their common shape; without cancellation for any a and c.

    Raises:
        FastregError: steps below 1.

    Source: derived here; the regime is that of Beneventano 2023, arXiv:2312.16143.

    Example:
        >>> import torch
        >>> from fastreg.noise.drift import drift_weight
        >>> drift_weight(torch.ones(1), torch.tensor([1.0, 0.5, 0.0]), 4)
        tensor([6.0000, 4.2500, 3.0000])
    """
    check_count("drift_weight", "steps", steps, 1)
    weight, geometric = torch.zeros_like(out * noise), torch.zeros_like(noise)
    for _ in range(steps):
        weight, geometric = out * weight + geometric, noise * geometric + 1
    return weight


def _checked(function: str, batch: Batch, batch_size: int, lr: float) -> int:
    check_lr(function, lr)
    count = count_batches(function, batch, batch_size)
    if count < 2:
        raise FastregError(f"{function}: batch_size must leave two batches or more, got {batch_size}")
    return count


def _fluctuations(batches: BatchDerivatives) -> Tensor:
    """``dg_i``, ``[k, D]``."""
    return batches.gradients - batches.gradients.mean(0)


def _move(parameters: dict[str, nn.Parameter], by: Tensor) -> None:
    with torch.no_grad():
        for name, part in unflatten(by, parameters).items():
            parameters[name].add_(part.to(parameters[name].dtype))
