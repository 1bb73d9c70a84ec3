"""Chains of SGD on linear regression with Gaussian inputs, side by side: second moments and their growth.

    y = u . x + e,   x ~ N(0, A),   e ~ N(0, sigma^2),      w <- w - (lr/S) sum_{i in batch} x_i (x_i . w - e_i)

``w`` is counted from ``u``, in the eigenbasis of A; D weights, S fresh samples a step.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def step(w: Tensor, spectrum: Tensor, lr: float, batch_size: int, sigma: float, generator: torch.Generator) -> Tensor:
    """One step of every chain on fresh samples.

    Args:
        w: ``[chains, D]``, in the eigenbasis of A.
        spectrum: ``[D]``, eigenvalues of A.
        lr: the learning rate.
        batch_size: S.
        sigma: standard deviation of the label noise; 0 for none.
        generator: of samples and noise.

    Returns:
        ``[chains, D]``.

    Example:
        >>> w = torch.zeros(5, 2, dtype=torch.float64)
        >>> step(w, torch.ones(2, dtype=torch.float64), 0.1, 4, 1.0, torch.Generator()).shape
        torch.Size([5, 2])
    """
    x = torch.randn(batch_size, *w.shape, generator=generator, dtype=w.dtype) * spectrum.sqrt()
    residual = (x * w).sum(-1)
    if sigma:
        residual = residual - sigma * torch.randn(residual.shape, generator=generator, dtype=w.dtype)
    return w - lr / batch_size * (x * residual[..., None]).sum(0)


def simulate(
    spectrum: Tensor, lr: float, batch_size: int, sigma: float, chains: int, steps: int, generator: torch.Generator
) -> Tensor:
    """Second moments of stationary SGD, from chains that start at the minimum.

    Args:
        spectrum, lr, batch_size, sigma, generator: as for :func:`step`.
        chains: independent ones.
        steps: dropped first, and as many averaged over after that.

    Returns:
        ``w w'`` averaged over time, ``[chains, D, D]``: independent chains, so that their spread tells the error of
        their mean; it can be trusted only where fourth moments exist, well below the largest stable learning rate.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> simulate(torch.ones(2, dtype=torch.float64), 0.1, 4, 1.0, 5, 10, generator).shape
        torch.Size([5, 2, 2])
    """
    w = spectrum.new_zeros(chains, len(spectrum))
    total = w.new_zeros(chains, len(spectrum), len(spectrum))
    for done in range(2 * steps):
        w = step(w, spectrum, lr, batch_size, sigma, generator)
        if done >= steps:
            total += w[:, :, None] * w[:, None, :]
    return total / steps


def growth(
    spectrum: Tensor, lr: float, batch_size: int, chains: int, steps: int, generator: torch.Generator
) -> tuple[float, float]:
    """The factor by which ``E |w|^2`` ends up growing per step without label noise.

    Beyond a few steps the expectation lives in rare chains, which a plain mean never meets. So after every step the
    chains are scaled to length one and redrawn with probabilities proportional to the ``|w|^2`` they had: the mean of
    ``|w|^2`` after a step then estimates the factor, up to a bias of order ``1 / chains``.

    Args:
        spectrum, lr, batch_size, generator: as for :func:`step`.
        chains: how many.
        steps: dropped first, and as many averaged over after that.

    Returns:
        The factor and its standard error, from the spread over steps.

    Example:
        >>> growth(torch.ones(1, dtype=torch.float64), 0.0, 1, 10, 4, torch.Generator())
        (1.0, 0.0)
    """
    w = F.normalize(spectrum.new_ones(chains, len(spectrum)))
    factors = spectrum.new_empty(2 * steps)
    for done in range(2 * steps):
        w = step(w, spectrum, lr, batch_size, 0.0, generator)
        squares = w.square().sum(1)
        factors[done] = squares.mean()
        w = (w / squares.sqrt()[:, None])[squares.multinomial(chains, replacement=True, generator=generator)]
    kept = factors[steps:]
    return float(kept.mean()), float(kept.std()) / math.sqrt(steps)
