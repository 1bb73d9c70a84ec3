"""Curvature along one direction: of a gradient, or of the step that an optimizer took."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.vectors import Vectors, flatten
from fastreg.errors import FastregError


@dataclass(frozen=True)
class Along:
    """A symmetric matrix A along a vector v; each ``[n]``, or 0-d for a single vector.

    Attributes:
        quotient: the Rayleigh quotient ``v^T A v / v^T v``, in units of A; NaN for v = 0.
        cosine: ``v^T A v / (||v|| ||A v||)``: 1 where v is an eigenvector of a positive eigenvalue.
    """

    quotient: Tensor
    cosine: Tensor


def curvature_along(operator: CurvatureOperator, vectors: Vectors) -> Along:
    """Rayleigh quotient and cosine of v and A v, exact, for one product per vector.

    With the Hessian and a step ``v = w_(t+1) - w_t`` of any optimizer, ``lr * quotient`` beyond 2 means that the step
    overshot along its own direction; with the gradient the cosine tells how far it lies in an eigenspace, and the
    gradient of ``||g||^2``, which is ``2 H g``, along it.

    Args:
        operator: A, ``[D, D]``.
        vectors: as for ``operator @ vectors``.

    Raises:
        FastregError: as ``operator @ vectors``.

    Example:
        >>> import torch
        >>> from fastreg.curvature import Hessian, curvature_along
        >>> model, batch = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
        >>> hessian = Hessian(model, torch.nn.functional.mse_loss, batch)
        >>> found = curvature_along(hessian, torch.ones(4))
        >>> bool(found.quotient > 0), bool(found.cosine <= 1)
        (True, True)
    """
    rows, _ = flatten(vectors, operator.parameters)
    images = operator.apply(rows)
    if images.shape != rows.shape:
        raise FastregError(
            f"curvature_along: operator must give one row for each, {list(rows.shape)}, got {list(images.shape)}"
        )
    rows, images = rows.double(), images.double()
    dots, squares = (rows * images).sum(1), rows.square().sum(1)
    found = dots / squares, dots / (squares * images.square().sum(1)).sqrt()
    single = isinstance(vectors, Tensor) and vectors.dim() == 1
    return Along(*((one[0] if single or len(rows) == 1 else one).to(operator.dtype) for one in found))
