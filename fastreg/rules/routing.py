"""The autograd functions behind every routed operation.

``Routed`` is the operation; its backward is itself a function with a hand-written backward, which is what makes the
exact penalty one batched pass. With ``d`` the gradient of the loss with respect to ``y = B(x, w) + b``:

    backward         dx = B^T(d, w),  dw = outer(x, d),  db = sum d,  sq_k = ||outer(x_k, d_k)||^2
    double backward  (given vx, vw, vb, vsq)
        grad_d = B(vx, w) + B(x, vw) + vb + 2 vsq_k B(x, G_k)
        grad_x = B^T(d, vw) + 2 vsq_k B^T(d, G_k)
        grad_w = outer(vx, d)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.micro_batches import Selection
from fastreg.rules.bilinear import Bilinear, MaybeTensor, Parts
from fastreg.rules.joining import Deposit
from fastreg.rules.perturbation import keep_direction
from fastreg.rules.use import Use
from fastreg.session import Phase

# The overload: looking it up by name takes longer than the call.
_SAME = torch.ops.aten._unsafe_view.default


class Wanted(NamedTuple):
    """What one call of ``RoutedBackward`` computes."""

    dx: bool
    dw: bool
    db: bool
    norms: Parts
    exact: bool


class Routed(Function):
    """``y = op(x, weight, bias)`` whose backward returns squared micro-batch norms as the gradient of the probe."""

    @staticmethod
    def forward(ctx: Any, use: Use, x: Tensor, weight: Tensor | None, bias: Tensor | None, probe: Tensor) -> Tensor:
        ctx.use = use
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias)
        return use.op.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, ...]:
        if d is None:
            return (None,) * 5
        use, (x, weight, bias) = ctx.use, ctx.saved_tensors
        wanted = wanted_by(ctx, use, ctx.needs_input_grad)
        if takes_norms(ctx, use):
            deposit_shared(use, x, d, weight, bias)
        if wanted.exact:
            return None, *RoutedBackward.apply(use, wanted, d, x, weight, bias)
        # What is not differentiated again needs no node.
        return None, *_backward(use, wanted, d, x, weight, bias)[0]


class Tap(Function):
    """The identity on an operation's output; the gradient passes as it is, and squared norms are taken from it.

    Outputs and gradients are then those of torch's own operation, bit for bit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        use: Use,
        before: Callable[[Tensor], Tensor] | None,
        y: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        probe: Tensor,
    ) -> Tensor:
        ctx.use, ctx.before = use, before
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias)
        # Not a view, which an operation in place on the output would not be allowed to change.
        return _SAME(y, y.shape)

    @staticmethod
    def backward(ctx: Any, d: Tensor | None) -> tuple[Tensor | None, ...]:
        squared = None
        if d is not None and takes_norms(ctx, ctx.use):
            with torch.no_grad():
                squared = _tapped(ctx.use, ctx.before, d, *ctx.saved_tensors)
        return None, None, d, None, None, None, squared


