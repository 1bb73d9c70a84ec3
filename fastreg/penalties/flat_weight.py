"""How SGD without replacement weighs fluctuations by curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.errors import FastregError

# Below it the terms of the series that are kept reach the last digit of float64; above it the closed form does.
SERIES_BELOW, SERIES_ORDER = 0.5, 16


def flat_drift_weight(scaled: Tensor) -> Tensor:
    r"""The weight of a fluctuating direction in the drift along a flat one, after many steps.

        S(c) = (c - 1 + e^-c) / c^2 = lim W(1, 1 - c / k) / k^2,       c = lr k lambda

    ``S(0) = 1/2``; ``1/c`` for large c: curved directions drop out; ``e^|c| / c^2`` for c < 0. As a function of a
    matrix it is ``phi_2(-c)`` of exponential integrators, and 2 S weighs the variance term of the modified loss.

    Args:
        scaled: c, of any shape.

    Returns:
        S, of its shape and dtype, to rounding also near 0.

    Raises:
        FastregError: ``scaled`` is not a floating point tensor.

    Source: derived here; the regime is that of Beneventano 2023, arXiv:2312.16143.

    Example:
        >>> import torch
        >>> from fastreg.penalties.flat_weight import flat_drift_weight
        >>> flat_drift_weight(torch.tensor([0.0, 1.0, 100.0]))
        tensor([0.5000, 0.3679, 0.0099])
    """
    if not isinstance(scaled, Tensor) or not scaled.is_floating_point():
        raise FastregError(f"flat_drift_weight: scaled must be a floating point tensor, got {scaled!r}")
    small = scaled.abs() < SERIES_BELOW
    away = torch.where(small, torch.ones_like(scaled), scaled)
    series = torch.ones_like(scaled)
    # 2 sum_j (-c)^j / (j + 2)!, by Horner's scheme.
    for j in range(SERIES_ORDER, 2, -1):
        series = 1 - scaled * series / j
    return torch.where(small, series / 2, (away + torch.expm1(-away)) / away**2)
