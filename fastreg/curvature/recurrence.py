"""The Lanczos recurrence with full reorthogonalisation, for several start vectors in lockstep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import count

import torch
from torch import Tensor

from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.vectors import check_tensor
from fastreg.errors import FastregError

# A pass of Gram-Schmidt that leaves this much of a norm has found nothing to take away.
KEPT = 0.9
# Longer products in float32 lose digits on the CPU: of 2 million terms, bases came out orthogonal to 4e-4, not 3e-6.
CHUNK = 2**14


@dataclass(frozen=True)
class Lanczos:
    """What n recurrences of s steps leave: tridiagonal matrices T, and the bases Q in which ``Q^T A Q = T``.

    Attributes:
        alphas: ``[n, s]`` float64, the diagonals.
        betas: ``[n, s - 1]`` float64, the off-diagonals; 0 where a recurrence was started anew.
        basis: ``[s, n, D]``, orthonormal along s.
        last: ``[n]`` float64, the norm of the residual after step s; 0 where the basis spans an invariant subspace.
            A Ritz vector of T's eigenvector y misses an eigenvector's equation by ``last |y_s|``.
    """

    alphas: Tensor
    betas: Tensor
    basis: Tensor
    last: Tensor

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of each T, ``[n, s]`` ascending, and eigenvectors in columns, ``[n, s, s]``; float64.

        Squares of the first components are the weights of Gaussian quadrature for the start vector.
        """
        # A matrix as small as this is solved sooner on the CPU.
        alphas, betas = self.alphas.cpu(), self.betas.cpu()
        tridiagonal = torch.diag_embed(alphas)
        if betas.shape[1]:
            tridiagonal = tridiagonal + torch.diag_embed(betas, 1) + torch.diag_embed(betas, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        return values.to(self.alphas.device), vectors.to(self.alphas.device)


def lanczos(
    operator: CurvatureOperator, starts: Tensor, steps: int, generator: torch.Generator | None = None
) -> Lanczos:
    """n independent Lanczos recurrences; every step is one ``operator.apply`` of n rows.

        beta_j q_{j+1} = A q_j - alpha_j q_j - beta_{j-1} q_{j-1},      q_1 = start / ||start||

    Every new vector is made orthogonal to all before it, twice (more often where little remains), so that no eigenvalue
    appears a second time by rounding. Where the residual is no more than rounding, the basis spans an invariant
    subspace: beta is 0, and the recurrence goes on from a random vector orthogonal to it. What follows has quadrature
    weight 0. The vectors take the memory of ``s n D`` numbers.

    Args:
        operator: symmetric, ``[D, D]``.
        starts: ``[n, D]``, of the operator's dtype, on its device; no row is zero.
        steps: at least 1; no more than D are taken.
        generator: of the random vectors; torch's global one by default.

    Returns:
        :class:`Lanczos` with s = min(steps, D).

    Raises:
        FastregError: an argument is out of range; a product is not finite.

    Example:
        >>> import torch
        >>> class Diagonal(CurvatureOperator):
        ...     def apply(self, rows):
        ...         return rows * torch.arange(1.0, 4.0)
        >>> result = lanczos(Diagonal({"w": torch.zeros(3)}), torch.ones(1, 3), steps=3)
        >>> [round(float(value), 4) for value in result.ritz()[0][0]]
        [1.0, 2.0, 3.0]
    """
    return Recurrence(operator, starts, generator).advance(steps)


class Recurrence:
    """:func:`lanczos` that can go on: ``advance(s)`` takes the steps that are missing to s.

    Example:
        >>> import torch
        >>> class Doubled(CurvatureOperator):
        ...     def apply(self, rows):
        ...         return 2 * rows
        >>> recurrence = Recurrence(Doubled({"w": torch.zeros(5)}), torch.ones(1, 5))
        >>> recurrence.advance(2).alphas.shape, recurrence.advance(4).alphas.shape
        (torch.Size([1, 2]), torch.Size([1, 4]))
    """

    def __init__(self, operator: CurvatureOperator, starts: Tensor, generator: torch.Generator | None = None) -> None:
        self.operator, self.generator = operator, generator
        starts = _checked(operator, starts)
        norms = _norms(starts)
        self._next = starts / norms.to(starts.dtype).unsqueeze(1)
        self._basis = starts.new_empty(len(starts), 0, operator.size)
        self._alphas: list[Tensor] = []
        self._betas: list[Tensor] = []
        # The largest ||A q|| so far, a lower bound of ||A||: what rounding is measured by.
        self._scale = torch.zeros_like(norms)

    def advance(self, steps: int) -> Lanczos:
        """The recurrence after ``steps`` steps in all (D at most); as :func:`lanczos`."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise FastregError(f"lanczos: steps must be an integer >= 1, got {steps!r}")
        steps = max(min(steps, self.operator.size), len(self._alphas))
        rows, held, size = self._basis.shape
        if steps > held:
            self._basis = torch.cat([self._basis, self._basis.new_empty(rows, steps - held, size)], dim=1)
        while len(self._alphas) < steps:
            self._step(len(self._alphas))
        betas = torch.stack(self._betas, dim=1)
        basis = self._basis.transpose(0, 1)
        return Lanczos(torch.stack(self._alphas, dim=1), betas[:, :-1], basis, betas[:, -1])

    def _step(self, done: int) -> None:
        self._basis[:, done] = self._next
        image = self.operator.apply(self._next).detach()
        self._scale = torch.maximum(self._scale, _norms(image))
        if not self._scale.isfinite().all():
            raise FastregError(f"lanczos: operator must give finite products, got nan or inf at step {done + 1}")
        # Below this a residual is rounding through and through.
        floor = torch.finfo(image.dtype).eps * self._scale
        residual, norms, parts = _orthogonalized(image, self._basis[:, : done + 1], floor)
        invariant = norms <= floor
        self._alphas.append(parts[:, -1])
        self._betas.append(torch.where(invariant, 0.0, norms))
        if invariant.any() and done + 1 < self.operator.size:
            fresh = random_rows(int(invariant.sum()), self.operator, self.generator)
            basis = self._basis[invariant, : done + 1]
            residual[invariant], norms[invariant], _ = _orthogonalized(fresh, basis, torch.zeros_like(norms[invariant]))
        self._next = residual / norms.to(residual.dtype).unsqueeze(1)


def random_rows(rows: int, operator: CurvatureOperator, generator: torch.Generator | None) -> Tensor:
    """``[rows, D]`` standard normal, drawn where the generator lives, by default on the operator's device."""
    device = operator.device if generator is None else generator.device
    drawn = torch.randn(rows, operator.size, generator=generator, dtype=operator.dtype, device=device)
    return drawn.to(operator.device)


def _orthogonalized(rows: Tensor, basis: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[n, D]`` without their parts along ``basis [n, s, D]``, their norms ``[n]``, and these parts ``[n, s]``.

    Classical Gram-Schmidt, twice at least: the second pass takes away what rounding left of the first (Giraud et al.
    2005). Where it takes away something still, another follows, since what remains is as small as that rounding and
    would hand it on enlarged from step to step; below ``floor [n]`` nothing is left to keep.
    """
    parts, norms = rows.new_zeros((), dtype=torch.float64), _norms(rows)
    for done in count(1):
        along = _products(basis, rows)
        rows = rows - torch.bmm(along.to(rows.dtype).unsqueeze(1), basis).squeeze(1)
        parts = parts + along
        before, norms = norms, _norms(rows)
        if done > 1 and ((norms >= KEPT * before) | (norms <= floor)).all():
            break
    return rows, norms, parts


def _products(basis: Tensor, rows: Tensor) -> Tensor:
    """``basis [n, s, D]`` times ``rows [n, D]``: ``[n, s]`` float64, summed in it from chunk to chunk."""
    chunks = zip(basis.split(CHUNK, dim=2), rows.unsqueeze(2).split(CHUNK, dim=1))
    return reduce(torch.add, (torch.bmm(part, row).double() for part, row in chunks)).squeeze(2)


def _norms(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def _checked(operator: CurvatureOperator, starts: Tensor) -> Tensor:
    rows = starts.shape[0] if isinstance(starts, Tensor) and starts.dim() == 2 else 1
    check_tensor("lanczos: starts", starts, (rows, operator.size), operator.parameters, "one start vector per row")
    norms = _norms(starts)
    if not (norms.isfinite() & (norms > 0)).all():
        raise FastregError(f"lanczos: starts must be finite rows that are not zero, got norms {norms.tolist()}")
    return starts.detach()
