"""Activations whose double backward torch composes of many elementwise steps; here it takes few.

relu, tanh and sigmoid keep torch's own: they need no rule, since they hold no parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastreg.errors import UnsupportedOperation
from fastreg.kernels import gelu_double_backward
from fastreg.kernels._checks import accumulator
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape


class Gelu(Function):
    """``F.gelu`` with torch's forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.approximate = approximate
        ctx.save_for_backward(x)
        return F.gelu(x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return GeluBackward.apply(d, x, ctx.approximate), None


class GeluBackward(Function):
    """``d gelu'(x)`` with a double backward of one pass."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, x: Tensor, approximate: str) -> Tensor:
        ctx.approximate = approximate
        ctx.save_for_backward(d, x)
        return torch.ops.aten.gelu_backward(d, x, approximate=approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor, None]:
        d, x = ctx.saved_tensors
        return *gelu_double_backward(x, d, v, ctx.approximate == "tanh"), None


class Silu(Function):
    """``F.silu`` with torch's forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return SiluBackward.apply(d, *ctx.saved_tensors)


class SiluBackward(Function):
    """``d silu'(x)``; its double backward uses ``silu''(x) = s (1 - s) (2 + x (1 - 2 s))``, ``s = sigmoid(x)``."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(d, x)
        return torch.ops.aten.silu_backward(d, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, Tensor]:
        d, x = ctx.saved_tensors
        wide = x.to(accumulator(x.dtype))
        s = wide.sigmoid()
        bend = torch.addcmul(wide + 2, wide, s, value=-2).mul_(v).mul_(d)
        return torch.ops.aten.silu_backward(v, x), torch.ops.aten.sigmoid_backward(bend, s).to(x.dtype)


@route(F.gelu, always=True, second_order=True)
def gelu(tape: Tape, input: Tensor, approximate: str = "none") -> Tensor:
    """``F.gelu``."""
    refuse_parameters(tape, input)
    return Gelu.apply(input, approximate)


@route(F.silu, always=True, second_order=True)
def silu(tape: Tape, input: Tensor, inplace: bool = False) -> Tensor:
    """``F.silu``; in place it is torch's own."""
    refuse_parameters(tape, input)
    return F.silu(input, inplace=True) if inplace else Silu.apply(input)


def refuse_parameters(tape: Tape, *operands: Tensor | None) -> None:
    """Raise for operands that derive from a parameter alone: their gradients would escape the norms."""
    if any(tape.lineage(operand) is not None for operand in operands):
        raise UnsupportedOperation("an operand derives from parameters alone, and the function is not linear in it")
