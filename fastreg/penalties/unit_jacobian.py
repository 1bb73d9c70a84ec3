"""The unit-Jacobian penalty."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastreg.errors import FastregError
from fastreg.hosted import hosted
from fastreg.loss import Reduction
from fastreg.micro_batches import MicroBatches
from fastreg.penalties.base import Step
from fastreg.penalties.targets import Draws, TargetPenalty, predictions
from fastreg.weights import Weight


@dataclass(eq=False)
class UnitJacobian(TargetPenalty):
    """The squared norm of the gradient of the outputs along random unit vectors.

        R = (1/m) sum_k (1/n) sum_j ||J_k^T u_kj||^2,      J_k = (1/b) sum_{i in k} d outputs_i / dw  [C, P]

    ``u_kj`` are uniform on the unit sphere of R^C, fresh in every micro-batch and step. Over the draw
    ``E R = (1/m) sum_k ||J_k||_F^2 / C``; with ``orthogonal`` the n vectors of a micro-batch are orthonormal, which
    takes variance, and at ``n = C`` all of it: R is then that mean itself. Value and gradient of the draw are exact;
    every direction is a first pass of its own. In models linear in their parameters the expectation is a constant.

    Source: Novack, Kaur, Marwah, Garg, Lipton 2022, arXiv:2211.15853, section 3 and its code (one direction).

    Args:
        weight: the coefficient of R, a number or a policy of :mod:`fastreg.weights`.
        directions: n, at least 1; at most C if orthogonal.
        orthogonal: whether directions of one micro-batch are orthogonal.
        seed: of the directions; None takes it from ``torch.initial_seed()`` at the first draw. They are a function of
            the seed and the number of draws so far.
        class_dim: as for :class:`fastreg.AverageJacobian`.

    Raises:
        FastregError: an argument is out of range; at the call: ``outputs`` were not passed, or are not floating point
            ``[B, ..., C]``, or more orthogonal directions than classes.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
        >>> reg = fastreg.Regularizer(model, fastreg.UnitJacobian(weight=0.001, seed=0), micro_batch_size=2)
        >>> out = model(torch.randn(8, 3))
        >>> reg(torch.nn.functional.cross_entropy(out, torch.randint(4, (8,))), out).backward()
    """

    weight: float | Weight
    directions: int = 1
    orthogonal: bool = False
    seed: int | None = None
    class_dim: int = -1
    last_directions: Tensor | None = field(default=None, init=False, repr=False)
    name: ClassVar[str] = "unit_jacobian"
    kept: ClassVar[tuple[str, ...]] = ("last_directions",)

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.directions
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise FastregError(f"UnitJacobian: directions must be an integer >= 1, got {count!r}")
        self._draws = Draws(self.seed)

    def value(self, step: Step) -> Tensor:
        cut, logits = step.session.micro_batches, self.logits(step.outputs)
        self._draw(logits, cut)
        totals = (self._along(logits, cut, j) for j in range(self.directions))
        each = predictions(logits, cut)
        return reduce(torch.add, (step.mean(step.sq_norms_of(total, each)) for total in totals)) / self.directions

    def surrogate(
        self, loss: Tensor, outputs: Tensor | None, reduction: Reduction, cut: MicroBatches, *, again: bool
    ) -> tuple[Tensor, Reduction]:
        if self.directions > 1:
            raise FastregError(f"UnitJacobian: directions must be 1 with method='perturb', got {self.directions}")
        return super().surrogate(loss, outputs, reduction, cut, again=again)

    def target(self, logits: Tensor, cut: MicroBatches, *, again: bool) -> Tensor:
        if not again:
            self._draw(logits, cut)
        return self._along(logits, cut, 0)

    def _draw(self, logits: Tensor, cut: MicroBatches) -> None:
        """``[m, n, C]`` unit vectors."""
        classes = logits.shape[-1]
        if self.orthogonal and self.directions > classes:
            raise FastregError(
                f"UnitJacobian: directions must be at most the number of classes, {classes}, to be orthogonal, got "
                f"{self.directions}"
            )
        shape, dtype, device = (cut.count, self.directions, classes), logits.dtype, logits.device
        self.last_directions = hosted(lambda: self._directions(*shape).to(device, dtype))

    def _directions(self, *shape: int) -> Tensor:
        drawn = self._draws.normal(*shape)
        if self.orthogonal:
            # Columns of a Gaussian matrix's Q are uniform up to signs, which a square does not see.
            return torch.linalg.qr(drawn.mT)[0].mT
        return drawn / drawn.norm(dim=-1, keepdim=True)

    def _along(self, logits: Tensor, cut: MicroBatches, j: int) -> Tensor:
        """``sum_i u_k(i)j . outputs_i``."""
        sums = cut.reduce(logits.flatten(0, -2), logits.shape[-1:])
        assert self.last_directions is not None
        return torch.linalg.vecdot(sums, self.last_directions[:, j]).sum()

    def state_dict(self) -> dict[str, Any]:
        return self._draws.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.load_state_dict(state)
