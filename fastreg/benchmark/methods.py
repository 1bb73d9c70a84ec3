"""The methods that ``fastreg bench`` can measure: ours here, the others from :mod:`peers`."""

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Literal

import torch

import fastreg
from fastreg.benchmark import peers, sam
from fastreg.benchmark.peers import Step, plain
from fastreg.benchmark.presets import Problem, mean_cross_entropy
from fastreg.stats import RidingNorms

Quantity = Literal["loss", "grad_norm", "fisher", "sample_norms", "sam", "m_sam"]
Suite = Literal["penalty", "sam"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to do one training step.

    Attributes:
        name: what ``--methods`` calls it.
        computes: whose gradient it leaves in ``.grad``: that of the loss, or of loss + weight * R
            with R the squared gradient norm or the Fisher trace; ``"sample_norms"`` is the
            gradient of the loss and every sample's squared gradient norm; ``"sam"`` and ``"m_sam"``
            are the gradient at weights perturbed along that of the batch, or of each micro-batch.
        about: one line for ``--help`` and the report.
        prepare: makes the step of a problem; the problem's model is the step's own.
        by_default: measured when ``--methods`` is not given.
        suite: the ``--suite`` that this is one of.
        compiled: whether it runs under ``torch.compile``, below what counts its operations.
        package: what must be installed for it, beyond what fastreg needs.
        rounding: relative error that it is allowed beyond the gate's tolerance, because it computes
            in float32 whatever the dtype is.
    """

    name: str
    computes: Quantity
    about: str
    prepare: Callable[[Problem], Step]
    by_default: bool = True
    suite: Suite = "penalty"
    compiled: bool = False
    package: str | None = None
    rounding: float = 0.0

    @property
    def installed(self) -> bool:
        """Whether this can run here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def plain_norms(problem: Problem) -> Step:
    """The plain step with per-sample squared gradient norms riding on its backward."""
    model = problem.model
    norms = RidingNorms(model, micro_batch_size=1)
    step = plain(problem)
    found: list[torch.Tensor] = []

    def run() -> None:
        step.run()
        found[:] = [norms.read()]

    return Step(model, run, sq_norms=lambda: found[0])


def exact(problem: Problem) -> Step:
    """The gradient-norm penalty, exact, all micro-batches at once."""
    penalty = fastreg.GradNorm(weight=problem.weight)
    return Step(problem.model, _regularized(problem, penalty))


def fisher(problem: Problem) -> Step:
    """The Fisher-trace penalty, exact for the labels drawn, all micro-batches at once."""
    penalty = fastreg.FisherTrace(weight=problem.weight)
    run = _regularized(problem, penalty)
    return Step(problem.model, run, labels=lambda: penalty.last_labels)


def _regularized(problem: Problem, penalty: fastreg.Penalty) -> Callable[[], None]:
    model = problem.model
    reg = fastreg.Regularizer(model, penalty, micro_batch_size=problem.micro_batch_size)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with problem.precision():
            outputs = model(problem.inputs)
            loss = mean_cross_entropy(outputs, problem.targets)
        reg(loss, outputs).backward()

    return run


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("plain", "loss", "forward, loss, backward", plain),
        Method(
            "plain_norms",
            "sample_norms",
            "plain, and fastreg.stats.RidingNorms for every sample",
            plain_norms,
        ),
        Method("exact", "grad_norm", "fastreg.GradNorm", exact),
        Method("fisher", "fisher", "fastreg.FisherTrace", fisher),
        Method(
            "sequential",
            "grad_norm",
            "gradient norm, one double backward per micro-batch",
            peers.sequential,
        ),
        Method(
            "sequential_fisher",
            "fisher",
            "Fisher trace, one double backward per micro-batch",
            peers.sequential_fisher,
            by_default=False,
        ),
        Method(
            "functorch",
            "grad_norm",
            "torch.func.grad of a penalty vmapped over micro-batches",
            peers.functorch,
        ),
        Method(
            "functorch_compiled",
            "grad_norm",
            "the same under torch.compile",
            peers.functorch_compiled,
            by_default=False,
            compiled=True,
        ),
        Method(
            "plain_compiled",
            "loss",
            "the plain step of torch.compile(model)",
            peers.plain_compiled,
            by_default=False,
            compiled=True,
        ),
        Method("m_sam", "m_sam", "fastreg.optim.SAM, a perturbation per micro-batch", sam.m_sam, suite="sam"),
        Method(
            "sequential_m_sam",
            "m_sam",
            "SAM on one micro-batch after another, torch._foreach_*",
            sam.sequential_m_sam,
            suite="sam",
        ),
        Method("sam", "sam", "fastreg.optim.SAM, one perturbation", sam.sam, suite="sam"),
        Method(
            "package_sam",
            "sam",
            "pytorch_optimizer.SAM, one perturbation",
            sam.package_sam,
            suite="sam",
            package="pytorch_optimizer",
            # It takes the norm of the gradient in float32.
            rounding=1e-6,
        ),
    )
}


def default_methods(suite: Suite) -> list[str]:
    """What a suite measures when no methods are named; the plain step is among them."""
    found = [m.name for m in METHODS.values() if m.suite == suite and m.by_default]
    return list(dict.fromkeys(("plain", *found)))
