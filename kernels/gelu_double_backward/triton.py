"""Triton form of gelu_double_backward: three reads and two writes per element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastreg.kernels._launch import launch
from fastreg.kernels._tiles import rounded
from fastreg.kernels.gelu_double_backward import reference
from fastreg.kernels.gelu_double_backward.config import CONFIG

CUBIC = tl.constexpr(reference.CUBIC)
# 2 sqrt(2 / pi): the tanh form is x sigma(w), w = RATE (x + CUBIC x^3), with the logistic function sigma.
RATE = tl.constexpr(1.5957691216057308)


@triton.jit
def exact_derivatives(x):
    """``Phi(x) + x phi(x)`` and ``phi(x) (2 - x^2)``."""
    # Beyond 14 both are constant in floats, and the square overflows later.
    x = tl.minimum(tl.maximum(x, -14.0), 14.0)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density, density * (2.0 - x * x)


@triton.jit
def tanh_derivatives(x):
    """``sigma + x sigma' w'`` and ``sigma' (2 w' + x (w'' + w'^2 (1 - 2 sigma)))``."""
    # Beyond 30 both forms are linear or zero in floats, and the cube overflows later.
    x = tl.minimum(tl.maximum(x, -30.0), 30.0)
    w = RATE * x * (1.0 + CUBIC * x * x)
    slope, bend = RATE * (1.0 + 3.0 * CUBIC * x * x), 6.0 * RATE * CUBIC * x
    # The exponential of a negative number, so that the smaller of sigma and 1 - sigma keeps its digits.
    e = tl.exp(-tl.abs(w))
    larger = 1.0 / (1.0 + e)
    sigma = tl.where(x < 0, e * larger, larger)
    sigma_slope = e * larger * larger
    second = sigma_slope * (2.0 * slope + x * (bend + slope * slope * (1.0 - 2.0 * sigma)))
    return sigma + x * sigma_slope * slope, second


@triton.jit
def gelu_kernel(
    x_ptr,  # [N]
    d_ptr,  # [N]
    v_ptr,  # [N]
    grad_d_ptr,  # [N]
    grad_x_ptr,  # [N]
    N,
    APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    d = tl.load(d_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    v = tl.load(v_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if APPROXIMATE:
        first, second = tanh_derivatives(x)
    else:
        first, second = exact_derivatives(x)
    tl.store(grad_d_ptr + offs, rounded(v * first, grad_d_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_x_ptr + offs, rounded(v * d * second, grad_x_ptr.dtype.element_ty), mask=mask)


def gelu_double_backward(x: Tensor, d: Tensor, v: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    """``x, d, v`` of one shape to ``grad_d, grad_x`` of that shape."""
    x, d, v = x.contiguous(), d.contiguous(), v.contiguous()
    grad_d, grad_x = torch.empty_like(x), torch.empty_like(x)
    launch(
        gelu_kernel, (triton.cdiv(x.numel(), CONFIG.BLOCK),),
        x, d, v, grad_d, grad_x, x.numel(), APPROXIMATE=approximate, BLOCK=CONFIG.BLOCK, warps=CONFIG.warps,
    )  # fmt: skip
    return grad_d, grad_x


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of a transformer's size, by op; no memory behind them."""
    x = torch.empty(8192, 3072, dtype=dtype, device="meta")
    return {"gelu_double_backward": [(x, x, x, False), (x, x, x, True)]}
