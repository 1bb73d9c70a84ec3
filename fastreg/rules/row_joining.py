"""Several uses of one matrix ``[V, D]`` joined through their rows, as for an embedding tied to the output layer.

With ``G_k = sum_u sum_{s in k} left_s right_s^T`` over the rows of all uses ``u``:

    ||G_k||^2 = sum_{u,v} <L_u L_v^T, R_u R_v^T>,    half its gradient: dL_u = sum_v (R_u R_v^T) L_v,
                                                                        dR_u = sum_v (L_u L_v^T) R_v

so no ``[m, V, D]`` gradient is stored; an index stands for rows of the identity.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.kernels._checks import accumulator
from fastreg.micro_batches import MicroBatches, Selection
from fastreg.rules.bilinear import MaybeTensor, Rows
from fastreg.session import Session


def prefers_rows(uses: list[Rows], cut: MicroBatches, shape: tuple[int, ...]) -> bool:
    """Counted per row, as for one linear layer: 4 s (V + D) against 6 V D; ``s`` counts the rows of all uses."""
    outputs, inputs = shape
    segment = sum(use.right.shape[0] for use in uses) // cut.samples * cut.size
    return 2 * segment * (inputs + outputs) < 3 * inputs * outputs


class RowJoin(Function):
    """Squared norms ``[m]`` of one parameter from ``left, right`` of each use (flattened in ``factors``)."""

    @staticmethod
    def forward(ctx: Any, session: Session, pick: Selection, exact: bool, *factors: Tensor) -> Tensor:
        factors = tuple(pick.take(factor) for factor in factors)
        ctx.pick = pick
        if exact:
            ctx.save_for_backward(*factors)
        squared = torch.cat([_squared_norms(views) for views in pick.kept.cuts(factors, ())])
        return session.for_probe(pick, squared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, vsq: Tensor) -> tuple[Tensor | None, ...]:
        pick, factors = ctx.pick, ctx.saved_tensors
        pieces = [_half_gradients(views) for views in pick.kept.cuts(factors, ())]
        weights = 2 * pick.take_segments(vsq)
        grads = []
        for i, needed in enumerate(ctx.needs_input_grad[3:]):
            grad = torch.cat([piece[i].flatten(0, 1) for piece in pieces]) if needed else None
            grads.append(pick.put(pick.kept.scale_(grad, weights).to(factors[i].dtype)) if needed else None)
        return None, None, None, *grads


def _squared_norms(views: tuple[Tensor, ...]) -> Tensor:
    lefts, rights = [_in_range(left) for left in views[::2]], _of_one_dtype(views[1::2])
    total: MaybeTensor = None
    for u in range(len(lefts)):
        for v in range(u + 1):
            of_right = rights[u] @ rights[v].mT
            wide = accumulator(of_right.dtype)
            pair = (left_gram(lefts[u], lefts[v], of_right.dtype).to(wide) * of_right).sum((1, 2))
            pair = pair if u == v else 2 * pair
            total = pair if total is None else total + pair
    return total


def _half_gradients(views: tuple[Tensor, ...]) -> list[MaybeTensor]:
    """For each use ``(dL_u or None for an index, dR_u)``, in order."""
    lefts, rights = [_in_range(left) for left in views[::2]], _of_one_dtype(views[1::2])
    grads: list[MaybeTensor] = []
    for left, right in zip(lefts, rights):
        to_right = sum(left_gram(left, other, r.dtype).to(r.dtype) @ r for other, r in zip(lefts, rights))
        to_left = None
        if left.is_floating_point():
            to_left = torch.zeros_like(left)
            for other, r in zip(lefts, rights):
                _add_product(to_left, right @ r.mT, other)
        grads += [to_left, to_right]
    return grads


def _of_one_dtype(rights: tuple[Tensor, ...]) -> list[Tensor]:
    """The right rows of all uses in the widest of their dtypes, which differ under autocast."""
    widest = reduce(torch.promote_types, (right.dtype for right in rights))
    return [_in_range(right.to(widest)) for right in rights]


def _in_range(rows: Tensor) -> Tensor:
    """float16 in float32: the product of two gradients underflows there."""
    return rows.float() if rows.dtype == torch.float16 else rows


def left_gram(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``[m, s, t]``: inner products of left rows, each side ``[m, s, V]`` or an index ``[m, s]``."""
    if a.is_floating_point() and b.is_floating_point():
        return a @ b.mT
    if a.is_floating_point():
        return a.gather(2, b.unsqueeze(1).expand(-1, a.shape[1], -1))
    if b.is_floating_point():
        return left_gram(b, a, dtype).mT
    return (a.unsqueeze(2) == b.unsqueeze(1)).to(dtype)


def _add_product(out: Tensor, gram: Tensor, left: Tensor) -> None:
    """``out [m, s, V] += gram [m, s, t] @ left``."""
    gram = gram.to(out.dtype)
    if left.is_floating_point():
        out.baddbmm_(gram, left)
    else:
        out.scatter_add_(2, left.unsqueeze(1).expand_as(gram), gram)