def _tapped(
    use: Use,
    before: Callable[[Tensor], Tensor] | None,
    d: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """Squared norms of the micro-batches selected; parts of parameters with other uses are left with the session."""
    norms = Parts(use.alone(use.weight), use.alone(use.bias))
    if use.shared:
        deposit_shared(use, x if before is None else before(x), d, weight, bias)
    if not any(norms):
        return None
    pick = use.session.pick(norms_alone=True)
    x = pick.take(x)
    x = x if before is None else before(x)
    return _norms_beside(use, norms, x, use.op.laid_out(pick.take(d)), weight, bias, pick)


def _norms_beside(
    use: Use, norms: Parts, x: Tensor, d: Tensor, weight: Tensor | None, bias: Tensor | None, pick: Selection
) -> Tensor:
    """Squared norms of the micro-batches picked, for the probe, noted for each parameter if asked for."""
    session = use.session
    if session.per_parameter is None:
        return session.for_probe(pick, use.op.norms(x, d, weight, bias, norms, pick.kept))
    total: MaybeTensor = None
    for lineage, part in ((use.weight, Parts(norms.weight, False)), (use.bias, Parts(False, norms.bias))):
        if lineage is not None and any(part):
            squared = session.for_probe(pick, use.op.norms(x, d, weight, bias, part, pick.kept))
            session.add_norms(lineage.key, squared)
            total = squared if total is None else total + squared
    return total


def takes_norms(ctx: Any, use: Use) -> bool:
    """Whether this pass computes squared norms; one that does not end at the probe (input gradients, say) must not."""
    return use.session.phase.takes_norms and torch._C._will_engine_execute_node(ctx.next_functions[-1][0])


def wanted_by(ctx: Any, use: Use, needs: tuple[bool, ...]) -> Wanted:
    """What the session's phase asks of one use; ``needs`` is the operation's ``ctx.needs_input_grad``."""
    parameters = use.session.forms_gradients
    norms = Parts(False, False)
    if takes_norms(ctx, use):
        norms = Parts(use.alone(use.weight), use.alone(use.bias))
    return Wanted(needs[1], needs[2] and parameters, needs[3] and parameters, norms, torch.is_grad_enabled())


def deposit_shared(use: Use, x: Tensor, d: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Leave what the root needs for parameters that this use does not make up alone."""
    for lineage, parameter, is_bias in ((use.weight, weight, False), (use.bias, bias, True)):
        if lineage is not None and parameter is not None and not use.alone(lineage):
            use.session.shared.append(Deposit(use, lineage, parameter.detach(), is_bias, x, d))


class RoutedBackward(Function):
    """The backward of :class:`Routed`, differentiable once more by hand."""

    @staticmethod
    def forward(
        ctx: Any, use: Use, wanted: Wanted, d: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.use, ctx.wanted, ctx.pick = use, wanted, use.session.pick()
        found, kept = _backward(use, wanted, d, x, weight, bias)
        ctx.save_for_backward(*kept)
        return found

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None, vsq: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        d, x, weight, tangent, memo = ctx.saved_tensors
        op, pick = ctx.use.op, ctx.pick
        needs_d, needs_x, needs_w = ctx.needs_input_grad[2:5]
        if ctx.use.session.phase is Phase.TANGENT:
            needs_x = needs_w = False
        grad_d = grad_x = grad_w = None
        if vx is not None:
            vx = op.laid_out(pick.take(vx))
            grad_d = op.forward(vx, weight, None) if needs_d else None
            grad_w = op.outer(vx, d, weight) if needs_w else None
        if vsq is not None and any(ctx.wanted.norms):
            factors = 2 * pick.take_segments(vsq)
            if needs_d:
                grad_d = op.scaled_pull(grad_d, x, tangent, memo, factors, pick.kept)
            if needs_x and ctx.wanted.norms.weight:
                grad_x = op.scaled_push(x, d, memo, factors, pick.kept)
        if vw is not None:
            grad_d = op.forward_onto(grad_d, x, vw) if needs_d else None
            grad_x = _plus(grad_x, op.transpose(d, vw, x)) if needs_x else None
        if vb is not None and needs_d:
            grad_d = _plus(grad_d, vb.reshape(op.bias_view(vb, d)).expand_as(d))
        return None, None, pick.put(grad_d), pick.put(grad_x), grad_w, None


def _backward(
    use: Use, wanted: Wanted, d: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """``(dx, dw, db, squared norms)``, and ``(d, x, weight, tangent, memo)`` to differentiate them by."""
    session, op, norms, pick = use.session, use.op, wanted.norms, use.session.pick()
    d, x = op.laid_out(pick.take(d)), pick.take(x)
    dx = pick.put(op.transpose(d, weight, x)) if wanted.dx else None
    dw = db = squared = tangent = memo = None
    if session.phase is Phase.DIRECTIONS and any(norms):
        squared = keep_direction(use, norms, x.detach(), d, weight, bias)
    elif session.phase is Phase.STATISTICS and any(norms) and not wanted.exact:
        dw, db, squared = op.with_norms(x, d, weight, bias, norms, pick.kept)
    elif any(norms):
        squared, tangent, memo = _norms(op, wanted, d, x, weight, bias, pick)
    symbolic = session.phase is Phase.SYMBOLIC
    if wanted.dw and dw is None:
        dw = symbol(weight) if symbolic else op.outer(x, d, weight)
    if wanted.db and db is None:
        db = symbol(bias) if symbolic else op.bias_total(d, bias)
    if session.per_parameter is not None:
        _note_each(use, norms, d, x, weight, bias, pick)
    squared = None if squared is None else session.for_probe(pick, squared)
    return (dx, dw, db, squared), (d, x, weight, tangent, memo)


def _norms(
    op: Bilinear, wanted: Wanted, d: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, pick: Selection
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Squared norms and, when they will be differentiated, what their double backward needs."""
    if wanted.exact:
        return op.pull(x, d, weight, bias, wanted.norms, pick.kept)
    return op.norms(x, d, weight, bias, wanted.norms, pick.kept), None, None


def _note_each(
    use: Use, norms: Parts, d: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, pick: Selection
) -> None:
    """Squared norms of each parameter by itself; the forms above may merge a weight and its bias."""
    for lineage, part, asked in (
        (use.weight, Parts(True, False), norms.weight),
        (use.bias, Parts(False, True), norms.bias),
    ):
        if lineage is not None and asked:
            squared = use.op.norms(x, d, weight, bias, part, pick.kept)
            use.session.add_norms(lineage.key, use.session.for_probe(pick, squared))


def symbol(parameter: MaybeTensor) -> Tensor:
    """Zeros without memory that stand for a gradient, of which only derivatives are asked for."""
    return parameter.new_zeros(()).expand(parameter.shape)


def _plus(known: Tensor | None, term: Tensor) -> Tensor:
    return term if known is None else known + term
