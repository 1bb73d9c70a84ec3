"""Building a model from a specification: a tuple of layer descriptions, each a tuple of its kind and its settings.

Layers are built one by one and run once on a tiny batch, so that each knows the shape it receives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from case_models import Attention, LowRank

CLASSES = 3

Spec = tuple
Shape = tuple[int, ...]


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Twice(nn.Module):
    """One body, applied two times."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.sin(self.body(x)))


class Elementwise(nn.Module):
    """x * gate + shift, each of them broadcast over the dimensions of size one."""

    def __init__(self, gate: Shape, shift: Shape) -> None:
        super().__init__()
        self.gate, self.shift = nn.Parameter(torch.randn(gate)), nn.Parameter(torch.randn(shift))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate + self.shift


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Tokens(nn.Module):
    """Token embedding and one of three kinds of positions."""

    def __init__(self, vocabulary: int, length: int, width: int, positions: str, padding: int | None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=padding)
        self.positions = None
        if positions == "embedding":
            self.positions = nn.Embedding(length, width)
        elif positions == "parameter":
            self.positions = nn.Parameter(torch.randn(length, width))

    def forward(self, index: Tensor) -> Tensor:
        x = self.tokens(index)
        if self.positions is None:
            return x
        if isinstance(self.positions, nn.Embedding):
            return x + self.positions(torch.arange(index.shape[1]))
        return x + self.positions


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh, "silu": nn.SiLU, "softplus": nn.Softplus,
}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def broadcast(shape: Shape, bits: int) -> Shape:
    """The shape with dimension i replaced by one where bit i is set."""
    return tuple(1 if bits >> i & 1 else n for i, n in enumerate(shape))


def convolution(spec: Spec, shape: Shape) -> nn.Module:
    """A valid convolution: padded as much as its reach asks for."""
    _, groups, per_group, kernel, stride, dilation, bias = spec
    if shape[0] % groups:
        groups = 1
    padding = dilation * (kernel - 1) // 2 + (dilation * (kernel - 1)) % 2
    return CONVOLUTIONS[len(shape) - 1](
        shape[0], groups * per_group, kernel, stride=stride, padding=padding,
        dilation=dilation, groups=groups, bias=bias,
    )


def layer(spec: Spec, shape: Shape) -> nn.Module:
    """The module a description stands for, given the shape of one sample."""
    kind, *rest = spec
    space, width = len(shape) - 1, shape[-1]
    match kind:
        case "activation":
            return ACTIVATIONS[rest[0]]()
        case "linear":
            return nn.Linear(width, rest[0], bias=rest[1])
        case "low_rank":
            return LowRank(width, rest[0])
        case "layer_norm":
            return nn.LayerNorm(shape[-rest[0]:], bias=rest[1])
        case "rms_norm":
            return nn.RMSNorm(width)
        case "prelu":
            return nn.PReLU(shape[0] if rest[0] else 1)
        case "elementwise":
            return Elementwise(broadcast(shape, rest[0]), broadcast(shape, rest[1]))
        case "residual" | "twice":
            inner = [layer(part, shape) for part in rest[0]]
            body = nn.Sequential(*inner, same_shape(shape, rest[1]))
            return Residual(body) if kind == "residual" else Twice(body)
        case "attention":
            return Attention(width, 2) if rest[0] else SelfAttention(width, rest[1])
        case "convolution":
            return convolution(spec, shape)
        case "transposed":
            return TRANSPOSED[space](shape[0], rest[0], rest[1], stride=rest[2], bias=rest[3])
        case "group_norm":
            return nn.GroupNorm(2 if shape[0] % 2 == 0 else 1, shape[0])
        case "instance_norm":
            return INSTANCE_NORMS[space](shape[0], affine=True)
        case "batch_norm":
            return BATCH_NORMS[space](shape[0]).train(rest[0])
    raise ValueError(f"no layer is called {kind!r}")


def same_shape(shape: Shape, image: bool) -> nn.Module:
    """A parametrised layer that keeps the shape."""
    if image:
        return CONVOLUTIONS[len(shape) - 1](shape[0], shape[0], 3, padding=1)
    return nn.Linear(shape[-1], shape[-1])


def build(first: list[nn.Module], specs: list[Spec], example: Tensor, head: str, frozen: int) -> nn.Module:
    """Layers in a row, then the head. Bit i of `frozen` freezes parameter i; one stays trainable."""
    modules, x = list(first), example
    with torch.no_grad():
        for module in modules:
            x = module(x)
        for spec in specs:
            modules.append(layer(spec, tuple(x.shape[1:])))
            x = modules[-1](x)
    if head == "flatten":
        modules.append(nn.Flatten())
        x = x.flatten(1)
    modules.append(nn.Linear(x.shape[-1], CLASSES))
    model = nn.Sequential(*modules).double()
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters[:-1]):
        parameter.requires_grad_(parameter.requires_grad and not frozen >> i & 1)
    return model
