"""One number for how many directions carry curvature: stable rank and participation ratio.

Both do not change when A is scaled, are 0 for A = 0, and for a positive semidefinite A lie between 1 and its rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.curvature.density import spectral_density
from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.traces import check_count, sign_blocks


def stable_rank(
    operator: CurvatureOperator, *, steps: int = 32, probes: int = 4, generator: torch.Generator | None = None
) -> Tensor:
    """The stable rank ``||A||_F^2 / ||A||_2^2`` of numerical linear algebra (Rudelson & Vershynin 2007).

        ||A||_F^2 = E ||A z||^2,   ||A||_2 = max |theta|,   both from one run of probes Lanczos recurrences

    The largest Ritz value theta bounds ``||A||_2`` from below and converges fast where the spectrum has outliers; the
    Frobenius norm is unbiased. Hessians are often given the :func:`participation_ratio` under this name.

    Args:
        operator: A, ``[D, D]``.
        steps: of Lanczos, at least 2; ``steps * probes`` vectors of length D are held.
        probes: at least 1.
        generator: of the signs; torch's global one by default.

    Returns:
        A 0-d float64 tensor.

    Raises:
        FastregError: steps or probes too small.

    Example:
        >>> import torch
        >>> from fastreg.curvature.operator import CurvatureOperator
        >>> from fastreg.curvature.summaries import stable_rank
        >>> class Diagonal(CurvatureOperator):
        ...     def apply(self, rows):
        ...         return rows * torch.tensor([3.0, 4.0, 0.0, 0.0])
        >>> round(float(stable_rank(Diagonal({"weight": torch.zeros(4)}))), 4)
        1.5625
    """
    check_count("stable_rank", "steps", steps, 2)
    check_count("stable_rank", "probes", probes, 1)
    density = spectral_density(operator, steps=steps, probes=probes, generator=generator)
    return _ratio(operator.size * density.moment(2), density.nodes.abs().max().square())


def participation_ratio(
    operator: CurvatureOperator, *, samples: int = 30, block: int = 8, generator: torch.Generator | None = None
) -> Tensor:
    """The participation ratio, or effective dimensionality, ``(tr A)^2 / ||A||_F^2 = (sum lambda)^2 / sum lambda^2``.

        tr A = E z . A z,   ||A||_F^2 = E ||A z||^2,   z of random signs, both from the same products

    Meant for a positive semidefinite A: eigenvalues of both signs cancel in the trace, and the ratio may fall to 0.

    Args:
        operator: A, ``[D, D]``.
        samples: products, at least 1.
        block: vectors per call of ``operator.apply``; it does not change the vectors drawn.
        generator: of the signs; torch's global one by default.

    Returns:
        A 0-d tensor in the operator's dtype. As a ratio of unbiased estimates it has a bias of order 1 / samples.

    Raises:
        FastregError: samples or block below 1.

    Example:
        >>> import torch
        >>> from fastreg.curvature.operator import CurvatureOperator
        >>> from fastreg.curvature.summaries import participation_ratio
        >>> class Diagonal(CurvatureOperator):
        ...     def apply(self, rows):
        ...         return rows * torch.tensor([3.0, 4.0, 0.0, 0.0])
        >>> participation_ratio(Diagonal({"weight": torch.zeros(4)}))
        tensor(1.9600)
    """
    check_count("participation_ratio", "samples", samples, 1)
    check_count("participation_ratio", "block", block, 1)
    traces, squares = [], []
    for probes in sign_blocks(operator, samples, block, generator):
        images = operator.apply(probes)
        traces.append((probes * images).sum(1))
        squares.append(images.square().sum(1))
    return _ratio(torch.cat(traces).mean().square(), torch.cat(squares).mean())


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, 0 where both are 0."""
    return torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))
