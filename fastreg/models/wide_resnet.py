"""Wide residual networks for 32 x 32 images (Zagoruyko and Komodakis 2016)."""

import torch
import torch.nn.functional as F
from torch import nn

from fastreg.errors import FastregError
from fastreg.models.norm import check_norm, norm_layer
from fastreg.models.resnet import conv3x3


class PreActivationBlock(nn.Module):
    """y = shortcut + conv(relu(norm(conv(relu(norm(x)))))); a projecting shortcut reads relu(norm(x))."""

    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.norm1 = norm_layer(norm, fan_in)
        self.conv1 = conv3x3(fan_in, fan_out, stride, bias)
        self.norm2 = norm_layer(norm, fan_out)
        self.conv2 = conv3x3(fan_out, fan_out, 1, bias)
        self.project: nn.Conv2d | None = None
        if stride != 1 or fan_in != fan_out:
            self.project = nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(active)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(active))))


class WideResNet(nn.Module):
    """Three stages of :class:`PreActivationBlock` of widths 16, 32, 64 times ``width``.

    Shapes:
        ``[B, 3, 32, 32]`` to ``[B, num_classes]``.
    """

    def __init__(self, depth: int, width: int, num_classes: int, norm: str) -> None:
        super().__init__()
        self.stem = conv3x3(3, 16, 1, bias=norm == "none")
        layers: list[nn.Module] = []
        fan_in = 16
        for stage in range(3):
            fan_out = 16 * width * 2**stage
            for block in range((depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(PreActivationBlock(fan_in, fan_out, stride, norm))
                fan_in = fan_out
        self.layers = nn.Sequential(*layers, norm_layer(norm, fan_in))
        self.head = nn.Linear(fan_in, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.layers(self.stem(x)))
        return self.head(x.mean(dim=(2, 3)))


def wide_resnet(
    depth: int = 16, width: int = 4, num_classes: int = 10, norm: str = "batch"
) -> WideResNet:
    """WRN-depth-width: ``(depth - 4) / 6`` blocks a stage, widths ``width * (16, 32, 64)``.

    Args:
        depth: 6 n + 4 layers: 10, 16, 22, 28, 40.
        width: widening factor, one or more.
        num_classes: size of the output.
        norm: ``"batch"``, ``"group"`` or ``"none"``.

    Returns:
        A module from ``[B, 3, 32, 32]`` to ``[B, num_classes]``.

    Raises:
        FastregError: a depth that is not 6 n + 4, a width below one, or an unknown ``norm``.

    Example:
        >>> import torch
        >>> wide_resnet(10, 1)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    check_norm("wide_resnet", norm)
    if depth < 10 or (depth - 4) % 6:
        raise FastregError(f"wide_resnet: depth must be 6 n + 4 with n >= 1, got {depth}")
    if width < 1:
        raise FastregError(f"wide_resnet: width must be at least 1, got {width}")
    return WideResNet(depth, width, num_classes, norm)
