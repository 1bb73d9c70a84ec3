"""The largest learning rate at which the second moments of SGD stay finite."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fastreg.noise.regression import arguments
from fastreg.noise.regression.modes import headroom


def maximal_lr(A: ArrayLike, batch_size: int, momentum: float = 0.0) -> float:
    """The learning rate at which the second moments of SGD on linear regression start to diverge.

        lr* = 2(1-mu) / z,    z the largest eigenvalue of  ((1-mu)/(1+mu) + 1/S) diag(a) + (1/S) sqrt(a) sqrt(a)'

    with a the eigenvalues of A: the root of the bound ``Tr[Lam A G^-1] = S`` of the paper, here as an eigenvalue
    (derived here). For ``A = a I`` it is ``2(1-mu) S / (a (D + 1 + S (1-mu)/(1+mu)))``; for S -> infinity the bound
    ``2(1+mu)/a`` of gradient descent. Exact for Gaussian inputs and samples drawn afresh. Weights converge in
    distribution at somewhat larger rates, then with infinite variance.

    Args:
        A: ``E x x'``, ``[D, D]``, positive definite. For a preconditioner P pass ``R' A R`` with ``R R' = P``.
        batch_size: S.
        momentum: mu of ``m' = mu m + g``, ``w' = w - lr m'``.

    Returns:
        lr*, above which second moments diverge.

    Raises:
        FastregError: an argument is not what is said above.

    Source: Ziyin et al. 2021, arXiv:2102.05375, the condition for theorem 2 to hold.

    Example:
        >>> import numpy as np
        >>> round(maximal_lr(np.eye(3), batch_size=4), 12)
        1.0
    """
    A = arguments.matrix("maximal_lr", "A", A)
    arguments.sgd("maximal_lr", batch_size, momentum)
    return headroom(np.linalg.eigvalsh(A), batch_size, momentum)
