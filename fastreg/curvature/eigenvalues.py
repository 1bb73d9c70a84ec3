"""Extreme eigenvalues of a curvature operator, to a tolerance that is checked on the residual."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, overload

import numpy
import torch
from torch import Tensor

from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.recurrence import Recurrence, random_rows
from fastreg.errors import FastregError

# The first k by ascending key are the ones wanted.
KEYS: dict[str, Callable[[Tensor], Tensor]] = {"LA": torch.neg, "SA": torch.clone, "LM": lambda values: -values.abs()}
METHODS = ("lanczos", "lobpcg")
# Residuals of this many roundings of the largest eigenvalue are as good as none: a product is no more precise.
ROUNDINGS = 16
# The smallest tolerance that lobpcg takes for one: 0 makes it choose another.
TINY = float(numpy.finfo(float).tiny)


@overload
def top_eigenvalues(
    operator: CurvatureOperator, k: int = 1, *, which: str = "LA", method: str = "lanczos", steps: int | None = None,
    tol: float = 1e-3, max_steps: int = 200, generator: torch.Generator | None = None, vectors: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def top_eigenvalues(
    operator: CurvatureOperator, k: int = 1, *, which: str = "LA", method: str = "lanczos", steps: int | None = None,
    tol: float = 1e-3, max_steps: int = 200, generator: torch.Generator | None = None, vectors: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def top_eigenvalues(
    operator: CurvatureOperator,
    k: int = 1,
    *,
    which: str = "LA",
    method: str = "lanczos",
    steps: int | None = None,
    tol: float = 1e-3,
    max_steps: int = 200,
    generator: torch.Generator | None = None,
    vectors: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The k eigenvalues at one end of the spectrum, with the eigenvectors if asked for.

        ||A v - theta v|| <= tol |theta|    for every pair returned, ||v|| = 1

    so that an eigenvalue of A lies within ``tol |theta|`` of each theta; where theta is within rounding of 0, the
    bound is that rounding.

    ``lanczos`` takes one product per step and keeps the s vectors ``[D]``. One start vector has one component in the
    eigenspace of a multiple eigenvalue: it sees such an eigenvalue once, until rounding brings in the others.
    ``lobpcg`` (scipy, Knyazev 2001) iterates on a block of k vectors, k products at once, and returns multiple
    eigenvalues as often as they occur; it keeps a few blocks, whatever the number of steps, on the host.

    Args:
        operator: symmetric, ``[D, D]``.
        k: how many; 1 to D.
        which: ``"LA"`` largest, ``"SA"`` smallest, ``"LM"`` largest magnitude (``lanczos`` only).
        method: ``"lanczos"`` or ``"lobpcg"``.
        steps: of ``lanczos``, before residuals are first looked at; None for ``2 k + 8``.
        tol: relative residual, above 0. The error of an isolated eigenvalue is of the order of its square.
        max_steps: of the recurrence, or of lobpcg; at least k.
        generator: of the start vectors; torch's global one by default.
        vectors: also return eigenvectors.

    Returns:
        ``[k]``, of the operator's dtype: descending for LA, ascending for SA, by descending magnitude for LM. With
        ``vectors=True`` also ``[D, k]``, orthonormal columns.

    Raises:
        FastregError: an argument is out of range; a residual is above the tolerance after ``max_steps``.
        ImportError: ``lobpcg`` without scipy.

    Source: Parlett 1998, The Symmetric Eigenvalue Problem, sections 13.2 (residual bounds) and 13.8.

    Example:
        >>> import torch
        >>> class Diagonal(CurvatureOperator):
        ...     def apply(self, rows):
        ...         return rows * torch.arange(-9.0, 6.0)
        >>> operator = Diagonal({"w": torch.zeros(15)})
        >>> [round(float(value), 3) for value in top_eigenvalues(operator, 2, tol=1e-6)]
        [5.0, 4.0]
    """
    _check(operator, k, which, method, steps, tol, max_steps)
    if method == "lanczos":
        first = min(max(steps or 2 * k + 8, k), max_steps)
        values, basis = _lanczos(operator, k, which, first, tol, max_steps, generator)
    else:
        values, basis = _lobpcg(operator, k, which, tol, max_steps, generator)
    values = values.to(operator.dtype)
    return (values, basis) if vectors else values


