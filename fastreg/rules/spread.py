"""Gradients of every micro-batch, and products with them, as derivatives by leaves ``[m, *p.shape]``.

A leaf stands for ``m`` copies of a parameter, one per micro-batch; it holds zeros without memory and is never read.
What an operation's backward returns for it is again zeros, in a graph: differentiating that along ``V_k`` is what a
Hessian-vector product with another vector in every micro-batch takes. With ``d`` the gradient of ``y = B(x, w) + b``:

    backward         dx = B^T(d, w)
    double backward  (given vx, V_k, U_k)
        grad_d = B(vx, w) + B(x, V_k) + U_k,  grad_x = B^T(d, V_k),
        and outer(vx, d), over all rows for the parameter, or over those of each micro-batch for its leaf
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.rules.routing import symbol
from fastreg.rules.use import Lineage, Use
from fastreg.session import Phase


class Leaves:
    """One leaf per parameter.

    Args:
        count: m.
        parameters: those that vectors are about.
        apart: whether what follows the double backward is asked for by micro-batch, as gradients of the leaves.

    Attributes:
        of: leaf ``[m, *p.shape]`` by identity of the parameter.
    """

    def __init__(self, count: int, parameters: Sequence[Tensor], apart: bool) -> None:
        self.of = {id(p): p.new_zeros(()).expand(count, *p.shape).requires_grad_() for p in parameters}
        self.apart = apart

    def lifted(self, lineage: Lineage | None) -> Tensor | None:
        """The leaf of a parameter, as the operation meets the parameter; None for what has none."""
        if lineage is None or lineage.key not in self.of:
            return None
        return lineage.lift_each(self.of[lineage.key])

    def enter(self, use: Use, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The operation as a node of the graph."""
        dtype = x.dtype if x.is_floating_point() or weight is None else weight.dtype
        leaves = (self.lifted(lineage) for lineage in (use.weight, use.bias))
        return Spread.apply(use, x, weight, bias, *(None if leaf is None else leaf.to(dtype) for leaf in leaves))


class Spread(Function):
    """``y = op(x, weight, bias)`` with leaves for the parameters beside them."""

    @staticmethod
    def forward(
        ctx: Any, use: Use, x: Tensor, weight: Tensor | None, bias: Tensor | None, *leaves: Tensor | None
    ) -> Tensor:
        ctx.use = use
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, *leaves)
        return use.op.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, ...]:
        if d is None:
            return (None,) * 6
        return None, *SpreadBackward.apply(ctx.use, ctx.needs_input_grad[1], d, *ctx.saved_tensors)


class SpreadBackward(Function):
    """The backward of :class:`Spread`, differentiable once more by hand."""

    @staticmethod
    def forward(
        ctx: Any,
        use: Use,
        needs_x: bool,
        d: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *leaves: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.use = use
        d = use.op.laid_out(d)
        ctx.save_for_backward(d, x, weight, bias, *leaves)
        dx = use.op.transpose(d, weight, x) if needs_x else None
        if use.session.phase is Phase.SYMBOLIC:
            return dx, None, None, *(None if leaf is None else symbol(leaf) for leaf in leaves)
        return dx, *_parameter_gradients(use, x, d, weight, bias, leaves)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, vx: Tensor | None, vw: None, vb: None, weights: Tensor | None, biases: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        use, (d, x, weight, _bias, *leaves) = ctx.use, ctx.saved_tensors
        op, cut = use.op, use.session.micro_batches
        grad_d = grad_x = None
        of_parameters: tuple[Tensor | None, ...] = (None,) * 4
        tangent_alone = use.session.phase is Phase.TANGENT
        if vx is not None:
            vx = op.laid_out(vx)
            grad_d = op.forward(vx, weight, None)
            if not tangent_alone:
                of_parameters = _parameter_gradients(use, vx, d, weight, None, (leaves[0], None))
        if weights is not None:
            pulled = op.dense_pull(x, weights, cut)
            grad_d = pulled if grad_d is None else grad_d + pulled
            grad_x = op.dense_push(d, weights, x, cut) if ctx.needs_input_grad[3] and not tangent_alone else None
        if biases is not None:
            grad_d = op.with_biases(torch.zeros_like(d) if grad_d is None else grad_d, biases, cut)
        return None, None, grad_d, grad_x, *of_parameters


def _parameter_gradients(
    use: Use,
    x: Tensor,
    d: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    leaves: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias and their leaves: of the former or of the latter."""
    op, cut = use.op, use.session.micro_batches
    of_weight, of_bias = leaves[0] is not None, leaves[1] is not None
    assert use.session.leaves is not None
    if use.session.leaves.apart:
        dense = op.dense(x, d, weight, cut) if of_weight else None
        return None, None, dense, op.bias_dense(d, bias, cut) if of_bias else None
    return op.outer(x, d, weight) if of_weight else None, op.bias_total(d, bias) if of_bias else None, None, None
