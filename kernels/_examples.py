"""Example inputs shared by the ops: random tensors and the segmentations every op must handle."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Equal; ragged tail; one row each; one segment; arbitrary with empty ones; no rows at all.
OFFSETS: tuple[tuple[int, ...], ...] = (
    (0, 4, 8, 12),
    (0, 5, 10, 13),
    (0, 1, 2, 3, 4, 5),
    (0, 17),
    (0, 0, 7, 7, 8, 21, 21),
    (0, 0, 0),
)


def normal(dtype: torch.dtype, device: str) -> Callable[..., Tensor]:
    """A function ``(*shape) -> Tensor`` of standard normal numbers from one fixed stream."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        sample = torch.randn(shape, generator=generator, dtype=torch.float64)
        return sample.to(device=device, dtype=dtype)

    return draw
