"""Plain torch forms of the passes: a few calls of torch's own multi-tensor functions each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator

Lists = Sequence[list[Tensor]]


def apply(rule: str, lists: Lists, coefficients: Tensor | None, constants: tuple[float, ...]) -> Tensor:
    """Run a rule; the sums ``[n]`` of what it returns, zeros where it returns nothing."""
    return RULES[rule](lists, coefficients, constants)


def sqnorm(lists: Lists, _coefficients: None, _constants: tuple[float, ...]) -> Tensor:
    """``sum x^2`` per tensor."""
    (xs,) = lists
    return torch.stack([_wide(x).square().sum() for x in xs])


def dot(lists: Lists, _coefficients: None, _constants: tuple[float, ...]) -> Tensor:
    """``sum x y`` per tensor."""
    return torch.stack([(_wide(x) * _wide(y)).sum() for x, y in zip(*lists, strict=True)])


def axpy(lists: Lists, coefficients: Tensor, _constants: tuple[float, ...]) -> Tensor:
    """``p += c d``."""
    ps, ds = lists
    torch._foreach_add_(ps, torch._foreach_mul(ds, [c.to(d.dtype) for c, d in zip(coefficients.unbind(), ds)]))
    return torch.zeros_like(coefficients)


def sgd(lists: Lists, _coefficients: None, constants: tuple[float, ...]) -> Tensor:
    """``p -= lr (sign g + weight_decay p)``."""
    (ps, grads), (lr, weight_decay, sign) = lists, constants
    torch._foreach_add_(ps, _decayed(ps, grads, weight_decay, sign), alpha=-lr)
    return sqnorm((grads,), None, ())


def sgd_momentum(lists: Lists, _coefficients: None, constants: tuple[float, ...]) -> Tensor:
    """``m = keep m + fresh d``, ``p -= lr (of_gradient d + of_buffer m)``."""
    (ps, buffers, grads), (lr, weight_decay, sign, keep, fresh, of_gradient, of_buffer) = lists, constants
    directions = _decayed(ps, grads, weight_decay, sign)
    torch._foreach_mul_(buffers, keep)
    torch._foreach_add_(buffers, directions, alpha=fresh)
    torch._foreach_add_(ps, directions, alpha=-lr * of_gradient)
    torch._foreach_add_(ps, buffers, alpha=-lr * of_buffer)
    return sqnorm((grads,), None, ())


def adamw(lists: Lists, _coefficients: None, constants: tuple[float, ...]) -> Tensor:
    """``p = decay p - rate m / (sqrt(v) / root + eps)`` with the moments of this step."""
    (ps, firsts, seconds, grads), (rate, decay, sign, beta1, beta2, root, eps) = lists, constants
    signed = torch._foreach_mul(grads, sign)
    torch._foreach_lerp_(firsts, signed, 1 - beta1)
    torch._foreach_mul_(seconds, beta2)
    torch._foreach_addcmul_(seconds, signed, signed, 1 - beta2)
    widths = torch._foreach_div(torch._foreach_sqrt(seconds), root)
    torch._foreach_add_(widths, eps)
    torch._foreach_mul_(ps, decay)
    torch._foreach_addcdiv_(ps, firsts, widths, -rate)
    return sqnorm((grads,), None, ())


def _decayed(ps: list[Tensor], grads: list[Tensor], weight_decay: float, sign: float) -> list[Tensor]:
    directions = list(torch._foreach_mul(grads, sign))
    torch._foreach_add_(directions, ps, alpha=weight_decay)
    return directions


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulator(x.dtype))


RULES: dict[str, Callable[[Lists, Any, tuple[float, ...]], Tensor]] = {
    "sqnorm": sqnorm, "dot": dot, "axpy": axpy, "sgd": sgd, "sgd_momentum": sgd_momentum, "adamw": adamw,
}  # fmt: skip
