"""C++ form of gelu_double_backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation


def gelu_double_backward(x: Tensor, d: Tensor, v: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    """``x, d, v`` of one shape to ``grad_d, grad_x`` of that shape."""
    x, d, v = x.contiguous(), d.contiguous(), v.contiguous()
    grad_d, grad_x = torch.empty_like(x), torch.empty_like(x)
    assert _native.MODULE is not None  # why_not came first
    _native.MODULE.gelu_double_backward_f32(
        x.data_ptr(), d.data_ptr(), v.data_ptr(), grad_d.data_ptr(), grad_x.data_ptr(),
        x.numel(), approximate, torch.get_num_threads(),
    )  # fmt: skip
    return grad_d, grad_x


def why_not(x: Tensor, *_rest: object) -> str | None:
    """Single precision only: the exponential is a polynomial made for it."""
    reason = _native.why_not(x)
    if reason is None and x.dtype != torch.float32:
        return f"it takes float32, not {x.dtype}"
    return reason


IMPLEMENTATION = Implementation("native", gelu_double_backward, why_not)
