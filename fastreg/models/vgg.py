"""VGG-11 for 32 x 32 images (Simonyan and Zisserman 2015, configuration A)."""

from torch import nn

# Output channels of the convolutions, in groups that each end in a 2 x 2 max pooling.
VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))


def vgg11(num_classes: int = 10) -> nn.Sequential:
    """VGG-11 without batch norm and without dropout: eight convolutions and one linear layer.

    Five poolings take 32 x 32 pixels to one, so the 4096-wide hidden layers of the ImageNet
    version have nothing to read and are left out, as is usual on CIFAR (9.2 M parameters).
    Weights start at the scale of He et al. (2015): with no norm layer, torch's default would
    shrink the signal by sqrt(1/6) = 0.41 a layer.

    Args:
        num_classes: size of the output.

    Returns:
        A module from ``[B, 3, 32, 32]`` to ``[B, num_classes]``.

    Example:
        >>> import torch
        >>> vgg11()(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = []
    fan_in = 3
    for group in VGG11:
        for fan_out in group:
            conv = nn.Conv2d(fan_in, fan_out, 3, padding=1)
            assert conv.bias is not None
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
            layers += [conv, nn.ReLU()]
            fan_in = fan_out
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(fan_in, num_classes))
