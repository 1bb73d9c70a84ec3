"""C++ forms of a norm layer with its scale and bias, its backward and its double backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation
from fastreg.kernels._segments import of

_FORWARD = _native.calls("norm_affine")
_BACKWARD = _native.calls("norm_affine_backward")
_DOUBLE_BACKWARD = _native.calls("norm_affine_double_backward")


def norm_affine(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``x [S, C, P], weight [C], bias [C] -> y [S, C, P], mean [S, G], rstd [S, G]``."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    mean, rstd = x.new_empty(x.shape[0], groups), x.new_empty(x.shape[0], groups)
    _FORWARD[x.dtype](
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), mean.data_ptr(),
        rstd.data_ptr(), _sizes(x, groups), eps, center, torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, rstd


def norm_affine_backward(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, d: Tensor, offsets: Sequence[int], center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``x, d [S, C, P], mean, rstd [S, G], weight [C] -> dx [S, C, P], scale [m, C], bias [m, C]``."""
    inputs, found = [t.contiguous() for t in (x, mean, rstd, weight, d)], of(offsets)
    scale, bias = (x.new_empty(found.count, x.shape[1]) for _ in range(2))
    results = torch.empty_like(inputs[0]), scale, bias
    _BACKWARD[x.dtype](
        [t.data_ptr() for t in inputs], found.pointer, [t.data_ptr() for t in results],
        _sizes(x, rstd.shape[1]), found.count, center, torch.get_num_threads(),
    )  # fmt: skip
    return results


def norm_affine_double_backward(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    d: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_bias: Tensor,
    offsets: Sequence[int],
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x, d, v [S, C, P], v_scale, v_bias [m, C] -> grad_d, grad_x [S, C, P], grad_weight [C]``."""
    inputs = [t.contiguous() for t in (x, mean, rstd, weight, d, v, v_scale, v_bias)]
    results = torch.empty_like(inputs[0]), torch.empty_like(inputs[0]), torch.empty_like(inputs[3])
    found = of(offsets)
    _DOUBLE_BACKWARD[x.dtype](
        [t.data_ptr() for t in inputs], found.pointer, [t.data_ptr() for t in results],
        _sizes(x, rstd.shape[1]), found.count, center, torch.get_num_threads(),
    )  # fmt: skip
    return results


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    samples, channels, places = x.shape
    return samples, groups, channels // groups, places


FORWARD = Implementation("native", norm_affine, _native.why_not)
BACKWARD = Implementation("native", norm_affine_backward, _native.why_not)
DOUBLE_BACKWARD = Implementation("native", norm_affine_double_backward, _native.why_not)
