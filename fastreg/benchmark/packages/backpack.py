"""BackPACK 1.7 (Dangel, Kunstner and Hennig 2020, arXiv:1912.10985): norms and a penalty through its extensions.

The loss is a mean, so what the package gives are gradients of ``loss_i / B``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastreg.benchmark.method import Method, no_samples
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem, mean_cross_entropy

if TYPE_CHECKING:
    from backpack.extensions.backprop_extension import BackpropExtension


def methods() -> Iterator[Method]:
    """Norms of samples and of micro-batches, and the gradient of the latter."""
    one = partial(Method, package="backpack")
    yield one(
        "backpack",
        "sample_norms",
        "BackPACK BatchL2Grad",
        sample_norms,
        suites=("norms",),
        unable=partial(without_rule, extension="BatchL2Grad"),
    )
    unable = partial(without_rule, extension="BatchGrad")
    about = "BackPACK BatchGrad, averaged over micro-batches before the norm"
    yield one("backpack_micro_norms", "micro_norms", about, micro_norms, suites=("norms",), unable=unable)
    unable_variance = partial(without_rule, extension="Variance")
    about = "the moments of the noise scale, BackPACK Variance"
    yield one("backpack_noise_scale", "noise_scale", about, noise_scale, suites=("norms",), unable=unable_variance)
    about = "gradient norm, BackPACK BatchGrad with create_graph, differentiated once more"
    yield one("backpack_penalty", "grad_norm", about, penalty, unable=unable, by_default=False)


def without_rule(problem: Problem, extension: str) -> str | None:
    """Why an extension cannot treat a model: modules with parameters that it has no rule for, or batch norm."""
    import backpack.extensions

    # The package only warns, and then leaves these parameters without a result.
    known = vars(getattr(backpack.extensions, extension)())["_BackpropExtension__module_extensions"]
    kinds = {type(module) for module in problem.model.modules() if list(module.parameters(recurse=False))}
    missing = ", ".join(sorted(kind.__name__ for kind in kinds - known.keys()))
    return no_samples(problem) or (f"BackPACK's {extension} has no rule for {missing}" if missing else None)


def sample_norms(problem: Problem) -> Step:
    """``BatchL2Grad`` during the backward of a plain step."""
    from backpack.extensions import BatchL2Grad

    def read(parameters: Sequence[Any]) -> Tensor:
        return len(problem.inputs) ** 2 * torch.stack([p.batch_l2 for p in parameters]).sum(0)

    return _norms(problem, BatchL2Grad(), read)


def micro_norms(problem: Problem) -> Step:
    """``BatchGrad`` during the backward of a plain step."""
    from backpack.extensions import BatchGrad

    return _norms(problem, BatchGrad(), partial(_micro_batch_norms, problem))


def noise_scale(problem: Problem) -> Step:
    """``Variance`` during the backward of a plain step, and the norm of the gradient that it leaves."""
    from backpack.extensions import Variance

    count = len(problem.inputs)

    def read(parameters: Sequence[Any]) -> Tensor:
        variances = torch.stack([p.variance.sum() for p in parameters]).sum()
        sq_norm = torch.stack([p.grad.square().sum() for p in parameters]).sum()
        # The package divides by B, and the gradients are those of loss_i / B.
        return torch.stack([variances * count**3 / (count - 1), sq_norm])

    step = _norms(problem, Variance(), read)
    return dataclasses.replace(step, sq_norms=None, statistics=step.sq_norms)


def _norms(problem: Problem, extension: BackpropExtension, read: Callable[[Sequence[Any]], Tensor]) -> Step:
    from backpack import extend

    parameters = list(extend(problem.model).parameters())
    found: list[Tensor] = []

    def forget() -> None:
        found.clear()
        _drop(parameters, extension)

    def run() -> None:
        _backward(problem, extension)
        found[:] = [read(parameters)]

    return Step(problem.model, run, sq_norms=lambda: found[0], forget=forget)


def penalty(problem: Problem) -> Step:
    """The example "gradient of backpropagated quantities" of its documentation, with micro-batches for a variance."""
    from backpack import extend
    from backpack.extensions import BatchGrad

    parameters, extension = list(extend(problem.model).parameters()), BatchGrad()

    def run() -> None:
        _backward(problem, extension, create_graph=True, retain_graph=True)
        added = torch.autograd.grad(problem.weight * _micro_batch_norms(problem, parameters).mean(), parameters)
        for p, gradient in zip(parameters, added, strict=True):
            # Without the graph, which would hold itself.
            p.grad = p.grad.detach() + gradient
        _drop(parameters, extension)

    return Step(problem.model, run)


def _backward(problem: Problem, extension: BackpropExtension, **options: bool) -> None:
    from backpack import backpack

    problem.model.zero_grad(set_to_none=True)
    with problem.precision():
        loss = mean_cross_entropy(problem.model(problem.inputs), problem.targets)
    with backpack(extension):
        loss.backward(**options)


def _micro_batch_norms(problem: Problem, parameters: Sequence[Any]) -> Tensor:
    """``||g_k||^2``, ``[m]``: m times the sum of ``grad_batch`` over a micro-batch is the mean of gradients there."""
    m = problem.micro_batches
    means = (m * p.grad_batch.unflatten(0, (m, -1)).sum(1) for p in parameters)
    return torch.stack([mean.square().flatten(1).sum(1) for mean in means]).sum(0)


def _drop(parameters: Sequence[Any], extension: BackpropExtension) -> None:
    for p in parameters:
        if hasattr(p, extension.savefield):
            delattr(p, extension.savefield)
