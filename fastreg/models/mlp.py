"""Multilayer perceptrons."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from fastreg.errors import FastregError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def mlp(sizes: Sequence[int], activation: str = "relu") -> nn.Sequential:
    """A fully connected network: x_{l+1} = act(W_l x_l + b_l), the last layer linear.

    Args:
        sizes: features of every layer, input first: ``(784, 512, 10)`` has two linear layers.
        activation: ``"relu"``, ``"gelu"``, ``"silu"`` or ``"tanh"``.

    Returns:
        A module from ``[B, ...]`` (flattened to ``[B, sizes[0]]``) to ``[B, sizes[-1]]``.

    Raises:
        FastregError: fewer than two sizes, a size below one, or an unknown activation.

    Example:
        >>> import torch
        >>> mlp((64, 32, 10))(torch.randn(4, 8, 8)).shape
        torch.Size([4, 10])
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise FastregError(f"mlp: sizes must be two or more positive integers, got {tuple(sizes)}")
    if activation not in ACTIVATIONS:
        raise FastregError(
            f"mlp: activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}"
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(fan_in, fan_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
