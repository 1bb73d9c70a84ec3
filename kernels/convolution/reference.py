"""Plain torch forms of the convolutions of segments: one convolution with m times the groups.

Segments lie side by side along the channels (Rochette et al. 2019, arXiv:1912.06015, for single samples).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = list[int]


def conv_outer(x: Tensor, d: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """``x [m, b, C, H, W], d [m, b, O, P, Q] -> [m, O, C, *kernel]``."""
    count, channels, outputs = x.shape[0], x.shape[2], d.shape[2]
    if d.numel() == 0 or x.numel() == 0:
        return x.new_zeros(count, outputs, channels, *kernel)
    weights = x.new_empty(count * outputs, channels, *kernel)
    geometry = stride, padding, dilation, False, [0, 0], count
    _, of_weights, _ = torch.ops.aten.convolution_backward(
        _beside(d), _beside(x), weights, None, *geometry, [False, True, False]
    )
    return of_weights.unflatten(0, (count, -1))


def conv_apply(
    x: Tensor, weights: Tensor, biases: Tensor | None, stride: Pair, padding: Pair, dilation: Pair
) -> Tensor:
    """``x [m, b, C, H, W], weights [m, O, C, *kernel], biases [m, O] -> [m, b, O, P, Q]``."""
    count = x.shape[0]
    flat = None if biases is None else biases.flatten()
    y = F.conv2d(_beside(x), weights.flatten(0, 1), flat, stride, padding, dilation, count)
    return y.unflatten(1, (count, -1)).transpose(0, 1)


def _beside(x: Tensor) -> Tensor:
    """``[m, b, C, H, W] -> [b, m C, H, W]``."""
    return x.transpose(0, 1).flatten(1, 2)
