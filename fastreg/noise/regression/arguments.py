"""Arguments of the regression formulas, checked and turned into float64 arrays."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastreg.errors import FastregError

Array = NDArray[np.floating[Any]]


def matrix(function: str, name: str, value: ArrayLike, *, definite: bool = True, size: int | None = None) -> Array:
    """``value`` as a symmetric positive (semi)definite float64 matrix ``[D, D]``, or FastregError."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size or size not in (None, len(array)):
        wanted = "[D, D]" if size is None else f"[{size}, {size}]"
        raise FastregError(f"{function}: {name} must be a square matrix {wanted}, got shape {array.shape}")
    if not np.isfinite(array).all() or not np.allclose(array, array.T, rtol=1e-8, atol=1e-10 * np.abs(array).max()):
        raise FastregError(f"{function}: {name} must be finite and symmetric, got {array} (pass (M + M') / 2)")
    low, high = np.linalg.eigvalsh(array)[[0, -1]]
    slack = 1e-12 * max(high, 0.0)
    if low <= slack if definite else low < -slack:
        kind = "positive definite" if definite else "positive semidefinite"
        raise FastregError(f"{function}: {name} must be {kind}, got smallest eigenvalue {low:.3g}")
    return array


def vector(function: str, name: str, value: ArrayLike, size: int) -> Array:
    """``value`` as a finite float64 vector ``[size]``, or FastregError."""
    array = np.asarray(value, dtype=np.float64)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise FastregError(f"{function}: {name} must be finite numbers of shape [{size}], got {array}")
    return array


def learning_rate(function: str, value: ArrayLike, size: int) -> Array:
    """The learning rate as a matrix ``[size, size]``: a number stands for that multiple of the identity."""
    if np.ndim(value):
        return matrix(function, "lr", value, size=size)
    return number(function, "lr", value, above=0.0) * np.eye(size)


def number(function: str, name: str, value: object, *, above: float | None = None, least: float | None = None) -> float:
    """``value`` as a finite float above or at least a bound, or FastregError."""
    low, sign = (least, ">=") if above is None else (above, ">")
    found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(found) or (low is not None and (found < low or found == above)):
        bound = "" if low is None else f" {sign} {low:g}"
        raise FastregError(f"{function}: {name} must be a finite number{bound}, got {value!r}")
    return found


def sgd(function: str, batch_size: object, momentum: object) -> None:
    """Raise FastregError unless ``batch_size`` is an integer >= 1 and ``momentum`` in [0, 1)."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or int(batch_size) < 1:
        raise FastregError(f"{function}: batch_size must be an integer >= 1, got {batch_size!r}")
    if isinstance(momentum, bool) or not isinstance(momentum, Real) or not 0 <= float(momentum) < 1:
        raise FastregError(f"{function}: momentum must be in [0, 1), got {momentum!r}")
