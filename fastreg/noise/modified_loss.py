"""The losses whose gradient flow SGD follows to second order in the learning rate.

Notation: an epoch is cut into m consecutive batches of b samples, with mean losses ``C_k``, gradients ``g_k`` and
Hessians ``H_k``; C, ``gbar`` and H are their means over k. lr is the learning rate of a single step.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor, nn

from fastreg.attach import buffers_kept
from fastreg.curvature.linearization import Linearization, LossFunction
from fastreg.curvature.traces import check_count
from fastreg.curvature.vectors import named_parameters
from fastreg.errors import FastregError
from fastreg.stats import micro_batch_grad_norms

Batch = tuple[Tensor, Tensor]
# Cyclic order is not among them: it follows the gradient flow of no loss.
SAMPLINGS = ("gd", "shuffled", "with_replacement")


def modified_loss(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    batch_size: int,
    lr: float,
    *,
    sampling: str = "shuffled",
    momentum: float = 0.0,
) -> Tensor:
    r"""The loss whose gradient flow the mean iterate of SGD follows, to second order in lr.

        gd, with_replacement   C + (lr/4) ||gbar||^2
        shuffled               C + (lr/4) (1/m) sum_k ||g_k||^2
        gd with momentum mu    C + (lr/4) (1 + mu) / (1 - mu)^2 ||gbar||^2

    A step takes time lr, or ``lr / (1 - mu)`` with momentum (heavy ball, once its transient has passed). Over an epoch
    flow and mean iterate differ by ``O((m lr)^3)``; the variance of batches acts through shuffling only. Where every
    batch of a shuffled epoch is used for n steps in a row, the loss is that of ``shuffled`` with lr that of one of
    them, and an epoch takes time ``n m lr``. The value is exact; no gradient is formed.

    Args:
        model: run in its current mode, in which it must draw no random numbers and treat samples one by one (no batch
            norm in training mode). Buffers stay as they are.
        loss_fn: ``loss_fn(outputs, targets)``, the mean loss over samples, scalar.
        batch: ``(inputs, targets)``, each ``[m b, ...]``: the epoch.
        batch_size: b, which divides the number of samples.
        lr: above 0, in units of parameters by gradients.
        sampling: one of the three.
        momentum: mu in ``[0, 1)``; ``gd`` only.

    Returns:
        A 0-d tensor, in units of the loss.

    Raises:
        FastregError: an argument is out of range, or as :func:`fastreg.micro_batch_grad_norms`.

    Source: Barrett, Dherin 2021, arXiv:2009.11162 (gd); Smith, Dherin, Barrett, De 2021, arXiv:2101.12176, eq. 1
    (shuffled); with replacement, several steps per batch and momentum: derived here.

    Example:
        >>> import torch
        >>> from fastreg.noise.modified_loss import modified_loss
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> loss_fn = torch.nn.functional.cross_entropy
        >>> (modified_loss(model, loss_fn, batch, 2, lr=0.1) > loss_fn(model(batch[0]), batch[1])).item()
        True
    """
    cut, coefficient = _term("modified_loss", batch, batch_size, lr, sampling, momentum)
    with buffers_kept(model):
        with torch.no_grad():
            loss = loss_fn(model(batch[0]), batch[1])
        return loss + coefficient * micro_batch_grad_norms(model, loss_fn, batch, cut).mean()


def modified_loss_gradient(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    batch_size: int,
    lr: float,
    *,
    sampling: str = "shuffled",
    momentum: float = 0.0,
) -> list[Tensor]:
    """The gradient of :func:`modified_loss`, a tensor for each parameter that requires grad; ``.grad`` is left alone.

        gbar + (lr/2) (1/m) sum_k H_k g_k          shuffled; with H gbar for the mean, times momentum's factor, for gd

    One forward, one backward and one batched pass for all ``H_k g_k``, exact. Arguments, errors and source are those
    of :func:`modified_loss`.

    Example:
        >>> import torch
        >>> from fastreg.noise.modified_loss import modified_loss_gradient
        >>> model, batch = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> [g.shape for g in modified_loss_gradient(model, torch.nn.functional.cross_entropy, batch, 2, lr=0.1)]
        [torch.Size([2, 3]), torch.Size([2])]
    """
    cut, coefficient = _term("modified_loss_gradient", batch, batch_size, lr, sampling, momentum)
    linear = Linearization(model, named_parameters(model), batch[0], cut)
    loss = linear.loss(loss_fn, batch[1])
    pairs = zip(linear.gradients(loss), linear.hessian_gradients(loss, mean=True), strict=True)
    return [gradient + 2 * coefficient * curved for gradient, curved in pairs]


def count_batches(function: str, batch: Batch, batch_size: int) -> int:
    """m; batches of different sizes would not weigh in as their samples do."""
    check_count(function, "batch_size", batch_size, 1)
    count, rest = divmod(len(batch[1]), batch_size)
    if rest or not count:
        raise FastregError(
            f"{function}: batch_size must be a divisor of the {len(batch[1])} samples, got {batch_size} (drop the rest)"
        )
    return count


def check_sampling(function: str, sampling: object, known: tuple[str, ...]) -> None:
    """Refuse an unknown one."""
    if sampling not in known:
        raise FastregError(f"{function}: sampling must be one of {known}, got {sampling!r}")


def check_lr(function: str, lr: object) -> None:
    """Refuse what is not a finite number > 0."""
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not (isfinite(lr) and lr > 0):
        raise FastregError(f"{function}: lr must be a number > 0, got {lr!r}")


def _term(
    function: str, batch: Batch, batch_size: int, lr: float, sampling: str, momentum: float
) -> tuple[int, float]:
    """The size of what squared gradient norms are taken of, and the coefficient of their mean."""
    count_batches(function, batch, batch_size)
    check_lr(function, lr)
    check_sampling(function, sampling, SAMPLINGS)
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 <= momentum < 1:
        raise FastregError(f"{function}: momentum must be a number in [0, 1), got {momentum!r}")
    if momentum and sampling != "gd":
        raise FastregError(f"{function}: momentum must be 0 unless sampling is 'gd', got {momentum!r}, {sampling!r}")
    cut = batch_size if sampling == "shuffled" else len(batch[1])
    return cut, lr / 4 * (1 + momentum) / (1 - momentum) ** 2
