"""What a method of the benchmark is, and what one can compute."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Literal, get_args

from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem

Product = Literal["hvp", "hvp_several", "hvp_micro", "hvp_micro_grad", "ggn"]
Fisher = Literal["fisher", "fisher_frozen", "fisher_true"]
Jacobian = Literal["average_jacobian", "unit_jacobian"]
Penalized = Literal["grad_norm", "variance", "noise_trace", "without_replacement", Fisher, Jacobian]
Statistic = Literal["fisher_trace", "noise_scale"]
Quantity = Literal["loss", "sample_norms", "micro_norms", Statistic, "sam", "m_sam", Penalized, Product]
Suite = Literal["norms", "penalty", "fisher", "regularizers", "monitor", "sam", "hvp", "scale"]

# What is made of the gradients of single samples.
PER_SAMPLE = ("sample_norms", *get_args(Statistic))
COUPLED = "batch norm couples the samples of a batch: none has a gradient of its own"


def no_samples(problem: Problem) -> str | None:
    """The reason why nothing can be made of gradients of single samples, where nothing can."""
    return COUPLED if problem.coupled else None


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to do one training step.

    Attributes:
        name: what ``--methods`` calls it.
        computes: whose gradient it leaves in ``.grad``: that of the loss, or of loss + weight * R with R the
            :data:`Penalized`; ``"sample_norms"`` and ``"micro_norms"`` are the gradient of the loss and the squared
            gradient norm of every sample, or micro-batch; ``"noise_scale"`` is the gradient of the loss and the two
            statistics of per-sample gradients whose ratio it is; ``"fisher_trace"`` is the mean over samples of their
            squared gradient norms on drawn labels, alone; ``"sam"`` and ``"m_sam"`` are the gradient at weights
            perturbed along that of the batch, or of each micro-batch. A :data:`Product` is formed instead of a
            gradient: with the Hessian, one vector or several; the mean over micro-batches of those of their Hessians
            with a vector each, or with their gradients; with the Gauss-Newton matrix, which is the exact Fisher matrix
            here.
        about: one line for ``--help`` and the report.
        prepare: makes the step of a problem; the problem's model is the step's own.
        by_default: measured when ``--methods`` is not given.
        suites: every ``--suite`` that this is one of.
        compiled: whether it runs under ``torch.compile``, below what counts its operations.
        package: what must be installed for it, beyond what fastreg needs.
        products: how many a run gives, to which its time is also referred.
        rounding: relative error that it is allowed beyond the gate's tolerance, because it computes
            in float32 whatever the dtype is.
        ours: whether this is fastreg's.
        unable: why it cannot treat a problem, or None; asked before it is tried, and the row is then skipped.
    """

    name: str
    computes: Quantity
    about: str
    prepare: Callable[[Problem], Step]
    by_default: bool = True
    suites: tuple[Suite, ...] = ("penalty",)
    compiled: bool = False
    package: str | None = None
    products: int = 1
    rounding: float = 0.0
    ours: bool = False
    unable: Callable[[Problem], str | None] = lambda problem: None

    @property
    def installed(self) -> bool:
        """Whether this can run here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def skipped(self, problem: Problem) -> str | None:
        """Why this has no result on ``problem``, or None where it has one."""
        if self.computes in PER_SAMPLE and problem.coupled:
            return COUPLED
        return self.unable(problem)
