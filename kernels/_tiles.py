"""Device code that the Triton kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastreg.kernels import _launch

INTERPRETED = tl.constexpr(_launch.INTERPRETED)


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: in TF32 only where torch may do so itself."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a b`` for ``a [M, K], b [K, N]``, ``acc [M, N]`` float32."""
    # The interpreter multiplies the bit patterns of bfloat16.
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Float32 ``x`` in another dtype, to the nearest."""
    # The interpreter cuts bfloat16 off instead: half a unit in the last place is added for it, ties to even.
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(dtype)
