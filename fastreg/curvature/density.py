"""The spectral density of curvature operators by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.recurrence import lanczos
from fastreg.curvature.traces import check_count, signs
from fastreg.errors import FastregError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Default kernel width over the largest |node|: bulk and outliers of a Hessian both stay visible.
RELATIVE_SIGMA = 0.01
# The default grid ends where the outermost kernel holds less than 1e-6 of its mass.
GRID_MARGIN = 5.0
# Below this part of the peak there are Gaussian tails only, which a logarithmic axis would stretch over decades.
PLOT_FLOOR = 1e-10


@dataclass(frozen=True)
class Density:
    """A spectral density as point masses, one set per probe.

        mu = (1/n) sum_i sum_k weights[i, k] delta(. - nodes[i, k])

    Args:
        nodes: ``[n, s]`` float64, Ritz values, in the units of the operator's eigenvalues.
        weights: ``[n, s]`` float64, at least 0, sum 1 per probe.
        grid: ``[G]`` float64, where the density is drawn.
        sigma: standard deviation of the Gaussian kernel, in eigenvalue units.
    """

    nodes: Tensor
    weights: Tensor
    grid: Tensor
    sigma: float

    def on(self, grid: Tensor | None = None, sigma: float | None = None) -> Tensor:
        """The density smoothed by a Gaussian: ``sum_k w_k N(t; theta_k, sigma^2)``, averaged over probes.

        Args:
            grid: ``[G]``, eigenvalues; ``self.grid`` by default.
            sigma: ``self.sigma`` by default.

        Returns:
            ``[G]`` float64, per unit of eigenvalue; integrates to 1.

        Raises:
            FastregError: sigma is not a positive number, or grid has not one dimension.
        """
        grid, sigma = self.grid if grid is None else grid, self.sigma if sigma is None else sigma
        _check_sigma("Density.on", sigma)
        if grid.dim() != 1:
            raise FastregError(f"Density.on: grid must be [G], got shape {tuple(grid.shape)}")
        distances = (grid.to(self.nodes).unsqueeze(1) - self.nodes.reshape(1, -1)) / sigma  # [G, n s]
        kernels = torch.exp(-0.5 * distances.square()) / (sigma * math.sqrt(2 * math.pi))
        return kernels @ self.weights.reshape(-1) / len(self.nodes)

    def moment(self, power: int) -> Tensor:
        """``mean_i sum_k w_k theta_k^power``, 0-d: an unbiased estimate of ``tr(A^power) / D`` for power < 2 s.

        Raises:
            FastregError: power is not an integer >= 0.
        """
        check_count("Density.moment", "power", power, 0)
        return (self.weights * self.nodes**power).sum(1).mean()

    def plot(self, target: str | PathLike[str] | Axes) -> Axes:
        """Draw the density over eigenvalues, on a logarithmic axis.

        Args:
            target: matplotlib axes, or a file to write; its extension is the format.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if not isinstance(target, (str, PathLike)):
            return self._draw(target)
        from matplotlib.figure import Figure

        # Figure without pyplot: no display is looked for and no global state is left behind.
        figure = Figure(layout="constrained")
        axes = self._draw(figure.add_subplot())
        figure.savefig(target)
        return axes

    def _draw(self, axes: Axes) -> Axes:
        values = self.on()
        # Gaps instead of axis limits, so that several densities can share the axes.
        shown = values.masked_fill(values < PLOT_FLOOR * values.max(), math.nan)
        axes.plot(self.grid.cpu().numpy(), shown.cpu().numpy())
        axes.set_yscale("log")
        axes.set_xlabel("eigenvalue")
        axes.set_ylabel("density")
        return axes


def spectral_density(
    operator: CurvatureOperator,
    *,
    steps: int = 64,
    probes: int = 4,
    grid: int = 1024,
    sigma: float | None = None,
    generator: torch.Generator | None = None,
) -> Density:
    """The density of the eigenvalues of A, ``(1/D) sum_j delta(. - lambda_j)``, by stochastic Lanczos quadrature.

        T_i = Lanczos(A, z_i / sqrt(D)),  z_i of random signs;   nodes theta_k = eigenvalues of T_i,
        weights w_k = (first component of eigenvector k of T_i)^2

    Every probe is a Gauss quadrature of its own spectral measure: it is exact for polynomials of degree < 2 s, and its
    mean over z_i is the density. All probes advance together: s = min(steps, D) products of ``probes`` vectors each,
    and ``s * probes`` vectors of length D in memory.

    References: Ubaru, Chen, Saad 2017; Ghorbani, Krishnan, Xiao 2019, arXiv:1901.10159.

    Args:
        operator: A, ``[D, D]``.
        steps: of Lanczos, at least 1.
        probes: at least 1.
        grid: number of equally spaced points over the nodes and five sigma beyond, at least 2.
        sigma: kernel width in eigenvalue units; 0.01 of the largest ``|theta|`` by default (0.01 if A = 0).
        generator: of the signs; torch's global one by default.

    Returns:
        A :class:`Density`.

    Raises:
        FastregError: steps, probes or grid too small, or sigma not a positive number.

    Example:
        >>> import torch
        >>> from fastreg.curvature.density import spectral_density
        >>> from fastreg.curvature.operator import CurvatureOperator
        >>> class Diagonal(CurvatureOperator):
        ...     def apply(self, rows):
        ...         return rows * torch.arange(1.0, 5.0)
        >>> density = spectral_density(Diagonal({"weight": torch.zeros(2, 2)}))
        >>> round(float(density.moment(1)), 4)
        2.5
    """
    for name, value, least in (("steps", steps, 1), ("probes", probes, 1), ("grid", grid, 2)):
        check_count("spectral_density", name, value, least)
    if sigma is not None:
        _check_sigma("spectral_density", sigma)
    nodes, vectors = lanczos(operator, signs(operator, probes, generator), steps, generator).ritz()
    weights = vectors[:, 0].square()
    if sigma is None:
        sigma = RELATIVE_SIGMA * (float(nodes.abs().max()) or 1.0)
    low, high = float(nodes.min()) - GRID_MARGIN * sigma, float(nodes.max()) + GRID_MARGIN * sigma
    return Density(nodes, weights, torch.linspace(low, high, grid, dtype=nodes.dtype, device=nodes.device), sigma)


def _check_sigma(function: str, sigma: object) -> None:
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 < sigma < float("inf"):
        raise FastregError(f"{function}: sigma must be a number > 0, got {sigma!r}")
