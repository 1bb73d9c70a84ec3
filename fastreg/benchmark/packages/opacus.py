"""Opacus 1.6 (Yousefpour et al. 2021, arXiv:2109.12298): its per-sample norms beside a plain step.

Neither clips nor adds noise here, and the gradient that is left is that of the plain loss: one backward pass suffices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastreg.benchmark.method import Method, no_samples
from fastreg.benchmark.packages.layers import TiedEmbedding, TiedHead, layered
from fastreg.benchmark.peers import Step
from fastreg.benchmark.presets import Problem, mean_cross_entropy

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleModule


def methods() -> Iterator[Method]:
    """Per-sample gradients by hooks, and norms by ghost clipping's rules."""
    one = partial(Method, suites=("norms",), package="opacus", unable=no_samples)
    about = "Opacus GradSampleModule: per-sample gradients by hooks, then their norms"
    yield one("opacus_hooks", "sample_norms", about, hooks)
    about = "the same, averaged over micro-batches before the norm"
    yield one("opacus_micro_norms", "micro_norms", about, micro_norms)
    about = "Opacus GradSampleModuleFastGradientClipping, first backward alone; a tied weight by per-sample gradients"
    yield one("opacus_ghost", "sample_norms", about, ghost)


def hooks(problem: Problem) -> Step:
    """``GradSampleModule``, and norms as ``DPOptimizer`` takes them."""
    return _hooked(problem, lambda grad_sample: grad_sample)


def micro_norms(problem: Problem) -> Step:
    """``GradSampleModule``, and norms of the means over micro-batches."""
    return _hooked(problem, lambda grad_sample: grad_sample.unflatten(0, (problem.micro_batches, -1)).mean(1))


def _hooked(problem: Problem, averaged: Callable[[Tensor], Tensor]) -> Step:
    from opacus.grad_sample import GradSampleModule

    def sq_norms(parameters: list[Any]) -> Tensor:
        norms = [averaged(p.grad_sample).flatten(1).norm(2, dim=-1) for p in parameters]
        return torch.stack(norms, dim=1).norm(2, dim=1).square()

    wrapped = GradSampleModule(_registered(problem.model))
    return _step(problem, wrapped, lambda: sq_norms(list(wrapped.parameters())))


def ghost(problem: Problem) -> Step:
    """``GradSampleModuleFastGradientClipping``; its second backward only clips."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(_registered(problem.model))
    return _step(problem, wrapped, lambda: wrapped.get_norm_sample().square())


def _registered(model: nn.Module) -> nn.Module:
    """The model in layers; those that share a weight have the package's rules for gradients, but none for norms.

    Ghost clipping refuses a weight that its rules for norms meet twice ("Parameter tying is not supported with Ghost
    Clipping"): norms do not add up; per-sample gradients do. A module with parameters of its own and no rule, such as a
    multi-head attention, the package differentiates by ``torch.func``, with all that it contains.
    """
    from opacus.grad_sample import GradSampleModule, register_grad_sampler

    for shared, kind in ((TiedEmbedding, nn.Embedding), (TiedHead, nn.Linear)):
        register_grad_sampler(shared)(GradSampleModule.GRAD_SAMPLERS[kind])
    return layered(model)


def _step(problem: Problem, wrapped: GradSampleModule, read: Callable[[], Tensor]) -> Step:
    found: list[Tensor] = []

    def forget() -> None:
        found.clear()
        wrapped.set_grad_sample_to_none()

    def run() -> None:
        wrapped.zero_grad(set_to_none=True)
        with problem.precision():
            loss = mean_cross_entropy(wrapped(problem.inputs), problem.targets)
        loss.backward()
        found[:] = [read()]

    return Step(problem.model, run, sq_norms=lambda: found[0], forget=forget)
