"""The mean displacement of one epoch of SGD, to second order in the learning rate.

Notation: an epoch is cut into m consecutive batches of b samples, with mean losses ``C_k``, gradients ``g_k`` and
Hessians ``H_k``; C, ``gbar`` and H are their means over k. lr is the learning rate of a single step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastreg.curvature.linearization import Linearization, LossFunction
from fastreg.curvature.traces import check_count
from fastreg.curvature.vectors import common_dtype, named_parameters, unflatten
from fastreg.noise.modified_loss import SAMPLINGS as MODIFIED, Batch, check_sampling, count_batches

SAMPLINGS = (*MODIFIED, "cyclic")


@dataclass(frozen=True)
class EpochExpansion:
    """The mean displacement of an epoch, ``lr first + lr^2 second + O(lr^3)``.

    Attributes:
        first: ``[D]``, minus the sum of the gradients of all steps.
        second: ``[D]``.
    """

    first: Tensor
    second: Tensor

    def displacement(self, lr: float) -> Tensor:
        """``[D]``, in units of parameters."""
        return lr * self.first + lr**2 * self.second


def epoch_expansion(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    batch_size: int,
    *,
    sampling: str = "shuffled",
    steps: int = 1,
) -> EpochExpansion:
    r"""The mean displacement of an epoch of m batches with n steps each, to second order in the learning rate.

        w - w_0 = -lr n m gbar + (n lr)^2 sum_k H_k v_k + O(lr^3)

        shuffled           v_k = (G - g_k) / 2            + (n - 1) / (2 n) g_k,     G = sum_j g_j
        with_replacement   v_k = (1 - 1 / m) G / 2        + (n - 1) / (2 n) g_k
        cyclic             v_k = sum_{j < k} g_j          + (n - 1) / (2 n) g_k
        gd                 v_k = (1 - 1 / (n m)) G / 2

    ``shuffled`` is the mean over orders, and already the mean of any order and its reverse. Exact, in one batched pass
    with another vector for every batch; it holds 2 m vectors of length D.

    Args:
        model, loss_fn, batch, batch_size: as for :func:`modified_loss`.
        sampling: one of the four; ``cyclic`` takes the batches as they come.
        steps: n, at least 1.

    Returns:
        :class:`EpochExpansion`, flat, in the order of the parameters that require grad.

    Raises:
        FastregError: as :func:`modified_loss`.

    Source: Smith et al. 2021, arXiv:2101.12176 (shuffled, n = 1, the step of their proof); the others: derived here.

    Example:
        >>> import torch
        >>> from fastreg.noise.expansion import epoch_expansion
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> epoch_expansion(model, torch.nn.functional.cross_entropy, batch, 2).displacement(0.1).shape
        torch.Size([8])
    """
    check_sampling("epoch_expansion", sampling, SAMPLINGS)
    check_count("epoch_expansion", "steps", steps, 1)
    count_batches("epoch_expansion", batch, batch_size)
    batches = BatchDerivatives(model, loss_fn, batch, batch_size)
    gradients = batches.gradients
    second = batches.products(_vectors(gradients, sampling, steps)).sum(0)
    return EpochExpansion(-steps * gradients.sum(0), steps**2 * second)


def cyclic_bracket(model: nn.Module, loss_fn: LossFunction, batch: Batch, batch_size: int) -> Tensor:
    r"""What a fixed order adds to the mean over orders, by which it follows no gradient flow at second order.

        (1/2) sum_{j < k} (H_k g_j - H_j g_k) = (1/2) sum_k H_k (sum_{j < k} g_j - sum_{j > k} g_j),      times lr^2

    It changes sign with the order reversed. Arguments and errors as for :func:`epoch_expansion`.

    Returns:
        ``[D]``: the difference of ``second`` between ``cyclic`` and ``shuffled``; exact.

    Source: derived here.

    Example:
        >>> import torch
        >>> from fastreg.noise.expansion import cyclic_bracket
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2))
        >>> cyclic_bracket(model, torch.nn.functional.mse_loss, batch, 2).shape
        torch.Size([8])
    """
    count_batches("cyclic_bracket", batch, batch_size)
    batches = BatchDerivatives(model, loss_fn, batch, batch_size)
    gradients = batches.gradients
    return batches.products(gradients.cumsum(0) - (gradients + gradients.sum(0)) / 2).sum(0)


class BatchDerivatives:
    """``g_k`` of every batch of an epoch, and products ``H_k v_k``, from one forward.

    Args:
        model, loss_fn, batch, batch_size: as for :func:`epoch_expansion`; batches of as many samples.

    Attributes:
        gradients: ``[m, D]``.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, batch: Batch, batch_size: int) -> None:
        self._parameters = named_parameters(model)
        self._linear = Linearization(model, self._parameters, batch[0], batch_size, spread=True, apart=True)
        loss = self._linear.loss(loss_fn, batch[1])
        self.gradients = self._rows(self._linear.gradients(loss))
        self._hessian = self._linear.hessian(loss)

    def products(self, rows: Tensor) -> Tensor:
        """``H_k v_k``, ``[m, D]``, of rows ``v_k``."""
        parts = unflatten(rows, self._parameters).items()
        return self._rows(self._hessian([part.to(self._parameters[name].dtype) for name, part in parts]))

    def _rows(self, found: list[Tensor]) -> Tensor:
        dtype = common_dtype(self._parameters)
        return torch.cat([part.flatten(1).to(dtype) for part in self._linear.unweighted(found)], 1)


def _vectors(gradients: Tensor, sampling: str, steps: int) -> Tensor:
    """``v_k`` of :func:`epoch_expansion`, ``[m, D]``."""
    count, total = len(gradients), gradients.sum(0)
    if sampling == "gd":
        return (total * (1 - 1 / (steps * count)) / 2).expand_as(gradients)
    before = {
        "shuffled": lambda: (total - gradients) / 2,
        "with_replacement": lambda: total * (1 - 1 / count) / 2,
        "cyclic": lambda: gradients.cumsum(0) - gradients,
    }
    return before[sampling]() + gradients * (steps - 1) / (2 * steps)
