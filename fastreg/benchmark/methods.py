"""The methods that ``fastreg bench`` can measure: ours here, the others from :mod:`peers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fastreg.benchmark import curvature, functorch, monitoring, peers, penalties, sam, scale
from fastreg.benchmark.method import Method, Quantity, Suite, no_samples
from fastreg.benchmark.packages import backpack, curvlinops, opacus, pytorch_optimizer, torchjd
from fastreg.benchmark.peers import Step


def _penalty() -> Iterator[Method]:
    """The methods of the suite ``"penalty"``, the plain step among them."""
    named = partial(Method, by_default=False)
    both = partial(Method, ours=True, suites=("penalty", "regularizers", "scale"))
    yield Method("plain", "loss", "forward, loss, backward", peers.plain)
    yield both("exact", "grad_norm", "fastreg.GradNorm", penalties.exact)
    suites: tuple[Suite, ...] = ("penalty", "fisher", "regularizers", "scale")
    yield both("fisher", "fisher", "fastreg.FisherTrace", penalties.fisher, suites=suites)
    steps: dict[str, tuple[Quantity, Callable[..., Step]]] = {
        "exact": ("grad_norm", penalties.exact),
        "fisher": ("fisher", penalties.fisher),
    }
    for name, (quantity, step) in steps.items():
        prepare = partial(step, compiled=True)
        about, suites = f"{name} in fastreg.compile", ("penalty", "scale")
        yield named(f"{name}_compiled", quantity, about, prepare, compiled=True, ours=True, suites=suites)
    about = "gradient norm, one double backward per micro-batch"
    yield Method("sequential", "grad_norm", about, peers.sequential)
    about = f"gradient norm, forward differences over {peers.DIFFERENCE:g} per micro-batch, two backwards each"
    yield Method("sequential_fd", "grad_norm", about, peers.sequential_fd, rounding=peers.TRUNCATION)
    about = "Fisher trace, one double backward per micro-batch"
    yield named("sequential_fisher", "fisher", about, peers.sequential_fisher, suites=("penalty", "fisher"))
    about = "torch.func.grad of a penalty vmapped over micro-batches"
    yield Method("functorch", "grad_norm", about, functorch.penalty)
    about = "the same under torch.compile"
    yield named("functorch_compiled", "grad_norm", about, functorch.penalty_compiled, compiled=True)
    about = "the plain step of torch.compile(model)"
    suites = ("penalty", "scale")
    yield named("plain_compiled", "loss", about, peers.plain_compiled, compiled=True, suites=suites)


def _norms() -> Iterator[Method]:
    """The methods of the suite ``"norms"``: what the gradients of samples or micro-batches are like, no penalty."""
    one = partial(Method, suites=("norms",))
    ours = partial(one, ours=True)
    about = "plain, and fastreg.stats.RidingNorms for every sample"
    yield ours("plain_norms", "sample_norms", about, monitoring.plain_norms, suites=("norms", "penalty", "monitor"))
    yield ours("micro_norms", "micro_norms", "the same for every micro-batch", monitoring.micro_norms)
    about = "plain_norms, and the moments of the noise scale"
    yield ours("noise_scale", "noise_scale", about, monitoring.noise_scale)
    about = "the moments of the noise scale, one backward per sample"
    yield one("sequential_noise_scale", "noise_scale", about, monitoring.sequential_noise_scale)
    about = "per_sample_grad_norms on drawn labels, no training step"
    yield ours("fisher_trace", "fisher_trace", about, monitoring.fisher_trace, suites=("norms", "fisher"))
    about = "the same, one backward per sample"
    prepare = monitoring.sequential_fisher_trace
    yield one("sequential_fisher_trace", "fisher_trace", about, prepare, suites=("norms", "fisher"))


def _norm_peers() -> Iterator[Method]:
    """What one writes with torch for the suite ``"norms"``."""
    one = partial(Method, suites=("norms",))
    yield one("sequential_norms", "sample_norms", "one backward per sample, and its norm", peers.sequential_norms)
    about = "one backward per micro-batch, and its norm"
    yield one("sequential_micro_norms", "micro_norms", about, peers.sequential_micro_norms)
    about = "torch.func.vmap of grad over samples, then norms and mean"
    yield one("functorch_norms", "sample_norms", about, functorch.norms)
    prepare = partial(functorch.norms, micro=True)
    about = "torch.func.vmap of grad over micro-batches, then norms and mean"
    yield one("functorch_micro_norms", "micro_norms", about, prepare)
    one = partial(one, compiled=True, by_default=False)
    about, prepare = "functorch_norms under torch.compile", partial(functorch.norms, compiled=True)
    yield one("functorch_norms_compiled", "sample_norms", about, prepare)
    about, prepare = "functorch_micro_norms under torch.compile", partial(prepare, micro=True)
    yield one("functorch_micro_norms_compiled", "micro_norms", about, prepare)


def _penalties() -> Iterator[Method]:
    """The other methods of the suite ``"regularizers"``."""
    peer = partial(Method, suites=("regularizers",))
    one = partial(peer, ours=True)
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
    yield peer("sequential_variance", "variance", about, penalties.sequential_variance)
    about = "variance, the batch's gradient, then one double backward per micro-batch"
    yield peer("sequential_centred", "variance", about, penalties.sequential_centred)


def _sam() -> Iterator[Method]:
    """The methods of the suite ``"sam"``."""
    one = partial(Method, suites=("sam",))
    about = "fastreg.optim.SAM, a perturbation per micro-batch"
    yield Method("m_sam", "m_sam", about, sam.m_sam, suites=("sam", "scale"), ours=True)
    about = "SAM on one micro-batch after another, torch._foreach_*"
    yield one("sequential_m_sam", "m_sam", about, sam.sequential_m_sam)
    yield one("sam", "sam", "fastreg.optim.SAM, one perturbation", sam.sam, ours=True)


def _monitors() -> Iterator[Method]:
    """The methods of the suite ``"monitor"``."""
    one = partial(Method, suites=("monitor",), ours=True)
    about = "fastreg.Monitor as it comes: an eighth of the samples"
    yield one("monitor", "loss", about, monitoring.monitored, suites=("monitor", "scale"), unable=no_samples)
    norms = partial(monitoring.monitored, metrics=("grad_noise_scale", "sample_norms"))
    yield one("monitor_norms", "sample_norms", "the same with every sample's norm", norms)
    passes = partial(monitoring.monitored, metrics=("grad_norm",), micro_batch_size=None)
    yield one("monitor_passes", "loss", "backward passes as micro-batches", passes)


def _scale() -> Iterator[Method]:
    """The methods of the suite ``"scale"`` that no other has."""
    one = partial(Method, suites=("scale",), ours=True)
    about = "plain, every block in torch.utils.checkpoint"
    yield one("plain_checkpointed", "loss", about, scale.plain_checkpointed, ours=False)
    about = "exact, every block in torch.utils.checkpoint"
    yield one("exact_checkpointed", "grad_norm", about, scale.exact_checkpointed)
    yield one("exact_recomputed", "grad_norm", "exact, with fastreg.checkpoint_blocks", scale.exact_recomputed)
    about = "fastreg.GradNorm by central differences, first order alone"
    yield one("perturb", "grad_norm", about, scale.perturbed, rounding=scale.TRUNCATION)


def _curvature() -> Iterator[Method]:
    """The methods of the suite ``"hvp"``: products with curvature matrices."""
    peer = partial(Method, suites=("hvp",))
    one = partial(peer, ours=True)
    several: dict[str, Any] = {"computes": "hvp_several", "products": curvature.SEVERAL}
    about = "batched_hvp, one vector, through fastreg.compile"
    yield one("hvp_compiled", "hvp", about, curvature.hvp_compiled, by_default=False, compiled=True)
    yield one("hvp", "hvp", "batched_hvp, one vector", curvature.hvp)
    yield one("hvp_kept", "hvp", "Hessian operator, a later product", curvature.hvp_kept)
    yield one("hvp8", about="batched_hvp, 8 vectors", prepare=curvature.hvp_several, **several)
    yield one("hvp_micro", "hvp_micro", "batched_hvp, a vector per micro-batch", curvature.hvp_micro)
    yield one("hvp_micro_grad", "hvp_micro_grad", "the same with their gradients", curvature.hvp_micro_grad)
    yield one("ggn", "ggn", "ggn_vp, one vector", curvature.ggn)
    yield one("fisher_exact", "ggn", "fisher_vp, kind exact, one vector", curvature.fisher_exact)
    yield peer("double_backward", "hvp", "torch.autograd, one vector", curvature.double_backward)
    yield peer("double_backward_kept", "hvp", "the same, a later product", curvature.double_backward_kept)
    yield peer("sequential_micro", "hvp_micro", "one double backward per micro-batch", curvature.sequential_micro)
    yield peer("func_hvp", "hvp", "torch.func, jvp of grad", curvature.func_hvp)
    yield peer("func_hvp8", about="the same vmapped over 8 vectors", prepare=curvature.func_hvp_several, **several)
    yield peer("func_micro", "hvp_micro", "the same vmapped over micro-batches", curvature.func_micro)


METHODS: dict[str, Method] = {
    method.name: method
    for methods in (
        *(_penalty(), _norms(), _norm_peers(), _penalties(), _sam(), _monitors(), _scale(), _curvature()),
        *(package.methods() for package in (opacus, backpack, torchjd, pytorch_optimizer, curvlinops)),
    )
    for method in methods
}


def default_methods(suite: Suite) -> list[str]:
    """What a suite measures when no methods are named; the plain step is among them."""
    found = [m.name for m in METHODS.values() if suite in m.suites and m.by_default]
    return list(dict.fromkeys(("plain", *found)))
