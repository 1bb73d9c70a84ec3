"""Residual networks for 32 x 32 images (He et al. 2016, "Deep residual learning").

The stem is the CIFAR one: a 3 x 3 convolution of stride one and no max pooling.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from fastreg.models.norm import check_norm, norm_layer


def conv3x3(fan_in: int, fan_out: int, stride: int, bias: bool) -> nn.Conv2d:
    """A padded 3 x 3 convolution from ``fan_in`` to ``fan_out`` channels."""
    return nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=bias)


class BasicBlock(nn.Module):
    """y = relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), with a 1 x 1 shortcut on a change of shape."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = conv3x3(fan_in, fan_out, stride, bias)
        self.norm1 = norm_layer(norm, fan_out)
        self.conv2 = conv3x3(fan_out, fan_out, 1, bias)
        self.norm2 = norm_layer(norm, fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=bias),
                norm_layer(norm, fan_out),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of :class:`BasicBlock`, global average pooling, linear classifier.

    Args:
        widths: channels of each stage; every stage after the first halves the resolution.
        blocks: residual blocks in each stage.
        num_classes: size of the output.
        norm: ``"batch"``, ``"group"`` or ``"none"``; without a norm the convolutions have biases.
        in_channels: channels of the input.

    Shapes:
        ``[B, in_channels, H, W]`` to ``[B, num_classes]``.

    Raises:
        FastregError: unknown ``norm``.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        num_classes: int,
        norm: str,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_norm("ResNet", norm)
        self.stem = conv3x3(in_channels, widths[0], 1, bias=norm == "none")
        self.stem_norm = norm_layer(norm, widths[0])
        layers: list[nn.Module] = []
        fan_in = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(fan_in, width, stride, norm))
                fan_in = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(fan_in, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        return self.head(self.layers(x).mean(dim=(2, 3)))


def resnet18(num_classes: int = 10, norm: str = "batch") -> ResNet:
    """ResNet-18 with the CIFAR stem: widths 64 to 512, two blocks a stage, 11.2 M parameters.

    Args:
        num_classes: size of the output.
        norm: ``"batch"``, ``"group"`` or ``"none"``.

    Returns:
        A module from ``[B, 3, 32, 32]`` to ``[B, num_classes]``.

    Raises:
        FastregError: unknown ``norm``.

    Example:
        >>> import torch
        >>> resnet18(norm="group")(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2), num_classes, norm)


def small_resnet(
    num_classes: int = 10, width: int = 32, norm: str = "group", in_channels: int = 3
) -> ResNet:
    """A three-stage residual network of one block a stage and widths ``width * (1, 2, 4)``.

    Args:
        num_classes: size of the output.
        width: channels of the first stage.
        norm: ``"batch"``, ``"group"`` or ``"none"``.
        in_channels: channels of the input.

    Returns:
        A module from ``[B, in_channels, H, W]`` to ``[B, num_classes]``.

    Raises:
        FastregError: unknown ``norm``.

    Example:
        >>> import torch
        >>> small_resnet(width=8)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return ResNet((width, 2 * width, 4 * width), (1, 1, 1), num_classes, norm, in_channels)
