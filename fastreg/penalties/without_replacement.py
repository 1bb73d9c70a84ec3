"""The eigenvalue-weighted variance that SGD without replacement descends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastreg.chain import symbolic_gradients
from fastreg.curvature.operator import CurvatureOperator
from fastreg.curvature.recurrence import lanczos
from fastreg.curvature.vectors import unflatten
from fastreg.errors import FastregError
from fastreg.hosted import hosted
from fastreg.penalties.base import Penalty, Step
from fastreg.penalties.flat_weight import flat_drift_weight
from fastreg.penalties.targets import Draws
from fastreg.session import Session
from fastreg.weights import Rate, Weight, current


@dataclass(eq=False)
class WithoutReplacement(Penalty):
    r"""The variance of micro-batch gradients, weighted by a function of the Hessian.

        R = sum_k w_k (g_k - g)^T S (g_k - g),      S = 2 phi_2(-eta K H),  phi_2(-c) = (c - 1 + e^-c) / c^2

    with ``w_k = b_k / B`` and ``g = sum_k w_k g_k``. Over an epoch of K steps at learning rate eta, SGD without
    replacement moves, beyond SGD with replacement, as by one more step of size ``eta K`` on ``(eta / 4) R``: the full
    variance along flat directions (S = 1), less along curved ones (S = 2 / c), more along those of negative curvature.
    As ``eta K H -> 0`` it is ``GradNorm(centered=True)``. Along negative curvature S grows like ``e^|c| / c^2``: where
    ``eta K`` times the most negative eigenvalue is far below -1, R is large and as inaccurate as that eigenvalue.

    S is a constant under differentiation, ``grad R = 2 sum_k w_k H_k S (g_k - g)``, in one batched pass. H is that of
    the batch's loss. ``rank`` Lanczos steps, two passes each, give Ritz pairs ``(theta_j, u_j)``; on their span S is
    ``2 phi_2(-eta K theta_j)``, elsewhere 1: exact at rank P, and otherwise as good as "eta K lambda is small" holds
    for eigenvalues that Lanczos has not found, which are those of small magnitude. Memory: ``(rank + m) P`` numbers.

    Args:
        weight: the coefficient of R; ``eta / 4`` is what SGD without replacement carries.
        lr: eta, a number or the optimizer that has it.
        steps: K, of an epoch of the SGD that is stood for; None: the micro-batches of the batch.
        rank: Lanczos steps, at least 1.
        refresh: how many calls the Ritz pairs are kept for, at least 1.
        seed: of the start vector; None takes it from ``torch.initial_seed()``.

    Raises:
        FastregError: an argument is out of range; at the call: ``fraction`` below 1.

    Source: Beneventano 2023, arXiv:2312.16143 (the regularizer); this form of it, for large K, is derived here.

    Example:
        >>> import torch, fastreg
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        >>> penalty = fastreg.WithoutReplacement(weight=0.025, lr=0.1, rank=8, seed=0)
        >>> reg = fastreg.Regularizer(model, penalty, micro_batch_size=2)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> reg(torch.nn.functional.mse_loss(model(x), y)).backward()
    """

    weight: float | Weight
    lr: Rate
    steps: int | None = None
    rank: int = 16
    refresh: int = 1
    seed: int | None = None
    name: ClassVar[str] = "without_replacement"
    squares_loss: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True
    centered: ClassVar[bool] = True
    _ritz: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        current(self.lr)
        for name in ("rank", "refresh", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                if name != "steps" or value is not None:
                    raise FastregError(f"WithoutReplacement: {name} must be an integer >= 1, got {value!r}")
        self._draws, self._calls = Draws(self.seed), 0

    @property
    def eager_next(self) -> bool:
        # It finds Ritz pairs then; how often a vector is made orthogonal is decided by values.
        return self._ritz is None or self._calls % self.refresh == 0

    def _count(self) -> None:
        self._calls += 1

    def open(self, session: Session) -> None:
        if session.frame is not None:
            raise FastregError("WithoutReplacement: must be the only one of its Regularizer, got a second")
        session.project(self.rank)

    def prepare(self, step: Step) -> None:
        if step.session.selected is not None:
            raise FastregError("WithoutReplacement: fraction must be 1, got less (its mean is over all micro-batches)")
        refreshes = self.eager_next
        hosted(self._count)
        self._ritz = _ritz_pairs(step, self.rank, self._draws) if refreshes else hosted(lambda: self._ritz)
        named = {str(i): p for i, p in enumerate(step.parameters)}
        parts = unflatten(self._pairs[1].to(step.session.probe.dtype), named).values()
        assert step.session.frame is not None  # made in open()
        step.session.frame.vectors = {id(p): part for p, part in zip(step.parameters, parts, strict=True)}

    @property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        """The Ritz values and vectors in use."""
        assert self._ritz is not None
        return self._ritz

    def value(self, step: Step) -> Tensor:
        count = step.session.micro_batches.count if self.steps is None else self.steps
        excess = 2 * flat_drift_weight(hosted(lambda: current(self.lr)) * count * self._pairs[0]) - 1
        centred = step.projections - step.shares @ step.projections
        return step.variance() + step.shares @ centred.square() @ excess.to(centred)

    def state_dict(self) -> dict[str, Any]:
        return {**self._draws.state_dict(), "calls": self._calls, "ritz": self._ritz}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.load_state_dict(state)
        self._calls, self._ritz = state["calls"], state["ritz"]


class _BatchHessian(CurvatureOperator):
    """H of the mean loss of a recorded batch; its graph stays."""

    def __init__(self, step: Step) -> None:
        super().__init__({str(i): p for i, p in enumerate(step.parameters)})
        self._by, self._total = step.parameters, step.total
        self._gradients = symbolic_gradients(step.session, step.loss.sum(), step.parameters)

    def apply(self, rows: Tensor) -> Tensor:
        return torch.stack([self._product(row) for row in rows]) / self._total

    def _product(self, row: Tensor) -> Tensor:
        vectors = unflatten(row, self.parameters).values()
        pairs = [(g, v) for g, v in zip(self._gradients, vectors, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(row)
        outputs, along = zip(*((g, v.to(g.dtype)) for g, v in pairs), strict=True)
        found = torch.autograd.grad(outputs, self._by, along, retain_graph=True, allow_unused=True)
        return _flat(found, self._by).to(row.dtype)


def _flat(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, like, strict=True)])


def _ritz_pairs(step: Step, rank: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """Ritz values ``[rank]`` and vectors ``[rank, P]``; beyond P of them, zero vectors."""
    operator = _BatchHessian(step)
    start = draws.normal(1, operator.size).to(operator.device, operator.dtype)
    found = lanczos(operator, start, rank, torch.Generator().manual_seed(draws.seed))
    values, mixing = found.ritz()
    vectors = mixing[0].T.to(found.basis.dtype) @ found.basis[:, 0]
    missing = rank - len(vectors)
    return torch.nn.functional.pad(values[0], (0, missing)), torch.nn.functional.pad(vectors, (0, 0, 0, missing))
