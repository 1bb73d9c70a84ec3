"""The methods that the experiment compares: a table of what each does, and one method's settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import fastreg
from fastreg.errors import FastregError
from fastreg.optim import LoggedNorm, Magnitude, MicroBatchNorm, UnitNorm

SMALL_BATCH = "small_batch"
LARGE_BATCH = "large_batch"
GRAD_NORM = "grad_norm"
FISHER_TRACE = "fisher_trace"
AVERAGE_JACOBIAN = "average_jacobian"
UNIT_JACOBIAN = "unit_jacobian"
ITERATIVE_GRAFTING = "iterative_grafting"
EXTERNAL_GRAFTING = "external_grafting"
NORMALIZED = "normalized"

# Runs small-batch SGD with the same seed and learning rate; the norms of its steps.
Trace = Callable[[], LoggedNorm]


@dataclass(frozen=True)
class Kind:
    """What a method does to a step of SGD on a large batch.

    Attributes:
        title: the name in tables and plots.
        does: its step in one line.
        penalty: class of the penalty R that is added to the loss, made of its weight.
        magnitude: what gives the gradient its length, made of the model, b and a trace of small-batch norms.
        cuts: whether its passes are cut into micro-batches of b, batch norm's statistics with them.
        matchable: whether the learning rate of small-batch SGD, with weight lr / 4, says something about it.
    """

    title: str
    does: str
    penalty: Callable[..., fastreg.Penalty] | None = None
    magnitude: Callable[[nn.Module, int, Trace], Magnitude] | None = None
    cuts: bool = False
    matchable: bool = True


def _penalty(name: str, penalty: type[fastreg.Penalty], does: str, matchable: bool = True) -> Kind:
    return Kind(f"large batch + {name}", does, penalty=penalty, cuts=True, matchable=matchable)


KINDS: dict[str, Kind] = {
    SMALL_BATCH: Kind("small batch", "w -= lr g_k, batches of b"),
    LARGE_BATCH: Kind("large batch", "w -= lr g, batches of B"),
    GRAD_NORM: _penalty("GradNorm", fastreg.GradNorm, "R_k = ||g_k||^2"),
    FISHER_TRACE: _penalty("FisherTrace", fastreg.FisherTrace, "R_k = ||g_k||^2 at labels that the model draws"),
    AVERAGE_JACOBIAN: _penalty("AverageJacobian", fastreg.AverageJacobian, "R_k = ||J_k^T 1||^2", matchable=False),
    UNIT_JACOBIAN: _penalty("UnitJacobian", fastreg.UnitJacobian, "R_k = ||J_k^T u_k||^2, u_k random", matchable=False),
    ITERATIVE_GRAFTING: Kind(
        "iterative grafting",
        "w -= lr ||g_k|| g / ||g||, k one micro-batch of the step",
        magnitude=lambda model, size, trace: MicroBatchNorm(model, size),
        cuts=True,
    ),
    EXTERNAL_GRAFTING: Kind(
        "external grafting",
        "w -= lr n_t g / ||g||, n_t the norm at step t of small-batch SGD",
        magnitude=lambda model, size, trace: trace(),
    ),
    NORMALIZED: Kind(
        "normalized", "w -= lr g / ||g||", magnitude=lambda model, size, trace: UnitNorm(), matchable=False
    ),
}
TITLES = {name: kind.title for name, kind in KINDS.items()}
PENALISED = tuple(name for name, kind in KINDS.items() if kind.penalty is not None)
# What `fastreg train` compares unless it is told otherwise.
DEFAULT_METHODS = (SMALL_BATCH, LARGE_BATCH, GRAD_NORM, FISHER_TRACE)


@dataclass(frozen=True)
class Method:
    """SGD on small or on large batches, or on large ones with a penalty or with steps of another length.

    A step descends C + weight * R with no momentum, no weight decay and a constant ``lr`` (Novack et al. 2022,
    arXiv:2211.15853): C is the mean loss of the batch, R the mean over its micro-batches of R_k. Grafted steps go along
    the gradient of C, as far as small-batch SGD at ``lr`` goes; normalized ones as far as ``lr``.

    Args:
        name: a key of ``KINDS``, which says what each does.
        lr: learning rate, positive.
        weight: factor of R; positive for the penalised methods and 0 for the others.

    Raises:
        FastregError: unknown name, or ``lr`` or ``weight`` out of range.

    Example:
        >>> Method("grad_norm", lr=0.1, weight=0.025).rule_ratio
        1.0
    """

    name: str
    lr: float
    weight: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise FastregError(f"Method: name must be one of {list(KINDS)}, got {self.name!r}")
        if not self.lr > 0:
            raise FastregError(f"Method: lr of {self.name} must be positive, got {self.lr}")
        if (self.weight > 0) != (self.name in PENALISED):
            expected = "positive" if self.name in PENALISED else "0, as it has no penalty"
            raise FastregError(f"Method: weight of {self.name} must be {expected}, got {self.weight}")

    @property
    def kind(self) -> Kind:
        """What it does."""
        return KINDS[self.name]

    @property
    def title(self) -> str:
        """The name in tables and plots."""
        return self.kind.title

    @property
    def rule_ratio(self) -> float:
        """weight / (lr / 4), for GradNorm 1 where the penalty is the one that SGD at ``lr`` carries implicitly.

        Shuffled SGD follows the gradient flow of C + (lr / 4) mean_k ||g_k||^2 (Smith et al. 2021,
        arXiv:2101.12176, eq. 1).
        """
        return self.weight / (self.lr / 4)

    def samples_per_step(self, batch_size: int, micro_batch_size: int) -> int:
        """A micro-batch for small-batch SGD, otherwise the whole batch."""
        return micro_batch_size if self.name == SMALL_BATCH else batch_size

    def regularizer(self, model: nn.Module, micro_batch_size: int) -> fastreg.Regularizer | None:
        """The penalty attached to ``model``; None for the methods without one."""
        if self.kind.penalty is None:
            return None
        return fastreg.Regularizer(model, self.kind.penalty(weight=self.weight), micro_batch_size=micro_batch_size)

    def magnitude(self, model: nn.Module, micro_batch_size: int, trace: Trace) -> Magnitude | None:
        """What gives the steps their length; None where the gradient keeps its own. ``trace`` runs if it is needed."""
        return None if self.kind.magnitude is None else self.kind.magnitude(model, micro_batch_size, trace)


def matched(methods: tuple[Method, ...]) -> tuple[Method, ...]:
    """Every method at the learning rate of small-batch SGD, penalties at the weight of the rule.

    Nothing is tuned for the large batch: weight = lr / 4 is what small-batch SGD at ``lr`` carries implicitly (Smith et
    al. 2021, arXiv:2101.12176, eq. 1). The rule says nothing about penalties on Jacobians and normalized steps.

    Args:
        methods: one of them is small-batch SGD.

    Returns:
        The same methods with the new settings.

    Raises:
        FastregError: small-batch SGD is missing, or a method that the rule says nothing about is there.

    Example:
        >>> matched((Method("small_batch", lr=0.2), Method("grad_norm", lr=1.0, weight=1.0)))[1]
        Method(name='grad_norm', lr=0.2, weight=0.05)
    """
    names = [method.name for method in methods]
    if SMALL_BATCH not in names:
        raise FastregError(f"matched: methods must contain {SMALL_BATCH}, got {names}")
    unruly = [method.name for method in methods if not method.kind.matchable]
    if unruly:
        known = [name for name, kind in KINDS.items() if kind.matchable]
        raise FastregError(f"matched: methods must be among {known}, got {unruly} (leave them out)")
    lr = methods[names.index(SMALL_BATCH)].lr
    return tuple(Method(name, lr, lr / 4 if name in PENALISED else 0.0) for name in names)
