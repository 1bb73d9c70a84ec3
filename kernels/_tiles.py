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
