"""Hill's estimate of a tail index from samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastreg.errors import FastregError


@dataclass(frozen=True)
class HillEstimate:
    """Tail indices estimated from the k largest samples.

    Args:
        index: the estimates, without unit.
        error: their standard errors for independent samples, ``index / sqrt(k)``.
        k: how many samples each rests on; of the same shape as the others, int64.
    """

    index: Tensor
    error: Tensor
    k: Tensor


def hill_plot(samples: Tensor, largest: int) -> HillEstimate:
    """Hill's estimates from the k largest samples, for every k up to ``largest``: what a Hill plot shows against k.

        index_k = 1 / mean_{i <= k} log(x_(i) / x_(k+1)),    x_(1) >= x_(2) >= ... the sorted |samples|

    (Hill 1975). Trust the k where the estimates stay level within their errors: smaller k are noisy, larger ones reach
    below the power law and are biased, which the errors do not tell.

    Args:
        samples: any shape; absolute values are taken, so centre them first.
        largest: the largest k, in 1 .. samples - 1; a tenth of the samples is usual.

    Returns:
        A :class:`HillEstimate` of shape ``[largest]``, float64. Its errors hold for independent samples: those along
        one trajectory depend on each other, and the errors told are then too small.

    Raises:
        FastregError: ``largest`` is out of range, or the ``largest + 1`` largest samples are not positive and finite.

    Example:
        >>> import torch
        >>> from fastreg.noise.hill import hill_plot
        >>> hill_plot(torch.tensor([1.0, 4.0, 2.0]), largest=2).index
        tensor([1.4427, 0.9618], dtype=torch.float64)
    """
    return _hill("hill_plot", "largest", samples, largest)


def hill_estimator(samples: Tensor, k: int) -> HillEstimate:
    """Hill's estimate of the tail index from the k largest samples alone: the last one of :func:`hill_plot`.

    Args:
        samples: any shape; absolute values are taken, so centre them first.
        k: samples it rests on, in 1 .. samples - 1; look at :func:`hill_plot` before you choose.

    Returns:
        A :class:`HillEstimate` of 0-d tensors, float64; its error is ``index / sqrt(k)``, for independent samples.

    Raises:
        FastregError: ``k`` is out of range, or the ``k + 1`` largest samples are not positive and finite.

    Example:
        >>> import torch
        >>> from fastreg.noise.hill import hill_estimator
        >>> pareto = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1] ** (-1 / 3)
        >>> f"{hill_estimator(pareto, k=500).index:.2f}"
        '3.02'
    """
    plot = _hill("hill_estimator", "k", samples, k)
    return HillEstimate(plot.index[-1], plot.error[-1], plot.k[-1])


def _hill(function: str, name: str, samples: Tensor, largest: int) -> HillEstimate:
    if isinstance(largest, bool) or not isinstance(largest, int) or not 1 <= largest < samples.numel():
        raise FastregError(f"{function}: {name} must be in 1 .. {samples.numel() - 1}, got {largest!r}")
    logs = samples.detach().flatten().abs().double().topk(largest + 1).values.log()
    if not logs.isfinite().all():
        raise FastregError(
            f"{function}: the {largest + 1} largest |samples| must be positive and finite, got others "
            f"(lower {name}, or find out why the weights diverged)"
        )
    k = torch.arange(1, largest + 1, device=logs.device)
    index = 1 / (logs[:-1].cumsum(0) / k - logs[1:])
    return HillEstimate(index, index / k.sqrt(), k)
