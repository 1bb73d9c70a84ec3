"""The methods that ``fastreg bench`` can measure: ours here, the others from :mod:`peers`."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch

import fastreg
from fastreg.benchmark import curvature, peers, sam
from fastreg.benchmark.peers import Step, plain
from fastreg.benchmark.presets import Problem, mean_cross_entropy
from fastreg.stats import RidingNorms

Product = Literal["hvp", "hvp_several", "hvp_micro", "hvp_micro_grad", "ggn"]
Quantity = Literal["loss", "grad_norm", "fisher", "sample_norms", "sam", "m_sam", Product]
Suite = Literal["penalty", "monitor", "sam", "curvature"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to do one training step.

    Attributes:
        name: what ``--methods`` calls it.
        computes: whose gradient it leaves in ``.grad``: that of the loss, or of loss + weight * R
            with R the squared gradient norm or the Fisher trace; ``"sample_norms"`` is the
            gradient of the loss and every sample's squared gradient norm; ``"sam"`` and ``"m_sam"``
            are the gradient at weights perturbed along that of the batch, or of each micro-batch.
            A :data:`Product` is formed instead of a gradient: with the Hessian, one vector or several;
            the mean over micro-batches of those of their Hessians with a vector each, or with their
            gradients; with the Gauss-Newton matrix, which is the exact Fisher matrix here.
        about: one line for ``--help`` and the report.
        prepare: makes the step of a problem; the problem's model is the step's own.
        by_default: measured when ``--methods`` is not given.
        suite: the ``--suite`` that this is one of.
        compiled: whether it runs under ``torch.compile``, below what counts its operations.
        package: what must be installed for it, beyond what fastreg needs.
        products: how many a run gives, to which its time is also referred.
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
    products: int = 1
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


def monitored(problem: Problem, **options: object) -> Step:
    """The plain step with :class:`fastreg.Monitor` beside it."""
    model = problem.model
    monitor = fastreg.Monitor(model, **options)
    step = plain(problem)

    def run() -> None:
        step.run()
        monitor.step()

    return Step(model, run, sq_norms=lambda: monitor.metrics["fastreg/sample_norms"].square())


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


def _monitors() -> Iterator[Method]:
    """The methods of the suite ``"monitor"``."""
    one = partial(Method, suite="monitor")
    yield one("monitor", "loss", "fastreg.Monitor as it comes: an eighth of the samples", monitored)
    norms = partial(monitored, metrics=("grad_noise_scale", "sample_norms"))
    yield one("monitor_norms", "sample_norms", "the same with every sample's norm", norms)
    passes = partial(monitored, metrics=("grad_norm",), micro_batch_size=None)
    yield one("monitor_passes", "loss", "backward passes as micro-batches", passes)
    about = "fastreg.stats.RidingNorms, every sample"
    yield one("riding_norms", "sample_norms", about, plain_norms)


def _curvature() -> Iterator[Method]:
    """The methods of the suite ``"curvature"``."""
    one = partial(Method, suite="curvature")
    several = partial(one, computes="hvp_several", products=curvature.SEVERAL)
    about = "batched_hvp, one vector, through fastreg.compile"
    yield one("hvp_compiled", "hvp", about, curvature.hvp_compiled, by_default=False, compiled=True)
    yield one("hvp", "hvp", "batched_hvp, one vector", curvature.hvp)
    yield one("hvp_kept", "hvp", "Hessian operator, a later product", curvature.hvp_kept)
    yield several("hvp8", about="batched_hvp, 8 vectors", prepare=curvature.hvp_several)
    yield one("hvp_micro", "hvp_micro", "batched_hvp, a vector per micro-batch", curvature.hvp_micro)
    yield one("hvp_micro_grad", "hvp_micro_grad", "the same with their gradients", curvature.hvp_micro_grad)
    yield one("ggn", "ggn", "ggn_vp, one vector", curvature.ggn)
    yield one("fisher_exact", "ggn", "fisher_vp, kind exact, one vector", curvature.fisher_exact)
    yield one("double_backward", "hvp", "torch.autograd, one vector", curvature.double_backward)
    yield one("double_backward_kept", "hvp", "the same, a later product", curvature.double_backward_kept)
    yield one("sequential_micro", "hvp_micro", "one double backward per micro-batch", curvature.sequential_micro)
    yield one("func_hvp", "hvp", "torch.func, jvp of grad", curvature.func_hvp)
    yield several("func_hvp8", about="the same vmapped over 8 vectors", prepare=curvature.func_hvp_several)
    yield one("func_micro", "hvp_micro", "the same vmapped over micro-batches", curvature.func_micro)
    about = "curvlinops.HessianLinearOperator"
    yield one("curvlinops", "hvp", about, curvature.curvlinops, package="curvlinops")


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
        *_monitors(),
        *_curvature(),
    )
}


def default_methods(suite: Suite) -> list[str]:
    """What a suite measures when no methods are named; the plain step is among them."""
    found = [m.name for m in METHODS.values() if m.suite == suite and m.by_default]
    return list(dict.fromkeys(("plain", *found)))
