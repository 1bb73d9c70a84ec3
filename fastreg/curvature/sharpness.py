"""Sharpness against the step size: where gradient descent and SGD stop being stable."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from fastreg.curvature.eigenvalues import top_eigenvalues
from fastreg.curvature.linearization import Batch, Linearization, LossFunction
from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.vectors import named_parameters
from fastreg.errors import FastregError
from fastreg.rules.bilinear import row_dots


@dataclass(frozen=True)
class SharpnessMargin:
    """The largest eigenvalue against the threshold of stability.

    Attributes:
        sharpness: ``lambda_max``, 0-d.
        threshold: ``2 (1 + momentum) / lr``; a quadratic of larger curvature makes gradient descent diverge.
    """

    sharpness: Tensor
    threshold: float

    @property
    def margin(self) -> Tensor:
        """``threshold - sharpness``: positive where gradient descent is stable."""
        return self.threshold - self.sharpness

    @property
    def ratio(self) -> Tensor:
        """``sharpness / threshold``: 1 at the edge of stability."""
        return self.sharpness / self.threshold


def sharpness_margin(
    operator: CurvatureOperator,
    lr: float,
    *,
    momentum: float = 0.0,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
) -> SharpnessMargin:
    """``lambda_max`` of an operator (the Hessian) against ``2 / lr``.

    Args:
        lr: the learning rate, above 0.
        momentum: heavy-ball momentum, in [0, 1), which raises the threshold to ``2 (1 + momentum) / lr``.
        tol: of :func:`fastreg.curvature.top_eigenvalues`.
        generator: of its start vector.

    Raises:
        FastregError: ``lr`` or ``momentum`` is out of range; as ``top_eigenvalues``.

    Source: Cohen et al. 2021, arXiv:2103.00065, sections 2 and appendix B (momentum).

    Example:
        >>> import torch
        >>> from fastreg.curvature import Hessian, sharpness_margin
        >>> model, data = torch.nn.Linear(1, 1, bias=False), (torch.ones(4, 1), torch.zeros(4, 1))
        >>> found = sharpness_margin(Hessian(model, torch.nn.functional.mse_loss, data), lr=0.5)
        >>> float(found.sharpness), found.threshold, float(found.ratio)
        (2.0, 4.0, 0.5)
    """
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < float("inf"):
        raise FastregError(f"sharpness_margin: lr must be a number > 0, got {lr!r}")
    if not 0 <= momentum < 1:
        raise FastregError(f"sharpness_margin: momentum must be in [0, 1), got {momentum!r}")
    sharpness = top_eigenvalues(operator, 1, tol=tol, generator=generator)[0]
    return SharpnessMargin(sharpness, 2 * (1 + momentum) / lr)


def gradient_curvatures(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    micro_batch_size: int,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
) -> tuple[Tensor, Tensor]:
    """``g_k^T H_k g_k`` and ``||g_k||^2`` of every micro-batch, ``[m]`` each, in one batched pass.

    Args:
        model, loss_fn, batch, parameters: as for :func:`fastreg.curvature.batched_hvp`.
        micro_batch_size: b; m gradients are held, ``m D`` numbers.

    Raises:
        FastregError: as :func:`fastreg.curvature.batched_hvp`.

    Example:
        >>> import torch
        >>> from fastreg.curvature import gradient_curvatures
        >>> model, batch = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
        >>> [tuple(t.shape) for t in gradient_curvatures(model, torch.nn.functional.mse_loss, batch, 2)]
        [(4,), (4,)]
    """
    chosen = named_parameters(model, parameters)
    linear = Linearization(model, chosen, batch[0], micro_batch_size, spread=True, apart=True)
    gradients, products = linear.along_gradients(linear.loss(loss_fn, batch[1]))
    curvatures = reduce(torch.add, map(row_dots, gradients, products))
    return curvatures, reduce(torch.add, (row_dots(g, g) for g in gradients))


def batch_sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Batch,
    micro_batch_size: int,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Tensor:
    """The curvature of micro-batch losses along their own gradients, ``mean_k g_k^T H_k g_k / ||g_k||^2``, 0-d.

    It is what settles at ``2 / lr`` when SGD trains, while the largest eigenvalue of the Hessian stays below. A
    micro-batch without a gradient counts as flat. Arguments as for :func:`gradient_curvatures`, which has the terms.

    Source: Andreyev, Beneventano 2024, arXiv:2412.20553.

    Example:
        >>> import torch
        >>> from fastreg.curvature import batch_sharpness
        >>> model, batch = torch.nn.Linear(1, 1, bias=False), (torch.ones(4, 1), torch.zeros(4, 1))
        >>> round(float(batch_sharpness(model, torch.nn.functional.mse_loss, batch, 2)), 4)
        2.0
    """
    curvatures, squared = gradient_curvatures(model, loss_fn, batch, micro_batch_size, parameters=parameters)
    return torch.where(squared > 0, curvatures / squared, 0.0).mean()
