"""What a penalty is, and what it computes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from fastreg.chain import squared_norms
from fastreg.errors import FastregError
from fastreg.loss import Reduction
from fastreg.session import Session


@dataclass(frozen=True)
class Step:
    """One regularized step, as penalties see it.

    Attributes:
        session: the recorded forward.
        loss: the loss that was passed, scalar or ``[B]``.
        outputs: the model's outputs (logits), or None if they were not passed.
        reduction: how ``loss`` was reduced.
    """

    session: Session
    loss: Tensor
    outputs: Tensor | None
    reduction: Reduction

    @cached_property
    def sq_norms(self) -> Tensor:
        """``||g_k||^2``, ``[m]``, differentiable; zero for micro-batches that are not selected."""
        total = self.loss.sum()
        reduction = Reduction("sum", self.reduction.scale, self.reduction.counts) if self.loss.dim() else self.reduction
        squared = squared_norms(self.session, total, differentiable=True)
        return squared * reduction.factors(self.session.micro_batches, squared)

    def sq_norms_of(self, total: Tensor, per_sample: int) -> Tensor:
        """As :attr:`sq_norms`, for another loss given as the sum of ``per_sample`` terms of every sample."""
        squared = squared_norms(self.session, total, differentiable=True)
        return squared * Reduction("sum").factors(self.session.micro_batches, squared) / per_sample**2

    def mean(self, per_micro_batch: Tensor) -> Tensor:
        """The mean over the micro-batches that are selected."""
        selected = self.session.selected
        return per_micro_batch.sum() / (self.session.micro_batches.count if selected is None else len(selected))


class Penalty(ABC):
    """A term ``weight * R`` of the loss. A subclass is a dataclass with a ``weight`` and a :meth:`value`.

    Attributes:
        weight: the coefficient; at least 0.
        name: the key of its value in ``reg.metrics``, after ``fastreg/``.
        squares_loss: whether the gradients it squares are those of the loss itself.
    """

    weight: float
    name: str
    squares_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number = isinstance(self.weight, (int, float)) and not isinstance(self.weight, bool)
        if not number or not 0 <= self.weight < float("inf"):
            raise FastregError(f"{type(self).__name__}: weight must be a number >= 0, got {self.weight!r}")

    @abstractmethod
    def value(self, step: Step) -> Tensor:
        """``R``, a differentiable scalar."""

    def surrogate(
        self, loss: Tensor, outputs: Tensor | None, reduction: Reduction, *, again: bool
    ) -> tuple[Tensor, Reduction]:
        """For ``method="perturb"``: the scalar whose micro-batch gradients the penalty squares, and how it is reduced.

        Args:
            loss, outputs: of this pass.
            reduction: of ``loss``.
            again: whether the pass is at perturbed weights: what was drawn in the first one is kept.

        Raises:
            FastregError: the penalty has none.
        """
        raise FastregError(f"reg: {type(self).__name__} must be computed with method='exact', got 'perturb'")

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint must hold to continue bit-identically."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Restore :meth:`state_dict`."""
