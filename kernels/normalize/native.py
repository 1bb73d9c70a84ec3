"""C++ forms of row normalisation, its backward and its double backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.kernels import _native
from fastreg.kernels._registry import Implementation

_FORWARD = _native.calls("normalize")
_BACKWARD = _native.calls("normalize_backward")
_DOUBLE_BACKWARD = _native.calls("normalize_double_backward")


def normalize(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """``x [R, N] -> xhat [R, N], rstd [R]``."""
    x = x.contiguous()
    xhat, rstd = torch.empty_like(x), x.new_empty(x.shape[0])
    _FORWARD[x.dtype](
        x.data_ptr(), xhat.data_ptr(), rstd.data_ptr(), *x.shape, eps, center, torch.get_num_threads()
    )
    return xhat, rstd


def normalize_backward(xhat: Tensor, rstd: Tensor, g: Tensor, center: bool) -> Tensor:
    """``xhat [R, N], rstd [R], g [R, N] -> dx [R, N]``."""
    xhat, rstd, g = xhat.contiguous(), rstd.contiguous(), g.contiguous()
    dx = torch.empty_like(g)
    _BACKWARD[g.dtype](
        xhat.data_ptr(), rstd.data_ptr(), g.data_ptr(), dx.data_ptr(),
        *g.shape, center, torch.get_num_threads(),
    )  # fmt: skip
    return dx


def normalize_double_backward(
    xhat: Tensor, rstd: Tensor, g: Tensor, v: Tensor, center: bool
) -> tuple[Tensor, Tensor]:
    """``xhat [R, N], rstd [R], g [R, N], v [R, N] -> grad_g [R, N], grad_x [R, N]``."""
    xhat, rstd, g, v = xhat.contiguous(), rstd.contiguous(), g.contiguous(), v.contiguous()
    grad_g, grad_x = torch.empty_like(g), torch.empty_like(g)
    _DOUBLE_BACKWARD[g.dtype](
        xhat.data_ptr(), rstd.data_ptr(), g.data_ptr(), v.data_ptr(), grad_g.data_ptr(),
        grad_x.data_ptr(), *g.shape, center, torch.get_num_threads(),
    )  # fmt: skip
    return grad_g, grad_x


FORWARD = Implementation("native", normalize, _native.why_not)
BACKWARD = Implementation("native", normalize_backward, _native.why_not)
DOUBLE_BACKWARD = Implementation("native", normalize_double_backward, _native.why_not)
