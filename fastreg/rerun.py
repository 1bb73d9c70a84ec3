"""The autograd functions of a block that is run again: in its backward, and in the backward of that.

``Rerun`` runs the block and keeps its inputs. Its backward is a function too, ``RerunBackward``, which runs the block
again with a graph, takes what is asked for from that graph, and keeps inputs and output gradients. The double backward
runs block and backward again, now differentiably, and differentiates once more. With ``y = f(x, w)``:

    backward         dx = (df/dx)^T d,  dw = (df/dw)^T d,  sq_k and, for parameters with other uses, the rows of G_k
    double backward  (given cotangents v of these)  grad by d, x, w of <v, backward(d, x, w)>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from fastreg.errors import FastregError
from fastreg.repeatable import Call, Ran
from fastreg.session import Phase, Session


class Asked(NamedTuple):
    """What one backward pass takes from a call.

    Attributes:
        session: the part of the pass that belongs to the call, or None.
        wanted: of which of its arguments and parameters gradients are wanted.
        norms: whether squared norms are.
    """

    call: Call
    session: Session | None
    wanted: tuple[bool, ...]
    norms: bool

    def take(
        self, d: Sequence[Tensor | None], ran: Ran, session: Session | None, differentiable: bool
    ) -> list[Tensor | None]:
        """Squared norms, gradients, and the rows of parameters that the call does not make up alone."""
        leaves = [*ran.leaves, *self.call.parameters]
        by = [leaf for leaf, wanted in zip(leaves, self.wanted, strict=True) if wanted]
        if self.norms:
            assert session is not None
            by = [session.probe, *by]
        found = iter(_gradients(self.call.parameters, ran.outputs, d, by, differentiable))
        squared = next(found) if self.norms else None
        gradients = [next(found) if wanted else None for wanted in self.wanted]
        shared = [] if session is None else session.shared
        return [squared, *gradients, *(t for deposit in shared for t in (deposit.x, deposit.d))]

    def leave(self, rows: Sequence[Tensor]) -> None:
        """Leave with the session of the forward what its root needs, as this pass has it."""
        if self.session is not None and self.call.session is not None:
            for deposit, x, d in zip(self.session.shared, rows[::2], rows[1::2], strict=True):
                self.call.session.shared.append(replace(deposit, x=x, d=d))
            # They lead to the graph of this run.
            self.session.shared.clear()


class Rerun(Function):
    """The outputs of a block, which is run again in the backward."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> tuple[Tensor, ...]:
        ctx.call, ctx.derived = call, call.derived
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:-1])
        with saved_tensors_hooks(_forget, _refuse):
            ran = call.run(tensors, call.session)
        call.refuse_captured(ran)
        outputs = tuple(out.detach() for out in ran.outputs)
        ctx.mark_non_differentiable(*(out for out, own in zip(outputs, ran.outputs) if not own.requires_grad))
        return outputs

    @staticmethod
    def backward(ctx: Any, *d: Tensor | None) -> tuple[Tensor | None, ...]:
        asked, tensors = _asked(ctx), ctx.saved_tensors
        squared, *found = RerunBackward.apply(asked, len(d), *d, *tensors)
        asked.leave(found[len(tensors) :])
        return None, *found[: len(tensors)], squared


class RerunBackward(Function):
    """The backward of :class:`Rerun`; its own runs block and backward once more."""

    @staticmethod
    def forward(ctx: Any, asked: Asked, outputs: int, *tensors: Any) -> tuple[Tensor | None, ...]:
        ctx.asked, ctx.outputs = asked, outputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ran = asked.call.again(tensors[outputs:], asked.session)
        found = asked.take(tensors[:outputs], ran, asked.session, differentiable=False)
        if asked.session is not None and asked.session.consumed and asked.call.session is not None:
            asked.call.session.consumed = True
        return tuple(None if one is None else one.detach() for one in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *v: Tensor | None) -> tuple[Tensor | None, ...]:
        asked, saved, call = ctx.asked, ctx.saved_tensors, ctx.asked.call
        d = [None if one is None else one.detach().requires_grad_() for one in saved[: ctx.outputs]]
        session = None if asked.session is None else asked.session.part()
        needed = ctx.needs_input_grad[2:]
        ran = call.again(saved[ctx.outputs :], session)
        found = asked.take(d, ran, session, differentiable=True)
        if session is not None:
            session.phase = call.session.phase
            needed = _needed_in(session.phase, needed, ctx.outputs)
        by = [t for t, one in zip((*d, *ran.leaves, *call.parameters), needed, strict=True) if one]
        grads = iter(_gradients(call.parameters, found, v, by, differentiable=False))
        return None, None, *(next(grads) if one else None for one in needed)


def _needed_in(phase: Phase, needed: tuple[bool, ...], outputs: int) -> tuple[bool, ...]:
    """What a double backward is asked for: all, or in the phase ``TANGENT`` gradients by ``d`` alone."""
    if phase is not Phase.TANGENT:
        return needed
    return (*needed[:outputs], *(False for _ in needed[outputs:]))


def _forget(_: Tensor) -> None:
    """What the first run's graph saves: nothing, since it is dropped."""


def _refuse(_: None) -> Tensor:
    raise FastregError(
        "checkpoint: function must not differentiate, got a backward inside its first run (leave this block as it is)"
    )


def _asked(ctx: Any) -> Asked:
    """What the pass that runs now takes from a call, as the session's phase says."""
    call, wanted, session = ctx.call, ctx.needs_input_grad[1:-1], ctx.call.session
    if session is None:
        return Asked(call, None, wanted, False)
    wanted = (*wanted[: call.count], *(session.forms_gradients for _ in call.parameters))
    norms = session.phase.takes_norms and torch._C._will_engine_execute_node(ctx.next_functions[-1][0])
    return Asked(call, session.part(), wanted, norms)


def _gradients(
    parameters: list[nn.Parameter],
    of: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    by: list[Tensor],
    differentiable: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients by ``by``, which hooks of parameters do not see: those are for the sum that autograd makes later."""
    pairs = [(t, s) for t, s in zip(of, seeds, strict=True) if t is not None and s is not None and t.requires_grad]
    if not pairs or not by:
        return (None,) * len(by)
    roots, cotangents = zip(*pairs)
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for known, _ in hooks:
        known.clear()
    try:
        return torch.autograd.grad(roots, by, cotangents, create_graph=differentiable, allow_unused=True)
    finally:
        for known, kept in hooks:
            known.update(kept)
