"""Coordinates in which preconditioned SGD on a quadratic falls apart into modes.

With ``Lam = V V'`` and ``V' H V = diag(h)``, SGD with the learning rate Lam on the Hessian H is, for the weights
``V^-1 w``, SGD with learning rate 1 on the Hessian ``diag(h)``: Lam and H need not commute anywhere.
"""

from __future__ import annotations

import numpy as np

from fastreg.errors import FastregError
from fastreg.noise.regression.arguments import Array


def modes(hessian: Array, lr: Array) -> tuple[Array, Array]:
    """``h`` ``[D]``, ascending, and ``V`` ``[D, D]`` with ``V V' = lr`` and ``V' hessian V = diag(h)``."""
    root = np.linalg.cholesky(lr)
    h, rotation = np.linalg.eigh(root.T @ hessian @ root)
    return h, root @ rotation


def range_modes(function: str, hessian: Array, lr: Array) -> tuple[Array, Array]:
    """:func:`modes` without those in the null space of the hessian, up to rounding: ``[r]`` and ``[D, r]``."""
    if not hessian.any():
        raise FastregError(f"{function}: the curvature must have an eigenvalue above 0, got a zero matrix")
    h, basis = modes(hessian, lr)
    kept = h > len(h) * np.finfo(h.dtype).eps * h[-1]
    return h[kept], basis[:, kept]


def rates(h: Array, momentum: float) -> Array:
    """``[D, D]``: what multiplies ``Sig_ij`` in theorem 1, once it is written in modes.

    (1-mu)(h_i + h_j) - (1-mu)/(1+mu) h_i h_j + mu/(1-mu^2) (h_i - h_j)^2; all are positive iff 0 < h < 2(1+mu).
    """
    rows, columns = h[:, None], h[None, :]
    damping = (1 - momentum) * (rows + columns - rows * columns / (1 + momentum))
    return damping + momentum / (1 - momentum**2) * (rows - columns) ** 2


def check_noise_free(function: str, h: Array, momentum: float) -> None:
    """Raise FastregError unless gradient descent without noise is stable."""
    if h.max() >= 2 * (1 + momentum):
        raise FastregError(
            f"{function}: lr must keep lr * hessian below 2 (1 + momentum) = {2 * (1 + momentum):.6g}, "
            f"got {h.max():.6g} (lower it by a factor above {h.max() / (2 * (1 + momentum)):.6g})"
        )


def headroom(h: Array, batch_size: int, momentum: float, sign: int = 1) -> float:
    """By what factor the learning rate can grow before second moments diverge; below 1 they do diverge.

    The bound ``sum_i h_i / G_i = S`` with ``G_i = 2(1-mu) / factor - c h_i`` is the secular equation of ``c diag(h)``
    plus a matrix of rank one, so that its largest eigenvalue gives the factor without a root search.
    """
    roots = np.sqrt(h)
    secular = np.diag(self_damping(batch_size, momentum, sign) * h) + np.outer(roots, roots) / batch_size
    return float(2 * (1 - momentum) / np.linalg.eigvalsh(secular)[-1])


def self_damping(batch_size: int, momentum: float, sign: int = 1) -> float:
    """c of ``G = 2(1-mu) I - c Lam A``; ``sign`` is that of ``A Sig A`` in the noise."""
    return (1 - momentum) / (1 + momentum) + sign / batch_size


def amplification(function: str, h: Array, batch_size: int, momentum: float, sign: int = 1) -> tuple[Array, float]:
    """The diagonal of G in modes ``[D]`` and ``T = Tr[Lam A G^-1]``; FastregError if second moments diverge."""
    factor = headroom(h, batch_size, momentum, sign)
    if factor <= 1:
        raise FastregError(
            f"{function}: lr must be below the largest stable one, got {1 / factor:.6g} times that "
            "(lower it by more than this factor)"
        )
    gaps = 2 * (1 - momentum) - self_damping(batch_size, momentum, sign) * h
    return gaps, float((h / gaps).sum())
