"""Steps that trade time for memory, for models made of ``blocks``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

import fastreg
from fastreg.benchmark import penalties
from fastreg.benchmark.peers import Step, plain
from fastreg.benchmark.presets import Problem, mean_cross_entropy
from fastreg.errors import FastregError

# Relative error of central differences in float64, with room: 4e-8 was seen on the small GPT.
TRUNCATION = 1e-6


def plain_checkpointed(problem: Problem) -> Step:
    """The plain step whose blocks keep their inputs alone."""
    return plain(_checkpointed(problem))


def exact_checkpointed(problem: Problem) -> Step:
    """The gradient-norm penalty on such blocks."""
    return penalties.exact(_checkpointed(problem))


def exact_recomputed(problem: Problem) -> Step:
    """The gradient-norm penalty on blocks whose first backward is run again too."""
    fastreg.checkpoint_blocks(_blocks(problem))
    return penalties.exact(problem)


def perturbed(problem: Problem) -> Step:
    """The gradient-norm penalty by central differences."""
    penalty = fastreg.GradNorm(problem.weight)
    reg = fastreg.Regularizer(
        problem.model, penalty, micro_batch_size=problem.micro_batch_size, method="perturb", difference="central"
    )

    def run() -> None:
        problem.model.zero_grad(set_to_none=True)
        reg(partial(_loss, problem)).backward()

    return Step(problem.model, run)


def _loss(problem: Problem) -> object:
    with problem.precision():
        return mean_cross_entropy(problem.model(problem.inputs), problem.targets)


def _checkpointed(problem: Problem) -> Problem:
    for block in _blocks(problem):
        block.forward = _again(block.forward)
    return problem


def _again(forward: Callable) -> Callable:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def _blocks(problem: Problem) -> nn.Sequential | nn.ModuleList:
    blocks = getattr(problem.model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise FastregError(f"bench: the model must have blocks to run again, got {type(problem.model).__name__}")
    return blocks
