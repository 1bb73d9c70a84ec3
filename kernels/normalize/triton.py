"""Triton forms of row normalisation to second order: a norm layer of one group, one place and no parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreg.kernels.norm_affine import triton as norm


def normalize(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """``x [R, N] -> xhat [R, N], rstd [R]``."""
    xhat, _, rstd = norm.norm_affine(x.unsqueeze(2), None, None, 1, eps, center)
    return xhat.squeeze(2), rstd.squeeze(1)


def normalize_backward(xhat: Tensor, rstd: Tensor, g: Tensor, center: bool) -> Tensor:
    """``xhat [R, N], rstd [R], g [R, N] -> dx [R, N]``."""
    xhat, g = xhat.unsqueeze(2), g.unsqueeze(2)
    dx, _, _ = norm.norm_affine_backward(xhat, None, rstd.unsqueeze(1), None, g, _one_segment(xhat), center)
    return dx.squeeze(2)


def normalize_double_backward(
    xhat: Tensor, rstd: Tensor, g: Tensor, v: Tensor, center: bool
) -> tuple[Tensor, Tensor]:
    """``xhat [R, N], rstd [R], g [R, N], v [R, N] -> grad_g [R, N], grad_x [R, N]``."""
    xhat, g, v = (t.unsqueeze(2) for t in (xhat, g, v))
    grad_g, grad_x, _ = norm.norm_affine_double_backward(
        xhat, None, rstd.unsqueeze(1), None, g, v, None, None, _one_segment(xhat), center
    )
    return grad_g.squeeze(2), grad_x.squeeze(2)


def typical(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Calls of transformers, and of a group norm over an image; no memory behind them."""
    forward: list[tuple[object, ...]] = []
    backward: list[tuple[object, ...]] = []
    double: list[tuple[object, ...]] = []
    for rows, width in ((8192, 768), (4096, 4096), (65536, 64), (2048, 8 * 112 * 112)):
        x = torch.empty(rows, width, dtype=dtype, device="meta")
        rstd = torch.empty(rows, dtype=torch.float32, device="meta")
        forward.append((x, 1e-5, True))
        backward.append((x, rstd, x, True))
        double.append((x, rstd, x, x, True))
    return {"normalize": forward, "normalize_backward": backward, "normalize_double_backward": double}


def _one_segment(rows: Tensor) -> tuple[int, int]:
    """Offsets that put all rows together: nothing is summed over them."""
    return 0, rows.shape[0]
