"""Parameters used several times: one gradient per micro-batch, the sum over uses.

Every use leaves its rows (``x``, ``d``) with the session; the root, whose backward runs after all of them, forms
``G_k = sum_u lift_u^T outer(x_u, d_u)_k`` and from it the squared norm and its double backward. This is also the way
of a parameter that reaches its operation through a map that is not isometric (a gather, say).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.micro_batches import MicroBatches, Selection, aligned
from fastreg.rules.bilinear import Rows, sum_squares
from fastreg.rules.row_joining import RowJoin, prefers_rows
from fastreg.rules.use import Lineage, Use
from fastreg.session import Phase, Session


@dataclass(frozen=True, slots=True)
class Deposit:
    """The rows of one use of a parameter that has other uses.

    Attributes:
        derived: the tensor the operation took, computed from the parameter by ``lineage.lift``.
        is_bias: whether it was the operation's bias.
    """

    use: Use
    lineage: Lineage
    derived: Tensor
    is_bias: bool
    x: Tensor
    d: Tensor

    def gradients(self, x: Tensor, d: Tensor, cut: MicroBatches) -> Tensor:
        """This use's share of the parameter's gradients: ``[m, *parameter.shape]``."""
        op = self.use.op
        share = op.bias_dense(d, self.derived, cut) if self.is_bias else op.dense(x, d, self.derived, cut)
        return self.lineage.transpose_lift(share)

    def rows(self) -> Rows | None:
        """The row form of this use, if the operation took the parameter itself, as its weight, and has one."""
        if self.is_bias or self.lineage.lift is not None:
            return None
        return self.use.op.rows(self.x, self.d)

    def pull(self, x: Tensor, d: Tensor, gradients: Tensor, cut: MicroBatches) -> Tensor:
        """``B(x, G_k)`` for the whole gradients ``[m, *parameter.shape]``."""
        lifted = self._lifted(gradients, d)
        if self.is_bias:
            return self.use.op.bias_pull(d, self.derived, lifted, cut)
        return self.use.op.dense_pull(x, lifted, cut)

    def push(self, x: Tensor, d: Tensor, gradients: Tensor, cut: MicroBatches) -> Tensor:
        """``B^T(d, G_k)`` for the whole gradients."""
        return self.use.op.dense_push(d, self._lifted(gradients, d), x, cut)

    def _lifted(self, gradients: Tensor, d: Tensor) -> Tensor:
        """The gradients as this use takes the parameter; under autocast uses differ in dtype."""
        return self.lineage.lift_each(gradients).to(d.dtype)


class Root(Function):
    """The identity on the probe; its backward adds what is known of parameters that were used several times.

    With a frame all parameters come this way, and their projections are the gradient of the frame's probe.
    """

    @staticmethod
    def forward(ctx: Any, session: Session, probe: Tensor, frame_probe: Tensor | None) -> Tensor:
        ctx.session = session
        ctx.set_materialize_grads(False)
        return probe.view_as(probe)

    @staticmethod
    def backward(ctx: Any, squared: Tensor | None) -> tuple[Tensor | None, ...]:
        by_parameter: dict[int, list[Deposit]] = defaultdict(list)
        for deposit in ctx.session.shared:
            by_parameter[deposit.lineage.key].append(deposit)
        ctx.session.shared.clear()
        projected = None
        for key, deposits in by_parameter.items():
            joined, along = _joined(ctx.session, deposits)
            ctx.session.add_norms(key, joined.detach())
            squared, projected = _plus(squared, joined), _plus(projected, along)
        return None, squared, projected


def _joined(session: Session, deposits: list[Deposit]) -> tuple[Tensor, Tensor | None]:
    """Squared norms ``[m]`` of one parameter, by the cheaper of its two forms, and products with the frame."""
    pick = session.pick(norms_alone=True)
    exact = torch.is_grad_enabled()
    rows = tuple(t for deposit in deposits for t in (deposit.x, deposit.d))
    if session.frame is not None:
        vectors = session.frame.vectors.get(deposits[0].lineage.key)
        return Join.apply(session, pick, deposits, exact, vectors, *rows)
    factors = [deposit.rows() for deposit in deposits]
    known = [one for one in factors if one is not None]
    by_rows = session.phase is not Phase.DIRECTIONS and len(known) == len(factors)
    if by_rows and prefers_rows(known, pick.whole, deposits[0].derived.shape):
        return RowJoin.apply(session, pick, exact, *(t for use in known for t in (use.left, use.right))), None
    return Join.apply(session, pick, deposits, exact, None, *rows)


class Join(Function):
    """Squared norms ``[m]`` of one parameter from its dense gradients ``[m, *shape]``, summed over uses.

    Given ``vectors [r, *shape]``, their products with them too, ``[m, r]``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        session: Session,
        pick: Selection,
        deposits: list[Deposit],
        exact: bool,
        vectors: Tensor | None,
        *rows: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.pick = pick
        ctx.set_materialize_grads(False)
        rows = tuple(pick.take(tensor) for tensor in rows)
        uses = list(zip(deposits, rows[::2], rows[1::2]))
        gradients = uses[0][0].gradients(*uses[0][1:], pick.kept)
        for deposit, x, d in uses[1:]:
            gradients = gradients + deposit.gradients(x, d, pick.kept)
        ctx.deposits = deposits
        if session.phase is Phase.DIRECTIONS:
            assert session.directions is not None
            squared = session.directions.keep_joined(deposits[0].lineage, gradients)
            return squared.to(session.probe.dtype), None
        if exact:
            ctx.save_for_backward(gradients, vectors, *rows)
        squared = session.for_probe(pick, sum_squares(gradients))
        if vectors is None:
            return squared, None
        return squared, gradients.flatten(1).to(vectors.dtype) @ vectors.flatten(1).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vsq: Tensor | None, along: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, vectors, *rows = ctx.saved_tensors
        pick, needs = ctx.pick, ctx.needs_input_grad[5:]
        factors = None if vsq is None else 2 * pick.take_segments(vsq)
        if along is not None:
            gradients, factors = _combined(gradients, factors, along, vectors), None
        grads: list[Tensor | None] = [None] * 5
        for i, (deposit, x, d) in enumerate(zip(ctx.deposits, rows[::2], rows[1::2])):
            grad_x = grad_d = None
            if needs[2 * i] and not deposit.is_bias:
                grad_x = deposit.push(x, d, gradients, pick.kept)
                grad_x = pick.put(grad_x if factors is None else pick.kept.scale_(grad_x, factors))
            if needs[2 * i + 1]:
                grad_d = deposit.pull(x, d, gradients, pick.kept)
                grad_d = pick.put(grad_d if factors is None else pick.kept.scaled(grad_d, factors))
            grads += [grad_x, grad_d]
        return tuple(grads)


def _combined(gradients: Tensor, factors: Tensor | None, along: Tensor, vectors: Tensor) -> Tensor:
    """``factors_k G_k + sum_j along_kj vectors_j``."""
    combined = (along @ vectors.flatten(1)).view(gradients.shape).to(gradients.dtype)
    if factors is None:
        return combined
    return combined.addcmul_(gradients, aligned(factors, gradients))


def _plus(known: Tensor | None, term: Tensor | None) -> Tensor | None:
    return term if known is None else known if term is None else known + term
