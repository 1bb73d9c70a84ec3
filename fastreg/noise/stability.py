"""Whether the noise of minibatches is still damped at a learning rate."""

from __future__ import annotations

import warnings

from torch import Tensor

from fastreg.errors import FastregError


def stability_load(
    eigenvalues: Tensor, lr: float, batch_size: int, momentum: float = 0.0, *, rest: float = 0.0
) -> float:
    r"""How much of what second moments can bear is used up; warns where it is all.

        load = (1/S) sum_i  lr a_i / (2 (1 - mu) - ((1 - mu) / (1 + mu) + 1/S) lr a_i)

    Second moments of SGD's weights stay finite below 1: exactly for linear regression on Gaussian inputs, where ``a_i``
    are the eigenvalues of ``E x x^T`` (:func:`fastreg.noise.regression.maximal_lr` has the learning rate of load 1).
    For a network near a minimum, eigenvalues of the Gauss-Newton matrix stand for them: an estimate of where noise, not
    curvature alone, ends stability. ``S -> infinity`` leaves ``lr a_max < 2 (1 + mu)``.

    Args:
        eigenvalues: ``a_i``, ``[r]``, at least 0: all, or the largest.
        lr: above 0.
        batch_size: S, at least 1.
        momentum: mu of heavy ball, in [0, 1).
        rest: the sum of the eigenvalues that are not given (the trace less these), taken for many small ones.

    Returns:
        The load; infinite where one eigenvalue alone is beyond its bound.

    Raises:
        FastregError: an argument is out of range.

    Source: Ziyin, Liu, Mori, Ueda 2021, arXiv:2102.05375, the condition ``T < S`` of theorem 2.

    Example:
        >>> import torch
        >>> round(stability_load(torch.ones(3), lr=0.5, batch_size=4), 6)
        0.272727
    """
    _check(eigenvalues, lr, batch_size, momentum, rest)
    scaled = lr * eigenvalues.double()
    room = 2 * (1 - momentum) - ((1 - momentum) / (1 + momentum) + 1 / batch_size) * scaled
    if (room <= 0).any():
        load = float("inf")
    else:
        load = float((scaled / room).sum() + lr * rest / (2 * (1 - momentum))) / batch_size
    if load >= 1:
        warnings.warn(
            f"stability_load: at lr = {lr} and batch size {batch_size} second moments diverge, load {load:.3g} (lower "
            "lr or enlarge the batch)",
            stacklevel=2,
        )
    return load


def _check(eigenvalues: Tensor, lr: float, batch_size: int, momentum: float, rest: float) -> None:
    if not isinstance(eigenvalues, Tensor) or eigenvalues.dim() != 1 or not (eigenvalues >= 0).all():
        raise FastregError(f"stability_load: eigenvalues must be a tensor [r] of numbers >= 0, got {eigenvalues!r}")
    for name, value, expected, good in (
        ("lr", lr, "> 0", lr > 0),
        ("batch_size", batch_size, ">= 1", batch_size >= 1),
        ("momentum", momentum, "in [0, 1)", 0 <= momentum < 1),
        ("rest", rest, ">= 0", rest >= 0),
    ):
        if not good:
            raise FastregError(f"stability_load: {name} must be {expected}, got {value!r}")
