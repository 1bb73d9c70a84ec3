"""Steps that trade time for memory, block by block."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fastreg
from fastreg.benchmark import penalties
from fastreg.benchmark.peers import Step, plain
from fastreg.benchmark.presets import Problem, mean_cross_entropy

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
    fastreg.checkpoint_blocks(_container(problem).children())
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


def _loss(problem: Problem) -> Tensor:
    with problem.precision():
        return mean_cross_entropy(problem.model(problem.inputs), problem.targets)


def _checkpointed(problem: Problem) -> Problem:
    made_of = _container(problem)
    for name, block in list(made_of.named_children()):
        setattr(made_of, name, checkpoint_wrapper(block))
    return problem


def _container(problem: Problem) -> nn.Module:
    """What holds the model's blocks: its ``blocks``, or else itself."""
    return getattr(problem.model, "blocks", problem.model)
