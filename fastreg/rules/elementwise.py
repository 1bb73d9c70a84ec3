"""Elementwise parameters: ``x + w``, ``x - w``, ``x * w``, ``w / x`` in all their spellings, PReLU, expanded tokens.

One operand is tracked (a parameter, or derived from one); the other is data with its samples along dimension 0, or a
constant, in which case the result derives from the parameter and is tracked further.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreg.errors import UnsupportedOperation
from fastreg.rules.affine import Scale
from fastreg.rules.registry import route
from fastreg.rules.tape import Tape
from fastreg.rules.use import Lineage

Operand = Tensor | float

_BROADCAST = Scale()


@route(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(tape: Tape, input: Operand, other: Operand, *, alpha: float = 1) -> Tensor:
    """``input + alpha * other``."""
    if tape.lineage(other) is not None:
        return _shift(tape, input, _multiple(tape, other, alpha))
    return _shift(tape, other if alpha == 1 else other * alpha, input)


@route(torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__)
def sub(tape: Tape, input: Operand, other: Operand, *, alpha: float = 1) -> Tensor:
    """``input - alpha * other``."""
    return add(tape, input, other, alpha=-alpha)


@route(torch.rsub, Tensor.__rsub__)
def rsub(tape: Tape, input: Operand, other: Operand, *, alpha: float = 1) -> Tensor:
    """``other - alpha * input``."""
    return add(tape, other, input, alpha=-alpha)


@route(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
def mul(tape: Tape, input: Operand, other: Operand) -> Tensor:
    """``input * other``."""
    return _scale(tape, other, input) if tape.lineage(input) is not None else _scale(tape, input, other)


@route(torch.div, torch.divide, torch.true_divide)
@route(Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__div__, Tensor.__truediv__)
def div(tape: Tape, input: Operand, other: Operand, *, rounding_mode: str | None = None) -> Tensor:
    """``w / x``; ``x / w`` is not linear in ``w``."""
    if rounding_mode is not None:
        raise UnsupportedOperation("a rounded quotient is not linear in the parameter")
    if tape.lineage(other) is not None:
        return rdiv(tape, other, input)
    return _scale(tape, 1 / other, input)


@route(Tensor.__rdiv__, Tensor.reciprocal, Tensor.reciprocal_, torch.reciprocal)
def rdiv(tape: Tape, input: Operand, other: Operand = 1) -> Tensor:
    """``x / w``, refused."""
    raise UnsupportedOperation("x / w is not linear in w; make the reciprocal the parameter and multiply by it")


@route(torch.neg, torch.negative, Tensor.neg, Tensor.negative, Tensor.__neg__)
def neg(tape: Tape, input: Tensor) -> Tensor:
    """``-w``."""
    return _multiple(tape, input, -1)


def _in_place(rule: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rule of the in-place form: data is overwritten, so that whoever else holds it sees the result."""

    def inner(tape: Tape, input: Tensor, *args: Operand, **kwargs: float) -> Tensor:
        if tape.lineage(input) is not None:
            raise UnsupportedOperation("a parameter is changed in place; use the form that returns a new tensor")
        # The operands are saved for the backward: not the tensor that is about to be overwritten.
        return input.copy_(rule(tape, input.clone(), *args, **kwargs))

    return inner


route(Tensor.add_, Tensor.__iadd__)(_in_place(add))
route(Tensor.sub_, Tensor.subtract_, Tensor.__isub__)(_in_place(sub))
route(Tensor.mul_, Tensor.multiply_, Tensor.__imul__)(_in_place(mul))
route(Tensor.div_, Tensor.divide_, Tensor.true_divide_, Tensor.__idiv__, Tensor.__itruediv__)(_in_place(div))


@route(torch.prelu, Tensor.prelu)
def prelu(tape: Tape, input: Tensor, weight: Tensor) -> Tensor:
    """``max(x, 0) + w * min(x, 0)``, linear in the slopes ``w``, one or one per channel (dimension 1)."""
    if tape.lineage(input) is not None:
        raise UnsupportedOperation("a nonlinear function of a parameter")
    trailing = input.dim() - 2 if weight.numel() > 1 else 0
    return F.relu(input) + tape.bilinear(Scale(trailing), input.clamp(max=0), weight)


