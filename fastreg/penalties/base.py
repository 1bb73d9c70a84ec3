"""What a penalty is, and what it computes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.chain import Found, norms_and_gradients, squared_norms
from fastreg.errors import FastregError
from fastreg.kernels import multi_sqnorm
from fastreg.loss import Reduction
from fastreg.micro_batches import MicroBatches
from fastreg.session import Session
from fastreg.weights import Fixed, Weight, check_weight


@dataclass(frozen=True)
class Step:
    """One regularized step, as penalties see it.

    Attributes:
        session: the recorded forward.
        loss: the loss that was passed, scalar or ``[B]``.
        outputs: the model's outputs (logits), or None if they were not passed.
        reduction: how ``loss`` was reduced.
        parameters: those that the gradient of the whole batch is wanted of, in the pass that finds the norms.
    """

    session: Session
    loss: Tensor
    outputs: Tensor | None
    reduction: Reduction
    parameters: tuple[Tensor, ...] = ()

    @cached_property
    def sq_norms(self) -> Tensor:
        """``||g_k||^2``, ``[m]``, differentiable; zero for micro-batches that are not selected."""
        squared = self._first.squared
        return squared * self._described.factors(self.session.micro_batches, squared)

    @cached_property
    def projections(self) -> Tensor:
        """``<u_j, g_k>`` for the session's frame, ``[m, r]``, differentiable."""
        projected = self._first.projected
        assert projected is not None  # the session has a frame
        return projected * self._described.factors(self.session.micro_batches, projected).sqrt().unsqueeze(1)

    @cached_property
    def sq_norm_of_mean(self) -> Tensor:
        """``||grad C||^2``, differentiable, C the mean loss of the batch."""
        return squared_norm(self._first.gradients) / self.total**2

    @property
    def total(self) -> Tensor | float:
        """``r``, with the sum of the loss passed r times C."""
        return self._described.total(self.session.micro_batches, self.loss)

    @property
    def shares(self) -> Tensor:
        """``w_k``, ``[m]``, with ``C = sum_k w_k C_k``; of those selected so that sums are without bias."""
        cut, selected = self.session.micro_batches, self.session.selected
        shares = self._described.shares(cut, self.session.probe)
        return shares if selected is None else shares * (cut.count / len(selected))

    def variance(self) -> Tensor:
        """``sum_k w_k ||g_k - grad C||^2``, differentiable."""
        return self.shares @ self.sq_norms - self.sq_norm_of_mean

    def sq_norms_of(self, total: Tensor, per_sample: int) -> Tensor:
        """As :attr:`sq_norms`, for another loss given as the sum of ``per_sample`` terms of every sample."""
        squared = squared_norms(self.session, total, differentiable=True)
        return squared * Reduction("sum").factors(self.session.micro_batches, squared) / per_sample**2

    def mean(self, per_micro_batch: Tensor) -> Tensor:
        """The mean over the micro-batches that are selected."""
        return per_micro_batch.sum() / self.selected_count

    @property
    def selected_count(self) -> int:
        """How many micro-batches norms are taken of."""
        selected = self.session.selected
        return self.session.micro_batches.count if selected is None else len(selected)

    @cached_property
    def _first(self) -> Found:
        total = self.loss.sum()
        if self.parameters:
            return norms_and_gradients(self.session, total, self.parameters)
        return Found(squared_norms(self.session, total, differentiable=True), None, [])

    @property
    def _described(self) -> Reduction:
        """How the sum of the loss was reduced."""
        return Reduction("sum", self.reduction.scale, self.reduction.counts) if self.loss.dim() else self.reduction


class Penalty(ABC):
    """A term ``weight * R`` of the loss. A subclass is a dataclass with a ``weight`` and a :meth:`value`.

    Attributes:
        weight: the coefficient, at least 0, or a policy of :mod:`fastreg.weights`.
        squares_loss: whether the gradients it squares are those of the loss itself.
        kept: names of attributes that hold tensors of the last step.
    """

    weight: float | Weight
    squares_loss: ClassVar[bool] = False
    kept: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Weight):
            check_weight(type(self).__name__, self.weight)

    @property
    @abstractmethod
    def name(self) -> str:
        """The key of its value in ``reg.metrics``, after ``fastreg/``."""

    @property
    def needs_gradient(self) -> bool:
        """Whether it needs the gradient of the whole batch."""
        return False

    @property
    def centered(self) -> bool:
        """Whether it is a variance about that gradient."""
        return False

    def policy(self, micro_batch_size: int) -> Weight:
        """The weight as a policy.

        Raises:
            FastregError: the policy is not for this penalty.
        """
        if not isinstance(self.weight, Weight):
            return Fixed(self.weight)
        return self.weight.fitted(centered=self.centered, micro_batch_size=micro_batch_size)

    @property
    def eager_next(self) -> bool:
        """Whether values of tensors decide what is done in the next step, which therefore is never a compiled one."""
        return False

    @property
    def constants(self) -> Hashable:
        """Python's values that become constants of a compiled step; other ones make it another graph."""
        return None

    def open(self, session: Session) -> None:
        """Say what is to be recorded besides norms, before a forward."""

    def prepare(self, step: Step) -> None:
        """What the first pass of the step must find ready; called for all penalties before any value."""

    @abstractmethod
    def value(self, step: Step) -> Tensor:
        """``R``, a differentiable scalar."""

    def surrogate(
        self, loss: Tensor, outputs: Tensor | None, reduction: Reduction, cut: MicroBatches, *, again: bool
    ) -> tuple[Tensor, Reduction]:
        """For ``method="perturb"``: the scalar whose micro-batch gradients the penalty squares, and how it is reduced.

        Args:
            loss, outputs: of this pass.
            reduction: of ``loss``.
            cut: of the batch into micro-batches.
            again: whether the pass is at perturbed weights: what was drawn in the first one is kept.

        Raises:
            FastregError: the penalty has none.
        """
        raise FastregError(f"reg: {type(self).__name__} must be computed with method='exact', got 'perturb'")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold to continue bit-identically."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


class Coefficient(NamedTuple):
    """Of a penalty at one step: its weight, and that in units of the rule for it, where there is one."""

    weight: float | Tensor
    rule_ratio: float | Tensor | None


def metrics(
    penalties: Sequence[Penalty], values: Sequence[Tensor], coefficients: Sequence[Coefficient]
) -> dict[str, Tensor]:
    """What is reported of a step: every value, their weighted sum, and the weights that are policies."""
    found = {f"fastreg/{penalty.name}": value.detach() for penalty, value in zip(penalties, values)}
    weighted = (own.weight * value.detach() for own, value in zip(coefficients, values))
    found["fastreg/penalty"] = reduce(torch.add, weighted)
    for penalty, own in zip(penalties, coefficients):
        if isinstance(penalty.weight, Weight):
            found[f"fastreg/{penalty.name}_weight"] = torch.as_tensor(own.weight, dtype=torch.float64)
            if own.rule_ratio is not None:
                found[f"fastreg/{penalty.name}_rule_ratio"] = torch.as_tensor(own.rule_ratio, dtype=torch.float64)
    return found


def squared_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """``sum_p ||g_p||^2`` of the gradients that there are, differentiable once, in one pass over all of them."""
    of_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if gradient is not None:
            of_dtype[gradient.dtype].append(gradient)
    return sum(_SquaredNorm.apply(*same) for same in of_dtype.values())


class _SquaredNorm(Function):
    @staticmethod
    def forward(ctx: Any, *gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return multi_sqnorm([g.contiguous() for g in gradients]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(torch._foreach_mul(ctx.saved_tensors, 2 * v))
