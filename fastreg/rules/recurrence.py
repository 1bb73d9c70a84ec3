"""The recurrent product of an unrolled layer, ``w_hh`` used once per step, as one linear map over all steps.

The gradient of ``w_hh`` is ``sum_t d_t^T h_{t-1}``: rows are the states before every step, output gradients those of
the recurrent terms. ``Enter`` adds the recurrent bias where the terms enter the steps and so receives all ``d_t`` at
once; ``Leave`` stands where the states leave the layer, is therefore differentiated first, and hands the states over
to ``Enter``. The products of the single steps carry the chain and no parameter gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.errors import FastregError
from fastreg.rules.bilinear import Rows
from fastreg.rules.linear import Linear
from fastreg.rules.routing import RoutedBackward, deposit_shared, takes_norms, wanted_by
from fastreg.rules.use import Use


class Handover:
    """Takes the states from the backward of :class:`Leave` to that of :class:`Enter` and keeps nothing after."""

    __slots__ = ("states",)

    def __init__(self) -> None:
        self.states: Tensor | None = None

    def take(self) -> Tensor:
        """The states ``[B, T + 1, H]``."""
        states, self.states = self.states, None
        if states is None:
            raise FastregError(
                "recurrent: the gradient must reach a recurrent layer through its outputs, got one through its "
                "recorded backward alone (differentiate the penalty together with the loss)"
            )
        return states


class Leave(Function):
    """The identity on ``states [B, T + 1, H]`` and what else the layer returns."""

    @staticmethod
    def forward(ctx: Any, handover: Handover, states: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        ctx.handover = handover
        ctx.set_materialize_grads(False)
        states = states.view_as(states)
        # The output, not the input: what the norms send back to the states then passes through here as well.
        ctx.save_for_backward(states)
        return states, *(other.view_as(other) for other in others)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (states,) = ctx.saved_tensors
        # A pass that does not reach Enter leaves them there: with their graph they would close a cycle.
        ctx.handover.states = states if torch.is_grad_enabled() else states.detach()
        return None, *grads


class Recurrent(Linear):
    """The recurrent product; its rows are states of all steps, which a step at perturbed weights has no use for."""

    def rows(self, x: Tensor, d: Tensor) -> Rows | None:
        return None


RECURRENT = Recurrent()


class Enter(Function):
    """``base + bias`` for ``base [B, T, G]``; its backward is that of ``base + states[:, :-1] weight^T + bias``."""

    @staticmethod
    def forward(
        ctx: Any, use: Use, handover: Handover, base: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor
    ) -> Tensor:
        ctx.use, ctx.handover = use, handover
        ctx.save_for_backward(weight, bias)
        return base.view_as(base) if bias is None else base + bias

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        use, (weight, bias) = ctx.use, ctx.saved_tensors
        rows = ctx.handover.take()[:, :-1]
        wanted = wanted_by(ctx, use, (False, False, *ctx.needs_input_grad[3:5]))
        if takes_norms(ctx, use):
            deposit_shared(use, rows, d, weight, bias)
        return None, None, d, *RoutedBackward.apply(use, wanted, d, rows, weight, bias)[1:]


class Step(Function):
    """``term + h weight^T`` for ``h [B, H]``. The gradient of ``weight`` is formed by :class:`Enter`."""

    @staticmethod
    def forward(ctx: Any, term: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.addmm(term, h, weight.t())

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (weight,) = ctx.saved_tensors
        return d, StepBackward.apply(d, weight) if ctx.needs_input_grad[1] else None, None


class StepBackward(Function):
    """``d weight``, differentiable in both."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(d, weight)
        return d @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor | None]:
        d, weight = ctx.saved_tensors
        return v @ weight.t(), d.t() @ v if ctx.needs_input_grad[1] else None
