"""Plain torch form of softmax cross entropy to second order, and of the label draw that goes with it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._philox import halves, philox

# As torch.nn.functional.cross_entropy has it: a row of this label has no loss and no gradient.
IGNORED = -100


def cross_entropy(z: Tensor, labels: Tensor | None, seed: int, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``z [R, C], labels [R] -> loss [R], lse [R], drawn [R]``."""
    wide = z.to(accumulator(z.dtype))
    lse = wide.logsumexp(1)
    drawn = _drawn(wide, lse, seed, draw)
    at = drawn if labels is None else labels
    loss = lse - wide.gather(1, _inside(at, z.shape[1]).unsqueeze(1)).squeeze(1)
    return _judged(loss, at, z.shape[1]), lse, drawn


def cross_entropy_backward(z: Tensor, lse: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """``z [R, C], lse, labels, scale [R] -> dz [R, C]``."""
    weight = _judged(scale, labels, z.shape[1])
    dz = _softmax(z, lse) * weight.unsqueeze(1)
    dz.scatter_add_(1, _inside(labels, z.shape[1]).unsqueeze(1), -weight.unsqueeze(1))
    return dz.to(z.dtype)


def cross_entropy_double_backward(
    z: Tensor, lse: Tensor, labels: Tensor, scale: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """``z, v [R, C], lse, labels, scale [R] -> grad_z [R, C], grad_scale [R]``."""
    p, wide = _softmax(z, lse), v.to(lse.dtype)
    mean = (p * wide).sum(1)
    grad_z = _judged(scale, labels, z.shape[1]).unsqueeze(1) * p * (wide - mean.unsqueeze(1))
    grad_scale = mean - wide.gather(1, _inside(labels, z.shape[1]).unsqueeze(1)).squeeze(1)
    return grad_z.to(z.dtype), _judged(grad_scale, labels, z.shape[1])


def cross_entropy_gradient(
    z: Tensor, labels: Tensor | None, scale: Tensor, seed: int, draw: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``z [R, C], labels, scale [R] -> loss [R], lse [R], drawn [R], dz [R, C]``."""
    loss, lse, drawn = cross_entropy(z, labels, seed, draw)
    return loss, lse, drawn, cross_entropy_backward(z, lse, drawn if labels is None else labels, scale)


def cross_entropy_gradient_(
    z: Tensor, labels: Tensor | None, scale: Tensor, seed: int, draw: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`cross_entropy_gradient`, with dz written over z."""
    loss, lse, drawn, dz = cross_entropy_gradient(z, labels, scale, seed, draw)
    z.copy_(dz)
    return loss, lse, drawn


def uniforms(rows: int, seed: int, draw: Tensor, device: torch.device) -> Tensor:
    """One number per row, inside (0, 1) and with 32 random bits: ``[R]`` float64."""
    row = torch.arange(rows, device=device)
    zero = torch.zeros_like(row)
    counter = (*halves(row), *(zero + half for half in halves(draw)))
    return (philox(counter, halves(seed))[0].double() + 0.5) / 2**32


def _drawn(wide: Tensor, lse: Tensor, seed: int, draw: Tensor) -> Tensor:
    """The first class at which the cumulative probability exceeds the row's uniform number."""
    p = (wide - lse.unsqueeze(1)).double().exp()
    cumulative = p.cumsum(1)
    target = uniforms(wide.shape[0], seed, draw, wide.device) * cumulative[:, -1]
    found = torch.searchsorted(cumulative, target.unsqueeze(1), right=True).squeeze(1)
    # Rows of NaN have no such class.
    return found.clamp(max=wide.shape[1] - 1)


def _softmax(z: Tensor, lse: Tensor) -> Tensor:
    return (z.to(lse.dtype) - lse.unsqueeze(1)).exp()


def _inside(labels: Tensor, classes: int) -> Tensor:
    """Labels that may index a row; what they stand for elsewhere is :func:`_judged`."""
    return labels.clamp(0, classes - 1)


def _judged(value: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``value [R]``, 0 where the label is ignored, NaN where it names no class."""
    outside = (labels < 0) | (labels >= classes)
    return value.masked_fill(outside, float("nan")).masked_fill(labels == IGNORED, 0.0)
