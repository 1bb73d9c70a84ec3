"""Whether the noise of minibatch gradients has the shape of curvature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.traces import check_count, sign_blocks
from fastreg.errors import FastregError
from fastreg.noise.covariance import NoiseCovariance


class CurvatureNoise(CurvatureOperator):
    r"""The covariance that minibatch gradients have where ``(1/N) sum_i g_i g_i' = weight * A``.

        P = factor * [ weight * A - gbar gbar' ],      factor = 1/S with replacement, as in NoiseCovariance

    ``weight = 2 L``, A the Gauss-Newton matrix (Ziyin et al., Thm. 5, has the Hessian, near a minimum)
        for squared errors of one output. The identity behind it, ``g_i g_i' = 2 l_i G_i`` with the Gauss-Newton
        matrix ``G_i`` of sample i, holds for ``l = c r^2`` with any c, so for ``mse_loss`` too (derived here). P is C
        if and only if ``sum_i (l_i - L) G_i = 0``, as where all absolute residuals are equal; with the Hessian, C is
        missed by ``factor * 2 L (H - G)``. For K outputs whose residuals are isotropic and independent of the
        Jacobians the weight is ``2 L / K`` (derived here).
    ``weight = 1``, A the Fisher matrix
        for cross-entropy (where it is the Gauss-Newton matrix), in expectation over labels that follow the model.

    L, gbar and A are of the loss that is sampled. Weight decay changes none of them, nor C: where it holds the
    weights at a minimum of the sum, gbar is not 0.

    Args:
        covariance: what gbar, S and the kind of drawing are taken from.
        curvature: A, on the same parameters.
        weight: a number or 0-d tensor.

    Raises:
        FastregError: the operators differ in size.

    Source: Ziyin, Liu, Mori, Ueda 2021, arXiv:2102.05375, Thm. 5 (weight 2 L).

    Example:
        >>> import torch
        >>> from fastreg.curvature import GGN
        >>> from fastreg.noise.alignment import CurvatureNoise, alignment
        >>> from fastreg.noise.covariance import NoiseCovariance
        >>> model, data = torch.nn.Linear(3, 1).double(), (torch.randn(8, 3).double(), torch.randn(8, 1).double())
        >>> with torch.no_grad():
        ...     data = data[0], model(data[0]) + torch.randn(8, 1).sign()
        >>> noise = NoiseCovariance(model, torch.nn.functional.mse_loss, data, batch_size=4)
        >>> curvature = GGN(model, torch.nn.functional.mse_loss, data)
        >>> found = alignment(noise, CurvatureNoise(noise, curvature, weight=2 * noise.mean().loss))
        >>> bool(found.distance < 1e-10)
        True
    """

    def __init__(
        self, covariance: NoiseCovariance, curvature: CurvatureOperator, weight: float | Tensor = 1.0
    ) -> None:
        super().__init__(covariance.parameters)
        _check_sizes("CurvatureNoise", covariance, curvature)
        self.covariance, self.curvature, self.weight = covariance, curvature, weight

    def apply(self, rows: Tensor) -> Tensor:
        gradient = self.covariance.mean().gradient
        curved = self.weight * self.curvature.apply(rows)
        return self.covariance.factor * torch.addr(curved, rows @ gradient, gradient, alpha=-1)


@dataclass(frozen=True)
class Alignment:
    """How close two symmetric operators A and B are, in the Frobenius inner product; each 0-d float64.

    Attributes:
        cosine: ``<A, B> / (||A|| ||B||)``: of their shapes alone, 1 where A is a positive multiple of B.
        distance: ``||A - B|| / ||B||``.
        multiple: ``<A, B> / ||B||^2``: the c for which ``c B`` is closest to A.
        cosine_error: standard error of the cosine; 0 where it is exact.
        distance_error: standard error of the distance; 0 where it is exact.
        products: with each of the two.
    """

    cosine: Tensor
    distance: Tensor
    multiple: Tensor
    cosine_error: Tensor
    distance_error: Tensor
    products: int


def alignment(
    measured: CurvatureOperator,
    predicted: CurvatureOperator,
    *,
    probes: int | None = None,
    block: int = 8,
    generator: torch.Generator | None = None,
) -> Alignment:
    r"""Compare two operators on the same parameters, a :class:`NoiseCovariance` and its :class:`CurvatureNoise`, say.

        <A, B> = sum_j (A e_j) . (B e_j)      exact, from D products with each
        <A, B> = E (A z) . (B z)              z of random signs: probes products with each

    All are ratios of the same three sums. From probes they have a bias of order 1 / probes, and the standard errors
    told are those of the jackknife. NaN where the predicted operator, for the cosine either of them, is 0.

    Args:
        measured: A, ``[D, D]``.
        predicted: B, ``[D, D]``.
        probes: at least 2, for models too large for D products; None for the exact values.
        block: vectors per product; ``4 * block * D`` numbers are held.
        generator: of the signs; torch's global one by default.

    Raises:
        FastregError: the operators differ in size; probes below 2 or block below 1.

    Source: Hutchinson 1989 for the probes, applied to ``A B``.

    Example:
        >>> import torch
        >>> class Diagonal(CurvatureOperator):
        ...     def __init__(self, *values):
        ...         super().__init__({"weight": torch.tensor(values)})
        ...     def apply(self, rows):
        ...         return rows * self.parameters["weight"]
        >>> found = alignment(Diagonal(3.0, 4.0), Diagonal(6.0, 8.0))
        >>> float(found.cosine), float(found.distance), float(found.multiple)
        (1.0, 0.5, 0.5)
    """
    _check_sizes("alignment", measured, predicted)
    check_count("alignment", "block", block, 1)
    if probes is None:
        blocks = _unit_rows(measured, block)
    else:
        check_count("alignment", "probes", probes, 2)
        blocks = sign_blocks(measured, probes, block, generator)
    terms = torch.cat([_terms(measured.apply(rows), predicted.apply(rows)) for rows in blocks])
    cosine, distance, multiple = _ratios(terms.sum(0))
    errors = terms.new_zeros(3) if probes is None else _jackknife(terms)
    return Alignment(cosine, distance, multiple, errors[0], errors[1], len(terms))


def _terms(measured: Tensor, predicted: Tensor) -> Tensor:
    """Per row ``[n, 4]``: ``a . b``, ``a . a``, ``b . b``, ``|a - b|^2``.

    The last is formed of the difference: from the other three it would not be known below the root of a rounding.
    """
    a, b = measured.double(), predicted.double()
    return torch.stack([(a * b).sum(1), a.square().sum(1), b.square().sum(1), (a - b).square().sum(1)], 1)


def _ratios(sums: Tensor) -> Tensor:
    """Cosine, distance and multiple, ``[..., 4] -> [3, ...]``."""
    both, first, second, apart = sums.unbind(-1)
    return torch.stack([both / (first * second).sqrt(), (apart / second).sqrt(), both / second])


def _jackknife(terms: Tensor) -> Tensor:
    """Standard errors of the ratios, ``[3]``, from terms ``[n, 4]``."""
    count = len(terms)
    left_out = _ratios(terms.sum(0) - terms)
    return left_out.std(1, correction=0) * (count - 1) ** 0.5


def _unit_rows(operator: CurvatureOperator, block: int) -> Iterator[Tensor]:
    for start in range(0, operator.size, block):
        rows = torch.zeros(min(block, operator.size - start), operator.size, dtype=operator.dtype)
        rows.diagonal(start).fill_(1)
        yield rows.to(operator.device)


def _check_sizes(function: str, first: CurvatureOperator, second: CurvatureOperator) -> None:
    if first.size != second.size:
        raise FastregError(
            f"{function}: operators must be on the same parameters, got {first.size} and {second.size} elements"
        )
