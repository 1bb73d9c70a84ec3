"""curvlinops 3.0 (Dangel, Eschenhagen and others 2025, arXiv:2501.19183): its linear operator of the Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastreg.benchmark.curvature import product_step, vector
from fastreg.benchmark.functorch import split_norms
from fastreg.benchmark.method import Method
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem, mean_cross_entropy

if TYPE_CHECKING:
    from curvlinops import HessianLinearOperator


def methods() -> Iterator[Method]:
    """The product with one vector."""
    about = "curvlinops.HessianLinearOperator"
    yield Method("curvlinops", "hvp", about, product, suites=("hvp",), package="curvlinops")


def product(problem: Problem) -> Step:
    """``curvlinops.HessianLinearOperator`` times one vector."""
    operator, v = hessian(problem), list(vector(problem).values())

    def compute() -> list[Tensor]:
        with problem.precision(), sdpa_kernel(SDPBackend.MATH):
            return operator @ v

    return product_step(problem, compute)


def hessian(problem: Problem) -> HessianLinearOperator:
    """The package's operator on the problem's batch, without its check that the model is deterministic."""
    from curvlinops import HessianLinearOperator

    # It takes forward derivatives of a vmapped backward: see SplitLayerNorm.
    split_norms(problem.model)
    parameters, batch = list(problem.model.parameters()), (problem.inputs, problem.targets)
    count = len(problem.inputs)
    return HessianLinearOperator(
        problem.model, MeanCrossEntropy(), parameters, [batch], check_deterministic=False, num_data=count
    )


class MeanCrossEntropy(nn.Module):
    """:func:`mean_cross_entropy` as the package wants it."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return mean_cross_entropy(outputs, targets)
