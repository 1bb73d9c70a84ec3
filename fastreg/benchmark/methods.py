"""The methods that ``fastreg bench`` can measure: ours here, the others from :mod:`peers`."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

from fastreg.benchmark import curvature, monitoring, peers, penalties, sam, scale
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem

Product = Literal["hvp", "hvp_several", "hvp_micro", "hvp_micro_grad", "ggn"]
Fisher = Literal["fisher", "fisher_frozen", "fisher_true"]
Jacobian = Literal["average_jacobian", "unit_jacobian"]
Penalized = Literal["grad_norm", "variance", "noise_trace", "without_replacement", Fisher, Jacobian]
Quantity = Literal["loss", "sample_norms", "sam", "m_sam", Penalized, Product]
Suite = Literal["penalty", "regularizers", "monitor", "sam", "curvature", "scale"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to do one training step.

    Attributes:
        name: what ``--methods`` calls it.
        computes: whose gradient it leaves in ``.grad``: that of the loss, or of loss + weight * R with R the
            :data:`Penalized`; ``"sample_norms"`` is the gradient of the loss and every sample's squared gradient
            norm; ``"sam"`` and ``"m_sam"`` are the gradient at weights perturbed along that of the batch, or of each
            micro-batch. A :data:`Product` is formed instead of a gradient: with the Hessian, one vector or several;
            the mean over micro-batches of those of their Hessians with a vector each, or with their
            gradients; with the Gauss-Newton matrix, which is the exact Fisher matrix here.
        about: one line for ``--help`` and the report.
        prepare: makes the step of a problem; the problem's model is the step's own.
        by_default: measured when ``--methods`` is not given.
        suites: every ``--suite`` that this is one of.
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
    suites: tuple[Suite, ...] = ("penalty",)
    compiled: bool = False
    package: str | None = None
    products: int = 1
    rounding: float = 0.0

    @property
    def installed(self) -> bool:
        """Whether this can run here."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def _penalty() -> Iterator[Method]:
    """The methods of the suite ``"penalty"``, the plain step among them."""
    named = partial(Method, by_default=False)
    both = partial(Method, suites=("penalty", "regularizers", "scale"))
    yield Method("plain", "loss", "forward, loss, backward", peers.plain)
    about = "plain, and fastreg.stats.RidingNorms for every sample"
    yield Method("plain_norms", "sample_norms", about, monitoring.plain_norms)
    yield both("exact", "grad_norm", "fastreg.GradNorm", penalties.exact)
    yield both("fisher", "fisher", "fastreg.FisherTrace", penalties.fisher)
    for name, quantity, prepare in (("exact", "grad_norm", penalties.exact), ("fisher", "fisher", penalties.fisher)):
        prepare = partial(prepare, compiled=True)
        about, suites = f"{name} in fastreg.compile", ("penalty", "scale")
        yield named(f"{name}_compiled", quantity, about, prepare, compiled=True, suites=suites)
    about = "gradient norm, one double backward per micro-batch"
    yield Method("sequential", "grad_norm", about, peers.sequential)
    about = "Fisher trace, one double backward per micro-batch"
    yield named("sequential_fisher", "fisher", about, peers.sequential_fisher)
    about = "torch.func.grad of a penalty vmapped over micro-batches"
    yield Method("functorch", "grad_norm", about, peers.functorch)
    about = "the same under torch.compile"
    yield named("functorch_compiled", "grad_norm", about, peers.functorch_compiled, compiled=True)
    about = "the plain step of torch.compile(model)"
    suites = ("penalty", "scale")
    yield named("plain_compiled", "loss", about, peers.plain_compiled, compiled=True, suites=suites)


