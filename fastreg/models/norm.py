"""The normalisation layers the convolutional models choose from."""

import math

from torch import nn

from fastreg.errors import FastregError

NORMS = ("batch", "group", "none")


def check_norm(function: str, norm: str) -> None:
    """Raise FastregError unless ``norm`` is one of :data:`NORMS`."""
    if norm not in NORMS:
        raise FastregError(f"{function}: norm must be one of {list(NORMS)}, got {norm!r}")


def norm_layer(norm: str, channels: int) -> nn.Module:
    """The normalisation of ``[B, channels, H, W]`` called ``norm``.

    Group norm uses eight groups where the channels allow it, and never one channel per group:
    that would be an instance norm, which removes the mean the layers after it rely on.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        return nn.GroupNorm(math.gcd(channels // 2, 8), channels)
    return nn.Identity()
