"""The gradient noise scale: the batch size at which noise and gradient are as large as each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastreg.noise.covariance import NoiseCovariance


@dataclass(frozen=True)
class NoiseScale:
    """Noise against gradient; each 0-d, exact on the data given.

    Attributes:
        squared_gradient: ``||grad L||^2``.
        trace: ``tr Cov`` of the gradients of single samples, in the same units.
        batch_size: ``B_simple = tr Cov / ||grad L||^2``, in samples; infinite at a stationary point with noise.
    """

    squared_gradient: Tensor
    trace: Tensor
    batch_size: Tensor


def noise_scale(covariance: NoiseCovariance) -> NoiseScale:
    """The simple noise scale ``B_simple = tr Cov / ||grad L||^2`` of the data of a covariance.

    Nothing is estimated: the data are taken for all there are, as the covariance does. Two passes of a forward and a
    backward. On a part of the data it is biased: ``||grad L||^2`` of N samples exceeds that of their distribution by
    ``tr Cov / N`` in expectation (see :mod:`fastreg.monitor.noise` for the unbiased moments).

    Args:
        covariance: of any batch size, with or without replacement: the scale is that of single samples.

    Raises:
        FastregError: as :class:`fastreg.noise.covariance.NoiseCovariance`.

    Source: McCandlish, Kaplan, Amodei et al. 2018, arXiv:1812.06162.

    Example:
        >>> import torch
        >>> from fastreg.noise.covariance import NoiseCovariance
        >>> from fastreg.noise.scale import noise_scale
        >>> model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
        >>> float(noise_scale(NoiseCovariance(model, torch.nn.functional.cross_entropy, data)).batch_size) > 0
        True
    """
    squared = covariance.mean().gradient.square().sum()
    trace = covariance.sample_trace()
    return NoiseScale(squared, trace, trace / squared)