def _penalties() -> Iterator[Method]:
    """The other methods of the suite ``"regularizers"``."""
    one = partial(Method, suites=("regularizers",))
    yield one("variance", "variance", "fastreg.GradNorm, centered", penalties.variance)
    yield one("noise_trace", "noise_trace", "fastreg.NoiseTrace", penalties.noise_trace)
    for kind in ("frozen", "true"):
        prepare = partial(penalties.fisher, gradient=kind)
        yield one(f"fisher_{kind}", f"fisher_{kind}", f"fastreg.FisherTrace, gradient {kind}", prepare)
    yield one("average_jacobian", "average_jacobian", "fastreg.AverageJacobian", penalties.average_jacobian)
    yield one("unit_jacobian", "unit_jacobian", "fastreg.UnitJacobian, one direction", penalties.unit_jacobian)
    about = f"fastreg.WithoutReplacement, rank {penalties.RANK}; Lanczos steps (every {penalties.REFRESH} runs) untimed"
    yield one("without_replacement", "without_replacement", about, penalties.without_replacement)
    about = "variance, one double backward per micro-batch and one of the batch"
    yield one("sequential_variance", "variance", about, penalties.sequential_variance)
    about = "variance, the batch's gradient, then one double backward per micro-batch"
    yield one("sequential_centred", "variance", about, penalties.sequential_centred)


def _sam() -> Iterator[Method]:
    """The methods of the suite ``"sam"``."""
    one = partial(Method, suites=("sam",))
    about = "fastreg.optim.SAM, a perturbation per micro-batch"
    yield Method("m_sam", "m_sam", about, sam.m_sam, suites=("sam", "scale"))
    about = "SAM on one micro-batch after another, torch._foreach_*"
    yield one("sequential_m_sam", "m_sam", about, sam.sequential_m_sam)
    yield one("sam", "sam", "fastreg.optim.SAM, one perturbation", sam.sam)
    about, package = "pytorch_optimizer.SAM, one perturbation", "pytorch_optimizer"
    # It takes the norm of the gradient in float32.
    yield one("package_sam", "sam", about, sam.package_sam, package=package, rounding=1e-6)


def _monitors() -> Iterator[Method]:
    """The methods of the suite ``"monitor"``."""
    one = partial(Method, suites=("monitor",))
    about = "fastreg.Monitor as it comes: an eighth of the samples"
    yield Method("monitor", "loss", about, monitoring.monitored, suites=("monitor", "scale"))
    norms = partial(monitoring.monitored, metrics=("grad_noise_scale", "sample_norms"))
    yield one("monitor_norms", "sample_norms", "the same with every sample's norm", norms)
    passes = partial(monitoring.monitored, metrics=("grad_norm",), micro_batch_size=None)
    yield one("monitor_passes", "loss", "backward passes as micro-batches", passes)
    about = "fastreg.stats.RidingNorms, every sample"
    yield one("riding_norms", "sample_norms", about, monitoring.plain_norms)


def _scale() -> Iterator[Method]:
    """The methods of the suite ``"scale"`` that no other has."""
    one = partial(Method, suites=("scale",))
    about = "plain, every block in torch.utils.checkpoint"
    yield one("plain_checkpointed", "loss", about, scale.plain_checkpointed)
    about = "exact, every block in torch.utils.checkpoint"
    yield one("exact_checkpointed", "grad_norm", about, scale.exact_checkpointed)
    yield one("exact_recomputed", "grad_norm", "exact, with fastreg.checkpoint_blocks", scale.exact_recomputed)
    about = "fastreg.GradNorm by central differences, first order alone"
    yield one("perturb", "grad_norm", about, scale.perturbed, rounding=scale.TRUNCATION)


def _curvature() -> Iterator[Method]:
    """The methods of the suite ``"curvature"``."""
    one = partial(Method, suites=("curvature",))
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
    for methods in (_penalty(), _penalties(), _sam(), _monitors(), _scale(), _curvature())
    for method in methods
}


def default_methods(suite: Suite) -> list[str]:
    """What a suite measures when no methods are named; the plain step is among them."""
    found = [m.name for m in METHODS.values() if suite in m.suites and m.by_default]
    return list(dict.fromkeys(("plain", *found)))
