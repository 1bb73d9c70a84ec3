"""C++ forms of softmax cross entropy to second order and of its label draw."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation

_HEAD = _native.calls("cross_entropy")
_BACKWARD = _native.calls("cross_entropy_backward")
_DOUBLE_BACKWARD = _native.calls("cross_entropy_double_backward")


def cross_entropy(z: Tensor, labels: Tensor | None, seed: int, draw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``z [R, C], labels [R] -> loss [R], lse [R], drawn [R]``."""
    return _head(z.contiguous(), labels, None, None, seed, draw)


def cross_entropy_gradient(
    z: Tensor, labels: Tensor | None, scale: Tensor, seed: int, draw: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``z [R, C], labels, scale [R] -> loss [R], lse [R], drawn [R], dz [R, C]``."""
    z = z.contiguous()
    dz = torch.empty_like(z)
    return *_head(z, labels, scale, dz, seed, draw), dz


def cross_entropy_gradient_(
    z: Tensor, labels: Tensor | None, scale: Tensor, seed: int, draw: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`cross_entropy_gradient`, with dz written over z."""
    dense = z.contiguous()
    results = _head(dense, labels, scale, dense, seed, draw)
    if dense is not z:
        z.copy_(dense)
    return results


def _head(
    z: Tensor, labels: Tensor | None, scale: Tensor | None, dz: Tensor | None, seed: int, draw: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [None if t is None else t.contiguous() for t in (z, labels, scale)]
    results = z.new_empty(z.shape[0]), z.new_empty(z.shape[0]), z.new_empty(z.shape[0], dtype=torch.int64)
    _HEAD[z.dtype](
        [_address(t) for t in inputs], [_address(t) for t in (*results, dz)], *z.shape, seed, int(draw),
        torch.get_num_threads(),
    )  # fmt: skip
    return results


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def cross_entropy_backward(z: Tensor, lse: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """``z [R, C], lse, labels, scale [R] -> dz [R, C]``."""
    inputs = [t.contiguous() for t in (z, lse, labels, scale)]
    dz = torch.empty_like(inputs[0])
    _BACKWARD[z.dtype]([t.data_ptr() for t in inputs], dz.data_ptr(), *z.shape, torch.get_num_threads())
    return dz


def cross_entropy_double_backward(
    z: Tensor, lse: Tensor, labels: Tensor, scale: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """``z, v [R, C], lse, labels, scale [R] -> grad_z [R, C], grad_scale [R]``."""
    inputs = [t.contiguous() for t in (z, lse, labels, scale, v)]
    results = torch.empty_like(inputs[0]), torch.empty_like(inputs[1])
    _DOUBLE_BACKWARD[z.dtype](
        [t.data_ptr() for t in inputs], [t.data_ptr() for t in results], *z.shape, torch.get_num_threads()
    )
    return results


FORWARD = Implementation("native", cross_entropy, _native.why_not)
GRADIENT = Implementation("native", cross_entropy_gradient, _native.why_not)
GRADIENT_IN_PLACE = Implementation("native", cross_entropy_gradient_, _native.why_not)
BACKWARD = Implementation("native", cross_entropy_backward, _native.why_not)
DOUBLE_BACKWARD = Implementation("native", cross_entropy_double_backward, _native.why_not)
