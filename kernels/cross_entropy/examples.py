"""Example inputs of the cross-entropy ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreg.kernels._checks import accumulator
from fastreg.kernels._examples import normal
from fastreg.kernels.cross_entropy import reference

# One class, few, odd, one past a block of short rows, one past the longest block; no rows.
_SHAPES = ((3, 1), (70, 5), (13, 131), (5, 1025), (2, 4097), (0, 7))
# Either word of each has bits set.
_SEED, _DRAW = 0x1234567890ABCDEF, torch.tensor(0x500000003)


def examples_forward(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """Every shape with given labels, some of them ignored, and with drawn ones."""
    return [
        (z, labels, _SEED, _DRAW) for z, given, _ in _cases(dtype, device) for labels in (given, None)
    ]


def examples_gradient(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The forward's examples with a weight for each row."""
    return [
        (z, labels, scale, _SEED, _DRAW) for z, given, scale in _cases(dtype, device) for labels in (given, None)
    ]


def examples_backward(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The forward's examples with given labels."""
    return [(z, _lse(z), labels, scale) for z, labels, scale in _cases(dtype, device)]


def examples_double(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The backward's examples with a direction."""
    draw = normal(dtype, device)
    return [(*args, draw(*args[0].shape)) for args in examples_backward(dtype, device)]


def _cases(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    draw, wide = normal(dtype, device), normal(accumulator(dtype), device)
    return [(3 * draw(*shape) + 1, _labels(*shape, device), wide(shape[0])) for shape in _SHAPES]


def _labels(rows: int, classes: int, device: str) -> Tensor:
    """First and last class among them; every fourth row is ignored."""
    row = torch.arange(rows, device=device)
    return torch.where(row % 4 == 2, reference.IGNORED, (classes - 1) * (row + 1) % classes)


def _lse(z: Tensor) -> Tensor:
    return z.to(accumulator(z.dtype)).logsumexp(1)