def _lanczos(
    operator: CurvatureOperator,
    k: int,
    which: str,
    first: int,
    tol: float,
    max_steps: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    limit = min(max_steps, operator.size)
    recurrence = Recurrence(operator, random_rows(1, operator, generator), generator)
    steps = min(first, limit)
    while True:
        run = recurrence.advance(steps)
        ritz, coordinates = (part[0] for part in run.ritz())
        wanted = torch.argsort(KEYS[which](ritz))[:k]
        values, coordinates = ritz[wanted], coordinates[:, wanted]
        residuals = run.last * coordinates[-1].abs()
        bounds = _allowed(values, ritz, tol, operator)
        if (residuals <= bounds).all():
            return values, run.basis[:, 0].T @ coordinates.to(operator.dtype)
        if steps == limit:
            raise _missed(values, residuals, bounds, tol, steps)
        # In proportion, so that all the small eigenproblems together cost no more than a few of the last one.
        steps = min(steps + max(1, steps // 8), limit)


def _lobpcg(
    operator: CurvatureOperator, k: int, which: str, tol: float, max_steps: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    from scipy.sparse.linalg import lobpcg

    if operator.size < 5 * k:
        # lobpcg needs room for three blocks and some; a matrix as small as this is solved whole.
        values, basis = torch.linalg.eigh(operator.dense().double())
        wanted = torch.argsort(KEYS[which](values))[:k]
        return values[wanted], basis[:, wanted].to(operator.dtype)
    block = random_rows(k, operator, generator).T.double().cpu().numpy()
    allowed, done, length = TINY, 0, 5
    # lobpcg takes an absolute tolerance: every round, twice as long as the one before, knows it from the last values.
    while True:
        length = min(length, max_steps - done)
        with warnings.catch_warnings():
            # What it warns of, a residual above the tolerance, is looked at below.
            warnings.filterwarnings("ignore", module=r"scipy\.|fastreg\.curvature\.eigenvalues")
            found, block, history = lobpcg(
                operator.to_scipy(), block, tol=allowed, maxiter=length, largest=which == "LA",
                retResidualNormsHistory=True,
            )  # fmt: skip
        done, length = done + length, 2 * length
        values, residuals = torch.tensor(found.copy()), torch.tensor(numpy.atleast_1d(history[-1]))
        bounds = _allowed(values, values, tol, operator)
        if (residuals <= bounds).all():
            return values.to(operator.device), torch.tensor(block, dtype=operator.dtype, device=operator.device)
        if done == max_steps:
            raise _missed(values, residuals, bounds, tol, done)
        allowed = max(float(bounds.min()), TINY)


def _allowed(values: Tensor, known: Tensor, tol: float, operator: CurvatureOperator) -> Tensor:
    """The residuals to reach, ``[k]``, where ``known`` are the eigenvalues that tell the scale of rounding."""
    rounding = ROUNDINGS * torch.finfo(operator.dtype).eps * known.abs().max()
    return (tol * values.abs()).clamp(min=float(rounding))


def _missed(values: Tensor, residuals: Tensor, bounds: Tensor, tol: float, steps: int) -> FastregError:
    worst = int((residuals - bounds).argmax())
    return FastregError(
        f"top_eigenvalues: max_steps must be enough for residuals of {tol:g} |theta|, got {residuals[worst]:.2g} for "
        f"theta = {values[worst]:.4g} after {steps} (raise max_steps or tol)"
    )


def _check(
    operator: CurvatureOperator, k: int, which: str, method: str, steps: int | None, tol: float, max_steps: int
) -> None:
    if method not in METHODS:
        raise FastregError(f"top_eigenvalues: method must be one of {METHODS}, got {method!r}")
    if which not in KEYS:
        raise FastregError(f"top_eigenvalues: which must be one of {tuple(KEYS)}, got {which!r}")
    if method == "lobpcg" and (which == "LM" or steps is not None):
        got = f"which={which!r}, steps={steps!r}"
        raise FastregError(f"top_eigenvalues: lobpcg must be asked for LA or SA, without steps, got {got} (or lanczos)")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= operator.size:
        raise FastregError(f"top_eigenvalues: k must be an integer from 1 to {operator.size}, got {k!r}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < k:
        raise FastregError(f"top_eigenvalues: max_steps must be an integer >= k = {k}, got {max_steps!r}")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= max_steps):
        raise FastregError(f"top_eigenvalues: steps must be an integer from 1 to {max_steps} or None, got {steps!r}")
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not 0 < tol < float("inf"):
        raise FastregError(f"top_eigenvalues: tol must be a number > 0, got {tol!r}")
