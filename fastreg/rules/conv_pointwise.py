"""Convolutions with one tap per channel pair: every product with ``G_k`` is a batched matrix product over pixels."""

from __future__ import annotations

from math import prod
from types import EllipsisType
from typing import ClassVar

import torch
from torch import Tensor

from fastreg.rules.conv_maps import Convolution


class Pointwise(Convolution):
    """A convolution with kernel size 1, no padding and no groups; rows are the pixels that the stride reads."""

    # Half a convolution's: matrix products need no change of layout.
    STORE_COST: ClassVar[int] = 100

    def transpose(self, d: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        if not _by_matrices(d):
            return super().transpose(d, weight, x)
        return self._written(torch.matmul(weight.flatten(1).mT, d.flatten(2)).unflatten(2, d.shape[2:]), x)

    def outer(self, x: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        # One product per image, then their sum: not if the products are as large as the images.
        few_channels = 2 * weight.numel() < d[0].numel() + x[0].numel() // prod(self.stride)
        if not (few_channels and _by_matrices(d)):
            return super().outer(x, d, weight)
        return torch.bmm(d.flatten(2), x[self._read].flatten(2).mT).sum(0).view(weight.shape)

    def lay(self, x: Tensor) -> Tensor:
        return channels_first(x[self._read])

    def segment_outer(self, laid: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        gradients = torch.bmm(channels_first(d).flatten(2), laid.flatten(2).mT)
        return gradients.view(d.shape[0], *weight.shape)

    def segment_forward(self, laid: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
        weights, pixels = weights.flatten(2), laid.flatten(2)
        if biases is None:
            y = torch.bmm(weights, pixels)
        else:
            y = torch.baddbmm(biases.unsqueeze(2), weights, pixels)
        return y.unflatten(2, laid.shape[2:]).transpose(1, 2)

    def segment_transpose(self, d: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        laid = channels_first(d)
        read = torch.bmm(weights.flatten(2).mT, laid.flatten(2)).unflatten(2, laid.shape[2:]).transpose(1, 2)
        return self._written(read, x)

    def _written(self, read: Tensor, x: Tensor) -> Tensor:
        """The pixels that the stride reads, among zeros shaped as ``x``."""
        if max(self.stride) == 1:
            return read
        out = x.new_zeros(x.shape)
        out[self._read] = read
        return out

    @property
    def _read(self) -> tuple[slice | EllipsisType, ...]:
        return (..., *(slice(None, None, step) for step in self.stride))


def channels_first(x: Tensor) -> Tensor:
    """``[m, b, C, *S] -> [m, C, b, *S]``; a copy if ``b > 1``."""
    return x.transpose(1, 2).contiguous()


def _by_matrices(d: Tensor) -> bool:
    """Where matrix products beat the convolution library, which does not know the kernel to be one tap.

    Measured in float32 on CPUs (bench/NOTES.md, "Convolutions"); of a tensor in another memory order every product
    would change the order of its result.
    """
    return d.is_cpu and d.is_contiguous() and d.dtype in (torch.float32, torch.float64)