def _spreading(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The rule of a function that copies a parameter: B times for the samples (class tokens), or without samples."""

    def rule(tape: Tape, input: Tensor, *sizes: object, **named: object) -> Tensor:
        out, lineage = function(input, *sizes, **named), tape.lineage(input)
        assert lineage is not None
        if not (_per_sample(out, tape.samples) and (input.dim() < out.dim() or input.shape[0] == 1)):
            return tape.derive(out, lineage, lambda p: function(p, *sizes, **named), isometric=False)
        one = out[:1]
        tape.derive(one, lineage, lambda p: function(p, *sizes, **named)[:1], one.numel() == input.numel())
        return tape.bilinear(_BROADCAST, out.new_zeros(()).expand(out.shape), None, one)

    return rule


_COPIES = (
    Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to, Tensor.repeat, Tensor.tile, torch.tile,
)  # fmt: skip
for _function in _COPIES:
    route(_function)(_spreading(_function))


def _shift(tape: Tape, other: Operand, parameter: Operand) -> Tensor:
    """``other + parameter``, the latter tracked."""
    tracked, lineage = _tracked(tape, other, parameter)
    if _is_constant(tape, other, tracked):
        out = tracked + other
        same = out.shape == tracked.shape
        # The gradient does not see the constant: the linear part is what counts.
        return tape.derive(out, lineage, lambda p: p if same else p.expand(out.shape), isometric=same)
    return tape.bilinear(_BROADCAST, _spread_data(other, tracked), None, tracked)


def _scale(tape: Tape, other: Operand, parameter: Operand) -> Tensor:
    """``other * parameter``, the latter tracked."""
    tracked, lineage = _tracked(tape, other, parameter)
    if _is_constant(tape, other, tracked):
        return tape.derive(tracked * other, lineage, lambda p: p * other, isometric=False)
    return tape.bilinear(_BROADCAST, _spread_data(other, tracked), tracked)


def _multiple(tape: Tape, tracked: Operand, factor: float) -> Tensor:
    """``factor * tracked`` for a number."""
    lineage = tape.lineage(tracked)
    assert isinstance(tracked, Tensor) and lineage is not None
    if factor == 1:
        return tracked
    return tape.derive(tracked * factor, lineage, lambda p: p * factor, isometric=factor == -1)


def _tracked(tape: Tape, other: Operand, tracked: Operand) -> tuple[Tensor, Lineage]:
    """The operand that has a lineage, and the lineage; a parameter without dimensions is given one.

    Raises:
        UnsupportedOperation: both operands have one.
    """
    if tape.lineage(other) is not None:
        raise UnsupportedOperation("both operands derive from parameters")
    lineage = tape.lineage(tracked)
    assert isinstance(tracked, Tensor) and lineage is not None
    if tracked.dim():
        return tracked, lineage
    one = tracked.reshape(1)
    tape.derive(one, lineage, lambda p: p.reshape(1), isometric=True)
    return one, tape.lineages[id(one)][1]


def _is_constant(tape: Tape, other: Operand, tracked: Tensor) -> bool:
    """Whether the operand beside a parameter is a number or a tensor without samples, rather than data.

    Raises:
        UnsupportedOperation: it is neither: the result would have no dimension of samples, or the parameter has one.
    """
    if not isinstance(other, Tensor):
        return True
    dims = max(other.dim(), tracked.dim())
    if not _has_samples(other, tape.samples) or other.dim() < dims:
        if other.requires_grad:
            raise UnsupportedOperation(
                f"data beside a parameter must keep its {tape.samples} samples along dimension 0, got shape "
                f"{tuple(other.shape)}"
            )
        return True
    if tracked.dim() == dims and tracked.shape[0] != 1:
        raise UnsupportedOperation("a parameter with a batch dimension has no rule; index it by sample instead")
    return False


def _has_samples(data: Tensor, samples: int) -> bool:
    """Whether dimension 0 holds the samples, or rows of them if the tensor depends on what came before.

    A tensor without gradient is data only with exactly one row per sample: a table ``[T, T]`` where T happens to be a
    multiple of B must not be cut into micro-batches, and rows taken for a table are refused where they are used.
    """
    if data.requires_grad:
        return data.dim() > 0 and data.shape[0] > 0 and data.shape[0] % samples == 0
    return _per_sample(data, samples)


def _per_sample(tensor: Tensor, samples: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == samples


def _spread_data(data: Operand, tracked: Tensor) -> Tensor:
    """Data, a tensor, in the shape and dtype of the result."""
    assert isinstance(data, Tensor)
    shape = torch.broadcast_shapes(data.shape, tracked.shape)
    return data.to(torch.result_type(data, tracked)).expand(shape)
