"""Gradients that are known already: their linear combinations, and a loss that hands them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.errors import FastregError

Gradients = list[Tensor | None]


class Delivered(Function):
    """A loss whose gradients are known: its backward hands them out."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise FastregError("reg: backward must run once on a loss of method='perturb', got a second time")
        if factor.dim() and factor.device.type == "cpu" and bool((factor != factor[0]).any()):
            raise FastregError(
                "reg: losses per sample must be averaged or summed with method='perturb', got weights that differ "
                "(apply them in the callable)"
            )
        return None, None, *times(gradients, factor.sum())


def times(gradients: Sequence[Tensor | None], factor: float | Tensor) -> Gradients:
    """``factor * g`` of each, in its dtype; None stays None."""
    return [None if g is None else (g * factor).to(g.dtype) for g in gradients]


def plus(left: Gradients, right: Gradients) -> Gradients:
    """``a + b`` of each pair; None counts as zero."""
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]
