"""Convolutions whose products with ``G_k`` are implicit matrix products: no segment is laid beside another."""

from __future__ import annotations

from torch import Tensor

from fastreg.kernels import conv_apply, conv_outer, has_fast_form
from fastreg.rules.conv_maps import Convolution


class Implicit(Convolution):
    """A convolution over one or two axes, without groups, where :mod:`fastreg.kernels.convolution` has a fast form."""

    @staticmethod
    def serves(x: Tensor, axes: int, groups: int) -> bool:
        """Whether a convolution of ``x`` is one of these."""
        return axes <= 2 and groups == 1 and has_fast_form("conv_outer", x)

    def lay(self, x: Tensor) -> Tensor:
        return x

    def segment_outer(self, laid: Tensor, d: Tensor, weight: Tensor) -> Tensor:
        kernel, stride, padding, dilation = self._geometry()
        gradients = conv_outer(_image(laid), _image(d), kernel, stride, padding, dilation)
        return gradients.reshape(-1, *weight.shape)

    def segment_forward(self, laid: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
        _, *geometry = self._geometry()
        return _axes(conv_apply(_image(laid), _image(weights), biases, *geometry), laid)

    def segment_transpose(self, d: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        kernel, stride, padding, dilation = self._geometry()
        # What the window reached to, before and after a pixel; a stride would leave gaps between those.
        reach = [apart * (taps - 1) - pad for apart, taps, pad in zip(dilation, kernel, padding)]
        if max(stride) > 1 or min(reach) < 0:
            return super().segment_transpose(d, x, weights)
        turned = _image(weights).transpose(1, 2).flip(3, 4)
        return _axes(conv_apply(_image(d), turned, None, stride, reach, dilation), x)

    def _geometry(self) -> list[list[int]]:
        """Kernel, stride, padding, dilation of two axes."""
        pairs = (self.kernel, 1), (self.stride, 1), (self.padding, 0), (self.dilation, 1)
        return [[neutral] * (2 - len(sizes)) + list(sizes) for sizes, neutral in pairs]


def _image(x: Tensor) -> Tensor:
    """``[m, n, C, *S]`` with two spatial axes."""
    return x.unsqueeze(3) if x.dim() == 4 else x


def _axes(y: Tensor, like: Tensor) -> Tensor:
    """``[m, b, O, P, Q]`` with the spatial axes of ``like``."""
    return y.squeeze(3) if like.dim() == 4 else y
