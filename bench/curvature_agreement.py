"""The Hessian of one network by fastreg and by curvlinops: eigenvalue, trace and moments, as a Markdown table.

Each package uses its own operator and estimators, and draws vectors of its own; what is drawn comes with its standard
error. The first rows compare what is not drawn: products with the same vectors, and the largest eigenvalue.

    pip install --no-deps curvlinops-for-pytorch einops einconv linear_operator opt-einsum
    python bench/curvature_agreement.py --model mlp
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from curvlinops import hutchinson_trace
from curvlinops.papyan2020traces.spectrum import fast_lanczos
from scipy.sparse.linalg import eigsh
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastreg.benchmark import curvature
from fastreg.benchmark.packages import curvlinops
from fastreg.benchmark.presets import PRESETS, Problem, mean_cross_entropy
from fastreg.curvature import Hessian, spectral_density, top_eigenvalues, trace

POWERS = (1, 2, 3, 4)
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error, which is 0 where nothing is drawn."""

    value: float
    error: float = 0.0

    @classmethod
    def of(cls, values: Tensor) -> Estimate:
        """The mean of independent values ``[n]``."""
        return cls(float(values.mean()), float(values.std() / len(values) ** 0.5))

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.1g}" if self.error else f"{self.value:.6g}"


def ours(problem: Problem, args: argparse.Namespace) -> dict[str, Estimate]:
    """By fastreg."""
    hessian = Hessian(problem.model, mean_cross_entropy, (problem.inputs, problem.targets))
    generator = torch.Generator().manual_seed(args.seed)
    found = trace(hessian, samples=args.samples, generator=generator)
    density = spectral_density(hessian, steps=args.steps, probes=args.probes, generator=generator)
    return {
        "largest eigenvalue": Estimate(float(top_eigenvalues(hessian, tol=args.tol, generator=generator))),
        "trace": Estimate(float(found.value), float(found.error)),
        **_moments(density.nodes, density.weights),
    }


def theirs(problem: Problem, args: argparse.Namespace) -> dict[str, Estimate]:
    """By curvlinops; the eigenvalue by scipy on its operator."""
    torch.manual_seed(args.seed + 1)
    hessian = curvlinops.hessian(problem)
    start = torch.randn(hessian.shape[0], dtype=hessian.dtype).numpy()
    (largest,) = eigsh(hessian.to_scipy(), k=1, which="LA", tol=args.tol, v0=start, return_eigenvectors=False)
    traces = torch.stack([hutchinson_trace(hessian, 1) for _ in range(args.samples)])
    nodes, bases = zip(*(fast_lanczos(hessian, args.steps) for _ in range(args.probes)), strict=True)
    weights = torch.stack([basis[0].square() for basis in bases])
    return {
        "largest eigenvalue": Estimate(float(largest)),
        "trace": Estimate.of(traces),
        **_moments(torch.stack(nodes), weights),
    }


def _moments(nodes: Tensor, weights: Tensor) -> dict[str, Estimate]:
    """``tr(H^p) / D`` from quadratures, one per row."""
    return {f"moment {p} of the density": Estimate.of((weights * nodes**p).sum(1)) for p in POWERS}


def product_error(problem: Problem, peer: Problem) -> float:
    """Relative difference of the products with the same vector."""
    steps = curvature.hvp(problem), curvlinops.product(peer)
    for step in steps:
        step.run()
    first, second = (step.product().double() for step in steps)
    return float((first - second).norm() / second.norm())


def table(args: argparse.Namespace) -> None:
    """Print a row per quantity."""
    problem = PRESETS[args.model].problem(1, dtype=DTYPES[args.dtype])
    peer = problem.copy()
    size = sum(p.numel() for p in problem.model.parameters())
    print(f"{args.model}, D = {size}, {args.dtype}; {args.samples} samples, {args.probes} probes of {args.steps} steps")
    print("\n| | fastreg | curvlinops | relative difference | in standard errors |\n" + "| --- " * 5 + "|")
    print(f"| H v, the same v | | | {product_error(problem, peer):.1e} | |", flush=True)
    found = ours(problem, args)
    with sdpa_kernel(SDPBackend.MATH):
        expected = theirs(peer, args)
    for name, a in found.items():
        b = expected[name]
        error = (a.error**2 + b.error**2) ** 0.5
        apart = f"{(a.value - b.value) / error:+.1f}" if error else ""
        print(f"| {name} | {a} | {b} | {(a.value - b.value) / abs(b.value):+.1e} | {apart} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add = parser.add_argument
    add("--model", choices=[*PRESETS], default="mlp")
    add("--dtype", choices=[*DTYPES], default="float32")
    add("--samples", type=int, default=128, help="products for the trace")
    add("--probes", type=int, default=16, help="recurrences for the density")
    add("--steps", type=int, default=32, help="of each recurrence")
    add("--tol", type=float, default=1e-4, help="of the largest eigenvalue")
    add("--seed", type=int, default=0)
    table(parser.parse_args())


if __name__ == "__main__":
    main()
